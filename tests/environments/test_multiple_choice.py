from __future__ import annotations

import csv
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memgen.environments.qa.aqua import AQuA
from memgen.environments.qa.gpqa import GPQA
from memgen.environments.qa.multiple_choice import choice_reward, chosen_letter

DATA = Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared")) / "data" / "aqua"
needs_real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the real AQuA data is not in {DATA} (set MEMGEN_SHARED)"
)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        (r"so \boxed{C}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{C)}", "C"),
        (r"\boxed{ C. }", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{$C$}", "C"),
        (r"\boxed{A} or rather \boxed{B}", "B"),
        (r"\boxed{A or B}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{C) 600}", "C"),
        (r"\boxed{C. 21}", "C"),
        (r"\boxed{(C) \frac{1}{2}}", "C"),
        (r"\boxed{(\text{C})}", "C"),
        (r"\boxed{\text{C) }21}", "C"),
        (r"\boxed{**C**}", "C"),
        (r"\boxed{**C.** 21}", "C"),
        (r"\boxed{Option C}", "C"),
        (r"\boxed{C}, in \boxed{}", "C"),
        (r"\boxed{A, B}", None),
        (r"\boxed{(A) and (B)}", None),
        (r"\boxed{A) 5 or B) 6}", None),
        (r"\boxed{x = 5}", None),
        ("**Answer: C**", None),
        (r"\boxed{5}", None),
        (r"\boxed{}", None),
        (r"\boxed{C", None),
        ("the answer is C", None),
        ("#### C", None),
        ("", None),
    ],
)
def test_only_one_boxed_letter_is_a_choice_with_or_without_its_options_text(answer, letter):
    assert chosen_letter(answer) == letter


@given(st.text(), st.sampled_from("ABCDE"), st.sampled_from("ABCDEF"))
def test_whatever_stands_before_the_last_boxed_letter_decides(text, correct, chosen):
    reward = choice_reward(correct, 5, text.rstrip("\\") + "\n\\boxed{" + chosen + "}")
    assert reward.total == reward.parts["correct"] == float(correct == chosen)
    assert reward.parts["has_answer"] == float(chosen != "F")


def aqua(i, **changes):
    options = [f"{letter}){i * 10 + j}" for j, letter in enumerate("ABCDE")]
    return {
        "question": f"What is {i}?",
        "options": options,
        "rationale": f"It is {i}.",
        "correct": "C",
        **changes,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_aqua_asks_as_the_released_code_asks_and_learns_rationale_and_letter(tmp_path):
    environment = AQuA(str(write(tmp_path / "dev.json", [aqua(1)])))
    (example,) = environment.examples("val")
    assert environment.messages(example) == [
        {
            "role": "user",
            "content": "Solve the problem with proper reasoning, and make sure to put the FINAL CHOICE inside "
            "\\boxed{}.Question: What is 1?\n\nPlease choose one of the following options:\n"
            "A. 10\nB. 11\nC. 12\nD. 13\nE. 14\n\n",
        }
    ]
    assert example.target == "It is 1.\n\nTherefore, the final answer is \\boxed{C}"
    assert environment.reward(example, example.target).total == 1.0
    assert environment.reward(example, "\\boxed{D}").total == 0.0


def test_aqua_sets_a_seeded_share_aside_where_there_is_no_dev_file(tmp_path):
    write(tmp_path / "train.json", [aqua(i) for i in range(300)])
    environment = AQuA(str(tmp_path), validation_fraction=0.2)
    train, val = ({e.id for e in environment.examples(s)} for s in ("train", "val"))
    assert not train & val
    assert len(train | val) == 300
    assert 30 < len(val) < 90
    write(tmp_path / "dev.json", [aqua(i) for i in range(3)])
    with_dev = AQuA(str(tmp_path), validation_fraction=0.2)
    assert len(with_dev.examples("train")) == 300
    assert len(with_dev.examples("val")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": "F"}, '"correct" must be a letter of the 5 options'),
        ({"correct": None}, '"correct" is empty or no text'),
        ({"options": ["A)1", "C)2"]}, r'"options" should have an option that begins with B\)'),
        ({"options": "A)1"}, '"options" must be a list'),
        ({"question": ""}, '"question" is empty'),
    ],
)
def test_a_broken_aqua_record_is_an_error_that_names_file_line_and_column(tmp_path, changes, message):
    write(tmp_path / "test.json", [aqua(1), aqua(2, **changes)])
    with pytest.raises(ValueError, match=rf"test\.json, line 2: {message}"):
        AQuA(str(tmp_path)).examples("test")


@needs_real_data
def test_all_254_real_gold_letters_score_one_and_all_others_zero():
    environment = AQuA(str(DATA))
    examples = environment.examples("val")
    assert len(examples) == 254
    for example in examples:
        assert environment.reward(example, example.target).total == 1.0
        assert environment.reward(example, example.target.replace("\\boxed", "")).total == 0.0
        for letter in set("ABCDE") - {example.answer}:
            assert environment.reward(example, f"{example.target}\n\\boxed{{{letter}}}").total == 0.0


def gpqa(i, **changes):
    wrong = {f"Incorrect Answer {j}": f"wrong {j}, of {i}" for j in (1, 2, 3)}
    return {
        "Question": f"Why {i},\nof all?",
        "Correct Answer": f"right {i}",
        **wrong,
        "Explanation": f"Because {i}.",
        "Record ID": f"rec{i}",
        **changes,
    }


def write_gpqa(folder, name, rows):
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def gpqa_folder(tmp_path):
    write_gpqa(tmp_path, "gpqa_main.csv", [gpqa(i) for i in range(100)])
    diamond = [gpqa(i) for i in range(20)]
    diamond += [gpqa(i, **{"Record ID": f"new{i}", "Question": f"why {i}, of  ALL?"}) for i in range(20, 40)]
    diamond += [gpqa(i, Question=f"Reworded {i}") for i in range(40, 50)]
    return write_gpqa(tmp_path, "gpqa_diamond.csv", diamond)


def test_no_diamond_item_is_trained_on_whether_told_by_id_or_by_text(gpqa_folder):
    environment = GPQA(str(gpqa_folder), validation_fraction=0.3)
    train, val, test = (
        {e.meta["record_id"] for e in environment.examples(s)} for s in ("train", "val", "test")
    )
    assert train | val == {f"rec{i}" for i in range(50, 100)}
    assert not train & val
    assert val
    assert len(test) == 50


def test_training_without_the_diamond_set_is_refused(gpqa_folder):
    (gpqa_folder / "gpqa_diamond.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file named gpqa_diamond .*set test_file"):
        GPQA(str(gpqa_folder)).examples("train")
    write_gpqa(gpqa_folder, "gpqa_extended.csv", [gpqa(i) for i in range(10)])
    with pytest.raises(FileNotFoundError, match=r"gpqa_diamond.*set diamond_file"):
        GPQA(str(gpqa_folder), test_set="gpqa_extended").examples("train")
    alone = GPQA(str(gpqa_folder / "gpqa_main.csv"))
    assert len(alone.examples("test")) == 100
    with pytest.raises(FileNotFoundError, match="is a file"):
        alone.examples("train")


def test_options_are_shuffled_by_seed_and_item_alone(gpqa_folder):
    def options(**settings):
        return {e.meta["record_id"]: e.question for e in GPQA(str(gpqa_folder), **settings).examples("test")}

    first = options()
    assert first == options()
    assert first != options(option_seed=1)
    write_gpqa(gpqa_folder, "gpqa_diamond.csv", [gpqa(i) for i in range(19, -1, -1)])
    assert options().items() <= first.items(), "the order of the file changes nothing"
    letters = Counter(e.answer for e in GPQA(str(gpqa_folder)).examples("train"))
    assert set(letters) == set("ABCD")


def test_the_gold_letter_is_the_place_of_the_correct_answer(gpqa_folder):
    environment = GPQA(str(gpqa_folder))
    for example in environment.examples("test"):
        lines = example.question.splitlines()
        assert any(line.startswith(f"{example.answer}. right") for line in lines)
        assert example.target.startswith("Because")
        assert environment.reward(example, example.target).total == 1.0
        for letter in set("ABCD") - {example.answer}:
            assert environment.reward(example, f"\\boxed{{{letter}}}").total == 0.0


def test_a_missing_gpqa_column_is_an_error_that_names_file_line_and_column(gpqa_folder):
    rows = [{k: v for k, v in gpqa(i).items() if k != "Incorrect Answer 3"} for i in range(2)]
    write_gpqa(gpqa_folder, "gpqa_diamond.csv", rows)
    with pytest.raises(ValueError, match=r'gpqa_diamond\.csv, line 2: "Incorrect Answer 3" is missing'):
        GPQA(str(gpqa_folder)).examples("test")


def test_gpqa_asks_the_hub_for_main_and_diamond(monkeypatch):
    calls = []

    def load_dataset(*arguments, **settings):
        calls.append((arguments, settings))
        return [gpqa(i) for i in range(10 if arguments[1] == "gpqa_main" else 3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    environment = GPQA(revision="r", validation_fraction=0.0)
    assert len(environment.examples("train")) == 7
    assert sorted(calls) == [
        (("Idavidrein/gpqa", name), {"split": "train", "revision": "r"})
        for name in ("gpqa_diamond", "gpqa_main")
    ]
