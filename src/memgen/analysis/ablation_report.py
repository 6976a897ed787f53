"""The ablation matrix to read: lines of text, one self-contained HTML page, and the numbers as JSON."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from memgen.analysis.effects import Effect
from memgen.analysis.matrix import COSTS, Line, Matrix
from memgen.analysis.page import STYLE, forest, svg, table
from memgen.files import write_whole

REPORT, NUMBERS = "report.html", "ablation.json"


def write(matrix: Matrix, folder: Path) -> tuple[str, str]:
    """Writes `report.html` and `ablation.json`, each whole or not at all.

    Returns:
        The page, and the numbers as JSON.
    """
    numbers = json.dumps(dataclasses.asdict(matrix), indent=2, ensure_ascii=False) + "\n"
    page = report_html(matrix)
    write_whole(folder / NUMBERS, numbers)
    write_whole(folder / REPORT, page)
    return page, numbers


def columns(matrix: Matrix) -> dict[str, list[str]]:
    """The table: texts by column, a line for each condition."""
    first = {effect.condition: effect for effect in matrix.against_first}
    memory = {effect.against: effect for effect in matrix.of_memory}
    lines = matrix.lines
    found = {
        "condition": [line.name for line in lines],
        "reward": [f"{line.reward.mean:.4f}" for line in lines],
        "95 % interval": [_interval(line) for line in lines],
        f"against {matrix.first}": [_difference(first.get(line.name)) for line in lines],
        "p (Holm)": [_p(first.get(line.name)) for line in lines],
    }
    if memory:
        found[f"{matrix.memory} against it"] = [_difference(memory.get(line.name)) for line in lines]
        found["its p (Holm)"] = [_p(memory.get(line.name)) for line in lines]
    found["finished"] = [f"{line.finished:.0%}" for line in lines]
    for cost in COSTS:
        found[cost.replace("_", " ").replace("cpu", "CPU")] = [f"{line.costs[cost]:.4g}" for line in lines]
    return found


def text_lines(matrix: Matrix) -> list[str]:
    """The table and the notes, as lines of text."""
    found = columns(matrix)
    widths = {name: max(len(name), *map(len, cells)) for name, cells in found.items()}

    def line(cells: Sequence[str]) -> str:
        shown = [
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths.values(), strict=True))
        ]
        return "  ".join(shown).rstrip()

    rows = zip(*found.values(), strict=True)
    return [
        f"{matrix.items} items of {matrix.environment}; costs are means per item",
        line(list(found)),
        *(line(row) for row in rows),
        *matrix.notes,
    ]


def report_html(matrix: Matrix) -> str:
    """The page."""
    found = columns(matrix)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(matrix.title)}</title><style>{STYLE}</style>',
        f"<h1>{html.escape(matrix.title)} on {html.escape(matrix.environment)}</h1>",
        f"<p>{matrix.items} test items, {html.escape(matrix.of)}, temperature {matrix.temperature:g}, seed "
        f"{matrix.seed}. The same items, template, limits and seeds in every line; costs are means per item. "
        f"Differences are paired by item; p-values are Holm's over the {matrix.tests} tests of the reward.</p>",
        table(list(found), zip(*found.values(), strict=True)),
        *(f"<p>{html.escape(note)}.</p>" for note in matrix.notes),
        "<h2>Reward against cost</h2>",
        _scatter(matrix.lines),
    ]
    if matrix.against_first:
        parts += [
            f"<h2>Each condition against {html.escape(matrix.first)}</h2>",
            forest(matrix.against_first),
        ]
        parts.append(_effects(matrix.against_first))
    if matrix.of_memory:
        shown = [
            dataclasses.replace(effect, condition=f"against {effect.against}") for effect in matrix.of_memory
        ]
        parts += [f"<h2>{html.escape(str(matrix.memory))} against each other condition</h2>", forest(shown)]
        parts.append(_effects(matrix.of_memory))
    if matrix.by_task:
        parts += [
            "<h2>On each task</h2><p>p-values are Holm's over this table.</p>",
            _effects(matrix.by_task),
        ]
    return "\n".join([*parts, "</html>\n"])


def _effects(effects: Sequence[Effect]) -> str:
    return table(
        ("condition", "against", "outcome", "items", "difference", "p", "p (Holm)", "test"),
        [
            (
                effect.condition,
                effect.against,
                effect.outcome.name,
                effect.items,
                str(effect.difference),
                f"{effect.p_value:.2g}",
                f"{effect.adjusted:.2g}",
                effect.test,
            )
            for effect in effects
        ],
    )


def _scatter(lines: Sequence[Line]) -> str:
    """Mean reward against mean positions, with its interval."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for line in lines:
        reward = line.reward
        low, high = (reward.mean if end is None else end for end in (reward.low, reward.high))
        place = line.costs["positions"]
        axis.plot([place, place], [low, high], color="#bbbbbb", linewidth=1)
        axis.plot([place], [reward.mean], "o", markersize=5, label=line.name.replace("$", r"\$"))
    axis.set_xlabel("positions read by reasoner, weaver and trigger, per item")
    axis.set_ylabel("mean reward, 95 % interval")
    axis.legend(fontsize=7)
    return svg(figure)


def _interval(line: Line) -> str:
    low, high = line.reward.low, line.reward.high
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _difference(effect: Effect | None) -> str:
    return "" if effect is None else f"{effect.difference.mean:+.4f}"


def _p(effect: Effect | None) -> str:
    return "" if effect is None else f"{effect.adjusted:.2g}"
