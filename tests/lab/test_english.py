import pytest

from memgen.lab.english import WORKED, EnglishLab
from memgen.lab.environment import Lab
from memgen.lab.world import World

SPLITS = ("train", "val", "test")
TASKS = ("shop", "bill", "open", "copy")


@pytest.fixture(scope="module")
def labs():
    return {task: EnglishLab((task,), train_size=400, test_size=400) for task in TASKS}


def first(task, items, split="train"):
    """The example of a task about these items, asked in this order."""
    lab = EnglishLab((task,), train_size=2000, bill_items=3)
    return lab, next(e for e in lab.examples(split) if e.meta["items"] == items)


def test_a_shop_problem_reads_as_documented():
    lab, example = first("shop", ("egg", "oat", "ham"))
    assert example.question == "What do an egg, oats and ham cost?"
    assert example.target == "1 + 3 = 4, 4 + 5 = 9"
    assert lab.messages(example) == [{"role": "user", "content": example.question}]


def test_a_bill_reads_as_documented():
    lab, example = first("bill", ("egg", "oat", "ham"))
    assert example.question == "Write the bill for an egg, oats and ham."
    assert example.target == "egg 1, oats 3, ham 5"
    assert lab.messages(example) == [{"role": "user", "content": example.question}]


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_answer_is_right_in_every_part(labs, task):
    lab = labs[task]
    for split in SPLITS:
        for example in lab.examples(split):
            assert lab.reward(example, example.target).parts == {"answer": 1.0, "prices": 1.0, "exact": 1.0}


@pytest.mark.parametrize("task", TASKS)
def test_no_two_splits_share_an_unordered_list_of_items(labs, task):
    asked = {split: {frozenset(e.meta["items"]) for e in labs[task].examples(split)} for split in SPLITS}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["val"]
    assert not asked["val"] & asked["test"]


def test_items_and_prices_are_those_of_the_lab(labs):
    lab = Lab(train_size=400, test_size=400)
    prices = World(0).prices()
    for split in SPLITS:
        for ours, theirs in zip(labs["shop"].examples(split), lab.examples(split), strict=True):
            assert ours.meta["items"] == theirs.meta["items"]
            assert int(ours.answer) == sum(prices[item] for item in ours.meta["items"])
    for example in labs["bill"].examples("val"):
        assert [int(line.split()[1]) for line in example.target.split(", ")] == [
            prices[item] for item in example.meta["items"]
        ]


@pytest.mark.parametrize("task", ["open", "copy"])
def test_prices_in_the_prompt_contradict_the_world_and_are_those_asked_for(labs, task):
    prices = World(0).prices()
    for example in labs[task].examples("test"):
        told = [int(digit) for digit in example.question if digit.isdigit()]
        assert all(price != prices[item] for item, price in zip(example.meta["items"], told, strict=True))
        if task == "open":
            assert (
                example.target
                == f"{told[0]} + {told[1]} = {sum(told[:2])}, {sum(told[:2])} + {told[2]} = {sum(told)}"
            )
        else:
            assert example.question == f"Repeat this: {example.target}"


@pytest.mark.parametrize("task", ["open", "copy"])
def test_worked_examples_are_right_and_none_is_held_out(labs, task):
    lab = labs[task]
    held_out = {frozenset(e.meta["items"]) for split in ("val", "test") for e in lab.examples(split)}
    *worked, question = lab.messages(lab.examples("test")[0])
    assert [message["role"] for message in worked] == ["user", "assistant"] * WORKED[task]
    for shown in worked[::2]:
        names = {
            name for name in World(0).prices() if f" {name}" in shown["content"].lower().replace(":", "")
        }
        assert frozenset(names) not in held_out
    assert question == {"role": "user", "content": lab.examples("test")[0].question}


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("1 + 3 = 4, 4 + 5 = 9", (1, 1, 1)),
        (" 1 + 3 = 4, 4 + 5 = 9.\n", (1, 1, 1)),
        ("1 + 3 = 4, 4 + 5 = 9..", (0, 0, 0)),
        ("1 + 3 = 4, 4 + 5 = 10", (0, 1, 0)),
        ("1 + 3 = 5, 5 + 5 = 9", (1, 1, 0)),
        ("3 + 1 = 4, 4 + 5 = 9", (1, 0, 0)),
        ("1+3=4, 4+5=9", (0, 0, 0)),
        ("4 + 5 = 9", (1, 0, 0)),
        ("The sum is = 9", (1, 0, 0)),
        ("9", (0, 0, 0)),
        ("1 + 3 = 4, 4 + 5 = 9, 9 + 1 = 10", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_the_shops_prices_and_sum_are_scored_apart(answer, parts):
    lab, example = first("shop", ("egg", "oat", "ham"))
    reward = lab.reward(example, answer)
    assert reward.parts == dict(zip(("answer", "prices", "exact"), parts, strict=True))
    assert reward.total == reward.parts["exact"]


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("egg 1, oats 3, ham 5", (1, 1, 1)),
        ("egg 1, oats 3, ham 5. ", (1, 1, 1)),
        ("egg 1, oat 3, ham 5", (1, 1, 0)),
        ("egg 1, oats 4, ham 5", (1, 0, 0)),
        ("egg 1, oats 3", (0, 0, 0)),
        ("egg 1, oats 3, ham 5, ham 5", (1, 0, 0)),
        ("5", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_a_bills_prices_are_scored_apart_from_its_names(answer, parts):
    lab, example = first("bill", ("egg", "oat", "ham"))
    assert lab.reward(example, answer).parts == dict(zip(("answer", "prices", "exact"), parts, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_that_does_not_depend_on_the_question_is_worth_little(labs, task):
    lab = labs[task]
    baseline = lab.constant_answer_baseline("test")
    scores = [lab.reward(example, baseline.completion) for example in lab.examples("test")]
    assert sum(score.total for score in scores) / len(scores) == pytest.approx(baseline.total)
    assert baseline.total < 0.05
    assert baseline.answer_accuracy < 0.35


def test_a_mixture_says_of_which_task_an_answer_is():
    lab = EnglishLab(("shop", "copy"), test_size=2)
    shop, copy = lab.examples("test")
    assert lab.reward(shop, shop.target).parts["shop/exact"] == 1.0
    assert lab.reward(copy, shop.target).parts["copy/exact"] == 0.0
    assert (shop.id, copy.id) == ("test-0", "test-1")


@pytest.mark.parametrize("items", [2, 6, 14])
def test_a_bill_has_as_many_items_as_asked_for(items):
    for example in EnglishLab(("bill",), bill_items=items, train_size=50, val_size=9, test_size=9).examples(
        "train"
    ):
        assert len(example.target.split(", ")) == len(set(example.meta["items"])) == items


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("walk",)}, "tasks must be some of shop, bill, open, copy, got"),
        ({"bill_items": 1}, "bill_items must be in 2 to 14, got 1"),
        ({"bill_items": 15}, "bill_items must be in 2 to 14, got 15"),
        ({"val_size": 0}, "val_size must be at least 1"),
    ],
    ids=["unknown task", "short bill", "long bill", "no examples"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnglishLab(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_size": 5000}, "set val_size lower"),
        (
            {"tasks": ("bill",), "bill_items": 2, "val_size": 5000},
            "fewer than 5000 different bills of 2 items",
        ),
    ],
    ids=["shop", "bill"],
)
def test_more_examples_than_the_split_has_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnglishLab(**arguments).examples("val")
