"""The report of `make bench-lab`: figures as JSON, and tables of them as Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memgen.bench.record import processor
from memgen.lab.report import OTHERS
from memgen.results.statistics import mean_interval


@dataclass(frozen=True)
class Score:
    """One condition on one task, on one reasoner, with one seed.

    Attributes:
        exact: 1 or 0 for each held-out item.
        insertions: mean insertions per answer.
    """

    exact: tuple[int, ...]
    insertions: float

    @property
    def mean(self) -> float:
        """Per cent."""
        return 100 * sum(self.exact) / len(self.exact)


@dataclass(frozen=True)
class Run:
    """All results of one reasoner and one seed."""

    base_seed: int
    seed: int
    results: Mapping[str, Any]

    def score(self, condition: str, task: str) -> Score | None:
        """A condition's score on a task, or None if it was not measured."""
        found = self.results.get(condition, {}).get("tasks", {}).get(task)
        if found is None:
            return None
        return Score(tuple(int(digit) for digit in found["exact"]), found["insertions"])

    def fit_seconds(self, training: str) -> float | None:
        """CPU seconds of a training command, start-up and validation included."""
        found = self.results.get(f"fit_{training}")
        return None if found is None else float(found["cpu_seconds"])


def write_report(data: Mapping[str, Any], folder: Path) -> None:
    """Writes `lab.json` and `lab.md`.

    Args:
        data: `machine`, `items` and `runs` (each `base_seed`, `seed` and its `results` by name).
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dated = {"date": date.today().isoformat(), **data}
    (folder / "lab.json").write_text(json.dumps(dated, indent=1) + "\n", encoding="utf-8")
    (folder / "lab.md").write_text(report(dated), encoding="utf-8")


def report(data: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    runs = [Run(run["base_seed"], run["seed"], run["results"]) for run in data["runs"]]
    bases = len({run.base_seed for run in runs})
    lines = [
        "# All stages on the lab",
        "",
        f"Exact match in per cent on {data['items']} held-out items of each task (test split), greedy decoding; settings",
        f"were chosen on the val split. {len(runs)} runs: {bases} reasoners, {len(runs) // bases} weaver seeds on each. Where a",
        "cell says `a (b to c)`, a is the mean over the runs, b and c the lowest and the highest run. Differences are",
        "paired over items, with 95 % bootstrap intervals.",
        "",
        f"Made by `make bench-lab` on {data['date']}: {data['machine']}.",
        *_shop(runs),
        *_grpo(runs),
        *_forgetting(runs),
        *_bill(runs),
        *_text_world(runs),
        *_cost(runs),
    ]
    return "\n".join(lines) + "\n"


def _shop(runs: Sequence[Run]) -> list[str]:
    rows = (
        ("reasoner alone", "reasoner alone"),
        ("untrained latents", "untrained latents"),
        ("trained weaver, all boundaries", "weaver always on"),
        ("trained weaver, prompt end only", "weaver, prompt end only"),
        ("trained weaver, latents of another item", "weaver, latents of another item"),
    )
    table = [[label, _spread(runs, condition, "shop")] for label, condition in rows]
    return section("Weaver SFT on the closed-book shop", ["", "exact match"], table)


def _grpo(runs: Sequence[Run]) -> list[str]:
    table = []
    for run in runs:
        before, after = run.score("half-trained weaver", "shop"), run.score("weaver GRPO", "shop")
        if before is None or after is None:
            continue
        table.append(
            [
                str(run.base_seed),
                str(run.seed),
                f"{before.mean:.1f}",
                f"{after.mean:.1f}",
                difference(after, before),
                _seconds(run.fit_seconds("grpo")),
            ]
        )
    header = ["reasoner", "weaver seed", "half-trained", "after GRPO", "lift, points", "CPU s of GRPO"]
    return section("Weaver GRPO from a weaver that SFT was stopped early on", header, table)


def _forgetting(runs: Sequence[Run]) -> list[str]:
    conditions = (
        "reasoner alone",
        "weaver always on",
        "trigger RL",
        "trigger RL, lambda = 0",
        "trigger RL on the target only",
        "random trigger, same rate",
        "LoRA-SFT of the reasoner",
        "LoRA-SFT with replay",
    )
    table = []
    for condition in conditions:
        cells = [_spread(runs, condition, task) for task in ("shop", *OTHERS)]
        invoked = [_mean_insertions(runs, condition, tasks) for tasks in (("shop",), OTHERS)]
        kept = changed = 0
        for ours, theirs in _pairs(runs, condition, "reasoner alone", OTHERS):
            low, high = interval(ours, theirs)
            kept += low <= 0 <= high
            changed += 1
        unharmed = f"{kept} of {changed}" if changed and condition != "reasoner alone" else ""
        table.append([condition, *cells, *invoked, unharmed])
    header = ["", "shop", *OTHERS, "insertions, shop", "insertions, others", "others unchanged"]
    found = section("What learning the shop does to the other tasks", header, table)
    return [
        *found,
        "",
        "Others unchanged: in how many (run, task) pairs the paired interval of the difference to the reasoner alone",
        "includes 0.",
        *_kept(runs),
    ]


def _kept(runs: Sequence[Run]) -> list[str]:
    """How much of the weaver's accuracy each trigger keeps, run by run."""
    lines = []
    for run in runs:
        weaver, trigger = run.score("weaver always on", "shop"), run.score("trigger RL", "shop")
        if weaver is None or trigger is None or not weaver.mean:
            continue
        lines.append(
            f"Reasoner {run.base_seed}, seed {run.seed}: trigger RL keeps {100 * trigger.mean / weaver.mean:.1f} % of "
            f"the weaver's {weaver.mean:.1f} at {trigger.insertions:.2f} insertions per answer (always: "
            f"{weaver.insertions:.2f})."
        )
    return ["", *(f"- {line}" for line in lines)] if lines else []


def _bill(runs: Sequence[Run]) -> list[str]:
    table = []
    for label, condition in (
        ("reasoner alone", "bill: reasoner alone"),
        ("weaver, all boundaries", "bill: weaver always on"),
        ("the same weaver, prompt end only", "bill: the same, prompt end only"),
        ("a weaver trained for the prompt end only", "bill: trained for the prompt end"),
        ("trigger RL", "bill: trigger RL"),
    ):
        others = _mean_insertions(runs, condition, OTHERS)
        table.append(
            [label, _spread(runs, condition, "bill"), _mean_insertions(runs, condition, ("bill",)), others]
        )
    kept = changed = 0
    for run in runs:
        for task in OTHERS:
            ours, theirs = (
                run.score("bill: trigger RL", task),
                run.score("bill: reasoner alone, other tasks", task),
            )
            if ours is not None and theirs is not None:
                low, high = interval(ours, theirs)
                kept += low <= 0 <= high
                changed += 1
    found = section(
        "Bills of six items: memory is needed in mid-generation",
        ["", "exact match", "insertions per bill", "insertions, others"],
        table,
    )
    if changed:
        found += [
            "",
            f"With the learned trigger the other tasks are unchanged in {kept} of {changed} (run, task) pairs.",
        ]
    return found


def _text_world(runs: Sequence[Run]) -> list[str]:
    table = []
    for run in runs:
        scores = [
            run.score(f"text world: {name}", "text_world")
            for name in ("reasoner alone", "weaver SFT", "half-trained weaver", "weaver GRPO")
        ]
        alone, sft, half, grpo = scores
        if alone is None or sft is None or half is None or grpo is None:
            continue
        table.append(
            [
                str(run.base_seed),
                str(run.seed),
                *(f"{score.mean:.1f}" for score in (alone, sft, half, grpo)),
                difference(grpo, half),
                " / ".join(
                    _seconds(run.fit_seconds(name))
                    for name in ("text_world", "text_world_half", "text_world_grpo")
                ),
            ]
        )
    header = [
        "reasoner", "weaver seed", "reasoner alone", "weaver SFT", "half-trained", "after GRPO", "lift, points",
        "CPU s of SFT / half / GRPO",
    ]  # fmt: skip
    return section("Text world: success in houses that were held out", header, table)


def _cost(runs: Sequence[Run]) -> list[str]:
    table = []
    for name in sorted({key for run in runs for key in run.results if key.startswith("fit_")}):
        seconds = [float(run.results[name]["cpu_seconds"]) for run in runs if name in run.results]
        table.append([name.removeprefix("fit_"), mean_and_range(seconds, 0)])
    return section(
        "CPU seconds of a training command, start-up and validation included", ["", "CPU s"], table
    )


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], level: int = 2) -> list[str]:
    """A heading of a level and a table; nothing if there are no rows."""
    if not any(any(cell for cell in row[1:]) for row in rows):
        return []
    lines = ["", f"{'#' * level} {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows if any(row[1:])]


def _pairs(
    runs: Sequence[Run], condition: str, reference: str, tasks: Sequence[str]
) -> Iterator[tuple[Score, Score]]:
    for run in runs:
        for task in tasks:
            ours, theirs = run.score(condition, task), run.score(reference, task)
            if ours is not None and theirs is not None:
                yield ours, theirs


def _spread(runs: Sequence[Run], condition: str, task: str) -> str:
    """Mean and range over the runs."""
    return mean_and_range(
        [score.mean for run in runs if (score := run.score(condition, task)) is not None], 1
    )


def _mean_insertions(runs: Sequence[Run], condition: str, tasks: Sequence[str]) -> str:
    found = [
        score.insertions
        for run in runs
        for task in tasks
        if (score := run.score(condition, task)) is not None
    ]
    return f"{np.mean(found):.2f}" if found else ""


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Mean and range of some values; nothing if there are none."""
    if not values:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def difference(ours: Score, theirs: Score) -> str:
    """In points, with its 95 % interval over paired items."""
    low, high = interval(ours, theirs)
    return f"{ours.mean - theirs.mean:+.1f} ({low:+.1f} to {high:+.1f})"


def interval(ours: Score, theirs: Score) -> tuple[float, float]:
    """95 % interval of the difference over paired items, in points."""
    found = mean_interval([a - b for a, b in zip(ours.exact, theirs.exact, strict=True)])
    assert found.low is not None, "there is more than one item"
    assert found.high is not None, "likewise"
    return 100 * found.low, 100 * found.high


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"


def machine() -> str:
    """Processor, versions and threads."""
    threads = torch.get_num_threads()
    return f"{processor()}, Python {platform.python_version()}, torch {torch.__version__}, {threads} threads"
