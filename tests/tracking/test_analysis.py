"""What an analysis leaves in MLflow."""

from __future__ import annotations

from pathlib import Path

from cli.played import CONFIG, prepare_trained
from memgen.cli import main as front_end
from memgen.results import statistics
from memgen.tracking.store import client_of


def test_tables_and_numbers_of_an_oracle_are_artifacts_too(root, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    monkeypatch.chdir(root.parent)
    prepare_trained(root.parent)
    arguments = ["--checkpoint", "trained", "--budget", "3", "--trainer.logger", "true"]
    assert front_end.main(["oracle", *CONFIG, *arguments, "--model.generation.max_new_tokens", "8"]) == 0
    client = client_of("sqlite:///runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("memgen").experiment_id])
    assert run.info.status == "FINISHED"
    found = [item.path for item in client.list_artifacts(run.info.run_id, "oracle")]
    assert found == ["oracle/oracle.json", "oracle/oracle.md"]
    assert (next((root / "oracle").iterdir()) / "oracle.md").is_file()


def test_report_and_numbers_are_artifacts_of_the_commands_run(root, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    monkeypatch.chdir(root.parent)
    prepare_trained(root.parent)
    arguments = ["--checkpoint", "trained", "--null-draws", "19", "--trainer.logger", "true"]
    assert front_end.main(["analyze", *CONFIG, *arguments]) == 0
    client = client_of("sqlite:///runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("memgen").experiment_id])
    assert run.info.status == "FINISHED"
    found = [item.path for item in client.list_artifacts(run.info.run_id, "analysis")]
    assert found == ["analysis/analysis.json", "analysis/report.html"]
    (folder,) = (root / "analysis").iterdir()
    assert f"report: runs/analysis/{folder.name}/report.html" in capsys.readouterr().out
    page = client.download_artifacts(run.info.run_id, "analysis/report.html", str(root.parent))
    assert Path(page).read_text(encoding="utf-8") == (folder / "report.html").read_text(encoding="utf-8")
