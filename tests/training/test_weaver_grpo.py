"""Weaver GRPO with a real Trainer on a tiny model."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from launched import launch
from memgen.data import PromptBatch, PromptIndex
from memgen.generation.rollout import EpisodeSettings
from memgen.generation.sampling import GenerationSettings
from memgen.objectives.policy_settings import PolicySettings
from memgen.training import policy_stage
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from rl_runs import Countdown, Vowels, make_data, make_grpo
from sft_runs import assert_gradients_close, make_trainer, save_tiny
from tolerance import assert_close
from training_records import Recorded, SaveAt

ROLLOUT = GenerationSettings(max_new_tokens=10, temperature=1.0, group_size=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), max_position_embeddings=1024)


def run(base, tmp_path, stage=None, data=None, **trainer):
    recorded = Recorded()
    stage = stage or make_grpo(base)
    trainer = make_trainer(tmp_path, callbacks=[recorded, *trainer.pop("callbacks", [])], **trainer)
    trainer.fit(stage, data or make_data(base))
    return stage, recorded


def test_the_first_update_has_a_ratio_of_one_and_the_rollouts_logprobs(base, tmp_path):
    _, recorded = run(base, tmp_path)
    metrics = recorded.metrics[0]
    assert metrics["train/ratio_min"] == metrics["train/ratio_max"] == 1.0
    assert metrics["train/clip_low"] == metrics["train/clip_high"] == 0.0
    assert 0.0 < metrics["rollout/logprob_drift_max"] < 1e-4
    assert abs(metrics["train/loss"]) < 1e-6
    assert metrics["train/gradient_norm"] > 1e-6


def test_only_the_weaver_moves(base, tmp_path):
    torch.manual_seed(0)
    stage = make_grpo(base, trigger="tokens")
    before = {}

    class Before(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({n: p.clone() for n, p in pl_module.memgen.named_parameters()})

    run(base, tmp_path, stage, callbacks=[Before()], max_steps=2)
    weaver = {id(p) for p in stage.memgen.weaver.own_parameters().values()}
    for name, parameter in stage.memgen.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in weaver), name


@pytest.mark.parametrize(
    "loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "reinforce", "reinforce_pp"]
)
@pytest.mark.parametrize("environment", [Vowels(), Countdown((1, 2, 3))], ids=["one turn", "several turns"])
def test_micro_batches_give_the_gradient_of_one_batch(base, tmp_path, loss, environment):
    policy = PolicySettings(loss=loss, kl=0.01 if loss == "grpo" else 0.0)
    results = []
    for accumulate in (1, 4):
        stage = make_grpo(base, policy=policy)
        data = make_data(base, environment)
        _, recorded = run(
            base, tmp_path, stage, data, accumulate_grad_batches=accumulate, max_steps=1, max_epochs=1
        )
        results.append(recorded)
    assert len(results[1].losses) == 4
    assert_gradients_close("gradient", results[1].steps[0], results[0].steps[0])


def test_a_rollout_serves_all_its_iterations_and_minibatches(base, tmp_path):
    stage = make_grpo(base, update=UpdateSettings(iterations=2, minibatches=2))
    _, recorded = run(base, tmp_path, stage, accumulate_grad_batches=2, max_steps=8)
    assert len(recorded.steps) == 8
    places = [part.totals for part in recorded.micro_batches]
    assert len(places) == 16
    # Two rollouts of eight training steps; each part is used twice.
    for first in (0, 8):
        for part in range(4):
            assert (
                recorded.micro_batches[first + part].trajectories
                is recorded.micro_batches[first + 4 + part].trajectories
            )
    assert recorded.micro_batches[0].trajectories is not recorded.micro_batches[8].trajectories
    ratios = [metrics["train/ratio_max"] for metrics in recorded.metrics]
    assert max(ratios[4:8]) > 1.001
    # The first minibatch of a rollout is updated at the rollout's own weights.
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)


def test_the_kl_divergence_from_the_weaver_training_began_with_is_zero_at_first(base, tmp_path):
    stage = make_grpo(base, policy=PolicySettings(kl=0.1))
    _, recorded = run(base, tmp_path, stage, max_steps=3)
    divergences = [metrics["train/kl"] for metrics in recorded.metrics]
    assert divergences[0] == pytest.approx(0.0, abs=1e-9)
    assert divergences[2] > 1e-5


def test_the_kl_divergence_from_the_rollouts_weights_stays_zero_at_one_update(base, tmp_path):
    stage = make_grpo(base, policy=PolicySettings(kl=0.1), update=UpdateSettings(reference="rollout"))
    _, recorded = run(base, tmp_path, stage, max_steps=3)
    assert [metrics["train/kl"] for metrics in recorded.metrics] == pytest.approx([0.0] * 3, abs=1e-9)


def test_entropy_is_that_of_the_distribution_the_tokens_were_drawn_from(base, tmp_path):
    stage = make_grpo(base, policy=PolicySettings(entropy_bonus=0.01, top_entropy=0.5))
    _, recorded = run(base, tmp_path, stage)
    assert 0.0 < recorded.metrics[0]["train/entropy"] < torch.log(torch.tensor(260.0))
    assert recorded.metrics[0]["train/focused"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("environment", [Vowels(), Countdown((1, 2, 3))], ids=["one turn", "several turns"])
def test_the_tokens_in_focus_are_those_of_the_whole_step_however_it_is_cut(base, tmp_path, environment):
    results = []
    for accumulate in (1, 4):
        stage = make_grpo(base, policy=PolicySettings(loss="dapo", top_entropy=0.3))
        data = make_data(base, environment)
        _, recorded = run(
            base, tmp_path, stage, data, accumulate_grad_batches=accumulate, max_steps=1, max_epochs=1
        )
        results.append(recorded)
    whole, cut = results
    (part,) = whole.micro_batches
    tokens = part.totals.tokens
    assert int(part.focus.sum()) == round(0.3 * tokens)
    assert sum(int(p.focus.sum()) for p in cut.micro_batches) == round(0.3 * tokens)
    # Every micro-batch's own share would be another.
    shares = [int(p.focus.sum()) / sum(t.tokens for t in p.trajectories) for p in cut.micro_batches]
    assert max(shares) - min(shares) > 0.05
    assert_gradients_close("gradient", cut.steps[0], whole.steps[0])


def test_every_minibatch_has_a_focus_of_its_own_and_keeps_it_in_every_pass(base, tmp_path):
    stage = make_grpo(
        base, policy=PolicySettings(top_entropy=0.4), update=UpdateSettings(iterations=2, minibatches=2)
    )
    _, recorded = run(base, tmp_path, stage, max_steps=4)
    for part in recorded.micro_batches[:2]:
        assert int(part.focus.sum()) == round(0.4 * part.totals.tokens)
    for first, second in zip(recorded.micro_batches[:2], recorded.micro_batches[2:], strict=True):
        assert first.focus is second.focus


def test_episodes_that_were_left_out_are_in_no_focus(base, tmp_path):
    stage = make_grpo(base, policy=PolicySettings(mask_truncated=True, top_entropy=0.5))
    _, recorded = run(base, tmp_path, stage, make_data(base, Countdown((2, 2), fails={0: 1})))
    (part,) = recorded.micro_batches
    for trajectory, line in zip(part.trajectories, part.focus, strict=True):
        if trajectory.fault is not None or trajectory.truncated:
            assert not line.any()
    every = Countdown((2, 2), fails={0: 1, 1: 1})
    stage = make_grpo(base, policy=PolicySettings(top_entropy=0.5))
    assert run(base, tmp_path, stage, make_data(base, every))[1].losses == [0.0]


def test_two_ranks_focus_on_the_tokens_that_one_does(base, tmp_path):
    worker = Path(__file__).with_name("focus_ranks_worker.py")
    one, two = (launch(worker, ranks, base, tmp_path / str(ranks), seconds=300) for ranks in (1, 2))
    # Ranks take turns with the items, so an item's episodes are found by its name.
    together = {name: line for rank in two for name, line in rank["focus"].items()}
    assert together == one[0]["focus"]
    # Each rank's own share would be another.
    shares = [rank["focused"] / rank["tokens"] for rank in two]
    assert abs(shares[0] - shares[1]) > 0.01
    for rank in two:
        assert_gradients_close("gradient", rank["gradient"], one[0]["gradient"])


def test_episodes_that_the_environment_failed_teach_nothing(base, tmp_path, caplog):
    environment = Countdown((2, 2), fails={0: 1})
    _, recorded = run(base, tmp_path, make_grpo(base), make_data(base, environment))
    (part,) = recorded.micro_batches
    failed = [t.fault is not None for t in part.trajectories]
    assert sum(failed) == 4
    assert part.advantages[torch.tensor(failed)].tolist() == [0.0] * 4
    assert part.totals.episodes == 4
    assert "4 episodes had an environment error" in caplog.text
    every = Countdown((2, 2), fails={0: 1, 1: 1})
    _, recorded = run(base, tmp_path, make_grpo(base), make_data(base, every))
    assert recorded.losses == [0.0]
    assert all(not grad.any() for grad in recorded.steps[0].values())


def test_cut_episodes_can_be_left_out_of_the_loss(base, tmp_path):
    _, recorded = run(base, tmp_path, make_grpo(base, policy=PolicySettings(mask_truncated=True)))
    (part,) = recorded.micro_batches
    kept = [t.tokens for t in part.trajectories if not t.truncated]
    assert part.totals.tokens == sum(kept)
    assert part.totals.episodes == len(kept)


def test_groups_without_spread_are_replaced(base, tmp_path):
    class Rare(Vowels):
        """Only one item in four can be rewarded at all."""

        def reward(self, example, answer):
            reward = super().reward(example, answer)
            return reward if int(example.id.rpartition("-")[2]) % 4 == 0 else type(reward)(0.0)

    shares = []
    for rounds in (0, 6):
        stage = make_grpo(base, update=UpdateSettings(dynamic_sampling=rounds))
        _, recorded = run(base, tmp_path, stage, make_data(base, Rare(16), batch_size=4))
        assert len(recorded.micro_batches[0].trajectories) == 16
        shares.append(recorded.metrics[0]["rollout/dead_groups"])
    assert shares[1] < shares[0]


def test_dead_groups_and_truncation_are_told_once(base, tmp_path, caplog):
    class Hopeless(Vowels):
        def reward(self, example, answer):
            return type(super().reward(example, answer))(0.0)

    with caplog.at_level(logging.WARNING):
        run(base, tmp_path, make_grpo(base), make_data(base, Hopeless()), max_steps=3)
    assert caplog.text.count("every group of this rollout has equal rewards") == 1
    assert caplog.text.count("were truncated at their limit") == 1
    assert caplog.text.count("the gradient is exactly 0") == 1


def test_a_run_says_what_a_person_needs_to_see(base, tmp_path):
    stage = make_grpo(base, policy=PolicySettings(kl=0.01))
    _, recorded = run(base, tmp_path, stage, max_steps=2)
    every = recorded.metrics[1]
    assert {
        *("rollout/reward", "rollout/reward_std", "rollout/reward_vowels", "rollout/reward_vowels_std"),
        *("rollout/exact_match", "rollout/tokens", "rollout/truncated", "rollout/dead_groups"),
        *("train/loss", "train/gradient_norm", "train/entropy", "train/kl", "train/k1", "train/k3"),
        *("train/clip_low", "train/clip_high", "train/ratio_min", "train/ratio_max"),
        *("trigger/invocation_rate_prompt", "trigger/invocation_rate_inference", "trigger/invocations"),
        *("latents/norm", "latents/norm_over_embedding", "latents/slot_cosine"),
        *("rollout/logprob_drift", "rollout/logprob_drift_max"),
        *("perf/rollout_tokens_per_second", "perf/update_tokens_per_second", "perf/process_memory_bytes"),
    } <= set(every)
    (part,) = recorded.micro_batches[1:]
    rewards = torch.tensor([t.parts["vowels"] for t in part.trajectories])
    assert every["rollout/reward_vowels_std"] == pytest.approx(float(rewards.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 3])
def test_what_costs_time_is_measured_at_the_steps_whose_metrics_are_kept(base, tmp_path, iterations):
    class Kept(Logger):
        name, version, kept = "kept", 0, {}

        def log_hyperparams(self, *_, **__):
            pass

        def log_metrics(self, metrics, step=None):
            self.kept[step] = dict(metrics)

    logger = Kept()
    stage = make_grpo(base, update=UpdateSettings(iterations=iterations))
    _, recorded = run(base, tmp_path, stage, logger=logger, max_steps=10, log_every_n_steps=5)
    assert sorted(logger.kept) == [4, 9]
    entropies = [logger.kept[step]["train/entropy"] for step in (4, 9)]
    assert entropies[0] != entropies[1]
    # Nothing is left from an earlier step: each is of the step that it is filed under.
    for step, entropy in zip((4, 9), entropies, strict=True):
        assert (
            entropy
            == recorded.metrics[step]["train/entropy"]
            != recorded.metrics[step - 1].get("train/entropy")
        )
        assert logger.kept[step]["latents/norm"] > 0


def test_the_time_of_an_update_has_its_backward_pass(base, tmp_path):
    stage = make_grpo(base, rollout=ROLLOUT)

    def slow(loss):
        time.sleep(0.3)

    stage.on_before_backward = slow
    _, recorded = run(base, tmp_path, stage, max_steps=2)
    tokens = sum(t.tokens for t in recorded.micro_batches[0].trajectories)
    assert 0 < recorded.metrics[1]["perf/update_tokens_per_second"] < tokens / 0.3


def test_pages_of_rollouts_show_woven_places_and_rewards(base, tmp_path, monkeypatch):
    pages = {}
    monkeypatch.setattr(
        policy_stage, "log_samples", lambda loggers, samples, name: pages.update({name: samples})
    )
    stage = make_grpo(base, samples_every=2)
    _, recorded = run(base, tmp_path, stage, max_steps=5)
    assert list(pages) == ["rollout_step_000000", "rollout_step_000002", "rollout_step_000004"]
    for name, samples in pages.items():
        part = recorded.micro_batches[int(name[-6:])]
        assert len(samples) == len(part.trajectories)
        for sample, trajectory in zip(samples, part.trajectories, strict=True):
            assert f"reward {trajectory.reward:g} (vowels" in sample.title
            marks = [segment for segment in sample.segments if segment.is_insertion]
            assert len(marks) == len(trajectory.turns[0].insertions) > 0
    assert run(base, tmp_path, make_grpo(base, samples_every=0))
    assert len(pages) == 3


def test_a_loss_of_zero_explains_itself(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(base, tmp_path, max_steps=2)
    assert caplog.text.count("train/loss is about 0, as it must be at the first update") == 1


def test_rollouts_run_without_dropout_and_so_do_updates(base, tmp_path):
    stage, recorded = run(base, tmp_path)
    assert not stage.memgen.training
    assert recorded.metrics[0]["rollout/logprob_drift_max"] < 1e-4


def test_checkpointing_does_not_change_the_gradient(base, tmp_path):
    plain = run(base, tmp_path)[1].steps[0]
    recomputed = run(base, tmp_path, make_grpo(base, checkpointing=True))[1].steps[0]
    assert_gradients_close("gradient", recomputed, plain)


def test_learning_raises_the_reward(base, tmp_path):
    stage = make_grpo(
        base,
        optimizer=OptimizerSettings(lr=5e-2, warmup_ratio=0.0, final_lr_ratio=1.0),
        rollout=GenerationSettings(max_new_tokens=10, temperature=1.0, group_size=16),
    )
    data = make_data(base, Vowels(8), batch_size=8)
    _, recorded = run(base, tmp_path, stage, data, max_steps=22)
    rewards = [metrics["rollout/reward"] for metrics in recorded.metrics]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


def test_validation_and_test_play_episodes(base, tmp_path):
    data = make_data(base, Countdown((1, 2, 3)))
    stage = make_grpo(base, episodes=EpisodeSettings(max_turns=2))
    trainer = make_trainer(tmp_path)
    (results,) = trainer.test(stage, data, verbose=False)
    assert results["test/turns"] == pytest.approx(5 / 3)
    assert results["test/reward_left"] == pytest.approx(1 / 3)
    predictions = [item for batch in trainer.predict(stage, data) for item in batch]
    assert [len(item["answer"]) for item in predictions] == [1, 2, 2]
    assert [item["finished"] for item in predictions][2] is False


def interrupted(base):
    """A stage that saves itself in the middle of a rollout's updates."""
    return make_grpo(base, update=UpdateSettings(iterations=2, minibatches=2), policy=PolicySettings(kl=0.05))


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("whole"), interrupted(base), max_steps=9)


@pytest.mark.parametrize("steps", [1, 3, 5], ids=["in a pass", "between passes", "in the second rollout"])
def test_an_interrupted_run_gives_the_uninterrupted_runs_numbers(base, tmp_path, uninterrupted, steps):
    whole, expected = uninterrupted
    saver = SaveAt(steps, tmp_path / "a.ckpt")
    make_trainer(tmp_path / "first", max_steps=9, callbacks=[saver]).fit(interrupted(base), make_data(base))
    stage = interrupted(base)
    recorded = Recorded()
    trainer = make_trainer(tmp_path / "second", max_steps=9, callbacks=[recorded])
    trainer.fit(stage, make_data(base), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert recorded.losses == expected.losses[steps:]
    for name, parameter in stage.trained().items():
        assert torch.equal(parameter, whole.trained()[name]), name


def test_settings_that_cannot_work_say_what_to_change(base, tmp_path):
    with pytest.raises(ValueError, match=r"rollout.temperature is 0, so all answers to a prompt are equal"):
        make_grpo(base, rollout=GenerationSettings(group_size=4))
    data = make_data(base)
    data.learn_from = "answers"
    with pytest.raises(ValueError, match=r"WeaverGRPO learns from rollouts, but data.learn_from is answers"):
        run(base, tmp_path, data=data)
    with pytest.raises(ValueError, match="8 episodes per rank and rollout cannot be shared out evenly"):
        run(base, tmp_path, make_grpo(base, update=UpdateSettings(minibatches=3)))


def test_a_step_of_a_rollout_that_is_not_there_is_refused(base, tmp_path):
    stage = make_grpo(base)
    make_trainer(tmp_path).fit(stage, make_data(base))
    stage.buffer = None
    with pytest.raises(RuntimeError, match="comes before its first"):
        stage.training_step(PromptBatch([], PromptIndex((0,), 0, 0, part=2)), 2)


def test_a_reward_that_counts_is_the_environments(base, tmp_path):
    _, recorded = run(base, tmp_path)
    (part,) = recorded.micro_batches
    rewards = torch.tensor([t.reward for t in part.trajectories])
    assert_close("reward", torch.tensor(recorded.metrics[0]["rollout/reward"]), rewards.mean())
    assert recorded.metrics[0]["rollout/reward_vowels"] == recorded.metrics[0]["rollout/reward"]
