"""Runs that belong together: the stages of a pipeline, the points of a sweep.

They are children of a run that has no training of its own. MLflow's pages show only the parent until it is unfolded, so
the parent gets its children's best values: in a pipeline those of each stage, in a sweep those of the best point.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_VARIABLE = "MEMGEN_PARENT_RUN"
"""Environment variable that names the run whose child a command's run becomes."""
PARENT_TAG = "mlflow.parentRunId"
"""MLflow's own name for it."""
FAMILY_TAG = "memgen.family"
"""Of a parent: what its children are."""
Family = Literal["pipeline", "sweep"]
BEST, TEST = "best/", "test/"
"""Sections of a child's metrics that its parent shows."""
MONITOR_TAG, MODE_TAG = "monitor", "monitor.mode"
"""Of a child: the metric that decided what its best checkpoint is, and whether larger or smaller is better."""


def best_key(metric: str) -> str:
    """Name of a run's best value of a metric. All of them stand in one section of MLflow's charts."""
    return f"{BEST}{metric.replace('/', '_')}"


def parent_run_id() -> str | None:
    """The run that the environment names as parent."""
    return os.environ.get(PARENT_VARIABLE) or None


def summarise_children(client: MlflowClient, parent: str) -> None:
    """Writes the best values of a parent's children onto it. Children may do so at the same time.

    Args:
        client: of the store.
        parent: its run id.
    """
    from mlflow.entities import Metric, RunTag

    run = client.get_run(parent)
    # Oldest first: of two runs of a stage the later one counts.
    children = client.search_runs(
        [run.info.experiment_id],
        filter_string=f"tags.`{PARENT_TAG}` = '{parent}'",
        order_by=["attributes.start_time ASC"],
        max_results=1000,
    )
    values, tags = _of_sweep(children) if run.data.tags.get(FAMILY_TAG) == "sweep" else _of_pipeline(children)
    now = int(time.time() * 1000)
    # Whoever has seen more children writes at a later step, and so has the last word.
    rows = [
        Metric(key, value, now, len(children))
        for key, value in values.items()
        if run.data.metrics.get(key) != value
    ]
    client.log_batch(parent, metrics=rows, tags=[RunTag(key, value) for key, value in tags.items()])


def _of_pipeline(children: list[Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Each stage's values in a section of its own."""
    values: dict[str, float] = {}
    for child in children:
        stage = child.data.tags.get("stage", "run")
        values |= {f"{stage}/{key.replace('/', '_')}": value for key, value in _shown(child).items()}
    return values, {}


def _of_sweep(children: list[Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The values of the best point, and which it is."""
    found = []
    for child in children:
        monitor = best_key(child.data.tags.get(MONITOR_TAG, ""))
        if monitor in child.data.metrics:
            sign = -1.0 if child.data.tags.get(MODE_TAG) == "min" else 1.0
            found.append((sign * child.data.metrics[monitor], child))
    if not found:
        return {}, {}
    _, best = max(found, key=lambda pair: pair[0])
    tags = {"best.run": best.info.run_id, "best.name": best.info.run_name, "points": str(len(found))}
    return _shown(best), tags


def _shown(child: Any) -> dict[str, float]:
    return {key: value for key, value in child.data.metrics.items() if key.startswith((BEST, TEST))}
