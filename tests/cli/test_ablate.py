"""memgen ablate as a person runs it, on a tiny checkpoint and an environment of several turns."""

from __future__ import annotations

import importlib.util
import json

import pytest

from cli.played import CONFIG, NAMED, named_base, prepare_trained
from memgen.analysis import ablation
from memgen.api import names
from memgen.cli import main as front_end
from memgen.results import statistics


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    prepare_trained(tmp_path)
    return tmp_path


def ablate(*extra: str) -> int:
    return front_end.main(["ablate", *CONFIG, "--checkpoint", "trained", *extra])


def test_it_prints_a_table_and_the_same_again_without_playing(folder, capsys, monkeypatch):
    chosen = ("--conditions", "vanilla,always,swapped,bon:2", "--out", "found")
    assert ablate(*chosen) == 0
    out = capsys.readouterr().out
    numbers = json.loads((folder / "found" / "ablation.json").read_text())
    assert [line["name"] for line in numbers["lines"]] == ["vanilla", "always", "swapped", "bon:2 oracle"]
    assert out.startswith("6 items of letter_game; costs are means per item\n")
    assert "bon:2 has no majority vote: letter_game has no exact answers" in out
    assert out.rstrip().endswith("report: found/report.html")
    page = (folder / "found" / "report.html").read_text()
    monkeypatch.setattr(ablation, "rollout", None)
    assert ablate(*chosen) == 0
    assert capsys.readouterr().out == out
    assert (folder / "found" / "report.html").read_text() == page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conditions", "vanilla,alwys"], "unknown condition 'alwys'; there are vanilla, never, always"),
        (["--conditions", "random:2"], "random:P needs a probability from 0 to 1, got 2"),
        (["--conditions", "trained"], "trained holds no trained trigger"),
        (["--data.test_examples", "1"], "the test split has 1 items, but a comparison needs at least 2"),
        (["--ckpt_path", "last"], "memgen ablate needs a checkpoint directory: --checkpoint DIR"),
        (["--cot-text", " "], "the text of cot is empty"),
    ],
    ids=["unknown", "no probability", "no trigger", "one item", "a checkpoint to resume from", "no text"],
)
def test_what_cannot_be_played_is_refused_in_one_line(folder, capsys, arguments, message):
    assert ablate(*arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_base_may_be_named_as_an_asset(folder, capsys, monkeypatch):
    monkeypatch.setattr(names, "resolve_asset", named_base)
    assert ablate(*NAMED, "--data.test_examples", "1") == 2
    # So it has come to the items.
    assert "the test split has 1 items" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ablate() == 2
    assert "needs matplotlib: pip install 'memgen[analysis]'" in capsys.readouterr().err
