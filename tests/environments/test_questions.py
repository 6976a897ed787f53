"""The items of question/answer benchmarks: which split they go to, what is left out, and how they are asked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memgen.environments.base import Example
from memgen.environments.code.bigcodebench import BigCodeBench
from memgen.environments.code.kodcode import KodCode
from memgen.environments.qa.aqua import AQuA
from memgen.environments.qa.competition_math import MATH
from memgen.environments.qa.gpqa import GPQA
from memgen.environments.qa.gsm8k import GSM8K
from memgen.environments.questions import Questions, hash_fraction, normalised, seeded_key, without
from memgen.environments.search.triviaqa import TriviaQA
from memgen.environments.sources import Source

DATA = Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"
needs_real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the real data is not in {DATA} (set MEMGEN_SHARED)"
)


def example(record, identifier):
    if "q" not in record.fields:
        return f"{record.where} asks nothing"
    return Example(identifier, record.text("q"), "target", "answer")


def write(path, questions):
    path.write_text("".join(json.dumps({"q": q}) + "\n" for q in questions))
    return path


def ids(questions):
    return {split: {e.id for e in questions.examples(split)} for split in ("train", "val", "test")}


ASKED = [f"Question {i}?" for i in range(300)]


def test_a_split_with_data_of_its_own_is_taken_as_it_is(tmp_path):
    for name, asked in (("train", ASKED), ("val", ASKED[:3]), ("test", ASKED[:2])):
        write(tmp_path / f"{name}.jsonl", asked)
    for test_fraction in (None, 0.2):
        split = ids(Questions(Source("T", str(tmp_path)), example, 0.5, test_fraction))
        assert {name: len(items) for name, items in split.items()} == {"train": 300, "val": 3, "test": 2}


@given(st.floats(0.0, 0.5), st.integers(0, 299), st.integers(0, 5), st.booleans())
def test_splits_share_no_question_and_miss_none_in_any_order(
    tmp_path_factory, fraction, repeated, seed, back
):
    folder = tmp_path_factory.mktemp("questions")
    asked = [*ASKED, f" {ASKED[repeated].upper()}"][:: -1 if back else 1]
    questions = Questions(
        Source("T", str(write(folder / "train.jsonl", asked))), example, fraction, split_seed=seed
    )
    train, val = ({normalised(e.question) for e in questions.examples(s)} for s in ("train", "val"))
    assert not train & val
    assert len(train | val) == 300
    assert len(questions.examples("train")) + len(questions.examples("val")) == 301
    assert abs(len(val) - fraction * 300) < 50
    assert val == {normalised(q) for q in ASKED if hash_fraction(seeded_key(q, seed, "val")) < fraction}


def test_a_set_that_is_published_whole_is_split_in_three(tmp_path):
    source = Source("T", str(write(tmp_path / "all.jsonl", ASKED)), lone_file="to_split")
    split = ids(Questions(source, example, 0.1, 0.2))
    assert split["train"] | split["val"] | split["test"] == {f"train-{i}" for i in range(1, 301)}
    assert sum(map(len, split.values())) == 300
    assert 12 <= len(split["val"]) <= 48
    assert 36 <= len(split["test"]) <= 84
    assert ids(Questions(source, example, 0.1, 0.2, split_seed=1)) != split


def test_files_of_splits_that_a_benchmark_does_not_have_are_not_looked_at(tmp_path):
    write(tmp_path / "train.jsonl", ASKED)
    write(tmp_path / "val.jsonl", ASKED[:3])
    val = Questions(Source("T", str(tmp_path), splits=("train", "test")), example, 0.2).examples("val")
    assert all(item.id.startswith("train-") for item in val)
    assert 30 <= len(val) <= 90


def test_records_that_are_left_out_are_counted_and_all_of_them_are_an_error(tmp_path, caplog):
    file = tmp_path / "test.jsonl"
    file.write_text('{"q": "a"}\n{"x": 1}\n{"x": 2}\n')
    questions = Questions(Source("T", str(file)), example)
    assert [e.id for e in questions.examples("test")] == ["test-1"]
    assert [e.id for e in questions.examples("test")] == ["test-1"]
    assert caplog.messages == [
        f"T: 2 of 3 test items are left out, the first because {file}, line 2 asks nothing"
    ]
    file.write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match=r"T: 1 of 1 test items are left out, .* line 1 asks nothing"):
        Questions(Source("T", str(file)), example).examples("test")


def test_the_caller_may_change_the_list_of_items_it_got(tmp_path):
    questions = Questions(Source("T", str(write(tmp_path / "test.jsonl", ASKED))), example)
    questions.examples("test").clear()
    assert len(questions.examples("test")) == 300


def test_the_prompt_is_filled_with_the_question(tmp_path):
    questions = Questions(Source("T", str(tmp_path)), example, prompt="Say: {question} {answer}\n")
    assert questions.messages(Example("1", "a {question}?", "", "")) == [
        {"role": "user", "content": "Say: a {question}? {answer}\n"}
    ]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"validation_fraction": -0.1}, "validation_fraction"),
        ({"test_fraction": 1.5}, "test_fraction"),
        ({"validation_fraction": 0.6, "test_fraction": 0.6}, "at most 1 together"),
        ({"prompt": "Solve it"}, "prompt must contain"),
    ],
)
def test_settings_out_of_range_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        Questions(Source("T", "nowhere"), example, **settings)


@given(st.text(), st.integers(0, 5))
def test_a_question_goes_to_the_same_side_however_it_is_spaced(question, seed):
    spaced = "  " + question.replace(" ", " \n ")
    assert normalised(spaced) == normalised(question)
    assert seeded_key(spaced, seed, "val") == seeded_key(question, seed, "val")
    assert 0.0 <= hash_fraction(seeded_key(question, seed, "val")) < 1.0


def test_an_item_is_recognised_by_any_of_its_marks():
    items = [Example(str(i), q, "", "") for i, q in enumerate(["a", "b", "c", "d"])]
    others = [Example("1", "x", "", ""), Example("9", "c", "", "")]
    assert [e.id for e in without(items, others, lambda e: [f"id {e.id}", e.question])] == ["0", "3"]


def real_questions(count):
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["question"] for line in lines[:count]]


def of_real_questions(folder, make):
    """A file with the questions of GSM8K in a benchmark's form, where its own training data cannot be had here."""
    rows = [make(i, q) for i, q in enumerate(real_questions(1000))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def kodcode(folder):
    def row(i, q):
        info = [{"function_name": "f"}]
        return {"question": q, "solution": "def f(): pass", "test": "def test_f(): f()", "test_info": info}

    of_real_questions(folder, row)
    return KodCode(str((folder / "train.jsonl").rename(folder / "all.jsonl")), isolation="limits")


def gpqa(folder):
    def row(i, q):
        wrong = {f"Incorrect Answer {j}": "no" for j in (1, 2, 3)}
        return {"Question": q, "Correct Answer": "yes", **wrong, "Explanation": ""}

    of_real_questions(folder, row).joinpath("train.jsonl").rename(folder / "gpqa_main.jsonl")
    text = json.dumps(row(0, "Another?")) + "\n"
    (folder / "gpqa_diamond.jsonl").write_text(text)
    return GPQA(str(folder))


def aqua(folder):
    def row(i, q):
        return {"question": q, "options": ["A)1", "B)2"], "rationale": "", "correct": "A"}

    return AQuA(str(of_real_questions(folder, row)))


def triviaqa(folder):
    return TriviaQA(str(of_real_questions(folder, lambda i, q: {"question": q, "answer": {"value": "x"}})))


# Computed by the release before the splits had one rule: a user's splits must not change with a release.
MEMBERS = {
    "gsm8k": (lambda folder: GSM8K(str(DATA / "gsm8k")), "val", 392, "3d89efd295747e58"),
    "gsm8k, a fifth": (
        lambda folder: GSM8K(str(DATA / "gsm8k"), validation_fraction=0.2),
        "val",
        1472,
        "836cc8bbbbc0bdb3",
    ),
    "math": (
        lambda folder: MATH(str(DATA / "math"), train_file="math_test5000.jsonl"),
        "val",
        226,
        "a7dbbabdf983cf34",
    ),
    "math, another seed": (
        lambda folder: MATH(str(DATA / "math"), train_file="math_test5000.jsonl", split_seed=3),
        "val",
        231,
        "3c72480e21348fc4",
    ),
    "aqua": (aqua, "val", 59, "e6ac2f89a82e9a16"),
    "gpqa": (gpqa, "val", 105, "d416bb8c89c9afb4"),
    "kodcode": (kodcode, "val", 100, "7e477500afb31368"),
    "kodcode's test": (kodcode, "test", 176, "8eba431f45ca97f9"),
    "bigcodebench": (
        lambda folder: BigCodeBench(str(DATA / "bigcodebench"), isolation="limits"),
        "test",
        # 71 before items whose tests need a missing library were left out: train-273, train-314 and train-630.
        68,
        "6fac8997701eb890",
    ),
    "triviaqa": (triviaqa, "val", 94, "488f79025fe0d8bb"),
}


@needs_real_data
@pytest.mark.parametrize("case", MEMBERS)
def test_the_members_of_a_split_stay_what_they_were(case, tmp_path):
    make, split, count, digest = MEMBERS[case]
    found = sorted(e.id for e in make(tmp_path).examples(split))
    assert (len(found), hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]) == (count, digest)
