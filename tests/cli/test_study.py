"""memgen study as a person runs it, on a tiny model and an environment of several turns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from cli.played import prepare_trained
from memgen.cli import main as front_end
from memgen.cli import study
from memgen.cli.config import Request, merge, resolve
from memgen.results import recorded_test, statistics
from memgen.study import session
from memgen.study.settings import cells, read_settings

ROOT = Path(__file__).resolve().parents[2]
STUDY = """\
stage: stage.yaml
seeds: [0]
experiences: 1
methods:
  vanilla: {}
  exp_rag: {memory: {method: exp_rag}}
  weaver: {checkpoint: "{task}", tasks: [trained]}
all: {settings: {model: {generation: {temperature: 0.0}}}}
tasks:
  trained: {}
  other: {settings: {data: {environment: {seconds: 0.001}}}}
"""
COMMAND = ("study", "--config", "study.yaml", "--out", "found")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    prepare_trained(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def test_a_study_is_played_reported_and_goes_on_without_playing_again(folder, capsys, monkeypatch):
    assert front_end.main([*COMMAND]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.startswith("trained/vanilla/0: reward ")
    assert out.rstrip().endswith("report: found/study.md")
    numbers = json.loads((folder / "found" / "study.json").read_text())
    assert [table["protocol"] for table in numbers["tables"]] == ["online", "frozen"]
    for table in numbers["tables"]:
        assert [line["name"] for line in table["matrix"]["lines"]] == ["vanilla", "exp_rag", "weaver"]
        assert [line["items"] for line in table["matrix"]["lines"]] == [12, 12, 6]
    assert numbers["tables"][1]["matrix"]["lines"][1]["costs"]["learning_positions"] > 0
    report = (folder / "found" / "study.md").read_text()
    assert "memgen study --config study.yaml --out found" in report
    played = []
    real = session.rollout
    for module in (session, recorded_test):
        monkeypatch.setattr(module, "rollout", lambda *a, **k: (played.append(1), real(*a, **k))[1])
    assert front_end.main([*COMMAND]) == 0
    assert played == []
    assert (folder / "found" / "study.md").read_text() == report
    # A method more plays its own cells alone; other settings of a cell or of the study are refused.
    more = ("--methods.shots.examples", "1", "--methods.exp_rag", "null", "--tasks.other", "null")
    assert front_end.main([*COMMAND, *more]) == 0
    assert len(played) == 3
    assert "| shots |" in (folder / "found" / "study.md").read_text()
    capsys.readouterr()
    assert front_end.main([*COMMAND, "--budget", "100"]) == 2
    assert "budget was 256 and is 100" in capsys.readouterr().err
    assert front_end.main([*COMMAND, "--methods.exp_rag.memory.constants.k", "2"]) == 2
    assert "method.memory.constants" in capsys.readouterr().err


def test_in_mlflow_a_study_is_a_run_and_its_cells_are_children(folder, capsys):
    from mlflow import MlflowClient

    (folder / "stage.yaml").write_text((folder / "stage.yaml").read_text().replace("  logger: false\n", ""))
    arguments = ("--tasks.other", "null", "--methods.exp_rag", "null")
    assert front_end.main([*COMMAND, *arguments]) == 0, capsys.readouterr().err
    client = MlflowClient(
        f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    )  # mlflow keeps a store of each address
    runs = client.search_runs([client.get_experiment_by_name("memgen").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run not in parents]
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted(run.info.run_name for run in children) == ["trained/vanilla/0", "trained/weaver/0"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("test/reward" in run.data.metrics for run in children)
    assert {"online/vanilla", "frozen/weaver"} <= set(parents[0].data.metrics)
    paths = {found.path for found in client.list_artifacts(parents[0].info.run_id, "study")}
    assert paths == {"study/study.md", "study/study.svg", "study/study.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods.weaver.checkpoint", "nowhere"], "nowhere is no checkpoint directory"),
        (["--methods.exp_rag.memory.method", "rag"], "memory.method must be one of exp_recent"),
        (["--methods.exp_rag.memory.method", "my.Rag"], "methods.exp_rag: memory.method 'my.Rag' cannot be imported"),
        (["--methods.exp_rag.memory.method", "macla"], "methods.exp_rag: macla compares cosines with constants"),
        (["--methods.exp_rag.memory.constants.kk", "2"], "do not fit exp_rag, which has: k"),
        (["--methods.exp_rag.memory.constants.k", "0"], "methods.exp_rag: k must be at least 1, got 0"),
        (["--methods.weaver.overlays", "[no.yaml]"], "there is no file no.yaml, and none of this name below conf/"),
        (["--methods.weaver.settings.model.generation.temperature", "1.0"], "all methods answer at one temperature"),
        (["--run", "here"], "takes --out DIR, not --run"),
        (["--sedes", "[1]"], "sedes is not a key of StudySettings"),
        (["--scribe.kind", "http"], "scribe.kind http needs scribe.url"),
    ],
    ids=["checkpoint", "memory", "import", "vectors", "constant", "number", "file", "temperature", "--run", "key", "scribe"],
)  # fmt: skip
def test_what_cannot_be_played_is_refused_in_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    assert front_end.main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (folder / "found").exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert front_end.main([*COMMAND]) == 2
    assert "needs matplotlib for its figure: pip install 'memgen[analysis]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lab", "smollm2"])
def test_the_files_of_the_project_are_whole(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    layers = Request((ROOT / "conf" / "study" / f"{name}.yaml",), (), False, ()).layers()
    settings = read_settings(resolve(merge(layers), layers))
    assert next(iter(settings.methods)) == "vanilla"
    assert len(settings.seeds) == 3
    first = [cell for cell in cells(settings, sampled=False) if cell.name.endswith(("/0", "/online-0"))]
    assert {cell.method for cell in first} == set(settings.methods)
    documents = [study.document_of(settings, cell, tmp_path) for cell in first]
    backbones = {document["model"]["memgen"]["backbone"]["name"] for document in documents}
    assert backbones == {{"lab": "lab:reasoner", "smollm2": "lab:smollm2"}[name]}
