from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from memgen.environments.qa.competition_math import MATH, SUBJECTS

DATA = Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared")) / "data" / "math"
needs_real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the real MATH data is not in {DATA} (set MEMGEN_SHARED)"
)


def problem(i):
    return {
        "problem": f"What is  ${i}+1$?",
        "solution": f"It is $\\boxed{{{i + 1}}}$.",
        "level": "Level 1",
        "type": "A",
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_target_is_the_solution_as_it_is_and_scores_one(tmp_path):
    environment = MATH(str(write(tmp_path / "test.jsonl", [problem(1)])))
    (example,) = environment.examples("test")
    assert example.target == "It is $\\boxed{2}$."
    assert example.answer == "2"
    assert environment.messages(example)[0]["content"].endswith(
        "inside \\boxed{}.Question: What is  $1+1$?\n"
    )
    assert environment.reward(example, example.target).parts == {"correct": 1.0, "has_answer": 1.0}
    assert environment.reward(example, "It is 2.").parts == {"correct": 0.0, "has_answer": 0.0}
    assert environment.reward(example, "\\boxed{3}").parts == {"correct": 0.0, "has_answer": 1.0}


def test_no_tested_problem_is_trained_on(tmp_path):
    write(tmp_path / "train.jsonl", [problem(i) for i in range(200)])
    write(tmp_path / "test.jsonl", [{**problem(i), "problem": f"what is ${i}+1$?"} for i in range(50, 60)])
    environment = MATH(str(tmp_path), validation_fraction=0.2)
    train, val = ({e.answer for e in environment.examples(split)} for split in ("train", "val"))
    assert len(train) + len(val) == 190
    assert 10 < len(val) < 80
    assert not train & val
    assert not (train | val) & {str(i + 1) for i in range(50, 60)}
    other = MATH(str(tmp_path), validation_fraction=0.2, split_seed=1)
    assert {e.answer for e in other.examples("val")} != val


def test_the_original_folders_of_one_file_per_problem_are_read(tmp_path):
    for split in ("train", "test"):
        for subject in ("algebra", "geometry"):
            (tmp_path / split / subject).mkdir(parents=True)
            for i in (2, 10):
                text = json.dumps(problem(i + 100 * (split == "test")))
                (tmp_path / split / subject / f"{i}.json").write_text(text)
    assert [e.answer for e in MATH(str(tmp_path)).examples("test")] == ["103", "111", "103", "111"]


def test_the_hub_is_asked_for_all_subjects_and_for_math_500(monkeypatch):
    calls = []

    def load_dataset(*arguments, **settings):
        calls.append((arguments, settings))
        return [problem(len(calls))]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    environment = MATH(revision="r", validation_fraction=0.0)
    assert len(environment.examples("train")) == 7
    assert calls == [
        (("HuggingFaceH4/MATH-500",), {"split": "test"}),
        *((("EleutherAI/hendrycks_math", s), {"split": "train", "revision": "r"}) for s in SUBJECTS),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"solution": "\\boxed{1}"}, '"problem" is missing'),
        ({"problem": "a"}, '"solution" is missing'),
        ({"problem": "a", "solution": "it is 1"}, 'no \\\\boxed{} answer, and there is no column "answer"'),
    ],
)
def test_a_broken_record_is_an_error_that_names_file_line_and_column(tmp_path, row, message):
    write(tmp_path / "test.jsonl", [problem(1), row])
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 2: .*{message}|test\.jsonl, line 2: {message}"):
        MATH(str(tmp_path)).examples("test")


@needs_real_data
def test_all_500_real_gold_solutions_score_one_and_corrupted_ones_zero():
    environment = MATH(str(DATA), reward_workers=2)
    examples = environment.examples("test")
    assert len(examples) == 500

    def total(answers):
        return sum(reward.total for reward in environment.rewards(examples, answers))

    assert total([e.target for e in examples]) == 500.0
    assert total([e.target.replace("\\boxed", "").replace("\\fbox", "") for e in examples]) == 0.0
    assert total([f"{e.target}\n\\boxed{{{e.answer} + 1}}" for e in examples]) == 0.0


@needs_real_data
def test_the_rest_of_the_original_test_split_serves_for_training():
    environment = MATH(str(DATA), train_file="math_test5000.jsonl")
    sizes = [len(environment.examples(split)) for split in ("train", "val", "test")]
    assert sizes == [4274, 226, 500]
    assert len(MATH(str(DATA / "math_test5000.jsonl")).examples("test")) == 5000
