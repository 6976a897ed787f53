"""`memgen bench generation --sweep`: how the cost of decoding grows, one quantity at a time.

The sweep "others" is the claim that rows do not pay for each other: in a batch of 8, row 0 never inserts, and 0 to 7
of the others do. Then a step in which nobody inserts must cost the same whatever the others inserted before, and the
whole must grow by a constant per insertion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from memgen.bench.generation import Decoding, Memory, Work, has_static_cache, measure_decoding, sides
from memgen.bench.regression import fit_line, fit_prices
from memgen.bench.shapes import ModelSettings
from memgen.bench.timing import Meter, interleave
from memgen.model.cache import KVCache
from memgen.model.trigger import Boundary, Trigger

SweepName = Literal["batch", "new", "insertions", "latents", "prompt", "others"]

PRICED = (
    "reasoner_forwards",
    "reasoner_positions",
    "weaver_forwards",
    "weaver_positions",
    "query_key_pairs",
)
"""What the fit over all sweeps gives a price."""


@dataclass(frozen=True)
class Sweep:
    """One quantity and its values."""

    name: SweepName
    what: str
    """The x axis."""
    values: tuple[int, ...]


SWEEPS: dict[str, Sweep] = {
    sweep.name: sweep
    for sweep in (
        Sweep("batch", "rows in the batch", (1, 2, 4, 8, 16, 32, 64)),
        Sweep("new", "new tokens (one row)", (32, 128, 512, 2048)),
        Sweep("insertions", "insertions per row (8 rows, 256 new tokens)", (0, 1, 2, 4, 8, 16, 32)),
        Sweep("latents", "K (8 rows)", (1, 2, 4, 8, 16, 32)),
        Sweep("prompt", "prompt tokens (8 rows)", (32, 128, 512, 1024)),
        Sweep("others", "other rows that insert (of 8)", (0, 1, 2, 3, 4, 5, 6, 7)),
    )
}


SWEEP_WORK = Work(batch=8, prompt=128, new=128)
"""What stays as it is while another quantity varies."""


def find_sweep(name: str) -> Sweep:
    """The sweep of a name.

    Raises:
        ValueError: if there is none of that name; the message names those that there are.
    """
    if name not in SWEEPS:
        raise ValueError(f"unknown sweep '{name}'; choose among: {', '.join(SWEEPS)}")
    return SWEEPS[name]


@final
class RowTrigger(Trigger):
    """Invokes at every boundary of some rows, and never in the others.

    Args:
        rows: the rows that insert. While no row finishes, a row's line is its index.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        super().__init__()
        self.rows = frozenset(rows)

    @override
    def invoke_probs(self, boundary: Boundary, cache: KVCache | None) -> Float[Tensor, " rows"]:
        return torch.tensor([float(row in self.rows) for row in boundary.rows])


@dataclass(frozen=True)
class Point:
    """One place of a sweep."""

    sweep: SweepName
    x: int
    settings: ModelSettings
    work: Work
    memory: Memory
    inserting: int | None = None
    """Rows that insert, from the last one down; None: all."""


def points(sweep: Sweep, settings: ModelSettings) -> list[Point]:
    """What a sweep measures."""
    base = SWEEP_WORK
    made = []
    for x in sweep.values:
        point = Point(sweep.name, x, settings, base, "always")
        match sweep.name:
            case "batch":
                point = replace(point, work=replace(base, batch=x))
            case "new":
                point = replace(point, work=replace(base, batch=1, new=x))
            case "insertions":
                # Delimiters are every 4th token, so that 31 of them occur in each row; the prompt's end is the first.
                dense = replace(settings, cap=max(x - 1, 0), spacing=4)
                point = replace(point, settings=dense, work=replace(base, new=2 * base.new))
                point = replace(point, memory="always" if x else "never")
            case "latents":
                point = replace(point, settings=replace(settings, latents=x))
            case "prompt":
                point = replace(point, work=replace(base, prompt=x))
            case "others":
                point = replace(point, inserting=x)
        made.append(point)
    return made


def runs_of(point: Point, repeats: int) -> int:
    """How often `progress` is called for a point."""
    counted = repeats + has_static_cache(point.settings)
    return counted * sides(point.settings, [point.memory])


def measure_point(
    point: Point, repeats: int, meter: Meter, progress: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """One case of a sweep.

    Args:
        point: where.
        repeats: counted passes.
        meter: the clocks.
        progress: called after each run.
    """
    decoding = Decoding(point.settings)
    if point.inserting is not None:
        rows = range(point.work.batch - point.inserting, point.work.batch)
        decoding.models["always"] = decoding.parts.model(RowTrigger(rows))
    (case,) = measure_decoding(
        point.settings,
        point.work,
        [point.memory],
        repeats,
        meter,
        progress,
        decoding=decoding,
        # On a device, work is compiled and captured at a new shape's first use.
        warm_up=has_static_cache(point.settings),
    )
    case |= {"sweep": point.sweep, "x": point.x}
    if point.inserting is not None:
        case["memory"] = "some rows"
        case["rows_inserting"] = point.inserting
        case |= quiet_steps(decoding, point.work, repeats, meter)
    return case


def warm_up(settings: ModelSettings, meter: Meter) -> None:
    """One small run of both sides, since points of a sweep are too dear to be run for nothing."""
    decoding = Decoding(settings)
    work = Work(batch=2, prompt=16, new=16)
    interleave(
        {
            "plain": lambda: decoding.huggingface(work),
            "ours": lambda: decoding.ours(work, decoding.models["always"]),
        },
        1,
        meter,
    )


def quiet_steps(decoding: Decoding, work: Work, repeats: int, meter: Meter) -> dict[str, Any]:
    """Steps in which no row inserts, timed one by one, and what a row that never inserts is fed.

    Args:
        decoding: with a trigger that keeps some rows from inserting.
        work: the task.
        repeats: runs.
        meter: runs them.
    """
    seconds: list[float] = []
    fed = 0

    def run() -> None:
        nonlocal fed
        ticks: list[float] = []
        loud = False
        quiet: list[bool] = []

        def observe(row: int, token: int | None) -> None:
            nonlocal loud
            if token is None:
                loud = True
            elif row == 0:
                ticks.append(time.process_time())
                quiet.append(not loud)
                loud = False

        generation = decoding.ours(work, decoding.models["always"], observe)
        # The first tick ends the reading of the prompt.
        seconds.extend(
            end - begin for begin, end, still in zip(ticks[:-1], ticks[1:], quiet[1:], strict=True) if still
        )
        assert not generation.plan.rows()[0], "row 0 never inserts"
        fed = work.prompt + work.new - 1

    for _ in range(repeats):
        meter.measure(run)
    return {
        "quiet_steps": len(seconds),
        "quiet_step_cpu_seconds_median": round(median(seconds), 8) if seconds else None,
        "positions_of_a_row_that_never_inserts": fed,
    }


def summarise(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fit over all points of one model, and the claim about other rows' insertions.

    Args:
        cases: of any sweeps.
    """
    summary: dict[str, Any] = {}
    for model in dict.fromkeys(case["model"] for case in cases):
        own = [case for case in cases if case["model"] == model]
        found: dict[str, Any] = {}
        if len(own) >= len(PRICED):
            fit = fit_prices(own, [case["ours"]["cpu_seconds_median"] for case in own], PRICED)
            found["fit"] = fit.as_dict()
        others = [case for case in own if case["sweep"] == "others"]
        if len(others) > 1:
            found["others"] = _others(others)
        summary[model] = found
    return summary


def _others(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    insertions = [case["insertions"] for case in cases]
    total = fit_line(insertions, [case["ours"]["cpu_seconds_median"] for case in cases])
    quiet = fit_line(insertions, [case["quiet_step_cpu_seconds_median"] for case in cases])
    most = max(insertions)
    return {
        "cpu_seconds_without_insertions": round(total.intercept, 6),
        "cpu_seconds_per_insertion": round(total.slope, 8),
        "r_squared": round(total.r_squared, 4),
        "quiet_step_cpu_seconds_without_insertions": round(quiet.intercept, 8),
        "quiet_step_growth_at_most_insertions": round(quiet.slope * most / quiet.intercept, 4),
        "most_insertions": most,
    }
