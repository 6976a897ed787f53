"""A user's own environment: the one of docs/environments.md, which registers nothing and edits nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from memgen.cli import main as front_end

ROOT = Path(__file__).resolve().parents[2]
(EXAMPLE,) = [
    block
    for block in re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/environments.md").read_text(), re.M | re.S
    )
    if "class Capitals" in block
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the example and its data, which Python finds modules in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    (tmp_path / "capitals.py").write_text(EXAMPLE)
    rows = [{"country": f"Land {i}", "capital": f"City {i}, the old"} for i in range(60)]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path
    sys.modules.pop("capitals", None)


def test_it_takes_at_most_40_lines():
    assert len(EXAMPLE.splitlines()) <= 40


def test_its_items_are_split_asked_and_rewarded(folder):
    from capitals import Capitals

    environment = Capitals("capitals.jsonl")
    splits = {split: environment.examples(split) for split in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == 60
    assert all(splits.values())
    example = splits["val"][0]
    assert environment.messages(example)[0]["content"] == (
        f"What is the capital of {example.question}? Answer with its name."
    )
    assert environment.reward(example, example.target).total == 1.0
    assert environment.reward(example, "City").total == 0.0


def test_a_stage_trains_and_validates_on_it(folder):
    assert not front_end.main(
        [
            "fit", "--config", str(ROOT / "conf/weaver_sft.yaml"), "--config", str(ROOT / "conf/backbone/tiny.yaml"),
            "--data.path", "capitals.jsonl", "--data.environment.class_path", "capitals.Capitals",
            "--data.environment.init_args.path", "${data.path}", "--data.batch_size=4",
            "--model.generation.max_new_tokens=4", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false",
        ]
    )  # fmt: skip
    assert (folder / "runs" / "weaver_sft").is_dir()
