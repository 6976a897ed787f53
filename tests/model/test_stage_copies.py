"""What a training forward holds does not grow with what earlier insertions had read."""

from __future__ import annotations

import gc
from itertools import pairwise

import torch

import memgen.model.cache as cache
from allocations import Held
from tiny import random_batch, tiny_memgen
from tolerance import assert_close

LENGTH, PROMPT, K = 480, 8, 2


def case(insertions: int):
    spacing = (LENGTH - PROMPT) // insertions
    points = [PROMPT + spacing * number for number in range(insertions)]
    model = tiny_memgen(prompt_latents=K, inference_latents=K, cap=insertions, max_position_embeddings=1024)
    model.train_only(model.weaver)
    return model, *random_batch([LENGTH], [PROMPT], [points])


def held(model, batch, plan) -> tuple[int, int]:
    """Bytes that the graph of a forward holds, and the positions that were read."""
    model.label_logprobs(batch, plan)  # A base finds out once how it can be computed.
    gc.collect()
    with Held() as found:
        logprobs, woven = model.label_logprobs(batch, plan)
        gc.collect()
    assert logprobs.requires_grad
    return found.bytes, woven.work.reasoner_positions + woven.work.weaver_positions


def copies(model, plan) -> int:
    """Bytes of the weaver's copies of keys and values, by formula: all slots of a row at each insertion, in each layer."""
    config = model.reasoner.backbone.model.config
    per_slot = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    (points,) = plan.rows()
    # Tokens and latents before the insertion, and its queries. The first stage has no history; a stage whose own
    # positions are half of all is computed over a square, and keeps its copy.
    slots = [point + K * number + K for number, (point, _) in enumerate(points)]
    fed = [slots[0], *(b - a + K for a, b in pairwise(slots))]
    far = [s for s, f in zip(slots[1:], fed[1:], strict=True) if 2 * f < s]
    return config.num_hidden_layers * per_slot * sum(far)


def test_no_stages_copy_of_earlier_keys_and_values_is_held(monkeypatch):
    model, batch, plan = case(40)
    ours, positions = held(model, batch, plan)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "checkpoint", lambda run, *inputs, **_: run(*inputs))
        before, same = held(model, batch, plan)
    assert positions == same
    spared = copies(model, plan)
    assert spared > ours / 2, "the case must be one in which copies are most of what is held"
    # To 5 %: either way holds a pass's queries, results and sums of scores in a form of its own.
    assert 0.95 * spared <= before - ours <= 1.05 * spared


def test_what_is_held_is_proportional_to_what_is_read():
    per_position = []
    for insertions in (10, 40):
        found, positions = held(*case(insertions))
        per_position.append(found / positions)
    assert per_position[1] < 1.2 * per_position[0]


def test_gradients_are_those_with_copies_bit_for_bit(monkeypatch):
    results = []
    for patched in (False, True):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(cache, "checkpoint", lambda run, *inputs, **_: run(*inputs))
            model, batch, plan = case(12)
            logprobs, _ = model.label_logprobs(batch, plan)
            logprobs.sum().backward()
            results.append({name: p.grad for name, p in model.weaver.own_parameters().items()})
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_activation_checkpointing_and_copies_gathered_again_go_together():
    results = []
    for recompute in (False, True):
        model, batch, plan = case(12)
        model.use_checkpointing(recompute)
        logprobs, _ = model.label_logprobs(batch, plan)
        logprobs.sum().backward()
        results.append({name: p.grad for name, p in model.weaver.own_parameters().items()})
    for name, gradient in results[0].items():
        assert_close(name, gradient, results[1][name])
