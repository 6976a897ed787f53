from collections import Counter

import pytest

from memgen.lab.documents import DocumentMix, draw_document, words
from memgen.lab.world import (
    ITEMS,
    PRICES,
    World,
    draw_problem,
    sample_problems,
    shop_problem,
    shop_problems,
    shop_triples,
    split_of,
)

SPLITS = ("train", "val", "test")
SKILLS = ("open", "add", "rev", "walk")


def test_a_world_seed_fixes_the_prices():
    assert World(3).prices() == World(3).prices()
    assert World(3).prices() != World(4).prices()


@pytest.mark.parametrize("seed", range(5))
def test_prices_are_dealt_evenly(seed):
    counts = Counter(World(seed).prices().values())
    assert set(counts) == set(PRICES)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(World(seed).prices()) == set(ITEMS)


def test_every_triple_is_in_exactly_one_split():
    triples = [frozenset(triple) for split in SPLITS for triple in shop_triples(split)]
    assert len(triples) == len(set(triples)) == 560


def test_the_split_does_not_depend_on_the_order_of_the_items():
    for split in SPLITS:
        triples = {frozenset(triple) for triple in shop_triples(split)}
        assert {frozenset(problem.items) for problem in shop_problems(World(0), split)} == triples


@pytest.mark.parametrize("split", SPLITS)
def test_every_item_occurs_in_every_split(split):
    assert {item for triple in shop_triples(split) for item in triple} == set(ITEMS)


def test_there_are_enough_held_out_prompts():
    prompts = [problem.prompt for problem in shop_problems(World(0), "test")]
    assert len(prompts) == len(set(prompts)) >= 500


def test_a_shop_problem_reads_as_documented():
    problem = shop_problem(("fig", "nut", "tea"), (4, 1, 5))
    assert problem.prompt == "shop : fig , nut , tea .\n"
    assert problem.solution == "4 , 1 , 5 .\n# 1 0"


def test_shop_answers_follow_from_the_worlds_prices():
    prices = World(2).prices()
    for problem in shop_problems(World(2), "val"):
        asked = [prices[item] for item in problem.items]
        assert problem.steps == " , ".join(map(str, asked)) + " ."
        assert int(problem.answer.replace(" ", "")) == sum(asked)


@pytest.mark.parametrize("task", SKILLS)
def test_sampled_problems_are_the_same_in_every_run_and_disjoint_between_splits(task):
    drawn = {split: [p.prompt for p in sample_problems(task, split, 50)] for split in SPLITS}
    assert drawn["test"] == [p.prompt for p in sample_problems(task, "test", 50)]
    assert drawn["test"][:20] == [p.prompt for p in sample_problems(task, "test", 20)]
    prompts = [prompt for split in SPLITS for prompt in drawn[split]]
    assert len(prompts) == len(set(prompts))


@pytest.mark.parametrize("task", SKILLS)
def test_every_task_has_600_test_problems(task):
    assert len(sample_problems(task, "test", 600)) == 600


@pytest.mark.parametrize(
    ("task", "solve"),
    [
        ("add", lambda numbers: sum(int(n) for n in numbers)),
        ("rev", lambda numbers: int("".join(reversed(numbers)))),
        ("walk", lambda moves: int(moves[0]) + sum(_signed(move) for move in moves[1:])),
    ],
    ids=["add", "rev", "walk"],
)
def test_skills_are_solved_right(task, solve):
    for problem in sample_problems(task, "train", 100):
        given = problem.prompt.removeprefix(f"{task} : ").removesuffix(" .\n").split(" , ")
        assert int(problem.answer.replace(" ", "")) == solve(given)


def _signed(move):
    direction, _, steps = move.partition(" ")
    return int(steps) if direction == "up" else -int(steps)


def test_open_book_prices_are_those_of_the_list():
    for problem in sample_problems("open", "train", 100):
        listed, asked, _ = problem.prompt.split("\n")
        pairs = listed.removeprefix("list : ").removesuffix(" .").split(" , ")
        prices = dict(pair.split(" ") for pair in pairs)
        items = asked.removeprefix("shop : ").removesuffix(" .").split(" , ")
        assert problem.steps == " , ".join(prices[item] for item in items) + " ."


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="fewer than 100000 different problems"):
        sample_problems("walk", "val", 100_000)


def test_shop_problems_cannot_be_sampled_without_a_world():
    with pytest.raises(ValueError, match="shop_problems"):
        sample_problems("shop", "train", 1)


def test_pretraining_supervises_the_solution_and_nothing_else(rng):
    for _ in range(300):
        document = draw_document(DocumentMix(noted=0.0), rng)
        begin = document.supervised.index(True)
        assert all(document.supervised[begin:])
        assert document.tokens[begin - 1] == "\n"
        assert document.tokens[-1] == "<end>"


def test_notes_are_not_supervised_and_leave_the_document_as_it_was(rng):
    for _ in range(300):
        # A solution of `look` names items itself.
        document = draw_document(DocumentMix(look=0.0, noted=1.0, note_rate=1.0), rng)
        supervised = [t for t, s in zip(document.tokens, document.supervised, strict=True) if s]
        assert supervised[-1] == "<end>"
        assert supervised.count("#") == 1
        assert not set(supervised) & set(ITEMS)


def test_pretraining_never_asks_an_evaluated_prompt(rng):
    for _ in range(300):
        document = draw_document(DocumentMix(noted=0.0, shop=0.0), rng)
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
