"""What a person sees of a pipeline in MLflow's pages: runs, charts, episodes with marks, traces, models."""

from __future__ import annotations

import shutil

import pytest

from browser_runs import Pipeline, run_pipeline
from mlflow_pages import CHROMIUM, Pages
from mlflow_server import Server

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(1500),
    # mlflow warns about its own code as it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set MEMGEN_CHROMIUM")
    pytest.importorskip("playwright", reason="no playwright: pip install -c constraints.txt -e .[dev]")
    one = Server(tmp_path_factory.mktemp("server"))
    one.start()
    try:
        one.wait()
        yield one
    finally:
        one.kill()


@pytest.fixture(scope="module")
def pipeline(server, tmp_path_factory) -> Pipeline:
    return run_pipeline(tmp_path_factory.mktemp("pipeline"), server.uri)


@pytest.fixture(scope="module")
def pages(server, pipeline, tmp_path_factory):
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("browser")
    with sync_playwright() as playwright:
        one = Pages(playwright, server.uri, folder / "profile", folder / "images")
        yield one
        one.close()


def route(pipeline: Pipeline, stage: str, page: str = "") -> str:
    return f"/experiments/{pipeline.experiment}/runs/{pipeline.stages[stage]}{page}"


def test_the_stages_are_found_below_their_pipeline(pages, pipeline):
    pages.open(f"/experiments/{pipeline.experiment}/runs", "pipeline")
    pages.unfold("pipeline")
    text = pages.wait_for("weaver_grpo Countdown tiny seed 0")
    for name in ("weaver_sft Letters tiny seed 0", "trigger_rl Countdown tiny seed 0"):
        assert name in text
    pages.shoot("mlflow_runs")


def test_a_run_says_what_it_is(pages, pipeline):
    pages.open(route(pipeline, "weaver_grpo"), "weaver_grpo-Countdown-tiny", "countdown-train")
    text = pages.text()
    for tag in ("stage: weaver_grpo", "backbone: tiny", "environment: Countdown", "seed: 0", "git.revision"):
        assert tag in text, tag
    assert "Finished" in text
    pages.open(f"/experiments/{pipeline.experiment}/runs/{pipeline.parent}", "weaver_grpo/best_val_reward")


def test_metrics_are_drawn_in_sections(pages, pipeline):
    pages.open(route(pipeline, "weaver_grpo", "/model-metrics"), "latents", "rollout", "trigger")
    pages.search_charts("rollout/reward")
    assert pages.charts() >= 2
    pages.shoot("mlflow_charts")


def test_episodes_are_shown_with_the_places_where_memory_was_woven_in(pages, pipeline):
    html = pages.artifact_text(route(pipeline, "weaver_grpo", "/artifacts/samples/val_step_000006.html"))
    assert "<mark>3 latents</mark>" in html
    assert "count 3" in html
    pages.shoot("mlflow_episodes")


def test_an_episode_of_several_turns_is_a_trace(pages, pipeline):
    text = pages.open_trace(route(pipeline, "weaver_grpo", "/traces"), "count 3")
    for part in ("episode", "turn 2", "environment", "turn 3", "⟦3 latents⟧", "3 to go"):
        assert part in text, part
    pages.shoot("mlflow_trace")


def test_checkpoints_are_versions_of_registered_models(pages):
    pages.open(
        "/models", "weaver_grpo-Countdown-tiny", "weaver_sft-Letters-tiny", "trigger_rl-Countdown-tiny"
    )
    assert "Version 1" in pages.text()
