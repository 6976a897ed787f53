"""The whole model on the Triton kernels: rollouts, replays and gradients are those of the plain-torch operations."""

from __future__ import annotations

import pytest
import torch

import memgen.kernels as kernels
from generations import logprobs
from interpreted import whole_reductions
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from tiny import random_batch, random_rows, tiny_memgen
from tolerance import assert_close


@pytest.fixture(autouse=True)
def _quick():
    with whole_reductions():
        yield


def test_a_rollout_and_its_replay_are_the_same_on_either_kernels(device, monkeypatch):
    from memgen.kernels import triton_interleave

    calls = []
    original = triton_interleave.interleave
    monkeypatch.setattr(triton_interleave, "interleave", lambda *a: calls.append(1) or original(*a))
    model = tiny_memgen().to(device)
    prompts = random_rows([9, 1])
    results = {}
    for implementation in ("triton", "reference"):
        with kernels.forced(implementation), torch.no_grad():
            generation = generate(model, prompts, GenerationSettings(max_new_tokens=6))
            replayed, _ = model.label_logprobs(generation.as_batch(), generation.plan)
        results[implementation] = generation, replayed
        assert bool(calls)
    (ours, replayed), (expected, expected_replay) = results["triton"], results["reference"]
    assert ours.answers() == expected.answers()
    assert ours.plan.rows() == expected.plan.rows()
    assert sum(ours.plan.counts) > 2
    for row in range(2):
        assert_close("logprobs", logprobs(ours, row), logprobs(expected, row))
    assert_close("replayed", replayed, expected_replay)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_weavers_gradients_are_the_same_on_either_kernels(device, checkpointing):
    batch, plan = random_batch([8, 5], [3, 2], [[3, 5], [2]])
    gradients = []
    for implementation in ("triton", "reference"):
        model = tiny_memgen().to(device)
        model.train_only(model.weaver)
        model.use_checkpointing(checkpointing)
        with kernels.forced(implementation):
            logprobs, _ = model.label_logprobs(batch, plan)
            logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in model.weaver.own_parameters().items()})
    ours, expected = gradients
    assert any(bool(gradient.any()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None
        else:
            assert_close(name, ours[name], gradient)
