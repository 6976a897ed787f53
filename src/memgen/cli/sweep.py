"""`memgen ablate --sweep`: trains and tests every point of a grid of settings, here or as a SLURM array, and compares them.

The folder is laid out as `memgen submit --array` lays out its own: `points/NNN/` is a run like any other, with its
overrides, and with the records of its test in `test/`. So what an array has trained and tested is compared by the same
command that would have done it here, and what it has left is done here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memgen.cli import submit
from memgen.cli.config import Request
from memgen.cli.errors import UsageError
from memgen.cli.slurm import OVERRIDES, POINTS, TEST
from memgen.files import write_whole

if TYPE_CHECKING:
    from memgen.analysis.matrix import Matrix
    from memgen.tracking.run_logger import RunLogger

logger = logging.getLogger(__name__)

SWEEP, LIST = "sweep.json", "sweep.txt"
"""In the sweep's folder: what it was begun with, and its points as `memgen submit --array` reads them."""
FOLDER = "runs/sweeps"
SHORT = ("backbone", "weaver", "trigger", "boundaries")
"""Sections of `model.memgen`, which need not be written in front of their keys."""
Point = dict[str, str]
"""The values of one point by key, as they were typed."""


def read_grid(texts: Sequence[str]) -> list[Point]:
    """The points of a grid: every combination of the values, the last key's fastest.

    Args:
        texts: `KEY=V1,V2,...` for each key.

    Raises:
        UsageError: if one is not written so, has a value twice or names a key that another names.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        if not equals or not key or not all(values):
            raise UsageError(f"--sweep {text!r}: write KEY=V1,V2,..., such as weaver.prompt_latents=2,4,8")
        if len(set(values)) < len(values):
            raise UsageError(f"--sweep {text!r} has a value twice")
        if key in axes:
            raise UsageError(f"--sweep {key} is given twice; list all its values in one")
        axes[key] = values
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(points) < 2:
        raise UsageError("a sweep needs at least two points; give --sweep more values")
    return points


def overrides(point: Point) -> list[str]:
    """The arguments of `memgen fit` that a point adds."""
    return [
        f"--{'model.memgen.' if key.split('.')[0] in SHORT else ''}{key}={value}"
        for key, value in point.items()
    ]


def name(point: Point) -> str:
    """A point's name in tables."""
    return ", ".join(f"{key}={value}" for key, value in point.items())


def run(
    grid: Sequence[str], arguments: Sequence[str], out: Path | None, submitted: Sequence[str] | None
) -> int:
    """Trains and tests all points and compares them; what is done is not done again.

    Args:
        grid: `KEY=V1,V2,...` for each key.
        arguments: of `memgen fit`, for all points.
        out: the sweep's folder; None: by what is swept and how.
        submitted: options of `memgen submit`: the points become a job array; None: they run here, one by one.

    Returns:
        The exit status.

    Raises:
        UsageError: if an option or a point's configuration is refused, or the folder was begun with another sweep.
        RuntimeError: if a point fails.
        KeyboardInterrupt: after Ctrl-C; the same command goes on.
    """
    points = read_grid(grid)
    request = Request.from_argv(arguments)
    folder = (out or Path(FOLDER) / _default_name(points, arguments)).absolute()
    description = submit.check_points(request, arguments, [overrides(point) for point in points])
    _require_checkpoints(description.resolved)
    _begin(folder, points, arguments)
    if submitted is not None:
        listed = ["--array", str(folder / LIST), "--run", str(folder), "--test"]
        return submit.main([*arguments, *listed, *submitted])
    parent = _parent(folder, description.resolved, len(points))
    for number, point in enumerate(points):
        _train_and_test(folder / POINTS / f"{number:03d}", point, arguments)
    _report(folder, points, parent)
    return 0


def _require_checkpoints(resolved: Mapping[str, Any]) -> None:
    """Refuses a configuration that keeps no weights to test."""
    callbacks = (resolved.get("trainer") or {}).get("callbacks") or []
    if not any(str(found.get("class_path", "")).endswith(".AdapterCheckpoint") for found in callbacks):
        raise UsageError(
            "a sweep tests the weights that each point has trained, but no callback keeps them; add "
            "memgen.training.callbacks.AdapterCheckpoint to trainer.callbacks"
        )


def _default_name(points: Sequence[Point], arguments: Sequence[str]) -> str:
    text = json.dumps([points, list(arguments)])
    keys = "-".join(key.rpartition(".")[2] for key in points[0])
    return f"{keys}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _begin(folder: Path, points: Sequence[Point], arguments: Sequence[str]) -> None:
    """Writes what the sweep is, or compares with what it was begun as."""
    from memgen.results.ledger import differences

    now: dict[str, Any] = {
        "arguments": shlex.join(arguments),
        "points": {f"{number:03d}": name(point) for number, point in enumerate(points)},
    }
    path = folder / SWEEP
    if path.is_file():
        wrong = differences(json.loads(path.read_text(encoding="utf-8")), now)
        if wrong:
            raise UsageError(
                f"{folder} was begun as another sweep: {'; '.join(wrong)}. Give the same again, or another folder (--out DIR)"
            )
    else:
        write_whole(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / LIST, "".join(f"{shlex.join(overrides(point))}\n" for point in points))
    for number, point in enumerate(points):
        place = folder / POINTS / f"{number:03d}" / OVERRIDES
        write_whole(place, "".join(f"{word}\n" for word in overrides(point)))


def _parent(folder: Path, resolved: Mapping[str, Any], count: int) -> RunLogger | None:
    """The MLflow run whose children the points' runs become: one for the sweep, however often it goes on."""
    from memgen.tracking.family import PARENT_VARIABLE
    from memgen.tracking.run_file import RUN_FILE
    from memgen.tracking.run_logger import open_parent, resumed_logger

    found = submit.logger_of(resolved)
    if found is None:
        return None
    if (folder / RUN_FILE).is_file():
        parent = resumed_logger(found, folder / POINTS)
    else:
        parent = open_parent(f"sweep of {count}", "sweep", found)
        parent.log_run_folder(folder)
    os.environ[PARENT_VARIABLE] = parent.run_id or ""
    return parent


def _train_and_test(place: Path, point: Point, arguments: Sequence[str]) -> None:
    """Trains a point and tests it, each in a process of its own as a person would."""
    from memgen.lab.trained import run_memgen
    from memgen.results.score_files import SUMMARY

    if (place / TEST / SUMMARY).is_file():
        logger.warning("%s is trained and tested", name(point))
        return
    given = [*arguments, *overrides(point)]
    print(f"{name(point)}: {place}", flush=True)
    # A run that has ended resumes at its last step, and ends again.
    run_memgen("fit", *given, "--run", str(place))
    trained = place / "best" if (place / "best").is_dir() else place / "last"
    run_memgen("test", *given, "--checkpoint", str(trained), "--records", str(place / TEST))


def _report(folder: Path, points: Sequence[Point], parent: RunLogger | None) -> None:
    from memgen.analysis import ablation_report

    found = compare(folder, points)
    page, numbers = ablation_report.write(found, folder)
    if parent is not None:
        parent.log_text(page, f"ablation/{ablation_report.REPORT}")
        parent.log_text(numbers, f"ablation/{ablation_report.NUMBERS}")
        parent.finalize()
    print("\n".join(ablation_report.text_lines(found)))
    print(f"report: {folder / ablation_report.REPORT}")


def compare(folder: Path, points: Sequence[Point]) -> Matrix:
    """Compares the tests of a sweep's points.

    Args:
        folder: of the sweep.
        points: all of them, each with a complete test.

    Raises:
        ValueError: if a test is not complete, or of other items than the first point's.
    """
    from memgen.analysis.matrix import compared, scored_test
    from memgen.results.score_files import read_records

    scored, first = {}, None
    for number, point in enumerate(points):
        records = read_records(folder / POINTS / f"{number:03d}" / TEST)
        first = first or records
        if records.settings["data"] != first.settings["data"]:
            raise ValueError(
                f"{records.folder} is of other items than {first.folder}, so the points cannot be compared"
            )
        task = str(records.settings["data"]["environment"])
        scored[name(point)] = scored_test(records.rows, task)
        if len(scored[name(point)]) < records.items:
            raise ValueError(
                f"{records.folder} is not complete: it has {len(scored[name(point)])} of {records.items} items; run the "
                "command again, which goes on where it stopped"
            )
    assert first is not None, "a sweep has points"
    generation = first.settings["generation"]
    return compared(
        scored,
        title=f"Sweep of {', '.join(points[0])}",
        environment=str(first.settings["data"]["environment"]),
        of=f"{len(points)} points, each trained by the same command",
        temperature=float(generation["temperature"]),
        seed=int(generation["seed"]),
        memory=None,
        notes=[
            "each point is one run: its seed's luck is in the difference, and not in the interval over items"
        ],
    )
