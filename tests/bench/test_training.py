"""Training steps of both sides."""

from __future__ import annotations

import pytest
import torch

from memgen.bench import training
from memgen.bench.shapes import ModelSettings
from memgen.bench.training import (
    STAGES,
    MemGenStep,
    PlainStep,
    TrainingWorkload,
    measure_training,
    policy_gradient,
)
from tolerance import assert_close

SETTINGS = ModelSettings(model="tiny", latents=2, spacing=4)
WORK = TrainingWorkload(batch=4, length=40, prompt=8, points=3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_either_side_leaves_gradients_on_what_it_trains_and_nowhere_else(stage):
    plain, ours = PlainStep(SETTINGS, WORK), MemGenStep(SETTINGS, WORK)
    for step in (plain, ours):
        assert torch.isfinite(step.step(stage))
    trained = {name for name, p in plain.model.named_parameters() if p.grad is not None}
    assert trained
    assert all(".lora_" in name for name in trained)
    weaver = ours.model.weaver.own_parameters()
    assert all(parameter.grad is not None for parameter in weaver.values())
    own = {id(parameter) for parameter in weaver.values()}
    assert all(p.grad is None for p in ours.model.parameters() if id(p) not in own)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_step_does_the_work_of_the_formula(group):
    step = MemGenStep(SETTINGS, TrainingWorkload(batch=4, length=40, prompt=8, points=3, group=group))
    step.step("grpo")
    rows = step.plan.rows()
    assert [len(row) for row in rows] == [3] * 4
    # A group's prompt of 8 tokens is read once, by the reasoner and by the weaver; K is 2.
    spared = 8 * (4 - 4 // group)
    assert step.done.reasoner_positions == 4 * (39 + 3 * 2) - spared
    # Tokens up to the last insertion, latents of the earlier two, and the queries of all three.
    assert step.done.weaver_positions == sum(row[-1][0] for row in rows) + 4 * (2 * 2 + 3 * 2) - spared


def test_both_stages_have_the_same_loss_at_equal_advantages():
    step = MemGenStep(SETTINGS, WORK)
    step.advantages = torch.ones_like(step.advantages)
    step.step("sft")
    sft = step.model.weaver.reasoner_to_weaver.weight.grad.clone()
    step.step("grpo")
    assert_close("gradient", step.model.weaver.reasoner_to_weaver.weight.grad, sft)


def test_a_policy_gradient_is_the_advantage_times_the_gradient_of_the_logprobs():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy_gradient(logprobs, torch.tensor([3.0, -1.0])).backward()
    assert logprobs.grad.tolist() == [-1.5, 0.5]


def test_more_points_than_a_row_has_are_refused():
    with pytest.raises(ValueError, match="but 90 points per row were asked for"):
        MemGenStep(SETTINGS, TrainingWorkload(batch=2, length=40, prompt=8, points=90))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompt": 40}, "below length"), ({"group": 3}, "group must divide batch"), ({"points": 0}, "points")],
)
def test_a_batch_that_cannot_be_made_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingWorkload(**({"batch": 4, "length": 40, "prompt": 8} | changes))


def test_a_case_has_ratios_memory_and_exact_work(meter, monkeypatch):
    peaks = {"plain": 100, "ours": 130}
    monkeypatch.setattr(
        training,
        "peak_in_own_process",
        lambda request: {"peak_above_weights_bytes": peaks[request["side"]], "held_before_bytes": 5},
    )
    ticks = []
    cases = list(measure_training(SETTINGS, WORK, STAGES, 2, meter, lambda: ticks.append(1)))
    assert [case["stage"] for case in cases] == ["sft", "grpo"]
    assert len(ticks) == 2 * (2 * 3 + 2)
    for case in cases:
        assert case["model"] == "tiny"
        assert (case["wall_ratio"], case["cpu_ratio"], case["memory_ratio"]) == (1.0, 1.0, 1.3)
        assert case["insertions"] == 4 * 3
        assert case["labels"] == 4 * 32
        assert case["ours"]["peak_above_weights_bytes"] == 130


def test_a_failing_memory_process_says_what_it_said(monkeypatch):
    class Done:
        returncode, stdout, stderr = 1, "", "no room left"

    monkeypatch.setattr(training.subprocess, "run", lambda *args, **kwargs: Done)
    with pytest.raises(RuntimeError, match="no room left"):
        training.peak_in_own_process({"kind": "training"})
    Done.returncode = 130
    with pytest.raises(KeyboardInterrupt):
        training.peak_in_own_process({"kind": "training"})
