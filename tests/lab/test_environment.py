import pytest

from memgen.lab.environment import Lab


@pytest.fixture(scope="module")
def lab():
    return Lab()


def test_the_reference_completion_scores_one(lab):
    for split in ("train", "val", "test"):
        for example in lab.examples(split):
            assert lab.reward(example, example.target).total == 1.0


def test_examples_are_the_same_in_every_run(lab):
    assert lab.examples("test") == Lab().examples("test")


def test_defaults_hold_out_at_least_500_different_prompts(lab):
    prompts = {example.question for example in lab.examples("test")}
    assert len(prompts) >= 500
    for split in ("train", "val"):
        assert not prompts & {example.question for example in lab.examples(split)}


def test_ids_are_unique(lab):
    ids = [example.id for example in lab.examples("train")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("5 , 3 , 2 .\n# 1 0", {"answer": 1, "prices": 1, "exact": 1}),
        (" 5 , 3 , 2 .\n# 1 0\n", {"answer": 1, "prices": 1, "exact": 1}),
        ("5 , 2 , 3 .\n# 1 0", {"answer": 1, "prices": 0, "exact": 0}),
        ("5 , 3 , 2 .\n# 1 1", {"answer": 0, "prices": 1, "exact": 0}),
        ("5 , 3 , 2 .\n# 1 0 0", {"answer": 0, "prices": 1, "exact": 0}),
        ("5 , 3 , 2 .\n# 1", {"answer": 0, "prices": 1, "exact": 0}),
        ("5 , 3 , 2 .\n# 1 0 # 1 0", {"answer": 0, "prices": 1, "exact": 0}),
        ("5 , 3 .\n# 1 0", {"answer": 1, "prices": 0, "exact": 0}),
        ("5 , 3 , 2 . # 1 0", {"answer": 1, "prices": 0, "exact": 0}),
        ("5 , 3 , 2 .", {"answer": 0, "prices": 0, "exact": 0}),
        ("# 1 0", {"answer": 1, "prices": 0, "exact": 0}),
        ("", {"answer": 0, "prices": 0, "exact": 0}),
    ],
)
def test_answer_and_price_list_must_both_be_exact(lab, answer, parts):
    example = next(e for e in lab.examples("train") if e.target == "5 , 3 , 2 .\n# 1 0")
    reward = lab.reward(example, answer)
    assert reward.parts == parts
    assert reward.total == parts["exact"]


def test_tasks_take_turns_by_their_shares():
    lab = Lab(("shop", "shop", "add"), test_size=9)
    tasks = [example.meta["task"] for example in lab.examples("test")]
    assert tasks == ["shop", "shop", "add"] * 3


def test_a_mixture_says_of_which_task_an_answer_is():
    lab = Lab(("shop", "add"), test_size=2)
    shop, add = lab.examples("test")
    assert lab.reward(shop, shop.target).parts["shop/exact"] == 1.0
    assert lab.reward(add, shop.target).parts["add/exact"] == 0.0
    assert not {"add/exact"} & set(lab.reward(shop, shop.target).parts)
    alone = Lab(("shop", "shop"))
    assert set(alone.reward(shop, shop.target).parts) == {"answer", "prices", "exact"}


def test_a_world_changes_answers_but_not_questions():
    first, second = Lab(world_seed=0).examples("val"), Lab(world_seed=1).examples("val")
    assert [e.question for e in first] == [e.question for e in second]
    assert [e.answer for e in first] != [e.answer for e in second]


def test_the_constant_baseline_is_the_best_constant(lab):
    baseline = lab.constant_answer_baseline("test")
    examples = lab.examples("test")
    scores = [lab.reward(example, baseline.completion) for example in examples]
    assert sum(score.total for score in scores) / len(examples) == pytest.approx(baseline.total)
    assert sum(e.answer == baseline.answer for e in examples) / len(examples) == baseline.answer_accuracy
    assert baseline.total < 0.05 < baseline.answer_accuracy < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("shopp",)}, "shopp"),
        ({"tasks": ()}, "tasks must be some of"),
        ({"test_size": 0}, "test_size must be at least 1"),
    ],
    ids=["unknown task", "no task", "no examples"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lab(**arguments)


def test_more_examples_than_the_split_has_is_an_error():
    with pytest.raises(ValueError, match="set val_size lower"):
        Lab(val_size=5000).examples("val")
