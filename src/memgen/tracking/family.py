"""Parent runs of pipelines and sweeps.

The runs of a pipeline's stages, or of a sweep's points, are children of a run that does not train. MLflow's list shows only
the parent until it is unfolded, so the parent gets its children's best values: of a pipeline those of each stage, of a
sweep those of the best point.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_VARIABLE = "MEMGEN_PARENT_RUN"
"""Environment variable with the id of the parent for a command's run."""
PARENT_TAG = "mlflow.parentRunId"
"""MLflow's tag with the parent's id."""
FAMILY_TAG = "memgen.family"
"""Tag of a parent: the kind of its children."""
Family = Literal["pipeline", "sweep"]
BEST, TEST = "best/", "test/"
"""Sections of a child's metrics that are copied to its parent."""
MONITOR_TAG, MODE_TAG = "monitor", "monitor.mode"
"""Tags of a child: the metric that chose its best checkpoint, and whether `max` or `min` is better."""


def best_key(metric: str) -> str:
    """Metric name for a run's best value of a metric; all of them share one section of MLflow's charts."""
    return f"{BEST}{metric.replace('/', '_')}"


def parent_run_id() -> str | None:
    """Id of the parent run that the environment names; None if it names none."""
    return os.environ.get(PARENT_VARIABLE) or None


def summarise_children(client: MlflowClient, parent: str) -> None:
    """Copies the best values of a parent's children to it. Children may do so at the same time.

    Args:
        client: client of the store.
        parent: id of the parent run.
    """
    from mlflow.entities import Metric, RunTag

    run = client.get_run(parent)
    # Oldest first: a later run of the same stage overrides an earlier one.
    children = client.search_runs(
        [run.info.experiment_id],
        filter_string=f"tags.`{PARENT_TAG}` = '{parent}'",
        order_by=["attributes.start_time ASC"],
        max_results=1000,
    )
    values, tags = _of_sweep(children) if run.data.tags.get(FAMILY_TAG) == "sweep" else _of_pipeline(children)
    now = int(time.time() * 1000)
    # A writer that has seen more children writes at a later step, so its values win.
    rows = [
        Metric(key, value, now, len(children))
        for key, value in values.items()
        if run.data.metrics.get(key) != value
    ]
    client.log_batch(parent, metrics=rows, tags=[RunTag(key, value) for key, value in tags.items()])


def _of_pipeline(children: list[Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Values of each stage, in a section per stage."""
    values: dict[str, float] = {}
    for child in children:
        stage = child.data.tags.get("stage", "run")
        values |= {f"{stage}/{key.replace('/', '_')}": value for key, value in _shown(child).items()}
    return values, {}


def _of_sweep(children: list[Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Values of the best point, and tags that name it."""
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
