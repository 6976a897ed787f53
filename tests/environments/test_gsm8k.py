from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from memgen.environments.qa.gsm8k import GSM8K

LINES = [
    {
        "question": f"How many eggs are {i} and 2?",
        "answer": f"{i}+2 = <<{i}+2={i + 2}>>{i + 2} eggs.\n#### {i + 2}",
    }
    for i in range(400)
]
SHARED = Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared")) / "data" / "gsm8k"
needs_real_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real GSM8K data is not in {SHARED} (set MEMGEN_SHARED)"
)


def write(directory: Path, train: list[object] | None = None, test: list[object] | None = None) -> Path:
    for name, lines in (("train.jsonl", train or LINES), ("test.jsonl", test or LINES[:3])):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def test_the_prompt_is_the_released_one_to_the_letter(tmp_path):
    environment = GSM8K(str(write(tmp_path)))
    assert environment.messages(environment.examples("test")[0]) == [
        {
            "role": "user",
            "content": "Solve the math problem with proper reasoning, and make sure to put the FINAL ANSWER inside "
            "\\boxed{}.Question: How many eggs are 0 and 2?\n",
        }
    ]


@pytest.mark.parametrize(
    ("style", "target"),
    [
        ("boxed", "0+2 = 2 eggs.\n\\boxed{2}"),
        ("released", "0+2 = <<0+2=2>>2 eggs.\\boxed{2}"),
        ("hashes", "0+2 = 2 eggs.\n#### 2"),
    ],
)
def test_the_target_is_the_solution_in_the_chosen_style_and_scores_one(tmp_path, style, target):
    environment = GSM8K(str(write(tmp_path)), target_style=style)
    example = environment.examples("test")[0]
    assert (example.id, example.target, example.answer) == ("test-1", target, "2")
    assert environment.reward(example, example.target).total == 1.0
    assert (
        environment.reward(example, example.target.replace("{2}", "{3}").replace("# 2", "# 3")).total == 0.0
    )
    assert environment.reward(example, "2").total == 0.0


def test_the_validation_split_does_not_depend_on_the_order_of_the_file(tmp_path):
    forward, backward = tmp_path / "a", tmp_path / "b"
    forward.mkdir()
    backward.mkdir()
    val = {e.question for e in GSM8K(str(write(forward))).examples("val")}
    assert val
    assert val == {e.question for e in GSM8K(str(write(backward, train=LINES[::-1]))).examples("val")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"answer": "b #### 1"}, '"question" is missing'),
        ({"question": "a"}, '"answer" is missing'),
        ({"question": " ", "answer": "b #### 1"}, '"question" is empty'),
        ({"question": "a", "answer": 5}, '"answer" is empty or no text: 5'),
        ({"question": "a", "answer": "b"}, "does not end in"),
        ({"question": "a", "answer": "b\n#### "}, "does not end in"),
    ],
)
def test_a_broken_line_is_an_error_that_names_file_and_number(tmp_path, line, message):
    environment = GSM8K(str(write(tmp_path, train=[*LINES[:6], line, *LINES[7:9]])))
    with pytest.raises(ValueError, match=message) as caught:
        environment.examples("train")
    assert str(caught.value).startswith(f"{tmp_path / 'train.jsonl'}, line 7: ")
    assert "\n" not in str(caught.value)
    assert len(environment.examples("test")) == 3, "the other file is not affected"


def test_absent_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory \.\./nowhere"):
        GSM8K("../nowhere").examples("train")
    with pytest.raises(FileNotFoundError, match=r"no file named test in .*set test_file"):
        GSM8K(str(tmp_path)).examples("test")
    with pytest.raises(FileNotFoundError, match=r"no file .*test\.jsonl"):
        GSM8K(str(tmp_path), test_file="test.jsonl").examples("test")
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"is a file, which is not read as test data; set test_file"):
        GSM8K(str(tmp_path / "train.jsonl")).examples("test")
    with pytest.raises(ValueError, match="has no lines"):
        GSM8K(str(tmp_path)).examples("train")


def test_files_may_have_other_names(tmp_path):
    write(tmp_path)
    (tmp_path / "test.jsonl").rename(tmp_path / "held_out.jsonl")
    elsewhere = GSM8K(str(tmp_path / "."), test_file=str(tmp_path / "held_out.jsonl"))
    assert len(elsewhere.examples("test")) == 3


def test_a_hub_name_is_read_through_datasets(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return LINES[:3]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples = GSM8K("openai/gsm8k").examples("test")
    assert [e.answer for e in examples] == ["2", "3", "4"]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]
    GSM8K("openai/gsm8k", revision="abc").examples("train")
    assert calls[1] == (("openai/gsm8k", "main"), {"split": "train", "revision": "abc"})


def test_a_single_file_is_the_split_that_its_name_says(tmp_path):
    write(tmp_path)
    assert len(GSM8K(str(tmp_path / "test.jsonl")).examples("test")) == 3
    alone = GSM8K(str(tmp_path / "train.jsonl"))
    assert len(alone.examples("train")) + len(alone.examples("val")) == 400


def test_many_answers_are_scored_as_one_by_one(tmp_path):
    environment = GSM8K(str(write(tmp_path)), reward_workers=2)
    examples = environment.examples("test")
    answers = [examples[0].target, "\\boxed{17}", "no answer"]
    rewards = environment.rewards(examples, answers)
    assert rewards == [environment.reward(e, a) for e, a in zip(examples, answers, strict=True)]
    assert [dict(r.parts) for r in rewards] == [
        {"correct": 1.0, "has_answer": 1.0},
        {"correct": 0.0, "has_answer": 1.0},
        {"correct": 0.0, "has_answer": 0.0},
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_fraction": 1.1},
        {"prompt": "Solve it"},
        {"target_style": "plain"},
    ],
)
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GSM8K(**settings)


@needs_real_data
@pytest.mark.parametrize("style", ["boxed", "released"])
def test_all_1319_real_gold_answers_score_one(style):
    environment = GSM8K(str(SHARED), target_style=style)
    examples = environment.examples("test")
    assert sum(environment.reward(e, e.target).total for e in examples) == 1319.0
    assert len(examples) == 1319


@needs_real_data
def test_corrupted_real_answers_score_zero():
    environment = GSM8K(str(SHARED))
    for example in environment.examples("test"):
        wrong = str(float(example.answer.replace(",", "")) + 1)
        assert environment.reward(example, f"{example.target}\n\\boxed{{{wrong}}}").total == 0.0
        assert environment.reward(example, example.target.replace("\\boxed", "")).total == 0.0


@needs_real_data
def test_the_real_splits_are_disjoint_and_complete():
    environment = GSM8K(str(SHARED))
    splits = [{e.question for e in environment.examples(split)} for split in ("train", "val", "test")]
    assert [len(split) for split in splits] == [7081, 392, 1319]
    assert len(set.union(*splits)) == 7473 + 1319
    assert not any("<<" in e.target or ">>" in e.target for e in environment.examples("train"))
