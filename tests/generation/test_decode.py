"""Decoding: rows that diverge, exact counts, and agreement with the teacher-forced forward."""

from __future__ import annotations

import pytest
import torch

from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.types import Decision, InsertionKind, TokenBatch
from tiny import random_rows, tiny_causal_lm, tiny_memgen
from tolerance import assert_close

GREEDY = GenerationSettings(max_new_tokens=24)
DRAWN = GenerationSettings(max_new_tokens=24, temperature=1.0, seed=5)
LENGTHS = [9, 4, 17, 1, 12, 6, 30, 8, 3, 21, 2, 5, 11, 7, 26, 10, 14, 13, 19, 16]


def varied(model, prompts) -> None:
    """The text under test is not one repeated token, and rows insert at different steps."""
    generation = generate(model, prompts, GREEDY)
    assert len({token for row in generation.answers() for token in row}) > 8


@pytest.mark.parametrize("trigger", ["always", "random", "tokens", "hidden_states"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_a_row_alone_in_a_batch_of_twenty_and_beside_others_gives_the_same_tokens(trigger, reads):
    model = tiny_memgen(trigger=trigger, reads=reads)
    prompts = random_rows(LENGTHS)
    seeds = list(range(100, 120))
    batch = generate(model, prompts, DRAWN, row_seeds=seeds)
    for row in (0, 3, 6, 19):
        alone = generate(model, [prompts[row]], DRAWN, row_seeds=[seeds[row]])
        assert alone.answers()[0] == batch.answers()[row]
        assert alone.plan.rows()[0] == batch.plan.rows()[row]
        length = int(batch.lengths[row])
        assert_close("logprobs", alone.logprobs[0], batch.logprobs[row, :length])


@pytest.mark.parametrize("trigger", ["always", "random", "tokens", "hidden_states", "never"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("own_bases", [False, True], ids=["shared base", "own bases"])
def test_decoding_then_replaying_its_plan_gives_the_same_logprobs(trigger, reads, own_bases):
    model = tiny_memgen(trigger=trigger, reads=reads, own_bases=own_bases)
    generation = generate(model, random_rows(LENGTHS[:6]), DRAWN)
    with torch.no_grad():
        replayed, _ = model.label_logprobs(generation.as_batch(), generation.plan)
    for row, ours in enumerate(replayed.split(generation.lengths.tolist())):
        assert_close(f"row {row}", ours, generation.logprobs[row, : len(ours)])


def test_never_trigger_equals_plain_generate_of_the_base():
    model = tiny_memgen(trigger="never")
    plain = tiny_causal_lm()
    prompts = random_rows([9, 4, 17])
    varied(model, prompts)
    generation = generate(model, prompts, GREEDY)
    for prompt, answer in zip(prompts, generation.answers(), strict=True):
        ids = torch.tensor([prompt])
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=258
        )
        assert answer == expected[0, len(prompt) :].tolist()
    assert generation.plan.counts.tolist() == [0, 0, 0]


def test_a_row_that_skips_equals_the_same_row_where_nobody_weaves():
    weaving, never = tiny_memgen(trigger="random", probability=0.3), tiny_memgen(trigger="never")
    prompts = random_rows(LENGTHS)
    mixed, plain = generate(weaving, prompts, GREEDY), generate(never, prompts, GREEDY)
    skipping = [row for row, points in enumerate(mixed.plan.rows()) if not points]
    assert 0 < len(skipping) < len(prompts)
    for row in skipping:
        assert mixed.answers()[row] == plain.answers()[row]
        assert_close(
            f"row {row}",
            mixed.logprobs[row, : int(mixed.lengths[row])],
            plain.logprobs[row, : int(plain.lengths[row])],
        )


def test_work_counts_are_exact_for_rows_that_insert_at_different_steps():
    model = tiny_memgen(prompt_latents=3, inference_latents=2)
    prompts = random_rows(LENGTHS[:8])
    generation = generate(model, prompts, DRAWN)
    rows = list(zip(prompts, generation.lengths.tolist(), generation.plan.rows(), strict=True))
    assert len({tuple(p - len(prompt) for p, _ in points) for prompt, _, points in rows}) > 3
    later = [sum(kind == InsertionKind.INFERENCE for _, kind in points) for _, _, points in rows]
    reasoner = sum(len(prompt) + 3 + new - 1 + 2 * n for (prompt, new, _), n in zip(rows, later, strict=True))
    assert generation.work.reasoner_positions == reasoner
    assert generation.work.reasoner_forwards == int(generation.lengths.max())
    weaver = sum(
        points[-1][0] + 3 * (n > 0) + 2 * max(0, n - 1) + 3 + 2 * n
        for (_, _, points), n in zip(rows, later, strict=True)
    )
    assert generation.work.weaver_positions == weaver


def test_a_group_reads_its_prompt_and_weaves_at_its_end_once():
    model = tiny_memgen(prompt_latents=3, cap=0)
    prompts = random_rows([9, 5])
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, group_size=4)
    generation = generate(model, prompts, settings)
    assert generation.prompt.rows() == [prompts[0]] * 4 + [prompts[1]] * 4
    decoded = sum(int(n) - 1 for n in generation.lengths)
    assert generation.work.reasoner_positions == 9 + 3 + 5 + 3 + decoded
    assert generation.work.weaver_positions == 9 + 3 + 5 + 3


@pytest.mark.parametrize("trigger", ["always", "random", "tokens", "hidden_states"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_answers_of_a_group_equal_answers_to_the_repeated_prompt(trigger, reads):
    model = tiny_memgen(trigger=trigger, reads=reads)
    prompts = random_rows([9, 5])
    seeds = list(range(8))
    settings = GenerationSettings(max_new_tokens=16, temperature=1.0, group_size=4, sample_decisions=True)
    grouped = generate(model, prompts, settings, row_seeds=seeds)
    single = GenerationSettings(max_new_tokens=16, temperature=1.0, sample_decisions=True)
    repeated = generate(model, [p for p in prompts for _ in range(4)], single, row_seeds=seeds)
    assert grouped.answers() == repeated.answers()
    assert grouped.plan.rows() == repeated.plan.rows()
    assert torch.equal(grouped.decisions, repeated.decisions)


def test_rows_stop_at_their_end_token_and_are_marked_finished():
    model = tiny_memgen()
    generation = generate(model, random_rows(LENGTHS), GenerationSettings(max_new_tokens=60, temperature=1.5))
    ends = set(model.reasoner.end_ids)
    for answer, finished in zip(generation.answers(), generation.finished.tolist(), strict=True):
        assert finished == (answer[-1] in ends)
        assert not ends & set(answer[:-1])
    assert any(generation.finished.tolist())
    assert not all(generation.finished.tolist())


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_the_cap_counts_insertions_inside_the_answer_only(cap):
    model = tiny_memgen(cap=cap)
    generation = generate(model, random_rows(LENGTHS), DRAWN)
    inside = [sum(kind == InsertionKind.INFERENCE for _, kind in row) for row in generation.plan.rows()]
    assert max(inside) == cap
    assert all(row[0][1] == InsertionKind.PROMPT for row in generation.plan.rows())


def test_decisions_are_recorded_where_latents_went_and_nowhere_else():
    model = tiny_memgen(trigger="random")
    generation = generate(model, random_rows(LENGTHS), DRAWN)
    for row, points in enumerate(generation.plan.rows()):
        prompt = int(generation.prompt.lengths[row])
        invoked = [i for i, d in enumerate(generation.decisions[row].tolist()) if d == Decision.INVOKE]
        assert [point - prompt for point, _ in points] == invoked
        asked = generation.decisions[row] != Decision.NOT_ASKED
        assert torch.equal(asked, generation.invoke_probs[row] > 0)


def test_recorded_latents_are_those_that_the_replay_weaves():
    model = tiny_memgen()
    generation = generate(model, random_rows([9, 4, 17]), GREEDY, keep_latents=True)
    with torch.no_grad():
        woven = model.label_logprobs(generation.as_batch(), generation.plan)[1]
    recorded = generation.latents
    stages = [row[stage] for stage in range(max(map(len, recorded))) for row in recorded if len(row) > stage]
    assert_close("latents", woven.latents, torch.cat(stages))


def test_an_intervention_replaces_what_is_inserted():
    model = tiny_memgen()
    prompts = random_rows([9, 4])
    plain = generate(model, prompts, GREEDY)
    seen = []

    def erase(rows, events, latents):
        seen.extend(zip(rows, events, strict=True))
        return [torch.zeros_like(block) for block in latents]

    erased = generate(model, prompts, GREEDY, intervene=erase, keep_latents=True)
    assert all(float(block.abs().max()) == 0 for row in erased.latents for block in row)
    assert erased.answers() != plain.answers()
    assert sorted(seen) == [(r, e) for r, row in enumerate(erased.plan.rows()) for e in range(len(row))]


def test_the_observer_hears_every_token_and_insertion_in_order():
    model = tiny_memgen()
    heard = {0: [], 1: []}
    generation = generate(
        model, random_rows([9, 4]), GREEDY, observe=lambda row, token: heard[row].append(token)
    )
    for row, points in enumerate(generation.plan.rows()):
        expected = list(generation.answers()[row])
        prompt = int(generation.prompt.lengths[row])
        for point, _ in reversed(points):
            expected.insert(point - prompt, None)
        assert heard[row] == expected


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[65], []], GREEDY, "prompt 1 is empty"),
        ([], GREEDY, "there is no prompt"),
        ([[65] * 500], GREEDY, "need 533 positions, but the reasoner's context is 512; shorten the prompt"),
    ],
    ids=["empty prompt", "no prompt", "prompt longer than the context"],
)
def test_prompts_that_cannot_be_answered_are_refused(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_memgen(), prompts, settings)


def test_generation_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"needs model\.eval"):
        generate(tiny_memgen().train(), [[65]], GREEDY)


def test_a_trigger_on_another_vocabulary_reads_the_translation_of_the_text_piece_by_piece():
    model = tiny_memgen(trigger="tokens", own_bases=True)
    model.trigger.translate = lambda ids: [token for i in ids for token in (i % 200, 7)]
    prompts = random_rows([9, 4, 17])
    generation = generate(model, prompts, DRAWN)
    asked = 0
    for row, (prompt, answer) in enumerate(zip(prompts, generation.answers(), strict=True)):
        for step in torch.nonzero(generation.decisions[row] != Decision.NOT_ASKED).flatten().tolist():
            text = TokenBatch.from_rows([model.trigger.translate(prompt + answer[:step])])
            with torch.no_grad():
                expected = model.trigger.logits(text)[-1].softmax(-1)[1]
            assert_close("probability", generation.invoke_probs[row, step], expected)
            asked += 1
    assert asked > len(prompts)
