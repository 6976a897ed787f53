"""Numbers that are not finite: rewards, losses, gradients, weights, and the metric that chooses the best checkpoint."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from memgen.environments.base import Reward
from memgen.generation.rollout import EpisodeSettings
from memgen.objectives.trigger import TriggerSettings
from memgen.training.callbacks import AdapterCheckpoint
from memgen.training.finite import SKIPS, NotFiniteError
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from rl_runs import Countdown, Vowels, make_data, make_grpo, make_trigger
from sft_runs import make_data as answers
from sft_runs import make_stage, make_trainer, save_tiny
from training_records import Recorded


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


class Broken(Vowels):
    """Gives some items a reward that is none."""

    name = "broken"

    def __init__(self, value, every=4, items=4):
        super().__init__(items)
        self.value, self.every = value, every

    def reward(self, example, answer):
        good = super().reward(example, answer)
        if int(example.id.rpartition("-")[2]) % self.every:
            return good
        return self.value if self.value is None else Reward(self.value)


NONE_OF_THEM = [
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    "1.0",
    None,
    10**400,
    np.float32("nan"),
    torch.tensor(math.nan),
]


@pytest.mark.parametrize("value", NONE_OF_THEM, ids=lambda value: str(value)[:12])
def test_a_reward_that_is_no_number_leaves_its_episode_out(base, tmp_path, caplog, value):
    recorded = Recorded()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[recorded])
    with caplog.at_level(logging.WARNING):
        trainer.fit(make_grpo(base), make_data(base, Broken(value)))
    (part,) = recorded.micro_batches
    faults = [t.fault for t in part.trajectories if t.fault is not None]
    assert 0 < len(faults) < len(part.trajectories)
    assert all("broken gave item train-" in fault for fault in faults)
    assert all(bool(grad.isfinite().all()) for grad in recorded.steps[0].values())
    assert "rewards are no finite numbers" in caplog.text


def test_a_component_and_an_episode_of_several_turns_are_checked_too(base, tmp_path):
    class Bad(Countdown):
        def episode(self):
            episode = super().episode()
            episode.reward = lambda: Reward(1.0, {"left": math.nan})
            return episode

    with pytest.raises(ValueError, match=r"countdown gave item train-\d a component left of nan"):
        make_trainer(tmp_path).fit(
            make_grpo(base, episodes=EpisodeSettings(bad_rewards="stop")), make_data(base, Bad())
        )


@pytest.mark.parametrize("kind", [int, bool, np.float32, np.int64, torch.tensor])
def test_numbers_of_other_kinds_are_taken(base, tmp_path, kind):
    recorded = Recorded()
    make_trainer(tmp_path, max_steps=1, callbacks=[recorded]).fit(
        make_grpo(base), make_data(base, Broken(kind(1)))
    )
    assert all(type(t.reward) is float and t.fault is None for t in recorded.micro_batches[0].trajectories)


class Spoil(Callback):
    """Makes the gradients of some steps NaN."""

    def __init__(self, *steps):
        self.spoiled = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.spoiled:
            next(iter(pl_module.trained().values())).grad.view(-1)[0] = math.nan


def weights(stage):
    return {name: tensor.detach().clone() for name, tensor in stage.trained().items()}


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(base, tmp_path):
    stage = make_stage(base)
    checkpoint = AdapterCheckpoint(root=str(tmp_path / "runs"), monitor=None)
    trainer = make_trainer(
        tmp_path, max_steps=4, callbacks=[Spoil(2), checkpoint], val_check_interval=1,
        check_val_every_n_epoch=None, limit_val_batches=1,
    )  # fmt: skip
    with pytest.raises(
        NotFiniteError, match=r"the gradient of step 2 is not finite.*optimizer.not_finite: skip"
    ):
        trainer.fit(stage, answers(base))
    assert all(bool(tensor.isfinite().all()) for tensor in weights(stage).values())
    assert (checkpoint.run / "last").is_dir()


def test_a_skipped_step_changes_nothing(base, tmp_path, caplog):
    class Watch(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(weights(pl_module))

    watch = Watch()
    stage = make_stage(base, optimizer=OptimizerSettings(lr=1e-2, weight_decay=0.1, not_finite="skip"))
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, max_steps=4, callbacks=[Spoil(1), watch]).fit(stage, answers(base))
    first, second, third, _ = watch.seen
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert "the gradient of step 1 is not finite: the step is skipped (1 in a row)" in caplog.text


def test_steps_are_not_skipped_for_ever(base, tmp_path):
    stage = make_stage(base, optimizer=OptimizerSettings(not_finite="skip"))
    with pytest.raises(NotFiniteError, match=f"as in the {SKIPS} steps before"):
        make_trainer(tmp_path, max_steps=30, max_epochs=-1, callbacks=[Spoil(*range(30))]).fit(
            stage, answers(base)
        )


def test_weights_that_are_not_finite_stop_the_run(base, tmp_path):
    class Burst(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                next(iter(pl_module.trained().values())).data.view(-1)[0] = math.inf

    stage = make_stage(base, optimizer=OptimizerSettings(not_finite="skip"))
    with pytest.raises(NotFiniteError, match=r"is not finite"):
        make_trainer(tmp_path, max_steps=3, callbacks=[Burst()]).fit(stage, answers(base))


def test_a_learning_rate_beyond_reason_ends_in_one_line(base, tmp_path):
    with pytest.raises(NotFiniteError, match=r"Lower optimizer.lr"):
        make_trainer(tmp_path, max_steps=8, max_epochs=-1).fit(
            make_stage(base, optimizer=OptimizerSettings(lr=1e30)), answers(base)
        )


@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_settings_that_are_not_finite_are_refused(lr):
    with pytest.raises(ValueError, match="must be finite"):
        OptimizerSettings(lr=lr)


class Says(Callback):
    """Logs a metric in each validation: the next of some values, or none."""

    def __init__(self, *values):
        self.values = list(values)

    def on_validation_epoch_end(self, trainer, pl_module):
        value = self.values.pop(0)
        if value is not None:
            pl_module.log("val/said", value)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(
    ("values", "best", "saved"),
    [
        ((math.nan, 0.5, 0.5), 0.5, [2, 3]),
        ((0.5, math.inf, -math.inf), 0.5, [1]),
        ((0.5, None, None), 0.5, [1]),
        ((None, math.nan, None), None, []),
    ],
)
def test_only_a_finite_value_of_this_validation_is_the_best(
    base, tmp_path, monkeypatch, caplog, values, best, saved, mode
):
    steps = []
    save = AdapterCheckpoint._save
    monkeypatch.setattr(
        AdapterCheckpoint, "_save",
        lambda self, trainer, module, name: (
            steps.append(trainer.global_step) if name == "best" else None, save(self, trainer, module, name)
        ),
    )  # fmt: skip
    checkpoint = AdapterCheckpoint(root=str(tmp_path / "runs"), monitor="val/said", mode=mode)
    trainer = make_trainer(
        tmp_path, max_steps=3, callbacks=[Says(*values), checkpoint], val_check_interval=1,
        check_val_every_n_epoch=None, limit_val_batches=1,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.fit(make_stage(base), answers(base))
    assert checkpoint.best == best
    assert steps == saved
    assert "val/said has no finite value at step" in caplog.text


def test_a_best_that_is_nan_in_an_old_checkpoint_is_none():
    checkpoint = AdapterCheckpoint()
    checkpoint.load_state_dict({"best": math.nan})
    assert checkpoint.best is None


def test_trigger_rl_validates_although_every_episode_failed(base, tmp_path):
    class Down(Vowels):
        def reward(self, example, answer):
            return Reward(math.nan) if example.id.startswith("val") else super().reward(example, answer)

    checkpoint = AdapterCheckpoint(root=str(tmp_path / "runs"), monitor="val/net_reward", with_trigger=True)
    trainer = make_trainer(
        tmp_path, max_steps=1, callbacks=[checkpoint], val_check_interval=1, check_val_every_n_epoch=None
    )
    trainer.fit(make_trigger(base), make_data(base, Down()))
    assert checkpoint.best is None
    assert (checkpoint.run / "last").is_dir()


@pytest.mark.parametrize(("penalty", "rounds"), [(0.5, 1), (0.0, 3)])
def test_groups_are_judged_by_the_rewards_that_train(base, tmp_path, penalty, rounds):
    """All answers are right. With a penalty on invocations they teach; without, their groups are dead."""
    played = []

    class Right(Vowels):
        def reward(self, example, answer):
            return Reward(1.0)

        def rewards(self, examples, answers):
            played.append(len(examples))
            return super().rewards(examples, answers)

    recorded = Recorded()
    stage = make_trigger(
        base, objective=TriggerSettings(penalty=penalty), update=UpdateSettings(dynamic_sampling=2)
    )
    make_trainer(tmp_path, max_steps=1, callbacks=[recorded]).fit(stage, make_data(base, Right()))
    assert recorded.metrics[0]["rollout/dead_groups"] == (0.0 if penalty else 1.0)
    assert len(played) == rounds
