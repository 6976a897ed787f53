"""A study to read: `study.md` with its tables, `study.svg` (reward against cost), and all numbers in `study.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from memgen.analysis.page import svg
from memgen.files import write_whole
from memgen.results.statistics import LEVEL
from memgen.study.results import COSTS, Table
from memgen.study.settings import StudySettings

REPORT, FIGURE, NUMBERS = "study.md", "study.svg", "study.json"
_TITLES = {
    "online": "Online: a memory learns from the test items, each behind its answer",
    "frozen": "Frozen: a memory learns from training items, and is only read on the test items",
}
_MARKERS = "os^vD*Pph<>"


def write(tables: Sequence[Table], settings: StudySettings, command: str, folder: Path) -> dict[str, str]:
    """Writes the report's three files, each whole or not at all.

    Args:
        tables: one for each protocol.
        settings: of the study.
        command: that made it.
        folder: where to.

    Returns:
        Their texts, by file name.
    """
    texts = {
        REPORT: markdown(tables, settings, command),
        FIGURE: figure(tables),
        NUMBERS: json.dumps(
            {
                "command": command,
                "settings": dataclasses.asdict(settings),
                "tables": [dataclasses.asdict(table) for table in tables],
            },
            indent=2,
            ensure_ascii=False,
        )
        + "\n",
    }
    for name, text in texts.items():
        write_whole(folder / name, text)
    return texts


def markdown(tables: Sequence[Table], settings: StudySettings, command: str) -> str:
    """The report."""
    first = tables[0].matrix
    seeds = ", ".join(map(str, settings.seeds))
    parts = [
        f"# {first.title}",
        "",
        f"{first.items} test items of {first.environment}; {first.of}; seeds {seeds} (each an order of the items), temperature "
        f"{first.temperature:g}. The same items, template and limits in every line; passages of at most {settings.budget} "
        "tokens in a prompt. An item's reward is its mean over the seeds.",
        "",
        f"    {command}",
        "",
        f"![Mean reward against positions]({FIGURE})",
    ]
    for table in tables:
        parts += ["", f"## {_TITLES[table.protocol]}", "", *_results(table), "", *_costs(table)]
        parts += [f"\n{note}." for note in table.matrix.notes]
    return "\n".join(parts) + "\n"


def _results(table: Table) -> Iterable[str]:
    matrix = table.matrix
    effects = {effect.condition: effect for effect in matrix.against_first}
    orders = {found.method: found for found in table.orders}
    tasks = list(dict.fromkeys(task for found in table.of_task.values() for task in found))
    several = len(tasks) > 1
    header = [
        "method", "reward", f"{LEVEL:.0%} interval", *(tasks if several else []), f"against {matrix.first}", "p (Holm)",
        "by order", "p over orders", "finished", "items",
    ]  # fmt: skip
    rows = []
    for line in matrix.lines:
        reward, effect, order = line.reward, effects.get(line.name), orders.get(line.name)
        faulted = f" (and {line.faulted} failed by the environment)" if line.faulted else ""
        rows.append(
            [
                line.name,
                f"{reward.mean:.4f}",
                "" if reward.low is None or reward.high is None else f"{reward.low:.3f} to {reward.high:.3f}",
                *(
                    [
                        f"{own[task]:.4f}" if task in own else "-"
                        for own in [table.of_task[line.name]]
                        for task in tasks
                    ]
                    if several
                    else []
                ),
                "" if effect is None else f"{effect.difference.mean:+.4f}",
                "" if effect is None else f"{effect.adjusted:.2g}",
                "" if order is None else " ".join(f"{difference:+.3f}" for difference in order.differences),
                "" if order is None else f"{order.p_value:.2g}",
                f"{line.finished:.0%}",
                f"{line.items}{faulted}",
            ]
        )
    return _table(header, rows)


def _costs(table: Table) -> Iterable[str]:
    lines = table.matrix.lines
    shown = [cost for cost in COSTS if any(line.costs[cost] for line in lines)]
    return [
        "What it costs, as means per test item (trained parameters, bytes and learning: of the whole):",
        "",
        *_table(
            ["method", *(cost.replace("_", " ") for cost in shown)],
            [[line.name, *(f"{line.costs[cost]:.4g}" for cost in shown)] for line in lines],
        ),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'|'.join('---' if number == 0 else '---:' for number in range(len(header)))}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def figure(tables: Sequence[Table]) -> str:
    """Mean reward with its interval against mean positions; a panel for each protocol."""
    drawn = Figure(figsize=(5.5 * len(tables), 4.5), layout="constrained")
    axes = drawn.subplots(1, len(tables), squeeze=False, sharey=True).flat
    for axis, table in zip(axes, tables, strict=True):
        for number, line in enumerate(table.matrix.lines):
            place, reward = line.costs["positions"], line.reward
            low, high = (reward.mean if end is None else end for end in (reward.low, reward.high))
            axis.plot([place, place], [low, high], color="#bbbbbb", linewidth=1)
            axis.plot(
                [place],
                [reward.mean],
                _MARKERS[number % len(_MARKERS)],
                color=f"C{number % 10}",
                markersize=6,
                label=line.name.replace("$", r"\$"),
            )
        axis.set_xscale("log")
        axis.set_title(table.protocol, fontsize=10)
        axis.set_xlabel("positions read, per item")
    next(iter(drawn.axes)).set_ylabel(f"mean reward, {LEVEL:.0%} interval")
    handles, labels = next(iter(drawn.axes)).get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    return svg(drawn)
