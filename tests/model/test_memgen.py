"""The teacher-forced forward: plans, gradients, sharing, and independence of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocations import Largest
from memgen.model.adapters import LoraSettings
from memgen.types import InsertionKind, InsertionPlan, TokenBatch
from tiny import random_batch, random_rows, tiny_memgen
from tolerance import assert_close

POINTS = [[6, 9, 14], [4], [8, 12], []]
LENGTHS, PROMPTS = [20, 9, 15, 12], [6, 4, 8, 5]


def straightforward_logprobs(model, row, marks, points, kinds):
    """The definition: full re-reads, no cache, one row, dense causal attention by Hugging Face's own modules."""
    base, weaver = model.reasoner.backbone, model.weaver
    stream, predictors = [], []
    embeddings = base.embed(torch.tensor(row))
    plan = dict(zip(points, kinds, strict=True))
    for i in range(len(row)):
        if i in plan:
            bank = weaver.prompt_queries if plan[i] == InsertionKind.PROMPT else weaver.inference_queries
            if weaver.config.reads == "hidden_states":
                states = dense(base, torch.stack(stream), None)
            else:
                states = torch.stack(stream)
            inputs = torch.cat([weaver.reasoner_to_weaver(states), bank()])
            read = dense(weaver.backbone, inputs, "weaver")[-len(bank.latents) :]
            stream += list(weaver.weaver_to_reasoner(read))
        predictors.append(len(stream) - 1)
        stream.append(embeddings[i])
    hidden = dense(base, torch.stack(stream), None)
    logprobs = base.head(hidden).log_softmax(-1)
    return torch.stack([logprobs[predictors[i], row[i]] for i in range(len(row)) if marks[i]])


def dense(backbone, embeddings, adapter):
    """A pass of the unmodified Hugging Face attention over one whole row."""
    backbone.model.set_attn_implementation("sdpa")
    try:
        with backbone.adapters.using(adapter):
            return backbone.model.get_decoder()(
                inputs_embeds=embeddings[None], use_cache=False
            ).last_hidden_state[0]
    finally:
        backbone.model.set_attn_implementation("memgen")


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("own_bases", [False, True], ids=["shared base", "own bases"])
def test_batched_ragged_plans_equal_the_definition_row_by_row_with_gradients(reads, own_bases):
    model = tiny_memgen(reads=reads, own_bases=own_bases, double=True)
    model.train_only(model.weaver)
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    logprobs, _ = model.label_logprobs(batch, plan)
    logprobs.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.weaver.own_parameters().items()}
    model.zero_grad()
    rows, marks = batch.rows(), batch.supervised.tolist()
    expected = torch.cat(
        [
            straightforward_logprobs(model, row, mark, [p for p, _ in points], [k for _, k in points])
            for row, mark, points in zip(rows, marks, plan.rows(), strict=True)
        ]
    )
    assert_close("logprobs", logprobs, expected)
    expected.sum().backward()
    for name, parameter in model.weaver.own_parameters().items():
        assert_close(name, ours[name], parameter.grad)
        assert float(parameter.grad.abs().max()) > 0


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_a_row_alone_and_in_a_batch_of_others_has_the_same_logprobs(reads):
    model = tiny_memgen(reads=reads)
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    together = model.label_logprobs(batch, plan)[0].split(batch.supervised.sum(1).tolist())
    for row in range(len(LENGTHS)):
        index = torch.tensor([row])
        alone, _ = model.label_logprobs(batch.select(index), plan.select(index))
        assert_close(f"row {row}", alone, together[row])


def test_what_stands_behind_a_rows_end_changes_nothing():
    model = tiny_memgen()
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    behind = torch.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
    padded = dataclasses.replace(batch, ids=batch.ids.masked_fill(behind, 258))
    assert torch.equal(model.label_logprobs(padded, plan)[0], model.label_logprobs(batch, plan)[0])


def test_rows_of_a_group_read_what_they_share_once_and_get_the_same_result_and_gradient():
    model = tiny_memgen()
    model.train_only(model.weaver)
    prompt = random_rows([10], seed=3)[0]
    answers = random_rows([7, 5, 9, 4], seed=4)
    rows = [prompt + answer for answer in answers]
    marks = [[False] * 10 + [True] * len(answer) for answer in answers]
    plain = TokenBatch.from_rows(rows, marks)
    grouped = dataclasses.replace(plain, group=torch.zeros(4, dtype=torch.int64), shared=torch.full((4,), 10))
    plan = InsertionPlan.from_rows([[10, 14], [10], [13], []], [[0, 1], [0], [1], []])
    results = []
    for batch in (plain, grouped):
        model.zero_grad()
        logprobs, woven = model.label_logprobs(batch, plan)
        logprobs.sum().backward()
        grads = {n: p.grad.clone() for n, p in model.weaver.own_parameters().items()}
        results.append((logprobs, grads, woven.work))
    assert_close("logprobs", results[1][0], results[0][0])
    for name in results[0][1]:
        assert_close(name, results[1][1][name], results[0][1][name])
    # Three more readings of the ten shared tokens fall away; the weaver serves only the rows that insert.
    assert results[0][2].reasoner_positions - results[1][2].reasoner_positions == 30
    assert results[0][2].weaver_positions - results[1][2].weaver_positions == 20


def test_rows_that_claim_to_share_but_differ_are_refused():
    model = tiny_memgen()
    batch, plan = random_batch([8, 8], [4, 4], [[4], [4]])
    grouped = dataclasses.replace(batch, group=torch.zeros(2, dtype=torch.int64), shared=torch.tensor([4, 4]))
    with pytest.raises(
        ValueError, match="rows 0 and 1 are of one group but do not begin with the same tokens"
    ):
        model.label_logprobs(grouped, plan)


def test_only_the_named_part_gets_gradients_and_the_base_never_does():
    model = tiny_memgen(trigger="tokens")
    model.train_only(model.weaver)
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    model.label_logprobs(batch, plan)[0].sum().backward()
    with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in model.weaver.own_parameters().values()}


def test_work_counts_are_exact():
    model = tiny_memgen(prompt_latents=3, inference_latents=2)
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    _, woven = model.label_logprobs(batch, plan)
    # Each row but its last token, and its latents.
    assert woven.work.reasoner_positions == sum(n - 1 for n in LENGTHS) + (3 + 2 + 2) + 3 + (3 + 2)
    # Up to the last insertion of each row: its tokens, the latents before it, and the queries of each insertion.
    rows = [(14, 3 + 2, 3 + 2 + 2), (4, 0, 3), (12, 3, 3 + 2)]
    assert woven.work.weaver_positions == sum(tokens + read + queries for tokens, read, queries in rows)
    assert woven.work.weaver_forwards == 3
    assert woven.latents.shape[0] == 7 + 3 + 5


@pytest.mark.parametrize("prompt_latents", [0, 3])
@pytest.mark.parametrize("inference_latents", [0, 2])
def test_zero_latents_switch_a_kind_of_insertion_off(prompt_latents, inference_latents):
    model = tiny_memgen(prompt_latents=prompt_latents, inference_latents=inference_latents)
    batch, plan = random_batch([12], [5], [[5, 8]])
    keep = [(5, 0)] * bool(prompt_latents) + [(8, 1)] * bool(inference_latents)
    reduced = InsertionPlan.from_rows([[p for p, _ in keep]], [[k for _, k in keep]])
    logprobs, woven = model.label_logprobs(batch, plan)
    assert woven.latents.shape[0] == prompt_latents + inference_latents
    assert_close("logprobs", logprobs, model.label_logprobs(batch, reduced)[0])


def test_a_point_outside_its_row_is_refused():
    model = tiny_memgen()
    batch, _ = random_batch([6, 12], [3, 3], [[], []])
    with pytest.raises(ValueError, match="row 0 has 6 tokens but its plan inserts before token 9"):
        model.label_logprobs(batch, InsertionPlan.from_rows([[9], []], [[1], []]))


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(reads, dropout):
    model = tiny_memgen(reads=reads, trigger="tokens", lora=LoraSettings(r=4, alpha=8, dropout=dropout))
    model.train_only(model.weaver)
    model.train()
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    gradients = []
    for recompute in (False, True):
        model.use_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(1)
        loss = model.label_logprobs(batch, plan)[0].sum()
        # What runs between forward and backward must not change what the recomputation sees.
        with torch.no_grad():
            model.decision_logits(batch, plan, batch.supervised)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.weaver.own_parameters().items()})
    for name in gradients[0]:
        assert_close(name, gradients[1][name], gradients[0][name])


def test_training_mode_leaves_the_frozen_base_in_evaluation_mode():
    model = tiny_memgen(lora=LoraSettings(r=4, alpha=8, dropout=0.3)).train()
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert all(m.training for m in dropouts)
    assert not model.reasoner.backbone.model.training


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_any_plan_gives_each_row_what_it_gets_alone(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    lengths = [draw(3, 16) for _ in range(rows)]
    prompts = [draw(1, n) for n in lengths]
    points = [sorted({draw(p, n) for _ in range(draw(0, 4))}) for n, p in zip(lengths, prompts, strict=True)]
    batch, plan = random_batch(lengths, prompts, points, seed)
    with torch.no_grad():
        together = MODEL.label_logprobs(batch, plan)[0].split(batch.supervised.sum(1).tolist())
        for row in range(rows):
            index = torch.tensor([row])
            alone, _ = MODEL.label_logprobs(batch.select(index), plan.select(index))
            assert_close(f"row {row}", alone, together[row])


MODEL = tiny_memgen()


def test_rows_packed_together_do_not_reach_each_others_gradients():
    model = tiny_memgen(double=True)
    model.train_only(model.weaver)
    batch, plan = random_batch(LENGTHS, PROMPTS, POINTS)
    parameters = list(model.weaver.own_parameters().values())
    for row in range(len(LENGTHS)):
        index = torch.tensor([row])
        together = model.label_logprobs(batch, plan)[0].split(batch.supervised.sum(1).tolist())[row]
        alone, _ = model.label_logprobs(batch.select(index), plan.select(index))
        assert_close(f"row {row}", together, alone)
        if not POINTS[row]:
            assert not alone.requires_grad
            continue
        gradients = [
            torch.autograd.grad(total.sum(), parameters, allow_unused=True) for total in (together, alone)
        ]
        for parameter, ours, reference in zip(model.weaver.own_parameters(), *gradients, strict=True):
            # A bank that the row does not use has no gradient alone and a zero one in the batch.
            expected = torch.zeros_like(ours) if reference is None else reference
            assert_close(f"row {row}, {parameter}", ours, expected)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_training_step_holds_logits_of_all_rows_positions_and_classes(recompute, entropy):
    vocabulary, rows, length = 8192, 16, 320
    model = tiny_memgen(vocab_size=vocabulary)
    model.train_only(model.weaver)
    model.use_checkpointing(recompute)
    batch, plan = random_batch([length] * rows, [20] * rows, [[20, 40, 60]] * rows)
    with Largest() as largest:
        scores = model.label_scores(batch, plan, entropy=entropy)
        loss = scores.logprobs.mean() + (scores.entropy.mean() if entropy else 0.0)
        loss.backward()
    logits = rows * length * vocabulary
    assert largest.elements < logits / 4, f"{largest.where} made {largest.elements} of {logits} elements"
    # The hook does see logits: a chunk of them.
    assert largest.elements >= 128 * vocabulary
