"""Which MLflow run a run's folder or checkpoint belongs to, so that a resumed run goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memgen.files import write_whole

RUN_FILE = "mlflow_run.json"
"""File in a run's folder with its id in MLflow, the store, and the path of undelivered records."""
RUN_KEY = "mlflow_run_id"
"""Key of the run's id in Lightning's checkpoints."""


def write_run_file(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `mlflow_run.json` into a run's folder; it appears whole or not at all."""
    write_whole(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")


def recorded_run(checkpoint: Path) -> dict[str, Any] | None:
    """The MLflow run of a Lightning checkpoint: `run_id`, and perhaps `tracking_uri` and `outbox`; None if not known.

    It is looked for in the run's folder, then beside the checkpoint and in it.
    """
    for folder in list(checkpoint.absolute().parents)[:3]:
        if (folder / RUN_FILE).is_file():
            found: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
            return found
    beside = checkpoint.resolve().with_suffix(".json")
    if beside.is_file():
        state = json.loads(beside.read_text(encoding="utf-8"))
    elif checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    else:
        return None
    return {"run_id": state[RUN_KEY]} if state.get(RUN_KEY) else None
