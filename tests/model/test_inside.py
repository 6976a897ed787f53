"""What the end of a text is inside of: rules by character against definitions over the whole text."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.model.inside import KINDS, TextReader

TEXTS = st.text(alphabet="1 2.,$€<>()[]`a\n", max_size=40)


def read(kind: str, *pieces: str) -> bool:
    reader = TextReader((kind,))
    for piece in pieces:
        reader.read(piece)
    return reader.inside is not None


def bracket(text: str) -> bool:
    depth = 0
    for char in text[text.rfind("\n\n") + 1 :]:
        depth = max(0, depth + (char in "([{") - (char in ")]}"))
    return depth > 0


DEFINITIONS = {
    "number": lambda text: bool(re.search(r"[0-9][.,]?\Z", text)),
    "currency": lambda text: bool(re.search(r"[$€]( ?|( ?[0-9]([.,]?[0-9])*[.,]?))\Z", text)),
    "calculator": lambda text: "<<" in re.sub("<<.*?>>", "|", text.rpartition("\n")[2]),
    "bracket": bracket,
    "code_fence": lambda text: len(re.findall("`{3,}", text)) % 2 == 1,
}


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_rules_by_character_agree_with_the_definition_over_the_whole_text(kind, text):
    assert read(kind, text) == DEFINITIONS[kind](text)


@given(TEXTS, st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=100, deadline=None)
def test_how_a_text_is_cut_into_pieces_does_not_matter(text, cuts):
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(ends)]
    for kind in KINDS:
        assert read(kind, *pieces) == read(kind, text)


@pytest.mark.parametrize(
    ("kind", "text", "inside"),
    [
        ("number", "It costs 1,", True),
        ("number", "It costs 1,234.5.", True),  # it may go on
        ("number", "It costs 1,234. ", False),
        ("number", "one, two,", False),
        ("currency", "for $ 1,234.", True),
        ("currency", "for €3,", True),
        ("currency", "for 3,", False),
        ("currency", "$x, $y,", False),
        ("calculator", "48/2 = <<48/2=24.", True),
        ("calculator", "48/2 = <<48/2=24>>24.", False),
        ("calculator", "cout << x;\n", False),  # ends with the line
        ("bracket", "f(a,", True),
        ("bracket", "in [0, 1),", False),
        ("bracket", "a) first, b) second,", False),
        ("bracket", "Sad :(\n\nNow,", False),  # never closed, ends with the paragraph
        ("code_fence", "```python\nx = 1\n", True),
        ("code_fence", "```python\nx = 1\n```\n", False),
        ("code_fence", "````\n", True),
        ("code_fence", "``x``,", False),
    ],
)
def test_examples(kind, text, inside):
    assert read(kind, text) == inside


def test_the_first_of_the_kinds_is_named():
    reader = TextReader(("bracket", "number"))
    reader.read("f(1,")
    assert reader.inside == "bracket"
    reader.read("2),")
    assert reader.inside is None
    reader.read(" 3.")
    assert reader.inside == "number"
