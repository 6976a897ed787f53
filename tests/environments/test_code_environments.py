"""KodCode and BigCodeBench: data, prompts, and which code of an answer runs. What runs it: test_sandbox.py."""

from __future__ import annotations

import json
import sys
import time
import types

import pyarrow
import pytest
from pyarrow import parquet

from memgen.environments.code.answers import extract_code, with_name
from memgen.environments.code.bigcodebench import BigCodeBench
from memgen.environments.code.execution import RunLimits
from memgen.environments.code.kodcode import KodCode

LIMITS = {"isolation": "limits", "reward_workers": 1}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\nf()\n```", "def f(): pass\n"),
        ("```python\ndef g(): pass\n```\n```py\nf = 1\n```", "f = 1\n"),
        ("```python\na = 1\n```\n```python\nb = 1\n```", "b = 1\n"),
        ("```bash\nls\n```\n```python\na = 1\n```", "a = 1\n"),
        ("```python\ndef f(): pa", "def f(): pa\n"),
        ("", ""),
    ],
)
def test_the_last_block_that_defines_the_function_is_the_code(answer, code):
    assert extract_code(answer, defines="f") == code


CODE = "def f(x):\n    return 1\n"
DOCUMENTED = """def f(x):
    '''As in
```
f(1)
```
    '''
    return 1
"""
FORMS = {
    "a list": ("1. So:\n   ```python\n   def f(x):\n       return 1\n   ```\n", CODE),
    "an item": ("- ```python\n  def f(x):\n      return 1\n  ```\n", CODE),
    "indented code": ("```python\n  def f(x):\n      return 1\n```", CODE),
    "a glued fence": ("```python\ndef f(x):\n    return 1```\nDone.", CODE),
    "tildes": (f"~~~python\n{CODE}~~~\nDone.", CODE),
    "four ticks": (f"````python\n{CODE}````\nDone.", CODE),
    "a block in Markdown": (f"````markdown\n```python\n{CODE}```\n````", CODE),
    "a fence in a docstring": (f"```python\n{DOCUMENTED}```\nDone.", DOCUMENTED),
    "a string that never ends": ("```python\ndef f(x):\n    '''oh\n```\nDone.", "def f(x):\n    '''oh\n"),
    "CRLF": (f"```python\n{CODE}```\n".replace("\n", "\r\n"), CODE),
    "a byte order mark": (f"\ufeff```python\n{CODE}```", CODE),
    "a version": (f"```python3.11\n{CODE}```", CODE),
    "braces": (f"```{{python}}\n{CODE}```", CODE),
    "no closing fence": (f"```python\n{CODE}```python\nf(1)\n```", CODE),
    "another name, then its use": ("```python\ndef g(x): return 1\n```\n```python\ng(1)\n```", "def g(x): return 1\n"),
    "another name, then its tests": ("```python\ndef g(x): return 1\n```\n```python\ndef test_g(): g(1)\n```", "def g(x): return 1\n"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "code"), FORMS.values(), ids=FORMS)
def test_code_is_found_in_the_forms_in_which_models_write_it(answer, code):
    assert extract_code(answer, defines="f") == code


@pytest.mark.parametrize(
    "block",
    [
        "```",
        "```a",
        "```\n",
        "```\n```python\n",
        "~",
        "`",
        "'",
        "'''",
        '\\"',
        "- ",
        " ",
        "\n",
        "```python\n'''\n",
    ],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("```python\n", "a"), ("", "a")])
def test_finding_code_takes_time_in_proportion_to_the_answers_length(block, before, after):
    def seconds(number):
        start = time.process_time()
        extract_code(before + block * number + after, "f")
        return time.process_time() - start

    short = min(seconds(10_000) for _ in range(2))
    assert min(seconds(20_000) for _ in range(2)) < 3 * short + 0.05


def test_an_answer_of_a_million_characters_has_no_code():
    assert extract_code("x" * 1_000_000) == ""


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        ("def f(x): return x", None),
        ("f = lambda x: x", None),
        ("from math import sqrt as f", None),
        ("def g(x): return x", "g"),
        ("def helper(x): return x\ndef g(x): return helper(x)", "g"),
        ("def g(x): return g(x - 1) if x else 0", "g"),
        ("def one(x): return x\ndef two(x, y): return x", "two"),
        ("class A:\n    def f(self): pass\n\ndef g(x): return x", "g"),
        ("def g(x):\n    f = 1\n    return f", "g"),
        ("x = 1", None),
        ("not python at all", None),
    ],
)
def test_a_missing_name_becomes_a_second_name_of_the_function_that_is_meant(code, meant):
    expected = code if meant is None else f"{code}\n\nf = {meant}\n"
    assert with_name(code, "f", parameters=2 if meant == "two" else 1) == expected


def kodcode(i, **changes):
    return {
        "question": f"Add {i}.",
        "solution": f"def add(x):\n    return x + {i}",
        "test": f"from solution import add\n\ndef test_add():\n    assert add(1) == {i + 1}\n",
        "test_info": [
            {
                "docstring": "Adds.",
                "function_declaration": "def add(x):",
                "function_name": "add",
                "parameter_list": "(x)",
            }
        ],
        **changes,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kodcode_is_split_by_seed_and_question(tmp_path):
    file = str(write(tmp_path / "kodcode.jsonl", [kodcode(i) for i in range(400)]))
    splits = {s: {e.question for e in KodCode(file, **LIMITS).examples(s)} for s in ("train", "val", "test")}
    assert set.union(*splits.values()) == {f"Add {i}." for i in range(400)}
    assert sum(map(len, splits.values())) == 400
    assert 240 < len(splits["train"]) < 320
    assert 20 < len(splits["val"]) < 60
    assert 55 < len(splits["test"]) < 105
    assert {e.question for e in KodCode(file, split_seed=1, **LIMITS).examples("test")} != splits["test"]
    everything = KodCode(file, test_fraction=1.0, validation_fraction=0.0, **LIMITS)
    assert len(everything.examples("test")) == 400
    assert everything.examples("train") == []


def test_files_named_after_splits_are_taken_as_they_are_split(tmp_path):
    write(tmp_path / "train.jsonl", [kodcode(i) for i in range(100)])
    write(tmp_path / "test.jsonl", [kodcode(i) for i in range(100, 110)])
    environment = KodCode(str(tmp_path), **LIMITS)
    assert len(environment.examples("test")) == 10
    train, val = environment.examples("train"), environment.examples("val")
    assert len(train) + len(val) == 100
    assert val
    alone = KodCode(str(tmp_path / "test.jsonl"), **LIMITS)
    assert len(alone.examples("test")) == 10
    with pytest.raises(FileNotFoundError, match="set train_file"):
        alone.examples("train")


def test_kodcode_asks_as_the_released_code_asks(tmp_path):
    file = str(write(tmp_path / "kodcode.jsonl", [kodcode(1)]))
    environment = KodCode(file, test_fraction=1.0, validation_fraction=0.0, **LIMITS)
    (example,) = environment.examples("test")
    assert environment.messages(example) == [
        {
            "role": "user",
            "content": "Write an efficient and correct Python function to solve the following problem.Question: Add 1.\n",
        }
    ]
    assert example.target == "def add(x):\n    return x + 1"
    signed = KodCode(
        file, prompt="{question} {signature}", test_fraction=1.0, validation_fraction=0.0, **LIMITS
    )
    assert signed.messages(example)[0]["content"] == "Add 1. def add(x):"


@pytest.mark.parametrize("form", ["parquet", "text"])
def test_the_function_of_a_kodcode_item_is_read_from_every_format(tmp_path, form):
    row = kodcode(1)
    if form == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "k.parquet")
    else:
        write(tmp_path / "k.jsonl", [{**row, "test_info": json.dumps(row["test_info"])}])
    environment = KodCode(str(tmp_path), test_fraction=1.0, validation_fraction=0.0, **LIMITS)
    (example,) = environment.examples("test")
    assert (example.meta["function"], example.meta["parameters"]) == ("add", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_info": [3]}, '"test_info" must be a list of objects with function_name'),
        ({"test_info": "x("}, '"test_info" is neither JSON nor a Python list'),
        ({"solution": ""}, '"solution" is empty'),
        ({"test": None}, '"test" is empty or no text'),
    ],
)
def test_a_broken_kodcode_record_is_an_error_that_names_file_line_and_column(tmp_path, changes, message):
    file = write(tmp_path / "k.jsonl", [kodcode(1), kodcode(2, **changes)])
    with pytest.raises(ValueError, match=rf"k\.jsonl, line 2: {message}"):
        KodCode(str(file), **LIMITS).examples("train")


def test_items_without_a_test_are_left_out_and_counted(tmp_path, caplog):
    file = write(tmp_path / "k.jsonl", [kodcode(1), kodcode(2, test="assert True")])
    environment = KodCode(str(file), test_fraction=1.0, validation_fraction=0.0, **LIMITS)
    assert len(environment.examples("test")) == 1
    assert "1 of 2 train items are left out" in caplog.text
    assert "k.jsonl, line 2 holds no test" in caplog.text


@pytest.mark.parametrize("info", [None, "", [], [None], [{"function_name": None}]])
def test_without_test_info_the_tests_import_says_which_function_is_wanted(tmp_path, info):
    file = write(tmp_path / "k.jsonl", [kodcode(1, test_info=info)])
    environment = KodCode(str(file), test_fraction=1.0, validation_fraction=0.0, **LIMITS)
    (example,) = environment.examples("test")
    assert (example.meta["function"], example.meta["parameters"], example.meta["signature"]) == (
        "add",
        None,
        "",
    )


def test_items_that_need_a_library_that_is_not_there_are_left_out_and_counted(tmp_path, caplog):
    rows = [
        kodcode(1, solution="def add(x):\n    import numpy.linalg\n    return x + 1"),
        kodcode(2, solution="try:\n    import numpy\nexcept ImportError: pass\ndef add(x): return x + 2"),
        kodcode(3, solution="import os.path\nfrom math import floor\ndef add(x): return x + 3"),
    ]
    environment = KodCode(
        str(write(tmp_path / "k.jsonl", rows)), test_fraction=1.0, validation_fraction=0.0, **LIMITS
    )
    assert [example.question for example in environment.examples("test")] == ["Add 2.", "Add 3."]
    assert "k.jsonl, line 1 needs libraries that the sandbox does not have (numpy)" in caplog.text


def bigcodebench(i, **changes):
    prompt = "import math\n\ndef task_func(x):\n"
    return {
        "task_id": f"BigCodeBench/{i}",
        "complete_prompt": f'{prompt}    """Adds {i}."""\n',
        "instruct_prompt": f"Add {i}. Start with:\n```\n{prompt}```",
        "canonical_solution": f"    return math.floor(x) + {i}",
        "code_prompt": prompt,
        "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_add(self):\n"
        f"        self.assertEqual(task_func(1.5), {i + 1})\n",
        "entry_point": "task_func",
        "libs": "['math']",
        **changes,
    }


@pytest.mark.parametrize("form", ["instruct", "complete"])
def test_bigcodebench_asks_in_the_benchmarks_own_forms(tmp_path, form):
    row = bigcodebench(1)
    file = str(write(tmp_path / "b.jsonl", [row]))
    environment = BigCodeBench(file, form=form, test_fraction=1.0, **LIMITS)
    (example,) = environment.examples("test")
    assert environment.messages(example)[0]["content"] == row[f"{form}_prompt"].strip() + "\n"
    begin = row["code_prompt"] if form == "instruct" else row["complete_prompt"]
    assert example.target == f"```python\n{begin}{row['canonical_solution']}\n```"


def test_tasks_that_need_other_libraries_are_left_out_and_counted(tmp_path, caplog):
    rows = [bigcodebench(1), bigcodebench(2, libs="['numpy', 'math']"), bigcodebench(3, libs=["os.path"])]
    environment = BigCodeBench(str(write(tmp_path / "b.jsonl", rows)), test_fraction=1.0, **LIMITS)
    assert [e.meta["task_id"] for e in environment.examples("test")] == ["BigCodeBench/1", "BigCodeBench/3"]
    assert "1 of 3 train items are left out" in caplog.text
    assert "b.jsonl, line 2 needs libraries that the sandbox does not have (numpy)" in caplog.text


def test_a_broken_bigcodebench_record_is_an_error_that_names_file_line_and_column(tmp_path):
    file = write(tmp_path / "b.jsonl", [bigcodebench(1), {"libs": "[]", "task_id": "a"}])
    with pytest.raises(ValueError, match=r'b\.jsonl, line 2: "test" is missing'):
        BigCodeBench(str(file), **LIMITS).examples("test")
    write(file, [bigcodebench(1, libs="nonsense(")])
    with pytest.raises(ValueError, match=r'b\.jsonl, line 1: "libs" is not a Python list'):
        BigCodeBench(str(file), **LIMITS).examples("test")


@pytest.mark.parametrize(
    ("environment", "call"),
    [
        (lambda: KodCode(revision="r", **LIMITS), (("KodCode/KodCode-Light-RL-10K",), "train")),
        (lambda: BigCodeBench(revision="r", **LIMITS), (("bigcode/bigcodebench",), "v0.1.4")),
    ],
    ids=["kodcode", "bigcodebench"],
)
def test_the_hub_is_asked_by_name(monkeypatch, environment, call):
    calls = []

    def load_dataset(*arguments, **settings):
        calls.append((arguments, settings))
        return [{**kodcode(i), **bigcodebench(i)} for i in range(20)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    made = environment()
    assert sum(len(made.examples(split)) for split in ("train", "val", "test")) == 20
    assert calls == [(call[0], {"split": call[1], "revision": "r"})]


@pytest.mark.parametrize(
    "settings",
    [
        {"test_fraction": 1.5},
        {"validation_fraction": 0.6, "test_fraction": 0.6},
        {"prompt": "x"},
        {"isolation": "docker"},
        {"reward_workers": 0},
        {"packages": ["numpy"]},
    ],
)
@pytest.mark.parametrize("environment", [KodCode, BigCodeBench])
def test_settings_out_of_range_are_named(environment, settings):
    name = next(iter(settings)).removeprefix("reward_")
    with pytest.raises(ValueError, match=name):
        environment(**{**LIMITS, **settings})


def test_limits_of_a_run_must_be_positive():
    with pytest.raises(ValueError, match="memory_mb must be positive, got 0"):
        RunLimits(memory_mb=0)


@pytest.mark.parametrize("environment", [KodCode, BigCodeBench])
def test_without_bubblewrap_the_error_says_how_to_get_it_or_to_choose_limits(
    environment, monkeypatch, tmp_path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"not installed.*apt-get install bubblewrap.*isolation: limits"):
        environment()
