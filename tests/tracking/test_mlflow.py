"""The record that a run leaves in MLflow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

import memgen
from memgen.tracking import mlflow as tracking
from memgen.tracking.mlflow import RunDescription, RunRecord, Sample, Segment, run_logger

RESOLVED = {
    "seed_everything": 7,
    "model": {
        "class_path": "memgen.training.weaver_sft.WeaverSFT",
        "memgen": {"backbone": {"name": "lab:reasoner"}, "boundaries": {"delimiters": [",", "."]}},
    },
    "data": {
        "environment": {"class_path": "memgen.environments.gsm8k.GSM8K", "init_args": {"path": "x" * 900}}
    },
    "trainer": {"callbacks": [{"class_path": "A", "init_args": {"x": 1}}, "B"], "plugins": []},
}
DESCRIPTION = RunDescription(
    command="fit",
    arguments=("--config", "conf/a.yaml", "--x", "a b"),
    raw={"conf/a.yaml": "x: ${y} # kept\n", "conf/data/b.yaml": "y: 1\n"},
    resolved_yaml="x: 1\ny: 1\n",
    resolved=RESOLVED,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One sqlite store for the module: creating its tables takes ten seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def logger(store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return run_logger(root=str(store / "runs"))


def artifacts(logger, folder="") -> dict[str, str]:
    """Text of each file below a folder of the run's artifacts."""
    root = Path(logger.experiment.get_run(logger.run_id).info.artifact_uri.removeprefix("file://")) / folder
    return {
        str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()
    }


def test_a_run_records_configuration_parameters_tags_and_metrics(logger, store, tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=0,
        logger=logger,
        callbacks=[RunRecord(DESCRIPTION)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(BoringModel())

    recorded = artifacts(logger, "config")
    assert f"torch=={torch.__version__}\n" in recorded.pop("packages.txt")
    assert recorded == {
        "raw/00_a.yaml": "x: ${y} # kept\n",
        "raw/01_b.yaml": "y: 1\n",
        "arguments.txt": "--config conf/a.yaml --x 'a b'\n",
        "resolved.yaml": "x: 1\ny: 1\n",
    }
    run = logger.experiment.get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.memgen.backbone.name"] == "lab:reasoner"
    assert run.data.params["trainer.callbacks.0.init_args.x"] == "1"
    assert run.data.tags["stage"] == "weaver_sft"
    assert run.data.tags["torch.version"] == torch.__version__
    assert logger.experiment.get_experiment_by_name("memgen").experiment_id == run.info.experiment_id
    assert (store / "runs" / "mlflow.db").is_file()
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(store / "runs" / "artifacts")


def test_a_run_that_goes_on_keeps_the_parameters_it_began_with(logger, store):
    tracking._write_parameters(logger, {"x": 1})
    again = run_logger(root=str(store / "runs"), run_id=logger.run_id)
    tracking._write_parameters(again, {"x": 2, "y": 3})
    assert again.experiment.get_run(logger.run_id).data.params == {"x": "1", "y": "3"}


def test_a_checkpoint_directory_becomes_an_artifact(logger, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "memgen.json").write_text("{}")
    tracking.log_checkpoint([logger], tmp_path / "best")
    assert artifacts(logger, "checkpoint") == {"memgen.json": "{}"}
    with pytest.raises(FileNotFoundError, match="gone is no checkpoint directory"):
        tracking.log_checkpoint([logger], tmp_path / "gone")


def test_samples_become_a_page_of_the_run(logger):
    tracking.log_samples([logger], [Sample("2 < 3?", [Segment("yes,"), Segment("8", True)])], "val_step_10")
    pages = artifacts(logger, "samples")
    assert list(pages) == ["val_step_10.html"]
    assert "<pre>2 &lt; 3?</pre><pre>yes,<mark>8</mark></pre>" in pages["val_step_10.html"]


def test_a_page_shows_text_as_text():
    page = tracking.samples_html([Sample("<b>", [Segment("</pre><script>"), Segment("<8>", True)], "a & b")])
    assert "<script>" not in page
    assert "<h2>a &amp; b</h2>" in page
    assert "<mark>&lt;8&gt;</mark>" in page


def test_other_loggers_are_left_alone(tmp_path):
    tracking.log_samples([], [Sample("", [])], "x")
    tracking.log_checkpoint([], tmp_path)


def test_the_environment_variable_names_another_store(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run_logger()._tracking_uri == "http://127.0.0.1:9"
    assert run_logger(tracking_uri="http://127.0.0.1:8")._tracking_uri == "http://127.0.0.1:8"
    assert not (tmp_path / "runs").exists()


def test_telemetry_is_off_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run_logger()
    assert tracking.os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_parameters_are_flat_text_of_at_most_500_characters():
    flat = tracking.flatten_parameters(RESOLVED)
    assert flat["seed_everything"] == "7"
    assert flat["model.memgen.boundaries.delimiters"] == "[',', '.']"
    assert flat["trainer.callbacks.1"] == "B"
    assert flat["trainer.plugins"] == "[]"
    long = flat["data.environment.init_args.path"]
    assert len(long) == 500
    assert long.endswith("x...")


def test_tags_say_what_a_person_filters_by():
    tags = tracking.run_tags(DESCRIPTION)
    expected = {
        "command": "fit",
        "stage": "weaver_sft",
        "backbone": "lab:reasoner",
        "environment": "GSM8K",
        "seed": "7",
        "memgen.version": memgen.__version__,
    }
    assert expected.items() <= tags.items()


def test_tags_leave_out_what_is_not_known():
    tags = tracking.run_tags(RunDescription(command="test"))
    assert not {"stage", "backbone", "environment", "seed"} & set(tags)


def repository(folder: Path, *, tracked: bool) -> Path:
    """A git repository around a copy of the package's first file."""

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(folder), *arguments],
            check=True,
            capture_output=True,
        )

    source = folder / "memgen" / "__init__.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    (folder / "other").write_text("")
    git("init", "-q")
    git("add", "." if tracked else "other")
    git("commit", "-q", "-m", "first")
    return source


def test_the_revision_of_the_source_is_recorded_with_its_changes(tmp_path, monkeypatch):
    source = repository(tmp_path, tracked=True)
    monkeypatch.setattr(memgen, "__file__", str(source))
    clean = tracking.git_revision()
    assert len(clean["git.revision"]) == 40
    assert clean["git.dirty"] == "false"
    source.write_text("a = 2\n")
    assert tracking.git_revision() == {**clean, "git.dirty": "true"}


def test_an_installed_package_inside_a_foreign_repository_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(memgen, "__file__", str(repository(tmp_path, tracked=False)))
    assert tracking.git_revision() == {}


def test_mlflow_is_imported_only_when_a_run_is_recorded():
    code = "import sys, memgen.tracking.mlflow; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
