"""The report of `python -m benchmarks.real`: cells as JSON, and tables of them as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab_report import Score, difference, interval, section
from memgen.results.statistics import mean_interval

MISSING = "not measured"
PAIRS = (
    ("weaver", "bare"),
    ("weaver", "other_item"),
    ("grpo", "half"),
    ("trigger", "weaver"),
    ("lora", "weaver"),
)
"""Conditions whose difference is of interest, on the same items and with the same seed."""


@dataclass(frozen=True)
class Report:
    """All cells, by their names.

    Attributes:
        data: as `write_report` gets it.
    """

    data: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """Seeds of a whole report."""
        found: list[int] = self.data["seeds"]
        return found

    def cell(self, task: str, seed: int, condition: str, other: str = "") -> Mapping[str, Any] | None:
        """A cell, or None if it was not measured."""
        folder = "all" if condition in self.data["without_seed"] else f"seed{seed}"
        name = f"{task}/{folder}/{condition}{f' on {other}' if other else ''}"
        found: Mapping[str, Any] | None = self.data["cells"].get(name)
        return found

    def score(self, task: str, seed: int, condition: str, other: str = "") -> Score | None:
        """A cell's scores, or None."""
        cell = self.cell(task, seed, condition, other)
        if cell is None:
            return None
        return Score(tuple(int(digit) for digit in cell["exact"]), cell["insertions"])

    def seeds_of(self, condition: str) -> list[int]:
        """The seeds that a condition has cells of its own for."""
        return self.seeds[:1] if condition in self.data["without_seed"] else self.seeds


def write_report(data: Mapping[str, Any], folder: Path) -> None:
    """Writes `real.json` and `real.md`.

    Args:
        data: settings, the `cells` that are there by name, and the names of the `missing` ones.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "real.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "real.md").write_text(report(data), encoding="utf-8")


def report(data: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    found = Report(data)
    cells = list(data["cells"].values())
    machines = sorted({cell["machine"] for cell in cells})
    dates = sorted({cell["date"] for cell in cells})
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines = [
        "# All stages on a real language model",
        "",
        f"Exact match in per cent on {data['items']} held-out items of each task (test split), greedy decoding; settings were",
        f"chosen on the val split. Weaver seeds {', '.join(map(str, found.seeds))}, each in a column of its own with its 95 %",
        "bootstrap interval over items. Differences are paired over items, with 95 % bootstrap intervals.",
        "",
        f"Made by `python -m benchmarks.real` on {when or 'no day yet'}: {'; '.join(machines) or 'no machine yet'}.",
        *(line for task in data["tasks"] for line in _task(found, task)),
        *_missing(data["missing"]),
    ]
    return "\n".join(lines) + "\n"


def _task(found: Report, task: str) -> list[str]:
    title = found.data["tasks"][task]["title"]
    return [
        *_accuracy(found, task, title),
        *_differences(found, task, title),
        *_cost(found, task, title),
        *_harm(found, task, title),
    ]


def _accuracy(found: Report, task: str, title: str) -> list[str]:
    table = []
    for condition, label in found.data["conditions"].items():
        cells = [found.cell(task, seed, condition) for seed in found.seeds_of(condition)]
        there = [cell for cell in cells if cell is not None]
        exact = [MISSING if cell is None else _with_interval(cell["exact"]) for cell in cells]
        exact += [""] * (len(found.seeds) - len(exact))
        prices = [cell["prices"] for cell in there if cell["prices"] is not None]
        table.append(
            [
                label,
                *exact,
                ", ".join(f"{100 * value:.1f}" for value in prices),
                ", ".join(f"{cell['insertions']:.2f}" for cell in there),
            ]
        )
    header = ["", *(f"seed {seed}" for seed in found.seeds), "price lists", "insertions"]
    return section(title, header, table)


def _differences(found: Report, task: str, title: str) -> list[str]:
    names = found.data["conditions"]
    table = []
    for ours, theirs in PAIRS:
        row = []
        for seed in found.seeds:
            a, b = found.score(task, seed, ours), found.score(task, seed, theirs)
            row.append(MISSING if a is None or b is None else difference(a, b))
        table.append([f"{names[ours]} less {names[theirs]}", *row])
    kept = []
    for seed in found.seeds:
        weaver, trigger = found.score(task, seed, "weaver"), found.score(task, seed, "trigger")
        if weaver is not None and trigger is not None and weaver.mean:
            kept.append(
                f"- Seed {seed}: trigger RL keeps {100 * trigger.mean / weaver.mean:.1f} % of the weaver's {weaver.mean:.1f} at "
                f"{trigger.insertions:.2f} insertions per answer (always: {weaver.insertions:.2f})."
            )
    header = ["points", *(f"seed {seed}" for seed in found.seeds)]
    return [*section(f"{title}: paired differences", header, table), *(["", *kept] if kept else [])]


def _cost(found: Report, task: str, title: str) -> list[str]:
    """What answers and trainings cost, over the seeds."""
    table = []
    for condition, label in found.data["conditions"].items():
        cells = [found.cell(task, seed, condition) for seed in found.seeds_of(condition)]
        there = [cell for cell in cells if cell is not None]
        trained = [found.cell(task, seed, f"fit_{condition}") for seed in found.seeds]
        minutes = [cell["cpu_seconds"] / 60 for cell in trained if cell is not None]
        steps = [str(cell["steps"]) for cell in trained if cell is not None]
        table.append(
            [
                label,
                ", ".join(f"{cell['positions']:.0f}" for cell in there),
                ", ".join(f"{cell['seconds'] / len(cell['exact']):.2f}" for cell in there),
                ", ".join(f"{cell['cpu_seconds'] / 60:.1f}" for cell in there),
                ", ".join(f"{value:.1f}" for value in minutes),
                ", ".join(steps),
            ]
        )
    header = [
        "",
        "positions per answer",
        "seconds per answer",
        "CPU-minutes of the test",
        "CPU-minutes of training",
        "steps",
    ]
    lines = section(f"{title}: what it costs", header, table)
    note = [
        "One figure for each seed that was measured. Positions are all that reasoner, weaver and trigger read, the prompt",
        "included. With latents of another item every item is answered twice. The weaver's training goes on from the",
        "half-trained one's, whose minutes come on top; its steps are those of both.",
    ]
    return [*lines, "", *note] if lines else []


def _harm(found: Report, task: str, title: str) -> list[str]:
    """The other tasks before and after, and whether the difference to the bare model could be none."""
    others = found.data["tasks"][task]["others"]
    text = any(
        " on text" in name and name.startswith(f"{task}/")
        for name in [*found.data["cells"], *found.data["missing"]]
    )
    table = []
    for condition in found.data["harm"]:
        label = found.data["conditions"][condition]
        for seed in found.seeds_of(condition):
            row = [f"{label}, seed {seed}" if condition not in found.data["without_seed"] else label]
            for other in others:
                ours, bare = found.score(task, seed, condition, other), found.score(task, seed, "bare", other)
                if ours is None:
                    row.append(MISSING)
                elif bare is None or condition == "bare":
                    row.append(f"{ours.mean:.1f}, {ours.insertions:.2f} ins.")
                else:
                    low, high = interval(ours, bare)
                    mark = "" if low <= 0 <= high else ", changed"
                    row.append(f"{ours.mean:.1f}, {difference(ours, bare)}{mark}, {ours.insertions:.2f} ins.")
            if text:
                row.append(
                    _perplexity(
                        found.cell(task, seed, condition, "text"), found.cell(task, seed, "bare", "text")
                    )
                )
            table.append(row)
    header = ["", *others, *(["perplexity of text"] if text else [])]
    if not others and not text:
        return []
    return [
        *section(f"{title}: what it does to other tasks", header, table),
        "",
        f"{found.data['other_items']} held-out items of each: exact match, the paired difference to the bare model (`changed` where",
        "its interval leaves 0 out), and insertions per answer (ins.). Of the text: the perplexity of reference answers, and",
        "likewise the difference of the loss per token, in nats.",
    ]


def _perplexity(cell: Mapping[str, Any] | None, bare: Mapping[str, Any] | None) -> str:
    """Perplexity per token, and the paired difference of the loss per token to the bare model's."""
    if cell is None:
        return MISSING
    shown = f"{math.exp(sum(cell['nll']) / sum(cell['tokens'])):.2f}"
    if bare is None or cell is bare or cell["nll"] == bare["nll"]:
        return shown
    losses = [(a - b) / n for a, b, n in zip(cell["nll"], bare["nll"], cell["tokens"], strict=True)]
    found = mean_interval(losses)
    if found.low is None or found.high is None:
        return f"{shown}, loss {found.mean:+.3f}"
    mark = "" if found.low <= 0 <= found.high else ", changed"
    return f"{shown}, loss {found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}){mark}"


def _with_interval(exact: str) -> str:
    found = mean_interval([100.0 * int(digit) for digit in exact])
    if found.low is None or found.high is None:
        return f"{found.mean:.1f}"
    return f"{found.mean:.1f} ({found.low:.1f} to {found.high:.1f})"


def _missing(names: Sequence[str]) -> list[str]:
    if not names:
        return ["", "Every cell was measured."]
    return ["", "## Cells that were not measured", "", f"{len(names)}:", "", *(f"- {name}" for name in names)]
