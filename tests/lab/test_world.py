from collections import Counter

import pytest

from memgen.lab.world import (
    HOPS,
    ITEMS,
    PLACES,
    PRICES,
    SHORT_HOPS,
    TURNS,
    World,
    route_problem,
    route_problems,
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


@pytest.mark.parametrize("task", ["shop", "route"])
def test_problems_of_a_world_cannot_be_sampled_without_it(task):
    with pytest.raises(ValueError, match=f"{task}_problems"):
        sample_problems(task, "train", 1)


@pytest.mark.parametrize("seed", range(5))
def test_every_place_is_left_of_one_place_and_right_of_another(seed):
    neighbours = World(seed).neighbours()
    assert neighbours == World(seed).neighbours()
    assert neighbours != World(seed + 1).neighbours()
    for turn in TURNS:
        assert {neighbours[place, turn] for place in PLACES} == set(PLACES)
    for place in PLACES:
        assert len({place, *(neighbours[place, turn] for turn in TURNS)}) == 3


def test_a_route_reads_as_documented():
    problem = route_problem("hall", ("left", "left"), {("hall", "left"): "den", ("den", "left"): "inn"})
    assert problem.prompt == "route : hall , 1 left , 2 left .\n"
    assert problem.solution == "hall 1 left , den 2 left , inn .\n# inn"


@pytest.mark.parametrize("split", SPLITS)
def test_routes_follow_the_map(split):
    neighbours = World(1).neighbours()
    for problem in route_problems(World(1), split)[:200]:
        start, *turns = problem.prompt.removeprefix("route : ").removesuffix(" .\n").split(" , ")
        place, visited = start, [start]
        for number, turn in enumerate(turns, 1):
            assert turn.split(" ")[0] == str(number)
            place = neighbours[place, turn.split(" ")[1]]
            visited.append(place)
        assert problem.items == tuple(visited)
        assert problem.answer == place
        assert [clause.split(" ")[0] for clause in problem.steps.removesuffix(" .").split(" , ")] == visited


def test_held_out_routes_are_long_and_never_trained_on():
    prompts = {split: [problem.prompt for problem in route_problems(World(0), split)] for split in SPLITS}
    for split in ("val", "test"):
        assert len(prompts[split]) == len(set(prompts[split]))
        assert {prompt.count(",") for prompt in prompts[split]} == set(HOPS)
        assert not set(prompts[split]) & set(prompts["train"])
    assert not set(prompts["val"]) & set(prompts["test"])
    assert len(prompts["test"]) >= 500
    assert {prompt.count(",") for prompt in prompts["train"]} == {*SHORT_HOPS, *HOPS}


def test_training_sees_every_fact_of_the_map_by_itself():
    single = {
        problem.prompt for problem in route_problems(World(0), "train") if problem.prompt.count(",") == 1
    }
    assert len(single) == len(PLACES) * len(TURNS)
