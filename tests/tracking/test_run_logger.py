"""The record that a run leaves in MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from memgen.environments.base import Example
from memgen.tracking import run_logger as tracking
from memgen.tracking.artifacts import fetch_checkpoint
from memgen.tracking.datasets import dataset_record
from memgen.tracking.delivery import read_outbox
from memgen.tracking.run_file import recorded_run
from memgen.tracking.run_logger import RunLogger, open_parent, pause_runs, resumed_logger, run_logger
from memgen.tracking.run_record import RunRecord
from memgen.tracking.store import deliver
from sft_runs import Letters
from tracking.described import DESCRIPTION


def artifacts(logger, folder="") -> dict[str, str]:
    """Text of each file below a folder of the run's artifacts."""
    assert logger.outbox.flush(30) == 0
    root = Path(logger.experiment.get_run(logger.run_id).info.artifact_uri.removeprefix("file://")) / folder
    return {
        str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()
    }


def read(logger):
    """The run as the store has it."""
    assert logger.outbox.flush(30) == 0
    return logger.experiment.get_run(logger.run_id)


def history(logger, key: str) -> list[tuple[int, float]]:
    rows = logger.experiment.get_metric_history(logger.run_id, key)
    return sorted((row.step, row.value) for row in rows)


def boring_trainer(folder, logger, **settings) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 0,
        "logger": logger,
        "callbacks": [RunRecord(DESCRIPTION)],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return Trainer(**{**defaults, **settings})


def test_a_run_records_configuration_parameters_tags_and_metrics(logger, root, tmp_path):
    boring_trainer(tmp_path, logger).fit(BoringModel())

    recorded = artifacts(logger, "config")
    assert f"torch=={torch.__version__}\n" in recorded.pop("packages.txt")
    assert recorded == {
        "raw/00_a.yaml": "x: ${y} # kept\n",
        "raw/01_b.yaml": "y: 1\n",
        "arguments.txt": "--config conf/a.yaml --x 'a b'\n",
        "resolved.yaml": "x: 1\ny: 1\n",
    }
    run = read(logger)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "weaver_sft GSM8K lab:reasoner seed 7"
    assert run.data.params["model.memgen.backbone.name"] == "lab:reasoner"
    assert run.data.params["trainer.callbacks.0.init_args.x"] == "1"
    assert run.data.tags["stage"] == "weaver_sft"
    assert run.data.tags["torch.version"] == torch.__version__
    assert run.data.tags["strategy"] == "SingleDeviceStrategy"
    assert run.data.tags["mlflow.user"]
    assert logger.experiment.get_experiment_by_name("memgen").experiment_id == run.info.experiment_id
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(root / "artifacts")
    assert [step for step, _ in history(logger, "train/learning_rate")] == [0, 1]
    assert not list((root / "outbox").glob("*"))


def test_a_run_whose_name_was_chosen_keeps_it(root, tmp_path):
    chosen = run_logger(root=str(root), run_name="mine", system_seconds=0)
    boring_trainer(tmp_path, chosen).fit(BoringModel())
    assert read(chosen).info.run_name == "mine"


def test_metrics_fall_into_sections_and_are_not_doubled(logger):
    logger.log_metrics({"epoch": 0, "train/loss": 1.0}, 0)
    logger.log_metrics({"epoch": 0, "val/reward": 0.5}, 0)
    logger.log_metrics({"epoch": 0, "val/reward": 0.5, "a:b": 2.0}, 1)
    assert set(read(logger).data.metrics) == {"train/epoch", "train/loss", "val/reward", "train/a_b"}
    assert history(logger, "train/epoch") == [(0, 0.0), (1, 0.0)]
    assert history(logger, "val/reward") == [(0, 0.5), (1, 0.5)]


def go_on(logger: RunLogger, folder: Path) -> RunLogger:
    """The logger of a process that resumes the run."""
    assert json.loads((folder / "mlflow_run.json").read_text())["run_id"] == logger.run_id
    fresh = run_logger(root=str(logger.folder.parent), system_seconds=0)
    return resumed_logger(fresh, folder / "resume" / "last.ckpt")


def test_a_resumed_run_goes_on_without_logging_steps_twice(logger, tmp_path):
    logger.log_run_folder(tmp_path / "run")
    for step in range(10):
        logger.log_metrics({"train/loss": float(step)}, step)
        if step % 3 == 0:
            logger.log_metrics({"val/reward": float(step)}, step)
    logger.finalize("failed")
    assert read(logger).info.status == "FAILED"

    again = go_on(logger, tmp_path / "run")
    for step in range(6, 14):
        again.log_metrics({"train/loss": float(step)}, step)
        if step % 3 == 0:
            again.log_metrics({"val/reward": float(step)}, step)
    assert read(again).info.status == "RUNNING"
    again.finalize()
    assert again.run_id == logger.run_id
    assert read(again).info.status == "FINISHED"
    assert history(again, "train/loss") == [(step, float(step)) for step in range(14)]
    assert history(again, "val/reward") == [(step, float(step)) for step in (0, 3, 6, 9, 12)]


def test_a_resumed_run_first_sends_what_was_left_of_it(logger, tmp_path, monkeypatch):
    assert logger.run_id is not None
    logger.log_run_folder(tmp_path / "run")
    read(logger)

    def down(records):
        raise ConnectionError("gone")

    monkeypatch.setattr(logger.store, "send", down)
    for step in range(5):
        logger.log_metrics({"train/loss": float(step)}, step)
    assert logger.outbox.flush(0.1) == 5
    logger.outbox.stop()

    again = go_on(logger, tmp_path / "run")
    again.log_metrics({"train/loss": 5.0}, 5)
    again.finalize()
    assert history(again, "train/loss") == [(step, float(step)) for step in range(6)]
    assert not list(logger.folder.glob("*"))


def test_a_checkpoint_names_its_run(logger, tmp_path):
    trainer = boring_trainer(tmp_path, logger)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert recorded_run(tmp_path / "a.ckpt") == {"run_id": logger.run_id}
    (tmp_path / "b.ckpt").mkdir()
    (tmp_path / "b.json").write_text('{"mlflow_run_id": "x"}')
    assert recorded_run(tmp_path / "b.ckpt") == {"run_id": "x"}
    assert recorded_run(tmp_path / "c.ckpt") is None


def test_a_run_that_its_store_has_lost_goes_on_as_a_new_one(logger, root, tmp_path):
    logger.log_run_folder(tmp_path / "run")
    logger.experiment.delete_run(logger.run_id)
    record = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
    record["run_id"] = "0" * 32
    (tmp_path / "run" / "mlflow_run.json").write_text(json.dumps(record))
    again = resumed_logger(run_logger(root=str(root), system_seconds=0), tmp_path / "run" / "last.ckpt")
    assert again.run_id not in (None, "0" * 32, logger.run_id)


def test_a_run_in_another_store_goes_on_as_a_new_one(logger, tmp_path, caplog):
    logger.log_run_folder(tmp_path / "run")
    other = run_logger(tracking_uri="http://127.0.0.1:9", root=str(tmp_path / "other"))
    assert resumed_logger(other, tmp_path / "run" / "last.ckpt") is other
    assert "continues as a new run in http://127.0.0.1:9" in caplog.text


@pytest.mark.parametrize(
    ("exception", "status"),
    [(RuntimeError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (None, "FINISHED")],
    ids=["error", "ctrl-c", "none"],
)
def test_the_status_says_how_a_run_ended(logger, tmp_path, exception, status):
    class Stops(Callback):
        def on_train_batch_end(self, *arguments):
            if exception is not None:
                raise exception

    trainer = boring_trainer(tmp_path, logger, callbacks=[RunRecord(DESCRIPTION), Stops()])
    with contextlib.suppress(RuntimeError, SystemExit):
        trainer.fit(BoringModel())
    assert read(logger).info.status == status


def test_a_run_that_a_cluster_will_start_again_is_scheduled(logger):
    logger.log_metrics({"train/loss": 1.0}, 0)
    pause_runs([logger])
    logger.finalize("failed")
    assert read(logger).info.status == "SCHEDULED"


def test_without_a_store_training_goes_on_and_the_records_can_be_sent_later(root, tmp_path, monkeypatch):
    lost = run_logger(tracking_uri="http://127.0.0.1:9", root=str(tmp_path / "lost"), flush_seconds=0.3)
    begin = time.perf_counter()
    boring_trainer(tmp_path, lost).fit(BoringModel())
    assert time.perf_counter() - begin < 30
    assert lost.run_id is None
    lost.outbox.stop()

    header, records = read_outbox(lost.outbox.path)
    run_id, refused = deliver({**header, "uri": f"sqlite:///{root / 'mlflow.db'}"}, records)
    assert refused == []
    client = run_logger(root=str(root)).experiment
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "weaver_sft GSM8K lab:reasoner seed 7"
    assert run.data.metrics["train/learning_rate"] == pytest.approx(0.1)
    assert "system/cpu_utilization_percentage" in run.data.metrics


def test_a_run_that_goes_on_keeps_the_parameters_it_began_with(logger, root):
    logger.log_hyperparams({"x": 1})
    read(logger)
    again = run_logger(root=str(root), run_id=logger.run_id)
    again.log_hyperparams({"x": 2, "y": 3})
    assert read(again).data.params == {"x": "1", "y": "3"}


def test_a_checkpoint_directory_becomes_an_artifact_and_a_version_of_a_model(logger, root, tmp_path):
    for score in (0.25, 0.5):
        best = tmp_path / f"best{score}"
        best.mkdir()
        (best / "memgen.json").write_text(f"{score}")
        logger.model_name = "weaver_sft-GSM8K-lab"
        name = f"checkpoints/step_{int(100 * score):06d}_best"
        tracking.log_checkpoint([logger], best, name, {"val/reward": score})
    assert artifacts(logger, "checkpoints") == {
        "step_000025_best/memgen.json": "0.25",
        "step_000050_best/memgen.json": "0.5",
    }
    store = logger.address.uri
    version = logger.experiment.get_model_version("weaver_sft-GSM8K-lab", "2")
    assert version.tags == {"val/reward": "0.5"}
    logger.experiment.set_registered_model_alias("weaver_sft-GSM8K-lab", "champion", "1")
    for source, expected in {
        "models:/weaver_sft-GSM8K-lab/1": "0.25",
        "models:/weaver_sft-GSM8K-lab/2": "0.5",
        "models:/weaver_sft-GSM8K-lab/latest": "0.5",
        "models:/weaver_sft-GSM8K-lab@champion": "0.25",
        f"runs:/{logger.run_id}": "0.5",
        f"runs:/{logger.run_id}/checkpoints/step_000025_best": "0.25",
    }.items():
        assert (fetch_checkpoint(source, store) / "memgen.json").read_text() == expected, source
    with pytest.raises(FileNotFoundError, match="gone is no checkpoint directory"):
        tracking.log_checkpoint([logger], tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models:/nothing/1", "there is no models:/nothing/1 in sqlite"),
        ("models:/nothing/latest", "no model of this name"),
        ("models:/nothing", "is not of the form models:/NAME/VERSION"),
        ("runs:/0123", "there is no runs:/0123 in sqlite"),
    ],
)
def test_a_checkpoint_that_is_not_recorded_is_refused(root, name, message):
    with pytest.raises(ValueError, match=message):
        fetch_checkpoint(name, f"sqlite:///{root / 'mlflow.db'}")


def test_a_store_that_does_not_exist_is_not_made_by_looking_into_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        fetch_checkpoint("models:/a/1")
    assert not list(tmp_path.iterdir())


def test_models_are_registered_only_if_that_is_wanted(root, tmp_path):
    silent = run_logger(root=str(root), register_models=False)
    silent.model_name = "a"
    tracking.log_checkpoint([silent], tmp_path, "checkpoints/x")
    read(silent)
    assert silent.experiment.search_registered_models() == []


def test_a_table_is_written_once_though_it_is_sent_twice(logger):
    columns = {"example": ["a", "b"], "reward": [0.0, 1.0]}
    for _ in range(2):
        logger.log_table(columns, "tables/val.json")
    table = json.loads(artifacts(logger, "tables")["val.json"])
    assert table == {"columns": ["example", "reward"], "data": [["a", 0.0], ["b", 1.0]]}


def test_the_data_of_a_run_is_recorded_with_a_digest_of_its_items(logger):
    items = [Example(str(n), f"q{n}", "t", "a") for n in range(3)]
    record = dataset_record(Letters(), "/data/x", "train", items)
    assert record.digest == dataset_record(Letters(), "/data/x", "train", list(items)).digest
    assert record.digest != dataset_record(Letters(), "/data/x", "train", items[:2]).digest
    logger.log_dataset(record)
    logger.log_dataset(record)
    (found,) = read(logger).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("letters-train", record.digest)
    assert json.loads(found.dataset.source) == {"uri": "/data/x"}
    assert json.loads(found.dataset.profile) == {"num_rows": 3}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def child_of(parent: RunLogger, monkeypatch, **tags: str) -> RunLogger:
    monkeypatch.setenv("MEMGEN_PARENT_RUN", str(parent.run_id))
    child = run_logger(root=str(parent.folder.parent), system_seconds=0)
    monkeypatch.delenv("MEMGEN_PARENT_RUN")
    child.describe(tags=tags)
    return child


def test_a_pipeline_shows_the_best_values_of_each_stage(root, monkeypatch):
    parent = open_parent("demo", "pipeline", run_logger(root=str(root), system_seconds=0))
    for stage, value in (("weaver_sft", 0.5), ("weaver_grpo", 0.75)):
        child = child_of(parent, monkeypatch, stage=stage)
        tracking.log_best([child], "val/reward", "max", value, 10)
        child.finalize()
        test = child_of(parent, monkeypatch, stage=stage)
        test.log_metrics({"test/reward": value / 2}, 0)
        test.finalize()
        assert read(test).data.tags["mlflow.parentRunId"] == parent.run_id
    parent.finalize()
    assert read(parent).data.metrics == {
        "weaver_sft/best_val_reward": 0.5,
        "weaver_sft/test_reward": 0.25,
        "weaver_grpo/best_val_reward": 0.75,
        "weaver_grpo/test_reward": 0.375,
    }
    assert len(history(parent, "weaver_sft/test_reward")) == 1


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_a_sweep_shows_its_best_point(root, monkeypatch, mode, best):
    parent = open_parent("lr", "sweep", run_logger(root=str(root), system_seconds=0))
    children = []
    for value in (0.5, 0.75, 0.25):
        children.append(child_of(parent, monkeypatch, stage="weaver_sft"))
        tracking.log_best([children[-1]], "val/x", mode, value, 10)
        children[-1].finalize()
    children.append(child_of(parent, monkeypatch, stage="weaver_sft"))
    children[-1].finalize("failed")
    run = read(parent)
    assert run.data.metrics == {"best/val_x": (0.5, 0.75, 0.25)[best]}
    assert run.data.tags["best.run"] == children[best].run_id
    assert run.data.tags["points"] == "3"


def test_other_loggers_are_left_alone(tmp_path):
    tracking.log_checkpoint([], tmp_path)


def test_the_environment_variable_names_another_store(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run_logger().address.uri == "http://127.0.0.1:9"
    assert run_logger(tracking_uri="http://127.0.0.1:8").address.uri == "http://127.0.0.1:8"
    assert not (tmp_path / "runs").exists()


def test_telemetry_is_off_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert run_logger().store.address.uri == "http://127.0.0.1:9"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_mlflow_is_imported_only_when_a_run_is_recorded():
    code = "import sys, memgen.tracking.run_record; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
