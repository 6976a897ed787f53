"""Decoding: rows that diverge, exact counts, and agreement with the teacher-forced forward."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from generations import asked_at, invoke_probs, logprobs
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.types import Decision, InsertionKind, InsertionPlan, TokenBatch
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
        assert_close("logprobs", logprobs(alone, 0), logprobs(batch, row))


@pytest.mark.parametrize("trigger", ["always", "random", "tokens", "hidden_states", "never"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("own_bases", [False, True], ids=["shared base", "own bases"])
def test_decoding_then_replaying_its_plan_gives_the_same_logprobs(trigger, reads, own_bases):
    model = tiny_memgen(trigger=trigger, reads=reads, own_bases=own_bases)
    generation = generate(model, random_rows(LENGTHS[:6]), DRAWN)
    with torch.no_grad():
        replayed, _ = model.label_logprobs(generation.as_batch(), generation.plan)
    for row, ours in enumerate(replayed.split(generation.lengths)):
        assert_close(f"row {row}", ours, logprobs(generation, row))


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
    assert generation.plan.counts == [0, 0, 0]


def test_a_row_that_skips_equals_the_same_row_where_nobody_weaves():
    weaving, never = tiny_memgen(trigger="random", probability=0.3), tiny_memgen(trigger="never")
    prompts = random_rows(LENGTHS)
    mixed, plain = generate(weaving, prompts, GREEDY), generate(never, prompts, GREEDY)
    skipping = [row for row, points in enumerate(mixed.plan.rows()) if not points]
    assert 0 < len(skipping) < len(prompts)
    for row in skipping:
        assert mixed.answers()[row] == plain.answers()[row]
        assert_close(f"row {row}", logprobs(mixed, row), logprobs(plain, row))


def test_work_counts_are_exact_for_rows_that_insert_at_different_steps():
    model = tiny_memgen(prompt_latents=3, inference_latents=2)
    prompts = random_rows(LENGTHS[:8])
    generation = generate(model, prompts, DRAWN)
    rows = list(zip(prompts, generation.lengths, generation.plan.rows(), strict=True))
    assert len({tuple(p - len(prompt) for p, _ in points) for prompt, _, points in rows}) > 3
    later = [sum(kind == InsertionKind.INFERENCE for _, kind in points) for _, _, points in rows]
    reasoner = sum(len(prompt) + 3 + new - 1 + 2 * n for (prompt, new, _), n in zip(rows, later, strict=True))
    assert generation.work.reasoner_positions == reasoner
    assert generation.work.reasoner_forwards == max(generation.lengths)
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
    assert [turn.context for turn in generation.turns] == [prompts[0]] * 4 + [prompts[1]] * 4
    decoded = sum(n - 1 for n in generation.lengths)
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
    assert [turn.decisions for turn in grouped.turns] == [turn.decisions for turn in repeated.turns]


def test_rows_stop_at_their_end_token_and_are_marked_finished():
    model = tiny_memgen()
    generation = generate(model, random_rows(LENGTHS), GenerationSettings(max_new_tokens=60, temperature=1.5))
    ends = set(model.reasoner.end_ids)
    for turn in generation.turns:
        assert turn.finished == (turn.tokens[-1] in ends)
        assert not ends & set(turn.tokens[:-1])
    assert any(turn.finished for turn in generation.turns)
    assert not all(turn.finished for turn in generation.turns)


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
    for turn in generation.turns:
        invoked = [i for i, d in enumerate(turn.decisions) if d == Decision.INVOKE]
        assert turn.insertion_points == invoked
        asked = [decision != Decision.NOT_ASKED for decision in turn.decisions]
        assert asked == [prob > 0 for prob in turn.invoke_probs]


def test_recorded_latents_are_those_that_the_replay_weaves():
    model = tiny_memgen()
    generation = generate(model, random_rows([9, 4, 17]), GREEDY, keep_latents=True)
    with torch.no_grad():
        woven = model.label_logprobs(generation.as_batch(), generation.plan)[1]
    recorded = generation.latents
    rounds = [row[i] for i in range(max(map(len, recorded))) for row in recorded if len(row) > i]
    assert_close("latents", woven.latents, torch.cat(rounds))


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


def _remove(chosen):
    """An intervention that inserts nothing where `chosen(answer, invocations before)`."""
    return lambda rows, before, latents: [
        block[:0] if chosen(row, number) else block
        for row, number, block in zip(rows, before, latents, strict=True)
    ]


@pytest.mark.parametrize("trigger", ["always", "tokens", "hidden_states"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_removing_every_insertion_leaves_the_answers_of_the_bare_reasoner(reads, trigger):
    settings = {"reads": reads, "trigger": trigger}
    prompts = random_rows([9, 4, 17])
    model, bare = tiny_memgen(**settings), tiny_memgen(reads=reads, trigger="never")
    removed = generate(model, prompts, GREEDY, intervene=_remove(lambda row, number: True), keep_latents=True)
    assert removed.answers() == generate(bare, prompts, GREEDY).answers()
    assert removed.latents == [[], [], []]
    assert removed.plan.counts == [0, 0, 0]
    if trigger == "always":
        assert max(turn.invocations for turn in removed.turns) == 4, "removals count towards the limit of 3"


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("static_step", ["off", "on"])
def test_what_is_left_of_removed_insertions_is_what_the_recorded_plan_replays(reads, static_step):
    model = tiny_memgen(reads=reads)
    settings = dataclasses.replace(GREEDY, static_step=static_step)
    for chosen in (lambda row, n: n == 0, lambda row, n: n == 2, lambda row, n: (row + n) % 2):
        part = generate(
            model, random_rows([9, 4, 17]), settings, intervene=_remove(chosen), keep_latents=True
        )
        with torch.no_grad():
            logprobs, woven = model.label_logprobs(part.as_batch(), part.plan)
        recorded = torch.tensor([x for turn in part.turns for x in turn.logprobs])
        assert_close("logprobs", recorded, logprobs)
        rounds = [row[i] for i in range(max(map(len, part.latents))) for row in part.latents if len(row) > i]
        assert_close("latents", torch.cat(rounds), woven.latents)


def test_a_removal_in_one_answer_leaves_the_others_as_they_are():
    model, prompts = tiny_memgen(), random_rows([9, 4, 17])
    plain = generate(model, prompts, GREEDY)
    part = generate(model, prompts, GREEDY, intervene=_remove(lambda row, n: row == 1))
    assert [part.answers()[row] for row in (0, 2)] == [plain.answers()[row] for row in (0, 2)]
    assert part.plan.counts[1] == 0


def test_an_intervention_that_gives_more_latents_than_there_were_is_refused():
    model = tiny_memgen()
    with pytest.raises(ValueError, match="gave 6 latents in place of 3; give at most those"):
        generate(model, random_rows([9]), GREEDY, intervene=lambda r, n, latents: [torch.cat(latents * 2)])


def test_the_observer_hears_every_token_and_insertion_in_order():
    model = tiny_memgen()
    heard = {0: [], 1: []}
    generation = generate(
        model, random_rows([9, 4]), GREEDY, observe=lambda row, token: heard[row].append(token)
    )
    for row, turn in enumerate(generation.turns):
        expected = list(turn.tokens)
        for point in reversed(turn.insertion_points):
            expected.insert(point, None)
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
    translate = lambda ids: [token for i in ids for token in (i % 200, 7)]  # noqa: E731
    prompts = random_rows([9, 4, 17])
    model.trigger.translate = translate
    generation = generate(model, prompts, DRAWN)
    model.trigger.translate = None
    asked = 0
    for row, (prompt, answer) in enumerate(zip(prompts, generation.answers(), strict=True)):
        for step in asked_at(generation, row):
            text = TokenBatch.from_rows([translate(prompt + answer[:step])])
            with torch.no_grad():
                logits = model.trigger.logits(text, torch.ones_like(text.supervised), None)
            expected = logits[-1].softmax(-1)[1]
            assert_close("probability", invoke_probs(generation, row)[step], expected)
            asked += 1
    assert asked > len(prompts)


# Latents of earlier turns


def two_turns(model, settings, **options):
    """A first turn, and a second whose prompts hold the first with its latents. Returns both, and the second's rows."""
    first = generate(model, random_rows([9, 4, 17]), DRAWN, keep_latents=True)
    questions = random_rows([5, 1, 8], seed=7)
    prompts = [row + ask for row, ask in zip(first.as_batch().rows(), questions, strict=True)]
    second = generate(
        model,
        prompts,
        settings,
        earlier=first.plan,
        earlier_latents=first.latents,
        keep_latents=True,
        **options,
    )
    return first, second


def whole(first, second, group=1):
    """Both turns as one supervised batch and one plan."""
    rows = second.as_batch().rows()
    marks, points, kinds = [], [], []
    for index, row in enumerate(rows):
        source = index // group
        before = first.turns[source]
        begin, end = len(before.context), len(before.context) + len(before.tokens)
        answer = len(second.turns[index].context)
        marks.append([begin <= i < end or i >= answer for i in range(len(row))])
        pairs = first.plan.rows()[source] + second.plan.rows()[index]
        points.append([point for point, _ in pairs])
        kinds.append([kind for _, kind in pairs])
    return TokenBatch.from_rows(rows, marks), InsertionPlan.from_rows(points, kinds)


@pytest.mark.parametrize("trigger", ["always", "random", "tokens", "hidden_states", "never"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_a_second_turn_that_sees_the_firsts_latents_equals_one_pass_over_both_turns(trigger, reads):
    model = tiny_memgen(trigger=trigger, reads=reads)
    first, second = two_turns(model, DRAWN)
    batch, plan = whole(first, second)
    with torch.no_grad():
        scored, woven = model.label_logprobs(batch, plan)
    parts = scored.split(batch.supervised.sum(dim=1).tolist())
    for row, part in enumerate(parts):
        turn_one, turn_two = part.split([first.lengths[row], second.lengths[row]])
        assert_close(f"row {row}, turn 1", turn_one, logprobs(first, row))
        assert_close(f"row {row}, turn 2", turn_two, logprobs(second, row))
    assert woven.latents.shape[0] == sum(
        len(block) for g in (first, second) for r in g.latents for block in r
    )


def test_earlier_latents_change_the_answer_and_none_change_nothing():
    model = tiny_memgen()
    first, second = two_turns(model, GREEDY)
    prompts = [turn.context for turn in second.turns]
    without = generate(model, prompts, GREEDY)
    assert without.answers() != second.answers()
    none = generate(model, prompts, GREEDY, earlier=InsertionPlan.empty(3), earlier_latents=[[], [], []])
    assert none == without
    extra = sum(len(block) for row in first.latents for block in row)
    assert extra > 0
    decoded = lambda g: sum(n - 1 for n in g.lengths) + 2 * sum(n - 1 for n in g.plan.counts)  # noqa: E731
    fed = sum(map(len, prompts)) + 3 * 3
    assert without.work.reasoner_positions == fed + decoded(without)
    assert second.work.reasoner_positions == fed + extra + decoded(second)


def test_the_cap_and_the_plan_leave_earlier_insertions_out():
    model = tiny_memgen(cap=2)
    first, second = two_turns(model, DRAWN)
    assert max(first.plan.counts) == 3
    for row, points in enumerate(second.plan.rows()):
        begin = len(second.turns[row].context)
        assert points[0] == (begin, InsertionKind.PROMPT)
        assert all(point > begin and kind == InsertionKind.INFERENCE for point, kind in points[1:])
    assert max(second.plan.counts) == 3


@pytest.mark.parametrize("trigger", ["always", "random"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_a_group_shares_a_prompt_with_earlier_latents(trigger, reads):
    model = tiny_memgen(trigger=trigger, reads=reads)
    settings = GenerationSettings(max_new_tokens=16, temperature=1.0, group_size=3)
    first, second = two_turns(model, settings, row_seeds=list(range(9)))
    batch, plan = whole(first, second, group=3)
    prompts = torch.tensor([len(turn.context) for turn in second.turns])
    only_second = batch.supervised & (torch.arange(batch.ids.shape[1]) >= prompts[:, None])
    batch = TokenBatch(ids=batch.ids, lengths=batch.lengths, supervised=only_second)
    with torch.no_grad():
        scored, _ = model.label_logprobs(batch, plan)
    for row, part in enumerate(scored.split(second.lengths)):
        assert_close(f"row {row}", part, logprobs(second, row))


LATENT = torch.zeros(2, 32)


@pytest.mark.parametrize(
    ("plan", "latents", "message"),
    [
        ([[3]], None, "earlier and earlier_latents belong together"),
        (
            [[3], [2]],
            [[LATENT], [LATENT]],
            "1 prompts need as many rows in earlier and earlier_latents, got 2 and 2",
        ),
        ([[3, 5]], [[LATENT]], "prompt 0 has 2 earlier points but 1 blocks of latents"),
        ([[9]], [[LATENT]], "prompt 0 has 9 tokens, but earlier latents lie before token 9"),
        ([[3]], [[torch.zeros(2, 31)]], r"prompt 0: earlier latents have shape \(2, 31\), not \(K, 32\)"),
    ],
    ids=["no latents", "rows", "blocks", "behind the prompt", "width"],
)
def test_earlier_latents_that_do_not_fit_are_refused(plan, latents, message):
    earlier = InsertionPlan.from_rows(plan, [[0] * len(row) for row in plan])
    with pytest.raises(ValueError, match=message):
        generate(tiny_memgen(), random_rows([9]), GREEDY, earlier=earlier, earlier_latents=latents)


def test_earlier_latents_count_against_the_context():
    latents = [[torch.zeros(500, 32)]]
    earlier = InsertionPlan.from_rows([[3]], [[0]])
    with pytest.raises(ValueError, match="a prompt of 509 positions"):
        generate(tiny_memgen(), random_rows([9]), GREEDY, earlier=earlier, earlier_latents=latents)


# Stopping


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_an_answer_that_stops_is_the_beginning_of_the_one_that_does_not(reads):
    model = tiny_memgen(reads=reads, trigger="random")
    prompts = random_rows(LENGTHS)
    free = generate(model, prompts, DRAWN)
    # Rows stop at different steps, some at once, so that the lines of the caches are filled from behind.
    stopped = generate(model, prompts, DRAWN, stop=lambda tokens: tokens[-1] % 23 == 0)
    assert len(set(stopped.lengths)) > 5
    for row, (answer, full) in enumerate(zip(stopped.answers(), free.answers(), strict=True)):
        ends = [i for i, token in enumerate(full) if token % 23 == 0]
        assert answer == (full[: ends[0] + 1] if ends else full)
        assert_close(f"row {row}", logprobs(stopped, row), logprobs(free, row)[: len(answer)])
        last = answer[-1]
        assert stopped.turns[row].finished == (last % 23 == 0 or last in model.reasoner.end_ids)
        begin = len(prompts[row])
        assert stopped.plan.rows()[row] == [p for p in free.plan.rows()[row] if p[0] < begin + len(answer)]
    assert 0 < sum(turn.finished for turn in stopped.turns) < len(prompts)


def test_stop_is_asked_once_per_token_of_a_live_row_that_is_no_end_token():
    model = tiny_memgen()
    heard: dict[tuple[int, ...], int] = {}

    def never(tokens):
        heard[tuple(tokens)] = heard.get(tuple(tokens), 0) + 1
        return False

    generation = generate(
        model, random_rows(LENGTHS[:6]), GenerationSettings(max_new_tokens=60, temperature=1.5), stop=never
    )
    expected: dict[tuple[int, ...], int] = {}
    for answer in generation.answers():
        for end in range(1, len(answer) + 1):
            if answer[end - 1] not in model.reasoner.end_ids:
                expected[tuple(answer[:end])] = expected.get(tuple(answer[:end]), 0) + 1
    assert heard == expected
    assert any(turn.finished for turn in generation.turns)


def test_answers_of_a_group_stop_each_for_itself():
    model = tiny_memgen()
    settings = GenerationSettings(max_new_tokens=20, temperature=1.0, group_size=4)
    prompts, seeds = random_rows([9, 5]), list(range(8))
    free = generate(model, prompts, settings, row_seeds=seeds)
    limits = {tuple(answer[:2]): 2 + 3 * row for row, answer in enumerate(free.answers())}
    assert len(limits) == 8
    generation = generate(
        model, prompts, settings, row_seeds=seeds, stop=lambda t: len(t) >= limits.get(tuple(t[:2]), 99)
    )
    for row, (answer, full) in enumerate(zip(generation.answers(), free.answers(), strict=True)):
        assert answer == full[: 2 + 3 * row]
    assert generation.work.reasoner_positions < free.work.reasoner_positions


def test_all_rows_may_stop_at_their_first_token():
    generation = generate(tiny_memgen(), random_rows([9, 4]), GREEDY, stop=lambda tokens: True)
    assert generation.lengths == [1, 1]
    assert [turn.finished for turn in generation.turns] == [True, True]
    assert generation.work.reasoner_forwards == 1
