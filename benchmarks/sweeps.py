"""How the cost of decoding grows, one quantity at a time: `python -m benchmarks.sweeps all`.

The sweep "others" is the claim that rows do not pay for each other: in a batch of 8, row 0 never inserts, and 0 to 7
of the others do. Then a step in which no row inserts must cost the same whatever the others inserted before, and the
whole must grow by a constant per insertion.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from benchmarks.regression import fit_line, fit_prices
from memgen.bench.generation import (
    Decoding,
    DecodingWorkload,
    InsertionMode,
    decoding_case,
    has_static_cache,
    measure_decoding,
)
from memgen.bench.record import Recorder
from memgen.bench.shapes import ModelSettings
from memgen.bench.tables import Rows, notes, table
from memgen.bench.timing import Meter, ProcessMeter, measure_in_turn
from memgen.model.cache import KVCache
from memgen.model.trigger import Boundary, Trigger
from memgen.types import Generation

logger = logging.getLogger(__name__)

SweepName = Literal["batch", "new", "insertions", "latents", "prompt", "others"]

PRICED = (
    "reasoner_forwards",
    "reasoner_positions",
    "weaver_forwards",
    "weaver_positions",
    "query_key_pairs",
)
"""Counts to which the fit over all sweeps gives a price."""


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


SWEEP_WORK = DecodingWorkload(batch=8, prompt=128, new=128)
"""Workload of a sweep, but for the quantity that varies."""


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
        rows: the rows that insert. While no row finishes, a row's cache slot is its index.
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
    workload: DecodingWorkload
    mode: InsertionMode
    inserting: int | None = None
    """Rows that insert, from the last one down; None: all."""


def points(sweep: Sweep, settings: ModelSettings) -> list[Point]:
    """The points of a sweep."""
    base = SWEEP_WORK
    made = []
    for x in sweep.values:
        point = Point(sweep.name, x, settings, base, "always")
        match sweep.name:
            case "batch":
                point = replace(point, workload=replace(base, batch=x))
            case "new":
                point = replace(point, workload=replace(base, batch=1, new=x))
            case "insertions":
                # Delimiters are every 4th token, so that 31 of them occur in each row; the prompt's end is the first.
                dense = replace(settings, cap=max(x - 1, 0), spacing=4)
                point = replace(point, settings=dense, workload=replace(base, new=2 * base.new))
                point = replace(point, mode="always" if x else "never")
            case "latents":
                point = replace(point, settings=replace(settings, latents=x))
            case "prompt":
                point = replace(point, workload=replace(base, prompt=x))
            case "others":
                point = replace(point, inserting=x)
        made.append(point)
    return made


def measure_point(point: Point, repeats: int, meter: Meter) -> dict[str, Any]:
    """One case of a sweep.

    Args:
        point: the settings.
        repeats: counted passes.
        meter: the clocks.
    """
    decoding = Decoding(point.settings)
    if point.inserting is not None:
        rows = range(point.workload.batch - point.inserting, point.workload.batch)
        decoding.models["always"] = decoding.components.model(RowTrigger(rows))
    measured = measure_decoding(
        decoding,
        point.workload,
        [point.mode],
        repeats,
        meter,
        # On a device, work is compiled and captured at a new shape's first use.
        warm_up=has_static_cache(point.settings),
    )
    case = decoding_case(decoding, point.workload, point.mode, measured)
    pairs = attention_pairs(measured.generations[point.mode], point.settings.latents)
    case |= {"sweep": point.sweep, "x": point.x, "query_key_pairs": pairs}
    if point.inserting is not None:
        case["memory"] = "some rows"
        case["rows_inserting"] = point.inserting
        case |= quiet_steps(decoding, point.workload, repeats, meter)
    return case


def attention_pairs(generation: Generation, latents: int) -> int:
    """Pairs of a query and a key that it attends to, in reasoner and weaver: what makes a longer stream dearer.

    The reasoner reads every token but the last, and all latents; the weaver reads tokens and latents up to a row's last
    insertion, and K queries per insertion, which later positions do not see.

    Args:
        generation: answers whose trigger has no pass of its own.
        latents: K, of every insertion.
    """
    pairs = 0
    lengths = [len(turn.context) + len(turn.tokens) for turn in generation.turns]
    for length, row in zip(lengths, generation.plan.rows(), strict=True):
        pairs += _triangle(length - 1 + latents * len(row))
        if row:
            pairs += _triangle(row[-1][0] + latents * (len(row) - 1))
        for earlier, (point, _) in enumerate(row):
            pairs += latents * (point + latents * earlier) + _triangle(latents)
    return pairs


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def warm_up(settings: ModelSettings, meter: Meter) -> None:
    """One small run of both sides, since points of a sweep are too dear to be run for nothing."""
    decoding = Decoding(settings)
    workload = DecodingWorkload(batch=2, prompt=16, new=16)
    measure_in_turn(
        {
            "plain": lambda: decoding.huggingface(workload),
            "ours": lambda: decoding.ours(workload, decoding.models["always"]),
        },
        1,
        meter,
    )


def quiet_steps(decoding: Decoding, workload: DecodingWorkload, repeats: int, meter: Meter) -> dict[str, Any]:
    """Times steps in which no row inserts, one by one, and counts the positions of a row that never inserts.

    Args:
        decoding: with a trigger that keeps some rows from inserting.
        workload: the task.
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

        generation = decoding.ours(workload, decoding.models["always"], observe)
        # The first tick ends the reading of the prompt.
        seconds.extend(
            end - begin for begin, end, still in zip(ticks[:-1], ticks[1:], quiet[1:], strict=True) if still
        )
        assert not generation.plan.rows()[0], "row 0 never inserts"
        fed = workload.prompt + workload.new - 1

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


def sweep_rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Points of sweeps."""
    header = ["sweep", "x", "insertions", "CPU s", "plain s", "CPU x", "pos. x", "quiet ms"]
    rows = []
    for case in cases:
        quiet = case.get("quiet_step_cpu_seconds_median")
        rows.append(
            [
                case["sweep"],
                str(case["x"]),
                str(case["insertions"]),
                f"{case['ours']['cpu_seconds_median']:.2f}",
                f"{case['plain']['cpu_seconds_median']:.2f}",
                f"{case['cpu_ratio']:.2f}",
                f"{case['floor_position_ratio']:.2f}",
                "" if quiet is None else f"{1000 * quiet:.2f}",
            ]
        )
    return header, rows


def sentences(scaling: Mapping[str, Any]) -> list[str]:
    """The summary of the sweeps in words.

    Args:
        scaling: of `summarise`.
    """
    lines = []
    for model, found in scaling.items():
        if "others" in found:
            others = found["others"]
            lines.append(
                f"{model}: another row's insertion costs {1000 * others['cpu_seconds_per_insertion']:.2f} CPU ms; "
                f"{others['most_insertions']} of them change a step in which no row inserts by "
                f"{100 * others['quiet_step_growth_at_most_insertions']:+.1f} %."
            )
        if "fit" in found:
            fit = found["fit"]
            prices = ", ".join(
                f"{1e6 * price:.3g} us per {name.removesuffix('s').replace('_', ' ')}"
                for name, price in fit["prices_seconds"].items()
            )
            lines.append(f"{model}: {prices} (R2 {fit['r_squared']:.3f}).")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measures sweeps and prints their table.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.

    Raises:
        ValueError: if a sweep, a model or a size cannot be used.
    """
    from rich.console import Console

    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    sweeps = (
        list(SWEEPS.values()) if "all" in options.sweeps else [find_sweep(name) for name in options.sweeps]
    )
    typed = shlex.join(["python", "-m", "benchmarks.sweeps", *arguments])
    recorder = Recorder(options.json, typed, options.device)
    meter = ProcessMeter(options.device)
    for model in options.model:
        settings = ModelSettings(model, options.device, options.dtype, options.seed, options.latents)
        warm_up(settings, meter)
        for sweep in sweeps:
            for point in points(sweep, settings):
                case = measure_point(point, options.repeats, meter)
                recorder.add(case)
                logger.info("%s %s %d: CPU x %.2f", model, sweep.name, point.x, case["cpu_ratio"])
    scaling = summarise(recorder.cases)
    recorder.finish(scaling=scaling)
    # Where output goes to a file or a pipe there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table("Decoding with memory, one quantity at a time", sweep_rows(recorder.cases)))
    for line in [*(f"Note: {note}" for note in notes(recorder.cases)), *sentences(scaling)]:
        console.print(line, highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweeps", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("sweeps", nargs="+", metavar="NAME", help=f"{', '.join(SWEEPS)}, or all")
    parser.add_argument(
        "--model", nargs="+", default=["small"], metavar="NAME", help="small, medium, qwen2.5-1.5b"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and cases here")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="counted passes (2)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's CPU threads (1)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs (0)")
    parser.add_argument("--latents", type=int, default=8, metavar="K", help="latents per insertion (8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
