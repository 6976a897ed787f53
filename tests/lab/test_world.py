from collections import Counter

import pytest

from memgen.lab.world import (
    BILL_ITEMS,
    ITEMS,
    PRICES,
    World,
    bill_problem,
    bill_problems,
    sample_problems,
    shop_problem,
    shop_problems,
    shop_triples,
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
    found = {split: [p.prompt for p in sample_problems(task, split, 50)] for split in SPLITS}
    assert found["test"] == [p.prompt for p in sample_problems(task, "test", 50)]
    assert found["test"][:20] == [p.prompt for p in sample_problems(task, "test", 20)]
    prompts = [prompt for split in SPLITS for prompt in found[split]]
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


@pytest.mark.parametrize("task", ["shop", "bill"])
def test_problems_of_a_world_cannot_be_sampled_without_it(task):
    with pytest.raises(ValueError, match=f"{task}_problems"):
        sample_problems(task, "train", 1)


def test_a_bill_reads_as_documented():
    problem = bill_problem(("fig", "nut"), (4, 1))
    assert problem.prompt == "bill : fig , nut .\n"
    assert problem.solution == "fig 4 , nut 1 .\n# 1"


@pytest.mark.parametrize("split", SPLITS)
def test_bills_follow_the_worlds_prices(split):
    prices = {item: str(price) for item, price in World(1).prices().items()}
    for problem in bill_problems(World(1), split, 200):
        lines = [line.split(" ") for line in problem.steps.removesuffix(" .").split(" , ")]
        assert lines == [[item, prices[item]] for item in problem.items]
        assert problem.answer == lines[-1][1]
        assert len(set(problem.items)) == BILL_ITEMS


def test_no_two_splits_have_a_bill_of_the_same_items():
    bills = {split: {frozenset(p.items) for p in bill_problems(World(0), split, 600)} for split in SPLITS}
    assert not bills["train"] & bills["test"]
    assert not bills["train"] & bills["val"]
    assert not bills["val"] & bills["test"]


def test_a_longer_list_of_bills_begins_with_the_shorter():
    assert bill_problems(World(0), "val", 50)[:20] == bill_problems(World(0), "val", 20)
