"""What `memgen ui` shows of `make demo` and of an agent trained on the text world: the pictures of the documents."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memgen.tracking.store import client_of
from mlflow_pages import CHROMIUM, Pages
from mlflow_server import answers, free_port

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    # mlflow warns about its own code as it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
]

ROOT = Path(__file__).resolve().parents[2]
WORLD = ["fit", "--config", "conf/weaver_sft.yaml", "--config", "conf/data/lab_text_world.yaml"]


def run(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "memgen.cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder after both commands."""
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set MEMGEN_CHROMIUM")
    pytest.importorskip("playwright", reason="no playwright: pip install -c constraints.txt -e .[dev]")
    folder = tmp_path_factory.mktemp("user")
    (folder / "conf").symlink_to(ROOT / "conf")
    run(folder, "demo")
    run(folder, *WORLD)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Any]:
    """The runs of the store by their stage and environment; and the parent."""
    client = client_of(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "memgen"]
    made = {}
    for found in client.search_runs([experiment.experiment_id]):
        tags = found.data.tags
        key = "parent" if tags.get("mlflow.runName") == "demo" else f"{tags['stage']} {tags['environment']}"
        if tags.get("command", "fit") == "fit":
            made[key] = found
    return {"experiment": experiment.experiment_id, **made}


@pytest.fixture(scope="module")
def pages(folder, tmp_path_factory) -> Iterator[Pages]:
    from playwright.sync_api import sync_playwright

    port = free_port()
    command = [sys.executable, "-m", "memgen.cli.main", "ui", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with (folder / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    # The pictures of docs/images: MEMGEN_SCREENSHOTS=docs/images, and --basetemp for a path that may be seen.
    images = Path(os.environ.get("MEMGEN_SCREENSHOTS", folder / "images"))
    try:
        assert answers(uri, process), (folder / "ui.log").read_text()[-3000:]
        with sync_playwright() as playwright:
            one = Pages(playwright, uri, tmp_path_factory.mktemp("profile"), images)
            yield one
            one.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


def route(runs: dict[str, Any], key: str, page: str = "") -> str:
    return f"/experiments/{runs['experiment']}/runs/{runs[key].info.run_id}{page}"


def test_the_stages_of_the_demo_are_children_of_one_run_that_holds_their_best_values(pages, runs):
    stages = {"weaver_sft Lab", "weaver_grpo Lab", "trigger_rl Lab"}
    assert stages | {"weaver_sft TextWorld", "parent", "experiment"} == set(runs)
    parent = runs["parent"]
    for stage in stages:
        assert runs[stage].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert runs[stage].info.status == "FINISHED"
    assert "mlflow.parentRunId" not in runs["weaver_sft TextWorld"].data.tags
    best = runs["weaver_sft Lab"].data.metrics["best/val_exact_match"]
    assert parent.data.metrics["weaver_sft/best_val_exact_match"] == pytest.approx(best)
    pages.open(f"/experiments/{runs['experiment']}/runs", "demo")
    pages.unfold("demo")
    text = pages.wait_for("weaver_grpo Lab")
    assert "trigger_rl Lab" in text
    pages.shoot("mlflow_runs")


def test_the_reward_of_grpo_is_drawn(pages, runs):
    pages.open(route(runs, "weaver_grpo Lab", "/model-metrics"), "latents", "rollout", "trigger")
    pages.search_charts("reward")
    assert pages.charts() >= 2
    pages.shoot("mlflow_charts")


def test_a_rollout_page_shows_prices_and_where_memory_went_in(pages, runs, folder):
    samples = client_of(f"sqlite:///{folder / 'runs' / 'mlflow.db'}").list_artifacts(
        runs["weaver_sft TextWorld"].info.run_id, "samples"
    )
    html = pages.artifact_text(route(runs, "weaver_sft TextWorld", f"/artifacts/{samples[-1].path}"))
    assert "<mark>" in html
    assert "latents</mark>" in html
    pages.shoot("mlflow_episodes")


def test_a_turn_of_the_agent_is_a_span_of_a_trace(pages, runs):
    text = pages.open_trace(route(runs, "weaver_sft TextWorld", "/traces"), "bring")
    for part in ("episode", "turn 1", "environment", "latents⟧"):
        assert part in text, part
    pages.shoot("mlflow_trace")
