import random

import pytest

from memgen.lab.documents import KINDS, DocumentMix, random_document, words
from memgen.lab.text_world import MAX_TURNS
from memgen.lab.world import ITEMS, ROOMS, random_problem, split_of

SOLVED = ("open", "shop", "bill", "add", "rev", "walk")
WORLDS = ("shop", "bill", "text_world")
"""Kinds whose facts every document samples."""


def texts(kind, rng, count=200, **settings):
    return [random_document(DocumentMix.of(kind, **settings), rng) for _ in range(count)]


def supervised(document):
    return [token for token, mark in zip(document.tokens, document.supervised, strict=True) if mark]


def test_shares_add_up_to_one():
    assert sum(getattr(DocumentMix(), kind) for kind in KINDS) == pytest.approx(1.0)


def test_every_kind_occurs(rng):
    found = {DocumentMix().random_kind(rng) for _ in range(500)}
    assert found == set(KINDS)


def test_the_same_seed_draws_the_same_documents():
    first, second = (
        [random_document(DocumentMix(), rng) for _ in range(100)]
        for rng in (random.Random(3), random.Random(3))
    )
    assert first == second


@pytest.mark.parametrize("kind", SOLVED)
def test_pretraining_supervises_the_solution_and_nothing_else(kind, rng):
    for document in texts(kind, rng, noted=0.0):
        begin = document.supervised.index(True)
        assert all(document.supervised[begin:])
        assert document.tokens[begin - 1] == "\n"
        assert document.tokens[-1] == "<end>"


@pytest.mark.parametrize("kind", SOLVED)
def test_notes_are_not_supervised_and_leave_the_solution_as_it_was(kind, rng):
    for document in texts(kind, rng, noted=1.0, note_rate=1.0):
        written = supervised(document)
        assert len(written) < len(document.tokens)
        assert written[-1] == "<end>"
        assert written.count("#") == 1
        assert kind == "bill" or not set(written) & set(ITEMS)


def test_relevant_notes_in_a_bill_begin_with_the_price_that_comes_next(rng):
    for document in texts("bill", rng, noted=1.0, note_rate=1.0, relevant=1.0):
        marked = list(zip(document.tokens, document.supervised, strict=True))
        behind = [i + 1 for i, (token, mark) in enumerate(marked) if mark and token == ","]
        behind.append(document.tokens.index("\n") + 1)
        for begin in behind:
            upcoming = [token for token, mark in marked[begin:] if mark][:2]
            assert list(document.tokens[begin : begin + 2]) == upcoming
            assert not any(document.supervised[begin : begin + 2])


def test_a_recall_asks_only_for_what_was_said_before(rng):
    for document in texts("recall", rng):
        facts = {}
        pairs = zip(document.tokens[::2], document.tokens[1::2], document.supervised[1::2], strict=True)
        for item, value, mark in pairs:
            assert item in ITEMS
            assert mark == (item in facts)
            assert facts.setdefault(item, value) == value
        assert not any(document.supervised[::2])
        assert len(facts) >= 3


@pytest.mark.parametrize("noted", [0.0, 1.0], ids=["without notes", "with notes"])
def test_episodes_supervise_actions_and_never_go_back_in_search(noted, rng):
    for document in texts("text_world", rng, noted=noted, relevant=1.0):
        actions, action = [], []
        for token in supervised(document):
            if token == "<end>":
                actions.append(action)
                action = []
            else:
                action.append(token)
        assert not action
        assert 3 <= len(actions) <= MAX_TURNS
        rooms = [document.tokens[document.tokens.index("\n") + 1]]
        for verb, what in actions:
            assert what in (ROOMS if verb == "go" else ITEMS)
            if verb == "go":
                assert what != rooms[-1]
                rooms.append(what)
        # Only the room in which the goal was seen before the thing was found may be entered twice.
        assert len(rooms) - len(set(rooms)) <= 1


def test_episodes_whose_notes_tell_both_places_take_the_shortest_way(rng):
    solved = 0
    for document in texts("text_world", rng, noted=1.0, note_rate=1.0, relevant=1.0):
        text = " ".join(document.tokens)
        solved += " put " in text and supervised(document)[-3] == "put"
    assert solved > 150


@pytest.mark.parametrize("kind", ["open", "add", "rev", "walk"])
def test_pretraining_never_asks_an_evaluated_prompt(kind, rng):
    for document in texts(kind, rng, noted=0.0):
        prompt = document.tokens[: document.supervised.index(True)]
        text = " ".join(prompt).replace(" \n ", "\n").replace(" \n", "\n")
        assert split_of(text) == "train"


@pytest.mark.parametrize(("task", "first", "every"), [("shop", 0, 2), ("bill", 1, 3)])
def test_closed_book_prices_in_pretraining_say_nothing_about_the_world(task, first, every, rng):
    """An item's price is near its mean over many documents, so that no world can be learnt."""
    seen = {item: [] for item in ITEMS}
    for _ in range(4000):
        problem = random_problem(task, rng)
        for item, price in zip(problem.items, words(problem.steps)[first::every], strict=True):
            seen[item].append(int(price))
    for prices in seen.values():
        assert sum(prices) / len(prices) == pytest.approx(3, abs=0.3)
