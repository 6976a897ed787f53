"""The three kinds of trigger."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from generations import asked_at, invoke_probs
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.cache import RowKVCache
from memgen.model.trigger import Boundary, ConstantTrigger, StateTrigger, TokenTrigger, TriggerConfig
from memgen.types import Decision, InsertionPlan, TokenBatch
from tiny import random_rows, tiny_memgen
from tolerance import assert_close

CPU = torch.device("cpu")


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_a_constant_trigger_has_one_probability_and_nothing_to_train(probability):
    trigger = ConstantTrigger(probability)
    probs = trigger.invoke_probs(Boundary(rows=[4, 2], unread=[[], []], states=None), None)
    assert torch.equal(probs, torch.full((2,), probability))
    assert trigger.own_parameters() == {}
    assert trigger.kv_cache(2, 10, CPU) is None
    assert trigger.stochastic
    assert not trigger.needs_states


@pytest.mark.parametrize(("kind", "expected"), [("always", 1.0), ("never", 0.0)])
def test_always_and_never_do_what_they_say(kind, expected):
    generation = generate(
        tiny_memgen(trigger=kind, cap=99),
        random_rows([4, 9, 6, 3, 7]),
        GenerationSettings(max_new_tokens=16, temperature=1.0),
    )
    asked = [d for turn in generation.turns for d in turn.decisions if d != Decision.NOT_ASKED]
    assert len(asked) > 4
    assert set(asked) == {int(expected)}


def test_random_invokes_with_its_probability():
    model = tiny_memgen(trigger="random", probability=0.25, cap=99)
    generation = generate(
        model, random_rows([5] * 40), GenerationSettings(max_new_tokens=20, temperature=1.0)
    )
    asked = sum(turn.offered for turn in generation.turns)
    invoked = sum(turn.invocations for turn in generation.turns)
    assert asked > 80
    assert abs(invoked / asked - 0.25) < 4 * (0.25 * 0.75 / asked) ** 0.5


def dense_probability(trigger: TokenTrigger, tokens: list[int]) -> torch.Tensor:
    """The definition: one read of the text by Hugging Face's own modules, head on the last state."""
    base = trigger.backbone
    base.model.set_attn_implementation("sdpa")
    try:
        with base.adapters.using("trigger"):
            hidden = base.model.get_decoder()(torch.tensor([tokens]), use_cache=False).last_hidden_state[
                0, -1
            ]
    finally:
        base.model.set_attn_implementation("memgen")
    return trigger.output_layer(hidden).softmax(-1)[Decision.INVOKE]


@pytest.mark.parametrize("own_bases", [False, True], ids=["shared base", "own base"])
@torch.no_grad()
def test_a_token_trigger_that_reads_only_what_is_new_decides_like_one_that_reads_everything(own_bases):
    trigger = tiny_memgen(trigger="tokens", own_bases=own_bases).trigger
    memory = trigger.kv_cache(3, 30, CPU)
    assert isinstance(memory, RowKVCache)
    text = {row: [] for row in range(3)}
    for step, (rows, lengths) in enumerate(
        [([0, 1, 2], [5, 1, 9]), ([2, 0], [3, 1]), ([1], [8]), ([0, 1, 2], [1, 2, 1])]
    ):
        unread = random_rows(lengths, seed=step)
        probs = trigger.invoke_probs(Boundary(rows=rows, unread=unread, states=None), memory)
        for row, new, prob in zip(rows, unread, probs, strict=True):
            text[row] += new
            assert_close(f"step {step}, row {row}", prob, dense_probability(trigger, text[row]))


@torch.no_grad()
def test_logits_behind_every_token_are_those_of_each_prefix():
    trigger = tiny_memgen(trigger="tokens").trigger
    rows = random_rows([6, 1, 4])
    batch = TokenBatch.from_rows(rows)
    logits = trigger.logits(batch, torch.ones_like(batch.supervised), None).split([6, 1, 4])
    for row, ours in zip(rows, logits, strict=True):
        for end in range(1, len(row) + 1):
            expected = dense_probability(trigger, row[:end])
            assert_close(f"prefix {end}", ours[end - 1].softmax(-1)[Decision.INVOKE], expected)


def grouped() -> tuple[TokenBatch, torch.Tensor]:
    """Three answers to a prompt of 4 tokens, a row that shares two with a fourth, one alone; and places of decisions."""
    prompt, other = random_rows([4, 4])
    tails = random_rows([3, 1, 5, 2, 4], seed=1)
    beginnings = [prompt, prompt, prompt, other, [*other[:2], 66]]
    rows = [beginning + tail for beginning, tail in zip(beginnings, tails, strict=True)]
    batch = dataclasses.replace(
        TokenBatch.from_rows(rows),
        group=torch.tensor([0, 0, 0, 1, 1]),
        shared=torch.tensor([4, 4, 4, 4, 2]),
    )
    at = torch.zeros_like(batch.supervised)
    for row, ids in enumerate(rows):
        at[row, : len(ids)] = torch.arange(len(ids)) % 2 == 1  # The last token of the prompt among them.
    return batch, at


def test_a_groups_prompt_is_read_once_and_every_row_has_its_logits_and_gradient(monkeypatch):
    batch, at = grouped()
    found = []
    for given in (batch, dataclasses.replace(batch, group=None, shared=None)):
        model = tiny_memgen(trigger="tokens", double=True)
        model.train_only(model.trigger)
        read: list[int] = []
        original = model.trigger.backbone.forward
        monkeypatch.setattr(
            model.trigger.backbone, "forward", lambda x, *a, f=original, r=read: r.append(len(x)) or f(x, *a)
        )
        logits = model.decision_logits(given, InsertionPlan.empty(5), at)
        (logits * torch.linspace(0.5, 1.5, len(logits))[:, None] ** 2).sum().backward()
        gradients = {name: p.grad for name, p in model.trigger.own_parameters().items()}
        found.append(({"logits": logits.detach(), **gradients}, read))
    (ours, shared), (expected, alone) = found
    assert alone == [int(batch.lengths.sum())]
    # Two answers take the prompt's 4 tokens from the first, the last row takes 2.
    assert shared == [alone[0] - 2 * 4 - 2]
    for name, value in expected.items():
        assert_close(
            name, ours[name], value, dtype=torch.float32
        )  # Logits are float32 whatever the model is.


def test_rows_of_a_group_that_begin_otherwise_are_refused():
    batch, at = grouped()
    batch.ids[1, 2] = 90
    with pytest.raises(
        ValueError, match="rows 0 and 1 are of one group but do not begin with the same tokens"
    ):
        tiny_memgen(trigger="tokens").trigger.logits(batch, at, None)


@pytest.mark.parametrize("static", ["on", "off"])
def test_where_no_prompt_has_latents_a_group_still_reads_its_prompt_once(static):
    model = tiny_memgen(trigger="tokens", prompt_latents=0, cap=2)
    prompts, seeds = random_rows([30, 40]), list(range(6))
    settings = GenerationSettings(max_new_tokens=24, temperature=1.0, static_step=static)
    stop = lambda tokens: tokens[-1] % 29 == 0  # noqa: E731 - rows end at different steps
    together = generate(
        model, prompts, dataclasses.replace(settings, group_size=3), row_seeds=seeds, stop=stop
    )
    alone = generate(model, [p for p in prompts for _ in range(3)], settings, row_seeds=seeds, stop=stop)
    assert together.answers() == alone.answers()
    assert together.plan.rows() == alone.plan.rows()
    for row in range(6):
        assert_close("probability", invoke_probs(together, row), invoke_probs(alone, row))
    asked = [turn.offered > 0 for turn in alone.turns]
    assert sum(asked) > 3
    spared = sum(
        len(prompt) * (sum(asked[3 * i : 3 * i + 3]) - 1)
        for i, prompt in enumerate(prompts)
        if any(asked[3 * i : 3 * i + 3])
    )
    assert together.work.trigger_positions == alone.work.trigger_positions - spared
    assert together.work.trigger_forwards <= alone.work.trigger_forwards + 2


@torch.no_grad()
def test_a_token_trigger_never_sees_latents():
    """The same text with other latents gets the same probabilities."""
    model = tiny_memgen(trigger="tokens", cap=99)
    settings = GenerationSettings(max_new_tokens=12)
    generation = generate(model, random_rows([5, 8]), settings)
    for row, (prompt, answer) in enumerate(zip(random_rows([5, 8]), generation.answers(), strict=True)):
        for step in asked_at(generation, row):
            expected = dense_probability(model.trigger, prompt + answer[:step])
            assert_close("probability", invoke_probs(generation, row)[step], expected)
    assert sum(generation.plan.counts) > 0


@torch.no_grad()
def test_a_state_trigger_reads_the_reasoners_state_alone():
    trigger = tiny_memgen(trigger="hidden_states").trigger
    assert isinstance(trigger, StateTrigger)
    assert trigger.needs_states
    assert trigger.kv_cache(3, 10, CPU) is None
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 4
    normed = (states - states.mean(-1, keepdim=True)) / (
        states.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    logits = trigger.output_layer(normed * trigger.norm.weight + trigger.norm.bias)
    nothing = TokenBatch.from_rows([[0]])
    assert_close("logits", trigger.logits(nothing, nothing.supervised, states), logits)
    probs = trigger.invoke_probs(Boundary(rows=[0, 1, 2], unread=[[], [], []], states=states), None)
    assert_close("probability", probs, logits.softmax(-1)[:, Decision.INVOKE])


@pytest.mark.parametrize("kind", ["tokens", "hidden_states"])
def test_gradients_of_a_learned_trigger_reach_all_its_parameters_and_no_others(kind):
    model = tiny_memgen(trigger=kind)
    model.train_only(model.trigger)
    batch = TokenBatch.from_rows(random_rows([5, 3]))
    logits = model.decision_logits(batch, InsertionPlan.empty(2), torch.ones_like(batch.supervised))
    logits.log_softmax(-1)[:, 1].sum().backward()
    with_gradient = {
        id(p) for p in model.parameters() if p.grad is not None and float(p.grad.abs().max()) > 0
    }
    assert with_gradient == {id(p) for p in model.trigger.own_parameters().values()}


@pytest.mark.parametrize("kind", ["tokens", "hidden_states"])
def test_the_initial_bias_moves_a_new_trigger_towards_invoking(kind):
    heads = []
    for bias in (0.0, 2.5):
        torch.manual_seed(0)
        config = TriggerConfig(kind=kind, initial_invoke_bias=bias)
        trigger = (
            TokenTrigger(tiny_memgen().reasoner.backbone, config)
            if kind == "tokens"
            else StateTrigger(32, config)
        )
        heads.append(trigger.output_layer.bias.detach())
    if kind == "hidden_states":
        assert_close("bias", heads[1] - heads[0], torch.tensor([0.0, 2.5]))
    assert float(heads[1][Decision.INVOKE]) > 2.0


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_a_probability_out_of_range_is_refused(probability):
    with pytest.raises(ValueError, match=rf"trigger\.probability must be in \[0, 1\], got {probability}"):
        TriggerConfig(kind="random", probability=probability)
