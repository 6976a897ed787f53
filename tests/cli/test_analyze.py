"""memgen analyze as a person runs it, on a tiny checkpoint and an environment of several turns."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from cli.played import CONFIG, NAMED, named_base, prepare_trained
from memgen.analysis import playing, report
from memgen.analysis.labels import BELIEF, PLANNING
from memgen.api import names
from memgen.cli import main as front_end
from memgen.results import statistics


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    prepare_trained(tmp_path)
    return tmp_path


def analyze(*extra: str) -> int:
    return front_end.main(["analyze", *CONFIG, "--checkpoint", "trained", "--null-draws", "19", *extra])


def test_it_reports_and_says_the_same_again_without_playing(folder, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    assert analyze("--out", "found") == 0
    out = capsys.readouterr().out
    numbers = json.loads((folder / "found" / "analysis.json").read_text())
    page = (folder / "found" / "report.html").read_text()
    assert out.startswith(numbers["verdict"]["headline"])
    assert out.rstrip().endswith("report: found/report.html")
    assert numbers["items"] == 6
    assert numbers["latents"]["prompt"] == 3
    assert {cluster["clusters"] for cluster in numbers["clusters"]} >= {4}
    assert all(0 <= condition["reward"] <= 1 for condition in numbers["conditions"].values())

    played = {path: path.read_bytes() for path in (folder / "found" / "conditions").iterdir()}
    assert len(played) > 40
    monkeypatch.setattr(playing, "rollout", None)
    assert analyze("--out", "found") == 0
    assert capsys.readouterr().out == out
    assert (folder / "found" / "report.html").read_text() == page
    assert {path: path.read_bytes() for path in (folder / "found" / "conditions").iterdir()} == played

    # People label the failures of that analysis; their types take the place of the rules'.
    html = (folder / "found" / "label.html").read_text()
    exported = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    failures = [json.loads(line) for line in (folder / "found" / "failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == [failure["id"] for failure in exported["failures"]]
    assert all(failure["messages"][-1]["role"] == "assistant" for failure in failures)
    for annotator, kinds in (("A", [PLANNING, BELIEF]), ("B", [PLANNING, PLANNING])):
        types = {failure["id"]: kinds[number % 2] for number, failure in enumerate(failures)}
        text = {key: exported[key] for key in ("format", "export")} | {
            "annotator": annotator,
            "labels": types,
        }
        (folder / f"{annotator}.json").write_text(json.dumps(text))
    assert analyze("--out", "found", "--labels", "A.json", "--labels", "B.json") == 0
    assert f"A and B: Cohen's kappa 0.000 on {len(failures)} failures" in capsys.readouterr().out
    numbers = json.loads((folder / "found" / "analysis.json").read_text())
    assert numbers["labelling"]["agreed"] == (len(failures) + 1) // 2
    kinds = {e["outcome"]["failure"] for found in numbers["removals"] for e in found["beyond_random"]}
    assert kinds == {None, PLANNING}
    assert "Cohen&#x27;s kappa" in (folder / "found" / "report.html").read_text()
    assert {path: path.read_bytes() for path in (folder / "found" / "conditions").iterdir()} == played


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clusters", "1"], "clusters must be at least 2, got 1"),
        (["--data.test_examples", "1"], "the test split has 1 items, but an analysis needs at least 4"),
        (["--model.memgen.trigger.kind", "never"], "the trigger never invokes"),
        (["--labels", "nowhere.json"], "nowhere.json does not exist (--labels)"),
        (["--ckpt_path", "last"], "memgen analyze needs a checkpoint directory: --checkpoint DIR"),
    ],
    ids=["one cluster", "one item", "no invocation", "no labels", "a checkpoint to resume from"],
)
def test_what_cannot_be_analysed_is_refused_in_one_line(folder, capsys, arguments, message):
    assert analyze(*arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_base_may_be_named_as_an_asset(folder, capsys, monkeypatch):
    monkeypatch.setattr(names, "resolve_asset", named_base)
    assert analyze(*NAMED, "--data.test_examples", "1") == 2
    # So it has come to the items.
    assert "the test split has 1 items" in capsys.readouterr().err


def test_without_a_checkpoint_it_asks_for_one(folder, capsys):
    assert front_end.main(["analyze", *CONFIG]) == 2
    assert "memgen analyze: needs a checkpoint directory" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert analyze() == 2
    assert "needs scikit-learn and matplotlib: pip install 'memgen[analysis]'" in capsys.readouterr().err


def test_the_report_has_a_map_by_umap_where_that_is_installed(monkeypatch):
    module = ModuleType("umap")
    module.__spec__ = SimpleNamespace()
    module.UMAP = lambda **settings: SimpleNamespace(
        fit_transform=lambda means: means[:, :2] * settings["n_neighbors"]
    )
    means = np.ones((9, 4), np.float32)
    monkeypatch.setitem(sys.modules, "umap", None)
    assert report._flattened("UMAP", means, 0) is None
    monkeypatch.setitem(sys.modules, "umap", module)
    assert report._flattened("UMAP", means, 0).tolist() == [[8.0, 8.0]] * 9
