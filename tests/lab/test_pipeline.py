"""The whole pipeline on the embedded default, one seed, from nothing: what `make demo` runs, and what it shows.

`memgen demo` runs once for all tests of this file: its figures need nothing more, and what `memgen ui` shows of it, and of an
agent trained on the text world, needs a browser. Those are the pictures of the documents.
"""

from __future__ import annotations

import json
import os
import re
import shlex
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
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    # mlflow warns about its own code as it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
]

ROOT = Path(__file__).resolve().parents[2]
WORLD = ["fit", "--config", "conf/weaver_sft.yaml", "--config", "conf/data/lab_text_world.yaml"]


class Folder:
    """A user's folder, in which commands are run."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        self.environment = {
            **os.environ,
            "MEMGEN_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        (path / "conf").symlink_to(ROOT / "conf")

    def run(self, *arguments: str, path: Path | None = None) -> str:
        """What a command prints, here or in another folder."""
        done = subprocess.run(
            [sys.executable, "-m", "memgen.cli.main", *arguments],
            cwd=path or self.path, env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    @property
    def store(self) -> str:
        return f"sqlite:///{self.path / 'runs' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lab_home) -> Folder:
    """After `memgen demo`; what it printed is in the file `printed`."""
    folder = Folder(tmp_path_factory.mktemp("user"), lab_home)
    (folder.path / "printed").write_text(folder.run("demo"))
    return folder


def test_the_demo_trains_every_stage_to_beat_its_controls_on_held_out_items(folder):
    assert "memgen ui" in (folder.path / "printed").read_text()
    report = json.loads((folder.path / "runs" / "demo.json").read_text())
    assert report["split"] == "test"
    assert report["items"] >= 500
    conditions = report["conditions"]
    exact = {name.strip(): condition["exact"] for name, condition in conditions.items()}
    assert exact["weaver SFT, all boundaries"] >= 0.95
    # Latents are about the item: those of another one do not help, and the price list cannot be guessed.
    assert exact["latents of another item"] < 0.3
    assert exact["reasoner alone"] < 0.1
    assert exact["untrained latents"] < 0.1
    assert report["constant_completion"]["exact"] < 0.05
    # Reinforcement learns what supervision had left.
    assert exact["and then weaver GRPO"] >= exact["half-trained weaver"] + 0.3
    # A weaver that is always on harms other tasks; the trigger keeps what it is good for and leaves them alone.
    trigger, alone, always = (
        conditions[name]
        for name in ("weaver SFT and trigger RL", "reasoner alone", "weaver SFT, all boundaries")
    )
    assert trigger["exact"] >= 0.97 * always["exact"]
    assert trigger["insertions_per_answer"] <= 1.2
    assert trigger["others"]["exact"] >= alone["others"]["exact"] - 0.02
    assert always["others"]["exact"] < alone["others"]["exact"] - 0.3


def test_the_first_block_of_readme_trains_what_the_demo_does_tests_it_and_answers(folder, tmp_path):
    """Its training is a command of the demo's, which is not run again; the others are, in a folder without `conf/`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(.*?)^```", readme, re.M | re.S)[1]
    fit, *others = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert f"2/6  weaver SFT: {shlex.join(fit)}\n" in (folder.path / "printed").read_text()
    (tmp_path / "runs").symlink_to(folder.path / "runs")
    tested, answered = (folder.run(*command[1:], path=tmp_path) for command in others)
    assert float(re.search(r"exact_match\D*([\d.]+)", tested)[1]) >= 0.95
    *_, prices, total = answered.splitlines()
    assert prices.count("⟦memory⟧") == 4
    assert total.startswith("# ")


@pytest.fixture(scope="module")
def browser() -> str:
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set MEMGEN_CHROMIUM")
    pytest.importorskip("playwright", reason="no playwright: pip install -c constraints.txt -e .[dev]")
    return CHROMIUM


@pytest.fixture(scope="module")
def runs(browser, folder) -> dict[str, Any]:
    """The runs of the store by their stage and environment, an agent's on the text world among them; and the parent."""
    folder.run(*WORLD)
    client = client_of(folder.store)
    (experiment,) = [found for found in client.search_experiments() if found.name == "memgen"]
    made = {}
    for found in client.search_runs([experiment.experiment_id]):
        tags = found.data.tags
        key = "parent" if tags.get("mlflow.runName") == "demo" else f"{tags['stage']} {tags['environment']}"
        if tags.get("command", "fit") == "fit":
            made[key] = found
    return {"experiment": experiment.experiment_id, **made}


@pytest.fixture(scope="module")
def pages(runs, folder, tmp_path_factory) -> Iterator[Pages]:
    from playwright.sync_api import sync_playwright

    port = free_port()
    command = [sys.executable, "-m", "memgen.cli.main", "ui", "--port", str(port)]
    with (folder.path / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder.path, env=folder.environment, stdout=log, stderr=log, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    # The pictures of docs/images: MEMGEN_SCREENSHOTS=docs/images, and --basetemp for a path that may be seen.
    images = Path(os.environ.get("MEMGEN_SCREENSHOTS", folder.path / "images"))
    try:
        assert answers(uri, process), (folder.path / "ui.log").read_text()[-3000:]
        with sync_playwright() as playwright:
            one = Pages(playwright, uri, tmp_path_factory.mktemp("profile"), images)
            yield one
            one.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


def route(runs: dict[str, Any], key: str, page: str = "") -> str:
    return f"/experiments/{runs['experiment']}/runs/{runs[key].info.run_id}{page}"


@pytest.mark.browser
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


@pytest.mark.browser
def test_the_reward_of_grpo_is_drawn(pages, runs):
    pages.open(route(runs, "weaver_grpo Lab", "/model-metrics"), "latents", "rollout", "trigger")
    pages.search_charts("reward")
    assert pages.charts() >= 2
    pages.shoot("mlflow_charts")


@pytest.mark.browser
def test_a_rollout_page_shows_prices_and_where_memory_went_in(pages, runs, folder):
    samples = client_of(folder.store).list_artifacts(runs["weaver_sft TextWorld"].info.run_id, "samples")
    html = pages.artifact_text(route(runs, "weaver_sft TextWorld", f"/artifacts/{samples[-1].path}"))
    assert "<mark>" in html
    assert "latents</mark>" in html
    pages.shoot("mlflow_episodes")


@pytest.mark.browser
def test_a_turn_of_the_agent_is_a_span_of_a_trace(pages, runs):
    text = pages.open_trace(route(runs, "weaver_sft TextWorld", "/traces"), "bring")
    for part in ("episode", "turn 1", "environment", "latents⟧"):
        assert part in text, part
    pages.shoot("mlflow_trace")
