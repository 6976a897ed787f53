"""What the commands leave in MLflow: one run over a resume, a registered checkpoint that `memgen test` loads."""

from __future__ import annotations

import pytest

from letters_stage import write_stage
from memgen.api.names import resolve_name
from memgen.cli import main as front_end
from memgen.tracking.store import client_of


@pytest.fixture
def folder(root, monkeypatch):
    folder = root.parent
    monkeypatch.chdir(folder)
    write_stage(folder)
    return folder


def run(command: str, *arguments: str) -> None:
    assert front_end.main([command, "--config", "stage.yaml", *arguments]) == 0


def the_client():
    return client_of("sqlite:///runs/mlflow.db")


def runs(client) -> list:
    experiment = client.get_experiment_by_name("memgen")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def test_a_resumed_command_goes_on_with_its_run_and_its_checkpoint_can_be_tested(folder):
    run("fit")
    (first,) = runs(the_client())
    assert first.info.status == "FINISHED"
    assert first.info.run_name == f"weaver_sft Letters {folder / 'base'} seed 3"
    resume = folder / "runs" / "weaver_sft" / first.info.run_id / "resume" / "last.ckpt"
    run("fit", "--ckpt_path", str(resume), "--trainer.max_steps=5")

    client = the_client()
    (again,) = runs(client)
    assert again.info.run_id == first.info.run_id
    steps = [row.step for row in client.get_metric_history(again.info.run_id, "train/loss")]
    assert steps == [0, 1, 2, 3, 4]
    assert {"best/val_reward", "val/loss", "train/learning_rate"} <= set(again.data.metrics)
    datasets = [found.dataset.name for found in again.inputs.dataset_inputs]
    assert sorted(datasets) == ["letters-train", "letters-val"]
    tables = [item.path for item in client.list_artifacts(again.info.run_id, "tables")]
    assert tables == ["tables/val_step_000003.json"]

    (model,) = client.search_registered_models()
    assert model.name.startswith("weaver_sft-Letters-")
    versions = sorted(
        int(version.version) for version in client.search_model_versions(f"name='{model.name}'")
    )
    assert versions == [1, 2]
    run("test", "--checkpoint", f"models:/{model.name}/1")
    tested = runs(the_client())[-1]
    assert tested.data.tags["init_from"] == f"models:/{model.name}/1"
    assert "test/reward" in tested.data.metrics
    named = resolve_name(f"runs:/{first.info.run_id}", "sqlite:///runs/mlflow.db")
    assert named.endswith("checkpoints/step_000005_best")


def test_two_folders_of_one_process_keep_their_own_runs(folder, tmp_path_factory, monkeypatch):
    run("fit")
    other = tmp_path_factory.mktemp("other")
    (other / "stage.yaml").write_text((folder / "stage.yaml").read_text())
    monkeypatch.chdir(other)
    run("fit")
    (second,) = runs(the_client())
    monkeypatch.chdir(folder)
    (first,) = runs(the_client())
    assert (folder / "runs" / "weaver_sft" / first.info.run_id).is_dir()
    assert (other / "runs" / "weaver_sft" / second.info.run_id).is_dir()


def test_a_checkpoint_that_mlflow_does_not_have_is_refused_in_one_line(folder, capsys):
    assert front_end.main(["test", "--config", "stage.yaml", "--checkpoint", "models:/nothing/7"]) == 2
    store = folder / "runs" / "mlflow.db"
    assert f"there is no models:/nothing/7 in sqlite:///{store}" in capsys.readouterr().err
