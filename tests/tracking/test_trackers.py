"""Other trackers beside MLflow: the same numbers, and the pages of episodes where they are taken."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest
from lightning.pytorch import loggers

from letters_stage import write_stage
from memgen.cli import main as front_end
from memgen.tracking import trackers
from memgen.tracking.store import client_of

CONF = Path(__file__).resolve().parents[2] / "conf" / "tracking"


def needs(package):
    absent = importlib.util.find_spec(package) is None

    def mark(test):
        return pytest.mark.trackers(pytest.mark.skipif(absent, reason=f"{package} is absent")(test))

    return mark


@pytest.fixture
def fit(root, monkeypatch):
    """Runs the letters' stage with a tracker's overlay."""
    folder = root.parent
    monkeypatch.chdir(folder)
    write_stage(folder)

    def fit(tracker):
        arguments = ["fit", "--config", "stage.yaml", "--config", str(CONF / f"{tracker}.yaml")]
        assert front_end.main(arguments) == 0
        return folder / "runs" / tracker

    return fit


def recorded(metric):
    """Values of a metric of the only run in MLflow, by step."""
    client = client_of("sqlite:///runs/mlflow.db")
    experiment = client.get_experiment_by_name("memgen")
    (run,) = client.search_runs([experiment.experiment_id])
    pages = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
    assert pages == ["samples/val_step_000003.html"]
    return {row.step: row.value for row in client.get_metric_history(run.info.run_id, metric)}


def test_a_table_of_metrics_has_what_mlflow_has_and_the_pages_lie_beside_it(fit):
    folder = fit("csv") / "memgen" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row.get("train/loss")}
    assert losses == pytest.approx(recorded("train/loss"))
    page = (folder / "samples" / "val_step_000003.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<section>" in page


@needs("tensorboard")
def test_tensorboard_has_the_metrics_and_the_episodes_as_text(fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fit("tensorboard") / "memgen" / "version_0"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx(recorded("train/loss"), rel=1e-6)
    (text,) = events.Tensors("samples/val_step_000003/text_summary")
    assert text.tensor_proto.string_val[0].startswith(b"    ")


@needs("wandb")
def test_wandb_keeps_a_run_on_this_machine(fit, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    (run,) = (fit("wandb") / "wandb").glob("offline-run-*")
    assert next(run.glob("*.wandb")).stat().st_size > 0
    (page,) = run.glob("files/media/html/samples/val_step_000003*.html")
    assert "<section>" in page.read_text()
    assert all(map(math.isfinite, recorded("train/loss").values()))


@pytest.mark.parametrize(
    ("tracker", "kind"), [("tensorboard", "TensorBoardLogger"), ("wandb", "WandbLogger")]
)
def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it(
    tracker, kind, monkeypatch, tmp_path
):
    def absent(*arguments, **settings):
        raise ModuleNotFoundError("Requirement not met")

    assert hasattr(loggers, kind)
    monkeypatch.setattr(trackers, kind, absent)
    with pytest.raises(ValueError, match=rf"pip install 'memgen\[{tracker}\]'"):
        getattr(trackers, tracker)(root=str(tmp_path))
