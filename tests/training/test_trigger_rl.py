"""Trigger RL with a real Trainer on a tiny model."""

from __future__ import annotations

import logging

import pytest
import torch

from memgen.environments.base import Reward
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig
from memgen.objectives.policy_settings import PolicySettings
from memgen.objectives.trigger import TriggerSettings
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from memgen.training.trigger_rl import TriggerRL
from rl_runs import Countdown, Vowels, make_data, make_trigger, memgen_config
from sft_runs import assert_gradients_close, make_trainer, save_tiny
from tolerance import assert_close
from training_records import Recorded, SaveAt

KINDS = ("tokens", "hidden_states")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), max_position_embeddings=1024)


def run(base, tmp_path, stage=None, data=None, **trainer):
    recorded = Recorded()
    stage = stage or make_trigger(base)
    trainer = make_trainer(tmp_path, callbacks=[recorded], **trainer)
    trainer.fit(stage, data or make_data(base))
    return stage, recorded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("environment", [Vowels(), Countdown((1, 2, 3))], ids=["one turn", "several turns"])
@pytest.mark.parametrize("keep", [False, True], ids=["latents of a turn", "latents of all turns"])
def test_the_first_update_has_a_ratio_of_one_and_the_rollouts_probabilities(
    base, tmp_path, kind, environment, keep
):
    stage = make_trigger(base, trigger=kind, boundaries={"keep_turn_latents": keep})
    _, recorded = run(base, tmp_path, stage, make_data(base, environment))
    metrics = recorded.metrics[0]
    assert metrics["train/ratio_min"] == metrics["train/ratio_max"] == 1.0
    assert metrics["rollout/logprob_drift_max"] < 1e-4
    assert 0.0 < metrics["trigger/invocation_rate"] < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_trigger_moves(base, tmp_path, kind):
    stage = make_trigger(base, trigger=kind)
    trainer = make_trainer(tmp_path, max_steps=2)
    before = {}
    stage.on_train_start = lambda: before.update({n: p.clone() for n, p in stage.memgen.named_parameters()})
    trainer.fit(stage, make_data(base))
    trigger = {id(p) for p in stage.memgen.trigger.own_parameters().values()}
    for name, parameter in stage.memgen.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in trigger), name


def test_every_boundary_that_was_offered_is_a_decision_the_prompts_end_included(base, tmp_path):
    _, recorded = run(base, tmp_path, data=make_data(base, Countdown((1, 2, 3))))
    (part,) = recorded.micro_batches
    assert part.totals.tokens == sum(t.offered for t in part.trajectories)
    for trajectory in part.trajectories:
        for turn in trajectory.turns:
            assert turn.decisions[0] >= 0


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_the_advantage_is_that_of_the_penalised_reward(base, tmp_path, scope):
    stage = make_trigger(base, objective=TriggerSettings(penalty=0.5, scope=scope))
    _, recorded = run(base, tmp_path, stage)
    (part,) = recorded.micro_batches
    shaped = []
    for first in (0, 4):
        everyone = part.trajectories
        scoped = everyone[first : first + 4] if scope == "group" else everyone
        ordered = sorted(t.reward for t in scoped)
        median = (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
        rates = [t.invocations / t.offered for t in scoped if t.reward >= median and t.offered]
        p_bar = sum(rates) / len(rates)
        rewards = [t.reward - 0.5 * (1 - p_bar) * t.invocations for t in everyone[first : first + 4]]
        shaped += [reward - sum(rewards) / 4 for reward in rewards]
    assert_close("advantages", part.advantages, torch.tensor(shaped))
    assert recorded.metrics[0]["trigger/penalty"] > 0


def test_lambda_zero_is_plain_grpo(base, tmp_path):
    stage = make_trigger(base, objective=TriggerSettings(penalty=0.0))
    _, recorded = run(base, tmp_path, stage)
    (part,) = recorded.micro_batches
    rewards = torch.tensor([t.reward for t in part.trajectories]).view(2, 4)
    assert_close("advantages", part.advantages.view(2, 4), rewards - rewards.mean(dim=1, keepdim=True))
    assert recorded.metrics[0]["trigger/penalty"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_gradient_of_one_batch(base, tmp_path, kind):
    results = []
    for accumulate in (1, 4):
        stage = make_trigger(base, trigger=kind, policy=PolicySettings(kl=0.05, entropy_bonus=0.01))
        _, recorded = run(base, tmp_path, stage, accumulate_grad_batches=accumulate)
        results.append(recorded)
    assert_gradients_close("gradient", results[1].steps[0], results[0].steps[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_from_the_start_grows_from_zero(base, tmp_path, kind):
    stage = make_trigger(
        base, trigger=kind, policy=PolicySettings(kl=0.1), update=UpdateSettings(iterations=2)
    )
    _, recorded = run(base, tmp_path, stage, max_steps=3)
    divergences = [metrics["train/kl"] for metrics in recorded.metrics]
    assert divergences[0] == pytest.approx(0.0, abs=1e-9)
    assert divergences[2] > 1e-6


def test_equal_rewards_teach_while_invocations_cost(base, tmp_path, caplog):
    class Silence(Vowels):
        def reward(self, example, answer):
            return Reward(1.0)

    for penalty, said in ((0.2, 0), (0.0, 1)):
        caplog.clear()
        stage = make_trigger(base, objective=TriggerSettings(penalty=penalty))
        with caplog.at_level(logging.WARNING):
            _, recorded = run(base, tmp_path, stage, make_data(base, Silence()))
        assert recorded.metrics[0]["rollout/dead_groups"] == (0.0 if penalty else 1.0)
        assert caplog.text.count("every group of this rollout has equal rewards") == said
        assert caplog.text.count("all answers are correct") == said


def test_an_untrained_weaver_is_refused_unless_told_to(base, tmp_path):
    def fresh(**settings):
        return TriggerRL(
            memgen_config(base, "tokens"),
            rollout=GenerationSettings(max_new_tokens=4, group_size=2, sample_decisions=True),
            **settings,
        )

    with pytest.raises(ValueError, match=r"the weaver is untrained \(no checkpoint was given\)"):
        make_trainer(tmp_path).fit(fresh(), make_data(base))
    make_trainer(tmp_path).fit(fresh(allow_untrained_weaver=True), make_data(base))


def test_a_trigger_that_cannot_learn_is_refused(base):
    with pytest.raises(ValueError, match=r"trigger.kind 'always' has nothing to learn"):
        TriggerRL(MemGenConfig())
    with pytest.raises(ValueError, match=r"rollout.sample_decisions is false"):
        TriggerRL(memgen_config(base, "tokens"), rollout=GenerationSettings(group_size=4))
    with pytest.raises(ValueError, match=r"policy.overlong_length punishes long answers"):
        TriggerRL(memgen_config(base, "tokens"), policy=PolicySettings(overlong_length=9, overlong_buffer=3))


def test_a_constant_trigger_is_told_once(base, tmp_path, caplog):
    stage = make_trigger(base, trigger="hidden_states", optimizer=OptimizerSettings(lr=1e-9))

    def convince():
        with torch.no_grad():
            stage.memgen.trigger.output_layer.bias.copy_(torch.tensor([0.0, 60.0]))

    stage.on_train_start = convince
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, max_steps=3).fit(stage, make_data(base))
    assert caplog.text.count("the trigger invokes at every boundary of this rollout") == 1


def test_invocations_are_told_of_each_kind_of_item(base, tmp_path):
    class Mixture(Vowels):
        """Items of an even number are of one kind, the others of another."""

        def reward(self, example, answer):
            reward = super().reward(example, answer)
            kind = "even" if int(example.id.rpartition("-")[2]) % 2 == 0 else "odd"
            return Reward(reward.total, {f"{kind}/vowels": reward.total})

    stage = make_trigger(base)
    _, recorded = run(base, tmp_path, stage, make_data(base, Mixture(2), batch_size=2))
    (part,) = recorded.micro_batches
    for kind, rest in (("even", 0), ("odd", 1)):
        episodes = [t for t in part.trajectories if int(t.example.rpartition("-")[2]) % 2 == rest]
        invocations = sum(t.invocations for t in episodes) / len(episodes)
        assert recorded.metrics[0][f"trigger/invocations_{kind}"] == pytest.approx(invocations)
        rewards = sum(t.reward for t in episodes) / len(episodes)
        assert recorded.metrics[0][f"rollout/reward_{kind}/vowels"] == pytest.approx(rewards)
    (results,) = make_trainer(tmp_path).test(stage, make_data(base, Mixture(2)), verbose=False)
    # Of the three test items two are even.
    even, odd = (results[f"test/reward_{kind}/vowels"] for kind in ("even", "odd"))
    assert results["test/reward"] == pytest.approx((2 * even + odd) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_raises_the_reward(base, tmp_path, kind):
    class Silence(Vowels):
        """Nothing is gained by memory: what is left of the reward is the penalty."""

        def reward(self, example, answer):
            return Reward(1.0)

    stage = make_trigger(
        base,
        trigger=kind,
        objective=TriggerSettings(penalty=0.2),
        optimizer=OptimizerSettings(lr=3e-2, warmup_ratio=0.0),
    )
    _, recorded = run(base, tmp_path, stage, make_data(base, Silence(8), batch_size=4), max_steps=25)
    rates = [metrics["trigger/invocation_rate"] for metrics in recorded.metrics]
    assert sum(rates[-3:]) / 3 < 0.5 * sum(rates[:3]) / 3


def test_an_interrupted_run_gives_the_uninterrupted_runs_numbers(base, tmp_path):
    def fresh():
        return make_trigger(base, update=UpdateSettings(iterations=2), policy=PolicySettings(kl=0.05))

    whole, expected = run(base, tmp_path / "whole", fresh(), max_steps=5)
    saver = SaveAt(3, tmp_path / "a.ckpt")
    make_trainer(tmp_path / "first", max_steps=9, callbacks=[saver]).fit(fresh(), make_data(base))
    stage, recorded = fresh(), Recorded()
    trainer = make_trainer(tmp_path / "second", max_steps=5, callbacks=[recorded])
    trainer.fit(stage, make_data(base), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert recorded.losses == expected.losses[3:]
    for name, parameter in stage.trained().items():
        assert torch.equal(parameter, whole.trained()[name]), name
