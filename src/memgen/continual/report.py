"""What a chain came to: tables for a terminal, numbers as JSON, and one HTML page that needs nothing from outside."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from memgen.analysis.page import page, svg, table
from memgen.continual.measures import NAMES, Measures, Scores, measure
from memgen.continual.settings import METHODS
from memgen.files import write_whole
from memgen.results.statistics import Interval

REPORT, NUMBERS = "report.html", "continual.json"
_NOTE = (
    "After each task of the chain all tasks are tested, on the same items: mean reward, per cent. Measures: average accuracy, "
    "backward and forward transfer are those of GEM (arXiv 1706.08840), forgetting is that of Chaudhry et al. (arXiv "
    "1801.10112); 95 % intervals over items, not over seeds of training."
)


def measured(scores: Mapping[str, Scores]) -> dict[str, Measures]:
    """The measures of each method."""
    return {method: measure(found) for method, found in scores.items()}


def as_dict(scores: Mapping[str, Scores], measures: Mapping[str, Measures], seed: int) -> dict[str, Any]:
    """For JSON.

    Args:
        scores: of each method.
        measures: likewise.
        seed: of the trainings.
    """
    first = next(iter(scores.values()))
    return {
        "seed": seed,
        "chain": list(first.chain),
        "tasks": list(first.tasks),
        "items": {task: len(first.rewards[0][task]) for task in first.tasks},
        "methods": {
            method: {
                "matrix": [
                    {"after": name, **dict(zip(found.tasks, map(float, row), strict=True))}
                    for name, row in zip(_after(found), found.matrix(), strict=True)
                ],
                "measures": {
                    name: None if interval is None else dataclasses.asdict(interval)
                    for name, interval in measures[method].as_dict().items()
                },
            }
            for method, found in scores.items()
        },
    }


def metrics(scores: Mapping[str, Scores], measures: Mapping[str, Measures]) -> list[dict[str, float]]:
    """Metrics of every step, from 0, the reasoner before the chain; the measures belong to the last one."""
    steps: list[dict[str, float]] = []
    for method, found in scores.items():
        for step, row in enumerate(found.matrix()):
            if step == len(steps):
                steps.append({})
            steps[step] |= {
                f"{method}/{task}": float(mean) for task, mean in zip(found.tasks, row, strict=True)
            }
        steps[-1] |= {
            f"{method}/{NAMES[name].replace(' ', '_')}": interval.mean
            for name, interval in measures[method].as_dict().items()
            if interval is not None
        }
    return steps


def tables(scores: Mapping[str, Scores], measures: Mapping[str, Measures]) -> list[Table]:
    """For a terminal: the matrices, and the measures."""
    first = next(iter(scores.values()))
    matrices = Table(title="Mean reward after each task, per cent", box=SIMPLE_HEAD)
    matrices.add_column("", no_wrap=True)
    for task in first.tasks:
        matrices.add_column(task, justify="right", no_wrap=True)
    matrices.add_row("reasoner before", *(_percent(mean) for mean in first.matrix()[0]))
    for method, found in scores.items():
        matrices.add_row(METHODS[method], style="bold")
        for name, row in zip(_after(found)[1:], found.matrix()[1:], strict=True):
            matrices.add_row(f"  after {name}", *(_percent(mean) for mean in row))
    summary = Table(title="Measures of the chain, points", box=SIMPLE_HEAD)
    summary.add_column("", no_wrap=True)
    named = _named(measures)
    for name in named:
        summary.add_column(NAMES[name], justify="right")
    for method, values in measures.items():
        means = [interval.mean for interval in values.as_dict().values() if interval is not None]
        summary.add_row(METHODS[method], *(_percent(mean) for mean in means))
    summary.caption = "their 95 % intervals over items are in the report"
    return [matrices, summary]


def report_html(scores: Mapping[str, Scores], measures: Mapping[str, Measures]) -> str:
    """The page."""
    first = next(iter(scores.values()))
    chain = " → ".join(first.chain)
    named = _named(measures)
    return page(
        "Continual learning",
        [
            f"<h1>Continual learning: {html.escape(chain)}</h1><p>{html.escape(_NOTE)}</p>",
            table(
                ("", *(NAMES[name] for name in named)),
                [
                    (METHODS[method], *(_percent_interval(values.as_dict()[name]) for name in named))
                    for method, values in measures.items()
                ],
            ),
            _curves(scores),
            *(part for method, found in scores.items() for part in _matrix(METHODS[method], found)),
        ],
    )


def write(
    scores: Mapping[str, Scores], measures: Mapping[str, Measures], seed: int, folder: Path
) -> tuple[str, str]:
    """Writes `report.html` and `continual.json`, each whole or not at all.

    Args:
        scores: of each method.
        measures: likewise.
        seed: of the trainings.
        folder: where to.

    Returns:
        The page, and the numbers as JSON.
    """
    text = report_html(scores, measures)
    numbers = json.dumps(as_dict(scores, measures, seed), indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / NUMBERS, numbers)
    write_whole(folder / REPORT, text)
    return text, numbers


def _matrix(title: str, scores: Scores) -> list[str]:
    """A matrix whose cells are the darker the higher; those of tasks already learnt have a frame."""
    lines = [
        "<tr><th>after</th>" + "".join(f"<th>{html.escape(task)}</th>" for task in scores.tasks) + "</tr>"
    ]
    for step, (name, row) in enumerate(zip(_after(scores), scores.matrix(), strict=True)):
        cells = []
        for task, mean in zip(scores.tasks, row, strict=True):
            learnt = task in scores.chain[:step]
            shade = min(max(float(mean), 0.0), 1.0)
            style = f"text-align:right;background:rgba(68,119,170,{0.6 * shade:.2f})"
            style += ";outline:2px solid #4477aa;outline-offset:-2px" if learnt else ""
            cells.append(f'<td style="{style}">{_percent(mean)}</td>')
        lines.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return [f"<h2>{html.escape(title)}</h2>", f"<table>{''.join(lines)}</table>"]


def _curves(scores: Mapping[str, Scores]) -> str:
    """Every task's mean reward along the chain; a line where it was learnt."""
    first = next(iter(scores.values()))
    columns = min(4, len(first.tasks))
    rows = -(-len(first.tasks) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    places = range(len(first.chain) + 1)
    for axis in list(axes)[len(first.tasks) :]:
        axis.set_visible(False)
    for number, (axis, task) in enumerate(zip(axes, first.tasks, strict=False)):
        for (method, found), marker in zip(scores.items(), "osv^", strict=False):
            axis.plot(
                places,
                100 * found.matrix()[:, number],
                f"{marker}-",
                label=METHODS[method],
                markersize=4,
                alpha=0.8,
            )
        if task in first.chain:
            axis.axvline(first.chain.index(task) + 1, color="#888888", linewidth=0.8, linestyle="--")
        axis.set_title(task.replace("$", r"\$"), fontsize=10)
        axis.set_xticks(places, ["before", *first.chain], fontsize=7, rotation=30)
        axis.set_ylim(-3, 103)
    figure.supylabel("mean reward, per cent", fontsize=9)
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return svg(figure)


def _after(scores: Scores) -> list[str]:
    return ["before", *scores.chain]


def _named(measures: Mapping[str, Measures]) -> list[str]:
    """The measures that the chain has."""
    first = next(iter(measures.values()))
    return [name for name, interval in first.as_dict().items() if interval is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _percent_interval(interval: Interval | None) -> str:
    assert interval is not None, "see _named"
    assert interval.low is not None, "measures have intervals"
    assert interval.high is not None, "measures have intervals"
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
