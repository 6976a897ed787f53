"""The benchmark on a real model: its cells on a random model, with trainings that leave random checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import real
from benchmarks.real import Bench, Settings, cells, decided_plan
from benchmarks.real_report import MISSING, report
from memgen.chat import load_tokenizer
from memgen.environments.base import Environment, Example, Message, Reward
from memgen.training.checkpoint import open_checkpoint
from memgen.types import InsertionKind, TokenBatch
from tiny_english import save_english_base, save_english_checkpoint

# What PEFT reads of a model is deprecated in transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Texts(Environment):
    """Two questions with a long answer."""

    name = "texts"

    def __init__(self, path: str) -> None:
        self.path = path

    def examples(self, split):
        return [Example(str(n), f"What is {n}?", f"{n}, or {n}, or {n}.", str(n)) for n in range(2)]

    def messages(self, example: Example) -> list[Message]:
        return [{"role": "user", "content": example.question}]

    def reward(self, example: Example, answer: str) -> Reward:
        return Reward(0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "base"
    save_english_base(folder)
    return folder


@pytest.fixture
def settings_file(base, tmp_path):
    """The benchmark's own settings made small."""
    values = yaml.safe_load(real.SETTINGS.read_text())
    values |= {"items": 6, "other_items": 2, "other_new_tokens": 4, "text_items": 2, "shots": 2}
    values["tasks"] = {"shop": values["tasks"]["shop"] | {"others": ["copy"]}}
    values["text"] = {"class_path": f"{__name__}.Texts"}
    values["others"]["copy"]["shots"] = 1
    values["overrides"] = {
        "model.memgen.backbone.name": str(base),
        "model.generation.max_new_tokens": 4,
        "data.batch_size": 2,
    }
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def fits(base, monkeypatch):
    """The trainings that were asked for: stage, overlays, values and run."""
    asked = []

    def fit(files, overrides, run):
        asked.append(([file.stem for file in files], overrides, run))
        shutil.rmtree(run / "best", ignore_errors=True)
        lora = files[-1].stem == "lora_sft"
        save_english_checkpoint(base, run / "best", trigger=files[0].stem == "trigger_rl", lora=lora)
        (run / "resume").mkdir(exist_ok=True)
        (run / "resume" / "step_000003.ckpt").touch()
        saved = {"step": 3, "epoch": 0, "world_size": 1, "saved_at": 0.0}
        (run / "resume" / "step_000003.json").write_text(json.dumps(saved))

    monkeypatch.setattr(real, "fit", fit)
    monkeypatch.setattr("benchmarks.real.environment", _environment)
    return asked


def _environment(values):
    """This module is not importable by name in every way of running the tests."""
    if str(values["class_path"]).endswith(".Texts"):
        return Texts(values["path"])
    return ORIGINAL(values)


ORIGINAL = real.environment


def run(settings_file, tmp_path, *more):
    return real.main(
        [
            "--settings",
            str(settings_file),
            "--root",
            str(tmp_path / "cells"),
            "--out",
            str(tmp_path / "out"),
            *more,
        ]
    )


def test_a_part_is_measured_and_the_rest_is_named_as_missing(settings_file, fits, tmp_path):
    assert run(settings_file, tmp_path, "--seeds", "1", "--text", "here") == 0
    data = json.loads((tmp_path / "out" / "real.json").read_text())
    text = (tmp_path / "out" / "real.md").read_text()
    settings = Settings.read(settings_file, Path("here"))
    measured = cells(settings, "shop", 1)
    assert set(measured) <= set(data["cells"])
    assert data["missing"] == [
        cell for seed in (0, 2) for cell in cells(settings, "shop", seed) if cell not in measured
    ]
    assert all(f"- {cell}\n" in text for cell in data["missing"])
    assert not any(f"- {cell}\n" in text for cell in measured)
    # Bare and few-shot are one cell for all seeds.
    assert {"shop/all/bare", "shop/all/shots", "shop/all/bare on copy"} <= set(measured)
    for cell in (data["cells"][name] for name in measured if " on text" not in name):
        assert len(cell["exact"]) in (6, 2)
    woven = {name.rpartition("/")[2]: data["cells"][name]["insertions"] for name in measured}
    assert woven["bare"] == woven["shots"] == woven["lora"] == woven["trigger"] == 0.0
    assert woven["weaver"] == woven["half"] == woven["other_item"] == woven["weaver on copy"] == 1.0
    assert woven["weaver on text"] == 1.0
    assert woven["trigger on text"] == 0.0
    assert data["cells"]["shop/all/shots"]["positions"] > data["cells"]["shop/all/bare"]["positions"]
    # A trigger that never invokes leaves everything as it was.
    same = ("nll", "tokens", "insertions")
    assert {key: data["cells"]["shop/seed1/trigger on text"][key] for key in same} == {
        key: data["cells"]["shop/all/bare on text"][key] for key in same
    }
    # Figures of the report are those of the cells.
    bare = data["cells"]["shop/all/bare on text"]
    assert f"{math.exp(sum(bare['nll']) / sum(bare['tokens'])):.2f}" in text
    row = next(line for line in text.splitlines() if line.startswith("| weaver SFT |"))
    assert row.count(MISSING) == 2


def test_the_weaver_goes_on_in_the_half_trained_ones_run_and_lora_takes_as_many_steps(
    settings_file, fits, tmp_path
):
    assert run(settings_file, tmp_path, "--seeds", "0") == 0
    (
        (half, half_values, half_run),
        (weaver, weaver_values, weaver_run),
        (grpo, _, _),
        (trigger, _, _),
        *loras,
    ) = fits
    assert half == weaver == ["weaver_sft", "smollm2-135m", "lab_english", "weaver_sft"]
    assert half_run == weaver_run
    threshold = "trainer.callbacks.2.stopping_threshold"
    assert (half_values[threshold], weaver_values[threshold]) == (0.3, 0.98)
    assert grpo == ["weaver_grpo", "smollm2-135m", "lab_english", "weaver_grpo"]
    assert trigger == ["trigger_rl", "smollm2-135m", "lab_english_mix", "trigger_rl"]
    lora = ["weaver_sft", "smollm2-135m", "lab_english", "weaver_sft", "lora_sft"]
    assert [files for files, _, _ in loras] == [lora, [*lora[:2], "lab_english_mix", *lora[3:]]]
    assert [values["trainer.max_steps"] for _, values, _ in loras] == [3, 3]
    assert [run.name for _, _, run in loras] == ["lora", "lora_replay"]


def test_an_interrupted_benchmark_goes_on_with_the_cell_that_it_was_at(
    settings_file, fits, tmp_path, monkeypatch
):
    scored = []
    score = real.score

    def stop(name, model, task):
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.append(task)
        return score(name, model, task)

    monkeypatch.setattr(real, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        run(settings_file, tmp_path, "--seeds", "0")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("shop/*/*.json")}
    trainings = len(fits)
    assert made
    monkeypatch.setattr(real, "score", score)
    assert run(settings_file, tmp_path, "--seeds", "0") == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert trainings + len(fits[trainings:]) == 6
    # Nothing is left to do, without the text that nobody pointed to.
    count = len(fits)
    assert run(settings_file, tmp_path, "--seeds", "0") == 0
    assert len(fits) == count
    missing = json.loads((tmp_path / "out" / "real.json").read_text())["missing"]
    assert "shop/seed0/weaver on text" in missing
    assert "shop/seed0/weaver" not in missing


def test_a_report_alone_measures_nothing(settings_file, fits, tmp_path):
    assert run(settings_file, tmp_path, "--report") == 0
    assert not fits
    text = (tmp_path / "out" / "real.md").read_text()
    assert MISSING in text
    assert "- shop/seed2/lora_replay on copy" in text


def test_an_unknown_task_is_named(settings_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(settings_file, tmp_path, "--only", "shopp")
    assert "there is no task 'shopp'; there are shop" in capsys.readouterr().err


def test_differences_are_paired_and_a_change_is_marked():
    def cell(exact, **more):
        spent = {"cpu_seconds": 60.0, "seconds": 30.0, "machine": "m", "date": "2026-01-02"}
        return {
            "exact": exact,
            "prices": None,
            "insertions": 1.0,
            "offered": 1.0,
            "positions": 9.0,
            **spent,
            **more,
        }

    data = {
        "items": 8, "other_items": 4, "shots": 3, "seeds": [0], "missing": [],
        "tasks": {"shop": {"title": "Shop", "others": ["copy"]}},
        "conditions": real.CONDITIONS, "without_seed": real.WITHOUT_SEED, "harm": real.HARM,
        "cells": {
            "shop/all/bare": cell("00000000"),
            "shop/seed0/weaver": cell("11111111"),
            "shop/all/bare on copy": cell("1111"),
            "shop/seed0/weaver on copy": cell("0000"),
            "shop/seed0/trigger on copy": cell("1111"),
            "shop/seed0/fit_weaver": {**cell(""), "steps": 40, "cpu_seconds": 120.0},
        },
    }  # fmt: skip
    text = report(data)
    assert "| weaver SFT less bare model | +100.0 (+100.0 to +100.0) |" in text
    assert "| weaver SFT, seed 0 | 0.0, -100.0 (-100.0 to -100.0), changed, 1.00 ins. |" in text
    assert "| weaver SFT, then trigger RL, seed 0 | 100.0, +0.0 (+0.0 to +0.0), 1.00 ins. |" in text
    assert "| weaver SFT | 9 | 3.75 | 1.0 | 2.0 | 40 |" in text
    assert "2026-01-02: m." in text
    assert "Every cell was measured." in text


def test_a_plan_of_a_written_answer_is_what_decoding_would_have_made(base, tmp_path):
    tokenizer = load_tokenizer(str(base))
    ids = tokenizer("Write it: 1, 2, 3, 4, 5.").input_ids
    begin = 4
    batch = TokenBatch.from_rows([ids], [[index >= begin for index in range(len(ids))]])
    for trigger, invoked in ((False, True), (True, False)):
        save_english_checkpoint(base, tmp_path / str(trigger), trigger=trigger, insertions=2)
        model, _ = open_checkpoint(tmp_path / str(trigger), load_tokenizer, str)
        with torch.no_grad():
            (points,) = decided_plan(model.eval(), batch).rows()
        if not invoked:
            assert points == []
            continue
        assert points[0] == (begin, int(InsertionKind.PROMPT))
        assert len(points) == 3  # and no more inside the answer than the cap
        assert all(tokenizer.decode([ids[point - 1]]).endswith(",") for point, _ in points[1:])


def test_the_benchmarks_own_settings_name_files_and_tasks_that_there_are():
    settings = Settings.read(real.SETTINGS)
    assert list(settings.tasks) == ["shop", "gym", "bill"]
    for name, subject in settings.tasks.items():
        bench = Bench(Path("runs"), settings, name, 0)
        assert set(subject.others) <= set(settings.others)
        for stage, mixed in (("weaver_sft", False), ("weaver_grpo", False), ("trigger_rl", True)):
            assert all(file.is_file() for file in bench.files(stage, mixed=mixed))
