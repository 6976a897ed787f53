"""What a study found: for each protocol the methods side by side, paired by item, and over orders.

An item's score is its mean over the seeds, so that items are the units of the paired tests: the same item under another seed
is no new one. Online, what a memory knows at an item depends on the items before it, so that items are no independent units:
there each seed's order gives one difference of means, and these are tested, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memgen.analysis.matrix import Matrix, Scored, compared
from memgen.results.best_of_n import positions
from memgen.results.score_files import read_records
from memgen.results.statistics import paired_test
from memgen.results.summary import Row
from memgen.study.session import LEARN, LEARNED
from memgen.study.settings import Cell, Protocol, StudySettings, cell_of

COSTS = (
    "positions", "prompt_tokens", "tokens", "retrievals", "scribe_calls", "scribe_tokens", "fallbacks", "seconds",
    "trained_parameters", "memory_bytes", "learning_positions", "learning_scribe_calls", "learning_scribe_tokens",
    "learning_seconds",
)  # fmt: skip
"""Means per test item: positions that reasoner, weaver and trigger read, tokens of the first prompt, tokens written, searches,
what the scribe was asked and read and wrote, questions that the fallback answered in its place, seconds. Of the whole: trained
parameters, bytes of the memory at the end. What learning from training items took, all of them together (frozen protocol)."""
_OF_ITEM = ("prompt_tokens", "tokens", "retrievals", "scribe_calls", "scribe_tokens", "fallbacks", "seconds")


@dataclass(frozen=True)
class Orders:
    """A method against the first, order by order.

    Attributes:
        method: its name.
        differences: of the mean reward over all of its tasks' items, one for each seed.
        test: name of the test over orders.
        p_value: two-sided. Of n orders it is at least 2 / 2^n.
    """

    method: str
    differences: tuple[float, ...]
    test: str
    p_value: float


@dataclass(frozen=True)
class Table:
    """A protocol's results.

    Attributes:
        protocol: how memories learnt.
        matrix: the methods' lines, costs and paired tests.
        of_task: mean reward of each method on each of its tasks.
        orders: each method but the first, order by order.
    """

    protocol: Protocol
    matrix: Matrix
    of_task: Mapping[str, Mapping[str, float]]
    orders: tuple[Orders, ...]


@dataclass(frozen=True)
class Played:
    """What is known of a cell that was played.

    Attributes:
        rows: scores of its test items.
        name: the method's name, with `/df` where a deterministic fallback wrote its memory.
        trained_parameters: of what answers.
        learning: costs of what its memory learnt before.
    """

    rows: Sequence[Row]
    name: str
    trained_parameters: int
    learning: Mapping[str, float]


def learning_costs(folder: Path) -> dict[str, float]:
    """What a cell's memory took to learn from training items; zeros if it learnt from none."""
    rows = read_records(folder / LEARN).rows if (folder / LEARN).is_dir() else []
    last = json.loads((folder / LEARNED).read_text(encoding="utf-8")) if (folder / LEARNED).is_file() else {}
    return {
        "learning_positions": sum(positions(row) for row in rows),
        **{
            f"learning_{name}": sum(row[name] for row in rows) + last.get(name, 0)
            for name in ("scribe_calls", "scribe_tokens", "seconds")
        },
    }


def tables(
    settings: StudySettings, played: Mapping[Cell, Played], *, title: str, of: str, temperature: float
) -> list[Table]:
    """A table for each protocol.

    Args:
        settings: of the study.
        played: every cell.
        title: of the tables.
        of: what was played, for people.
        temperature: of the answers.

    Raises:
        ValueError: if a method has no valid answer.
    """
    return [_table(settings, played, protocol, title, of, temperature) for protocol in settings.protocols]


def _table(
    settings: StudySettings,
    played: Mapping[Cell, Played],
    protocol: Protocol,
    title: str,
    of: str,
    temperature: float,
) -> Table:
    scored: dict[str, Scored] = {}
    orders: dict[str, dict[int, dict[int, float]]] = {}
    numbers: dict[tuple[str, int], int] = {}
    for method in settings.methods:
        runs = {
            (task, seed): played[cell]
            for task in settings.tasks
            for seed in settings.seeds
            for cell in [cell_of(settings, method, task, seed, protocol, sampled=False)]
            for cell in [
                cell if cell in played else cell_of(settings, method, task, seed, protocol, sampled=True)
            ]
            if cell in played
        }
        if not runs:
            continue
        name = next((run.name for run in runs.values() if run.name.endswith("/df")), method)
        scored[name], orders[name] = _scored(runs, numbers)
    first = next(iter(scored))
    matrix = compared(
        scored,
        title=title,
        environment=", ".join(settings.tasks),
        of=of,
        temperature=temperature,
        seed=settings.seeds[0],
        memory=None,
        notes=_notes(settings, scored),
        costs=COSTS,
    )
    tasks = {
        name: {
            task: sum(record["reward"] for record in own) / len(own)
            for task in settings.tasks
            for own in [[r for r in found.values() if r["task"] == task and r["fault"] is None]]
            if own
        }
        for name, found in scored.items()
    }
    against = tuple(_orders(name, orders[name], orders[first]) for name in scored if name != first)
    return Table(protocol, matrix, tasks, against)


def _scored(
    runs: Mapping[tuple[str, int], Played], numbers: dict[tuple[str, int], int]
) -> tuple[Scored, dict[int, dict[int, float]]]:
    """What every item scored over the seeds, and under each of them; items have one number in all methods."""
    by_item: dict[int, list[dict[str, Any]]] = {}
    by_seed: dict[int, dict[int, float]] = {}
    for (task, seed), run in runs.items():
        for row in run.rows:
            number = numbers.setdefault((task, int(row["index"])), len(numbers))
            by_item.setdefault(number, []).append(_record(row, task, run))
            if row["fault"] is None:
                by_seed.setdefault(seed, {})[number] = float(row["reward"])
    return {number: _mean(records) for number, records in sorted(by_item.items())}, by_seed


def _record(row: Row, task: str, run: Played) -> dict[str, Any]:
    return {
        "reward": float(row["reward"]),
        "fault": row["fault"],
        "failure": None,
        "task": task,
        "finished": float(row["finished"]),
        "samples": 1.0,
        "positions": positions(row),
        **{name: float(row[name]) for name in _OF_ITEM},
        "trained_parameters": float(run.trained_parameters),
        "memory_bytes": max(float(row["memory_bytes"]) for row in run.rows),
        **run.learning,
    }


def _mean(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An item over its seeds, those that the environment failed left out."""
    valid = [record for record in records if record["fault"] is None] or records[:1]
    means = {
        name: sum(record[name] for record in valid) / len(valid)
        for name in ("reward", "finished", "samples", *COSTS)
    }
    return {**valid[0], **means}


def _orders(
    name: str, own: Mapping[int, Mapping[int, float]], first: Mapping[int, Mapping[int, float]]
) -> Orders:
    means = []
    for seed in sorted(own):
        common = sorted(own[seed].keys() & first.get(seed, {}).keys())
        if common:
            pairs = [(first[seed][i], own[seed][i]) for i in common]
            means.append(tuple(sum(side) / len(common) for side in zip(*pairs, strict=True)))
    before, after = [m[0] for m in means], [m[1] for m in means]
    differences = tuple(b - a for a, b in zip(before, after, strict=True))
    # Means are seldom 0 or 1; a mark keeps McNemar's test away where they are.
    test = paired_test([0.5, *before], [0.5, *after]) if means else None
    return Orders(
        name, differences, "none" if test is None else test.name, 1.0 if test is None else test.p_value
    )


def _notes(settings: StudySettings, scored: Mapping[str, Scored]) -> list[str]:
    notes = []
    names = dict(zip(settings.methods, scored, strict=False)) if len(scored) == len(settings.methods) else {}
    first = next(iter(scored))
    for method, name in names.items():
        if settings.methods[method].control == "empty":
            same = all(
                scored[name][number]["reward"] == scored[first][number]["reward"]
                and scored[name][number]["positions"] == scored[first][number]["positions"]
                for number in scored[name]
            )
            notes.append(
                f"{name} {'has' if same else 'does not have'} the rewards and positions of {first} on every item"
            )
    partial = [method for method, given in settings.methods.items() if given.tasks]
    if partial:
        notes.append(
            f"{', '.join(partial)} did not play every task: means are over the tasks played, differences over the same items"
        )
    return notes
