"""Boundaries: the delimiter table, numbers, caps, turns, and the rule that decodes the whole prefix."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.boundary import Boundaries, BoundaryConfig
from memgen.types import InsertionKind, TokenBatch
from tiny import byte_tokenizer, random_rows, tiny_memgen

# A vocabulary with fused tokens: delimiters behind letters, digits, and other delimiters.
TEXTS = [
    "a",
    "b",
    ".",
    ",",
    "\n",
    ".\n",
    "1",
    "23",
    "4.",
    " x,",
    ", ",
    "é",
    "�",
    "",
    "5\n",
    "。",
    " 7",
    "...",
]
ID = {text: i for i, text in enumerate(TEXTS)}
DEFAULT = (",", ".", "\n")


def row(*texts: str) -> list[int]:
    return [ID[text] for text in texts]


def boundaries(**settings) -> Boundaries:
    return Boundaries(BoundaryConfig(**settings), TEXTS)


def points(table: Boundaries, prompt: list[int], answer: list[int]) -> list[int]:
    batch = TokenBatch.from_rows([prompt + answer], [[False] * len(prompt) + [True] * len(answer)])
    ((turn,),) = table.turns(batch)
    assert turn.begin == len(prompt)
    return list(turn.points)


# The table


def test_a_token_counts_if_its_own_text_ends_in_a_delimiter():
    marks = boundaries().is_delimiter.tolist()
    assert [text for text, mark in zip(TEXTS, marks, strict=True) if mark] == [
        ".", ",", "\n", ".\n", "4.", " x,", "5\n", "...",
    ]  # fmt: skip


def test_a_delimiter_of_several_characters_needs_all_of_them():
    marks = boundaries(delimiters=(", ",)).is_delimiter.tolist()
    assert [text for text, mark in zip(TEXTS, marks, strict=True) if mark] == [", "]


@pytest.mark.parametrize(
    ("delimiters", "message"),
    [
        ((",", ";"), "no token of this tokenizer ends in the delimiter ';'; change boundaries.delimiters"),
        ((",", ""), "boundaries.delimiters holds an empty text"),
    ],
    ids=["unknown", "empty"],
)
def test_a_delimiter_that_cannot_be_found_is_refused(delimiters, message):
    with pytest.raises(ValueError, match=message):
        boundaries(delimiters=delimiters)


def test_a_negative_cap_is_refused():
    with pytest.raises(ValueError, match="max_inference_insertions must be 0 or more, got -1"):
        BoundaryConfig(max_inference_insertions=-1)


def test_ids_that_the_tokenizer_lacks_are_no_delimiters():
    tokenizer = byte_tokenizer()
    table = Boundaries.from_tokenizer(BoundaryConfig(), tokenizer, len(tokenizer) + 5)
    found = [tokenizer.decode([i]) for i in table.is_delimiter.nonzero()[0].tolist()]
    assert sorted(found) == sorted(DEFAULT)
    assert table.is_delimiter.shape == (len(tokenizer) + 5,)


def test_the_table_of_a_smaller_model_vocabulary_is_cropped():
    table = Boundaries.from_tokenizer(BoundaryConfig(delimiters=("A",)), byte_tokenizer(), 100)
    assert table.is_delimiter.shape == (100,)


# Numbers


def test_marks_between_digits_are_skipped_only_if_asked():
    answer = row("1", ".", "23", ",", "a", ",", "b", "4.", "5\n", "a", ".")
    assert points(boundaries(), row("a"), answer) == [3, 5, 7, 9, 10]
    assert points(boundaries(ignore_numeric=True), row("a"), answer) == [7, 10]


def test_a_mark_behind_a_number_is_judged_without_knowing_what_follows():
    table = boundaries(ignore_numeric=True)
    for following in ("23", "a", "\n"):
        assert points(table, row("a"), row("1", ".", following)) == []
        assert points(table, row("a"), row("b", ".", following)) == [3]


def test_a_number_in_the_prompt_counts_as_what_precedes_the_answers_first_mark():
    assert points(boundaries(ignore_numeric=True), row("23"), row(".", "a")) == []
    assert points(boundaries(ignore_numeric=True), row("a"), row(".", "a")) == [2]


@given(st.lists(st.integers(0, len(TEXTS) - 1), min_size=2, max_size=20), st.integers(1, 19), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_boundary_does_not_depend_on_what_comes_later(ids, cut, ignore_numeric):
    cut = min(cut, len(ids) - 1)
    table = boundaries(ignore_numeric=ignore_numeric)
    whole = points(table, [0], ids)
    start = points(table, [0], ids[:cut])
    assert start == [point for point in whole if point < 1 + cut]


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_the_last_token_decides_what_decoding_the_whole_prefix_decides(data, prompt):
    """The released code decodes prompt + answer so far and looks at the end of the text."""
    tokenizer, table = BYTES
    ids = [0] * prompt + data
    expected = [
        point
        for point in range(prompt + 1, len(ids))
        if tokenizer.decode(ids[:point], clean_up_tokenization_spaces=False).endswith(DEFAULT)
    ]
    assert points(table, ids[:prompt], ids[prompt:]) == expected


BYTES = (byte_tokenizer(), Boundaries.from_tokenizer(BoundaryConfig(), byte_tokenizer(), 260))


def test_the_released_rule_finds_delimiters_in_such_bytes():
    tokenizer, table = BYTES
    ids = tokenizer.encode("x, é.\nü,")
    assert len(points(table, [0], ids)) == 3  # nothing follows the last comma


# Plans


def plan(table: Boundaries, rows, marks, choose=None):
    return table.plan(TokenBatch.from_rows(rows, marks), choose).rows()


def test_latents_go_at_the_prompt_end_and_behind_the_answers_first_delimiters():
    ids = row("a", ".", "b", "a", ",", "b", ".", "\n", "b", ".", "a")
    marks = [False] * 3 + [True] * 8
    assert plan(boundaries(max_inference_insertions=2), [ids], [marks]) == [[(3, 0), (5, 1), (7, 1)]]


@pytest.mark.parametrize("cap", [0, 1, 2, 9])
def test_the_cap_counts_the_delimiters_and_not_the_prompt_end(cap):
    ids = row("a", ",", "b", ",", "b", ",", "b")
    (points,) = plan(boundaries(max_inference_insertions=cap), [ids], [[False] + [True] * 6])
    assert points[0] == (1, InsertionKind.PROMPT)
    assert len(points) - 1 == min(cap, 3)
    assert all(kind == InsertionKind.INFERENCE for _, kind in points[1:])


def test_delimiters_of_prompts_never_count_not_even_the_last_token():
    ids = row(".", ",", "\n", ",", "a", "b")
    assert plan(boundaries(), [ids], [[False] * 4 + [True] * 2]) == [[(4, 0)]]


def test_nothing_is_inserted_behind_the_last_token():
    assert plan(boundaries(), [row("a", "b", ".")], [[False, True, True]]) == [[(1, 0)]]


def test_every_turn_has_its_prompt_end_its_own_delimiters_and_its_own_cap():
    first, middle, second = row("b", ".", "b", ",", "b"), row(".", "a", ","), row(",", "a", ".", "a")
    ids = row("a") + first + middle + second
    marks = [False] + [True] * 5 + [False] * 3 + [True] * 4
    table = boundaries(max_inference_insertions=1)
    assert [(turn.begin, turn.points) for turn in table.turns(TokenBatch.from_rows([ids], [marks]))[0]] == [
        (1, (3, 5)),
        (9, (10, 12)),
    ]
    assert plan(table, [ids], [marks]) == [[(1, 0), (3, 1), (9, 0), (10, 1)]]


def test_what_stands_behind_a_rows_end_is_not_read():
    rows, marks = [row("a", "b", ",", "b", ",", "b"), row("a", "b")], [[False] + [True] * 5, [False, True]]
    batch = TokenBatch.from_rows(rows, marks)
    batch.ids[1, 2:] = ID["."]
    assert boundaries().plan(batch).rows() == [[(1, 0), (3, 1), (5, 1)], [(1, 0)]]


def test_the_caller_may_choose_among_the_points_of_each_turn():
    ids = row("a", "b", ",", "b", ",", "b")
    asked = []

    def last(index, points):
        asked.append((index, points))
        return points[-1:]

    marks = [False] + [True] * 5
    assert (
        plan(boundaries(max_inference_insertions=0), [ids, ids], [marks, marks], last)
        == [[(1, 0), (5, 1)]] * 2
    )
    assert asked == [(0, (3, 5)), (1, (3, 5))]


def test_an_answer_without_a_prompt_is_refused():
    with pytest.raises(
        ValueError, match="row 1 begins with a supervised token; a prompt of at least one token"
    ):
        plan(boundaries(), [row("a", "b")] * 2, [[False, True], [True, True]])


def test_another_cap_leaves_the_original_as_it_was():
    table = boundaries(max_inference_insertions=3)
    assert table.capped(1).config.max_inference_insertions == 1
    assert table.config.max_inference_insertions == 3


def test_decoding_asks_the_trigger_exactly_where_training_would_insert():
    model = tiny_memgen(cap=100)
    generation = generate(
        model, random_rows([9, 4, 17]), GenerationSettings(max_new_tokens=32, temperature=1.0)
    )
    planned = model.boundaries.plan(generation.as_batch()).rows()
    assert generation.plan.rows() == planned
    assert max(len(row) for row in planned) > 3
    assert sum(turn.invocations for turn in generation.turns) == sum(len(row) for row in planned)
