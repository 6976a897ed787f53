import random
from itertools import pairwise

import pytest

from memgen.lab.documents import KINDS, DocumentMix, draw_document, words
from memgen.lab.text_world import MAX_TURNS
from memgen.lab.world import ITEMS, PLACES, ROOMS, TURNS, draw_problem, split_of

SOLVED = ("open", "shop", "route", "add", "rev", "walk")
WORLDS = ("shop", "route", "text_world")
"""Kinds whose facts a document draws for itself."""


def texts(kind, rng, count=200, **settings):
    return [draw_document(DocumentMix.of(kind, **settings), rng) for _ in range(count)]


def supervised(document):
    return [token for token, mark in zip(document.tokens, document.supervised, strict=True) if mark]


def test_shares_add_up_to_one():
    assert sum(getattr(DocumentMix(), kind) for kind in KINDS) == pytest.approx(1.0)


def test_every_kind_occurs(rng):
    drawn = {DocumentMix().draw_kind(rng) for _ in range(500)}
    assert drawn == set(KINDS)


def test_the_same_seed_draws_the_same_documents():
    first, second = (
        [draw_document(DocumentMix(), rng) for _ in range(100)]
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
        assert not set(written) & set(ITEMS)


def test_relevant_notes_inside_a_route_say_where_the_next_turn_leads(rng):
    for document in texts("route", rng, noted=1.0, note_rate=1.0, relevant=1.0):
        begin = document.supervised.index(True)
        comma = None
        for index, (token, mark) in enumerate(zip(document.tokens, document.supervised, strict=True)):
            if mark and index > begin and comma is not None:
                note = document.tokens[comma + 1 : index]
                leads_to = [place for turn, place in pairwise(note) if turn in TURNS]
                assert leads_to[0] == token
                comma = None
            if mark and token == ",":
                comma = index


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


def test_closed_book_prices_in_pretraining_say_nothing_about_the_world(rng):
    """An item's price is near its mean over many documents, so that no world can be learnt."""
    seen = {item: [] for item in ITEMS}
    for _ in range(4000):
        problem = draw_problem("shop", rng)
        for item, price in zip(problem.items, words(problem.steps)[::2], strict=True):
            seen[item].append(int(price))
    for prices in seen.values():
        assert sum(prices) / len(prices) == pytest.approx(3, abs=0.3)


def test_routes_in_pretraining_say_nothing_about_the_world(rng):
    """A turn leads from a place to every other place about equally often."""
    seen = {}
    for _ in range(6000):
        problem = draw_problem("route", rng)
        turns = [word for word in words(problem.prompt) if word in TURNS]
        seen.setdefault((problem.items[0], turns[0]), []).append(problem.items[1])
    assert len(seen) == len(PLACES) * len(TURNS)
    for (place, _), led in seen.items():
        assert place not in led
        assert max(led.count(other) for other in PLACES) / len(led) < 0.25
