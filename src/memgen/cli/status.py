"""`memgen status`: submitted runs, their SLURM states and their progress."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memgen.cli import slurm
from memgen.cli.errors import UsageError
from memgen.cli.slurm import JOB_FILE, JOB_FOLDER, POINTS, Submission

PROGRESS = Path("resume") / "progress.json"
METRICS = ("val/exact_match", "val/reward", "rollout/reward", "train/loss")
"""The first of these that a run has is shown."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    job: str
    state: str
    name: str
    step: str
    metric: str
    told: str
    run: str


def main(argv: list[str]) -> int:
    """Lists the runs below a folder.

    Args:
        argv: the arguments after `memgen status`.

    Returns:
        The exit status.

    Raises:
        UsageError: if there is no such folder.
    """
    parser = argparse.ArgumentParser(prog="memgen status", description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument(
        "--last", type=int, default=20, help="how many, the newest last; default: %(default)s"
    )
    options = parser.parse_args(argv)
    if not options.root.is_dir():
        raise UsageError(f"{options.root} is no folder; name the one that holds the runs")
    runs = sorted(find_runs(options.root), key=lambda run: Submission.read(run).submitted_at)[-options.last :]
    if not runs:
        print(f"{options.root} holds no run that was submitted")
        return 0
    submissions = [(run, Submission.read(run)) for run in runs]
    try:
        states = slurm.states([submission.job for _, submission in submissions])
    except UsageError as error:
        print(f"memgen status: {error}; states are not known")
        states = {}
    table = [line for run, submission in submissions for line in lines(run, submission, states)]
    _print(table)
    return 0


def find_runs(root: Path) -> list[Path]:
    """Folders of submitted runs: `root` itself, or up to three below."""
    pattern = f"{JOB_FOLDER}/{JOB_FILE}"
    found = [path for depth in ("", "*/", "*/*/", "*/*/*/") for path in root.glob(depth + pattern)]
    # A folder's `latest` is a link to one of the others.
    return sorted({path.parent.parent.resolve() for path in found})


def lines(run: Path, submission: Submission, states: dict[str, str]) -> list[Line]:
    """A run, or the points of a sweep."""
    if submission.points is None:
        return [_line(submission.job, submission.name, run, states)]
    return [
        _line(f"{submission.job}_{point}", submission.name, run / POINTS / f"{point:03d}", states)
        for point in range(submission.points)
    ]


def _line(job: str, name: str, run: Path, states: dict[str, str]) -> Line:
    progress = _progress(run)
    most = progress.get("max_steps", -1)
    shown = next((key for key in METRICS if key in progress.get("metrics", {})), None)
    value = progress["metrics"][shown] if shown else math.nan
    return Line(
        job=job,
        state=states.get(job, "unknown"),
        name=name,
        step=(f"{progress['step']}" + (f"/{most}" if most > 0 else "")) if progress else "-",
        metric=f"{shown} {value:.4g}" if shown else "-",
        told=_ago(time.time() - progress["time"]) if progress else "-",
        run=str(run),
    )


def _progress(run: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run / PROGRESS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def _print(table: list[Line]) -> None:
    rows = [("job", "state", "name", "step", "metric", "told", "run")]
    rows += [(line.job, line.state, line.name, line.step, line.metric, line.told, line.run) for line in table]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        *cells, last = row
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last]))
