"""Tables and curves of docs/performance.md from the recorded figures: `python -m benchmarks.performance_report`.

The document is text around tables. A table stands between `<!-- NAME -->` and `<!-- end -->`; this fills those places
from the JSON files that `make bench-performance` writes, and draws the curves beside them.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweeps import SWEEPS, sweep_rows
from memgen.bench.tables import Rows, generation_rows, kernel_rows, memory_rows, notes, training_rows

logger = logging.getLogger(__name__)

PARTS = ("reasoner", "weaver", "trigger")
UNITS = ("forwards", "positions")

RESULTS = Path("docs/results/performance")
DOCUMENT = Path("docs/performance.md")

PLACE = re.compile(r"(<!-- (?P<name>[a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def work_rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Exact work of decoding cases."""
    header = ["model", "batch", "memory", "prompt reads"]
    header += [f"{part} {unit}" for part in PARTS for unit in UNITS]
    header += ["insertions", "x plain's positions"]
    rows = [
        [
            case["model"],
            str(case["batch"]),
            case["memory"],
            f"{case['prefills']:g}",
            *(f"{case[f'{part}_{unit}']:,}" for part in PARTS for unit in UNITS),
            str(case["insertions"]),
            f"{case['floor_position_ratio']:.2f}",
        ]
        for case in cases
    ]
    return header, rows


def markdown(rows: Rows) -> str:
    """For a document."""
    header, lines = rows
    written = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    written += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(written)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Mapping[str, Any]]], Rows]]] = {
    "generation": (("generation_small", "generation_medium"), generation_rows),
    "work": (("generation_small", "generation_medium"), work_rows),
    "training": (("training_small", "training_medium"), training_rows),
    "kernels": (("kernels",), kernel_rows),
    "memory": (("memory",), memory_rows),
    "sweeps": (("sweeps",), sweep_rows),
}
"""Places in the document: the files whose cases they show, and how."""


def load(results: Path, name: str) -> dict[str, Any]:
    """One file of figures.

    Raises:
        ValueError: if it is absent or its run was interrupted.
    """
    path = results / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `make bench-performance`")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not content["complete"]:
        raise ValueError(f"{path} is of a run that was interrupted; run `make bench-performance` again")
    return content


def provenance(content: Mapping[str, Any]) -> str:
    """Command, machine, date and seed of recorded figures, as one sentence."""
    machine = content["machine"]
    seeds = sorted({case["seed"] for case in content["cases"] if "seed" in case})
    repeats = sorted({case["repeats"] for case in content["cases"] if "repeats" in case})
    counted = f", {' and '.join(map(str, repeats))} counted repeats" if repeats else ""
    loads = [case["load_average"][0] for case in content["cases"] if case["load_average"]]
    busy = f", load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    return (
        f"`{command(content)}`: {machine['date'][:10]}, {machine['processor']} ({machine['logical_cores']} cores), "
        f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}{busy}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, seed {', '.join(map(str, seeds))}{counted}."
    )


def command(content: Mapping[str, Any]) -> str:
    """The command, without `--json FILE`."""
    return re.sub(r" --json \S+", "", content["command"])


def fill(document: str, results: Path) -> str:
    """The document with its tables made anew.

    Args:
        document: text with places.
        results: folder of the JSON files.

    Raises:
        ValueError: if a place has an unknown name, or its figures are absent.
    """

    def table(name: str) -> str:
        files, rows = TABLES[name]
        contents = [load(results, file) for file in files]
        cases = [case for content in contents for case in content["cases"]]
        remarks = [f"Note: {note}." for note in notes(cases)]
        return "\n\n".join([markdown(rows(cases)), *remarks, *map(provenance, contents)])

    bodies = {name: functools.partial(table, name) for name in TABLES}
    return fill_places(document, DOCUMENT, {**bodies, "prices": lambda: prices(load(results, "sweeps"))})


def fill_places(document: str, name: Path, bodies: Mapping[str, Callable[[], str]]) -> str:
    """A document with the text in its places replaced.

    Args:
        document: text with places.
        name: of the document, for the error.
        bodies: what makes the text of each place.

    Raises:
        ValueError: if a place has an unknown name.
    """

    def made(match: re.Match[str]) -> str:
        if match["name"] not in bodies:
            raise ValueError(
                f"{name} has a place '{match['name']}' that nothing fills; choose among: {', '.join(bodies)}"
            )
        return f"{match[1]}{bodies[match['name']]()}\n{match[3]}"

    return PLACE.sub(made, document)


def prices(content: Mapping[str, Any]) -> str:
    """The sweeps' fit and the claim about other rows, in words."""
    lines = []
    for model, found in content["scaling"].items():
        fit, others = found["fit"], found["others"]
        lines += [
            f"`{model}`: CPU microseconds per unit of exact work, least squares over all {len(content['cases'])} points"
            f" (R2 {fit['r_squared']:.3f}, largest error of a point {100 * fit['largest_relative_error']:.0f} %):",
            "",
            "| " + " | ".join(name.replace("_", " ") for name in fit["prices_seconds"]) + " |",
            "|---" * len(fit["prices_seconds"]) + "|",
            "| " + " | ".join(f"{1e6 * price:.3g}" for price in fit["prices_seconds"].values()) + " |",
            "",
            f"Other rows' insertions: {1000 * others['cpu_seconds_per_insertion']:.2f} CPU ms each (a line through the "
            f"8 points, R2 {others['r_squared']:.3f}); with {others['most_insertions']} insertions in the other rows, a "
            f"step in which no row inserts changes by {100 * others['quiet_step_growth_at_most_insertions']:+.1f} % "
            "against none.",
        ]
    return "\n".join(lines)


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Draws the sweeps: measured CPU seconds of both sides, and the fit.

    Args:
        content: figures of `python -m benchmarks.sweeps all`.
        path: SVG file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # Text as text, and no random identifiers or dates: a small file that only changes with its figures.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memgen", "font.size": 8}):
        figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
        for axis, sweep in zip(axes.flat, SWEEPS.values(), strict=True):
            cases = [case for case in content["cases"] if case["sweep"] == sweep.name]
            x = [case["x"] for case in cases]
            axis.plot(x, [case["ours"]["cpu_seconds_median"] for case in cases], "o", label="with memory")
            axis.plot(x, [case["plain"]["cpu_seconds_median"] for case in cases], "x", label="plain generate")
            axis.plot(x, [_predicted(content, case) for case in cases], "-", linewidth=1, label="fit")
            if sweep.name == "others":
                quiet = [1000 * case["quiet_step_cpu_seconds_median"] for case in cases]
                right = axis.twinx()
                right.plot(x, quiet, "s", color="tab:red", markersize=3, label="step without insertions")
                right.set_ylabel("CPU ms of such a step")
                right.set_ylim(0, 2 * max(quiet))
                right.legend(loc="lower right", fontsize=7)
            if sweep.name in ("batch", "new", "latents", "prompt"):
                axis.set_xscale("log", base=2)
                axis.set_yscale("log", base=2)
            else:
                axis.set_ylim(bottom=0)
            axis.set_xlabel(sweep.what)
            axis.set_ylabel("CPU seconds")
        axes.flat[0].legend(fontsize=7)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _predicted(content: Mapping[str, Any], case: Mapping[str, Any]) -> float:
    prices_of = content["scaling"][case["model"]]["fit"]["prices_seconds"]
    return float(sum(price * case[name] for name, price in prices_of.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Fills the document and draws the curves.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance_report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the document to fill")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plot(load(options.results, "sweeps"), options.results / "scaling.svg")
    text = options.document.read_text(encoding="utf-8")
    options.document.write_text(fill(text, options.results), encoding="utf-8")
    logger.info("%s filled from %s", options.document, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
