"""The report of `python -m benchmarks.memory`: cells as JSON, and tables of them as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab_report import mean_and_range, section
from memgen.analysis.clusters import PAPER_COUNT
from memgen.analysis.effects import REWARD
from memgen.analysis.verdict import INDISCRIMINATE, SAME_PARTITION

RULES = {"nearest": "nearest centroid", "top_k": "top 10"}


@dataclass(frozen=True)
class Run:
    """One weaver seed on one reasoner, and what a command found.

    Attributes:
        base_seed: which reasoner of the lab.
        seed: of the weaver.
        found: the cell.
        reasoner: its name, where it is not the lab's.
    """

    base_seed: int
    seed: int
    found: Mapping[str, Any]
    reasoner: str | None = None

    @property
    def name(self) -> list[str]:
        """The first two columns of its row."""
        return [self.reasoner or str(self.base_seed), str(self.seed)]


def write_report(data: Mapping[str, Any], folder: Path) -> None:
    """Writes `memory.json` and `memory.md`.

    Args:
        data: the `subjects`, the `cells` that are there by name, and the names of the `missing` ones.
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "memory.md").write_text(report(data), encoding="utf-8")


def report(data: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    cells = list(data["cells"].values())
    machines = sorted({cell["machine"] for cell in cells})
    dates = sorted({cell["date"] for cell in cells})
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines = [
        "# What the memory does, on the lab and on SmolLM2",
        "",
        "Rewards are shares of right answers in per cent, on held-out items (test split), greedy decoding. A row or a count of",
        "runs is over weaver seeds 0 to 2 on the lab's reasoners 0 and 1; on SmolLM2, over one weaver (`make demo-real`). Where a cell",
        "says `a (b to c)`, a is the mean over the runs, b and c the lowest and the highest run.",
        "",
        f"Made by `python -m benchmarks.memory` on {when or 'no day yet'}: {'; '.join(machines) or 'no machine yet'}. The figures",
        "are those of the command beside each table. The paper's figures are in [paper.md](paper.md).",
        *_analysis(data),
        *_ablation(data),
        *_oracle(data),
        *_continual(data),
        *_missing(data["missing"]),
    ]
    return "\n".join(lines) + "\n"


def runs(data: Mapping[str, Any], task: str, part: str) -> list[Run]:
    """The runs of a task that have a cell of a command."""
    found = []
    for name, cell in data["cells"].items():
        subject, folder, command = name.split("/")
        if (subject, command) == (task, part):
            base, seed = folder.removeprefix("base").split("_seed")
            reasoner = data["subjects"].get(task, {}).get("reasoner")
            found.append(Run(int(base), int(seed), cell, reasoner))
    return sorted(found, key=lambda run: (run.base_seed, run.seed))


# memgen analyze


def _analysis(data: Mapping[str, Any]) -> list[str]:
    by_task = {task: runs(data, task, "analyze") for task in data["subjects"]}
    tables = []
    for task, found in by_task.items():
        if found:
            title = data["subjects"][task]["title"]
            tables += [*_clusters(title, found), *_whole_blocks(title, found), *_removals(title, found)]
    if not tables:
        return []
    every = [run for found in by_task.values() for run in found]
    seconds = [run.found["cpu_seconds"] for run in every]
    return [
        "",
        "## Clusters and interventions",
        "",
        "```",
        "memgen analyze --config conf/weaver_sft.yaml [--config OVERLAY ...] --checkpoint DIR --data.test_examples N --null-draws "
        f"{data['null_draws']}",
        "```",
        "",
        f"docs/analysis.md says what it does. {mean_and_range(seconds, 0)} CPU seconds a run. In the text world, a wrong answer is an",
        "episode that has used up its six turns without an action that was not possible.",
        "",
        "Do the clusters do different things, beyond a random removal at the same rate? Yes in "
        f"{sum(bool(run.found['verdict']['faculties']) for run in every)} of {len(every)} runs, by the rules of docs/analysis.md.",
        "",
        *(_conclusion(data["subjects"][task]["title"], found) for task, found in by_task.items() if found),
        *tables,
    ]


def _conclusion(title: str, found: Sequence[Run]) -> str:
    """What the runs say about faculties, counted."""
    clustered = sum(run.found["verdict"]["clusters_found"] for run in found)
    worse = sum(
        any(removed["beyond_random"]["harms"] for row in run.found["removals"] for removed in row["removed"])
        for run in found
    )
    several = [run for run in found if run.found["verdict"]["faculties"]]
    known = [run for run in found if any(_partitions(run))]
    everything = sum(
        all(
            removed["rate"] >= INDISCRIMINATE
            for row in run.found["removals"]
            if row["rule"] == "top_k"
            for removed in row["removed"]
        )
        for run in found
    )
    return (
        f"- **{title}** ({len(found)} run{'s' * (len(found) > 1)}): the latents form clusters in {clustered}; removing some cluster does more harm than a "
        f"random removal at the same rate in {worse}; several clusters have functions of their own in {len(several)}. The clusters "
        f"of some N are those of the task, the boundary or the kind of insertion in {len(known)}. The paper's rule removes at least "
        f"{INDISCRIMINATE:.0%} of all blocks, whatever the cluster, in {everything}."
    )


def _partitions(run: Run) -> list[bool]:
    """For each clustering, whether it is a partition that is known without the latents."""
    return [
        any(value >= SAME_PARTITION for value in row["agreement"].values()) for row in run.found["removals"]
    ]


def _clusters(title: str, found: Sequence[Run]) -> list[str]:
    table = []
    for run in found:
        study = run.found["study"]
        counts = {count["clusters"]: count for count in study["counts"]}
        best = counts.get(study["best"])
        shown = ["", "", "", ""]
        if best is not None:
            shown = [
                str(study["best"]),
                f"{best['silhouette']:.2f} / {best['null_silhouette']:.2f}",
                f"{study['p_value']:.3f}",
                f"{best['stability']:.2f}",
            ]
        agreement = {
            name: value for row in run.found["removals"] if row["clusters"] == PAPER_COUNT
            for name, value in row["agreement"].items()
        }  # fmt: skip
        table.append(
            [
                *run.name,
                f"{100 * run.found['reward']['mean']:.1f}",
                str(run.found["blocks"]),
                *shown,
                "yes" if run.found["verdict"]["clusters_found"] else "no",
                ", ".join(f"{name} {value:.2f}" for name, value in agreement.items()),
            ]
        )
    header = [
        "reasoner", "weaver seed", "reward", "blocks", "best N", "silhouette / without clusters", "p", "stability", "clusters",
        f"adjusted Rand index, N = {PAPER_COUNT}",
    ]  # fmt: skip
    return section(f"{title}: are there clusters?", header, table, level=3)


def _whole_blocks(title: str, found: Sequence[Run]) -> list[str]:
    """Conditions that treat every block alike."""
    removed = {r["condition"] for run in found for row in run.found["removals"] for r in row["removed"]}
    removed |= {r["control"] for run in found for row in run.found["removals"] for r in row["removed"]}
    names = dict.fromkeys(name for run in found for name in run.found["conditions"] if name not in removed)
    table = []
    for name in names:
        own = [run for run in found if name in run.found["conditions"]]
        effects = [
            effect
            for run in own
            for effect in run.found["overall"]
            if (effect["condition"], effect["outcome"]) == (name, REWARD)
        ]
        failures = sorted(
            {key for run in own for key in run.found["conditions"][name] if key.startswith("failure: ")}
        )
        table.append(
            [
                name,
                mean_and_range([100 * run.found["conditions"][name]["reward"] for run in own], 1),
                mean_and_range([100 * effect["mean"] for effect in effects], 1),
                f"{sum(effect['harms'] for effect in effects)} of {len(effects)}" if effects else "",
                ", ".join(
                    f"{key.removeprefix('failure: ')} {100 * sum(shares) / len(shares):.0f} %"
                    for key in failures
                    for shares in [[run.found["conditions"][name].get(key, 0.0) for run in own]]
                ),
            ]
        )
    header = ["condition", "reward", "difference, points", "harms, p <= 0.05 after Holm", "failures"]
    return section(
        f"{title}: every block changed in the same way ({found[0].found['scoring']} items a run)",
        header,
        table,
        level=3,
    )


def _removals(title: str, found: Sequence[Run]) -> list[str]:
    table = []
    for run in found:
        conditions = run.found["conditions"]
        for row in run.found["removals"]:
            removed = row["removed"]
            own = [f"{n + 1}: {', '.join(r['functions'])}" for n, r in enumerate(removed) if r["functions"]]
            table.append(
                [
                    *run.name,
                    str(row["clusters"]),
                    RULES[row["rule"]],
                    " / ".join(f"{100 * r['rate']:.0f}" for r in removed),
                    " / ".join(f"{100 * conditions[r['condition']]['reward']:.0f}" for r in removed),
                    " / ".join(f"{100 * conditions[r['control']]['reward']:.0f}" for r in removed),
                    ", ".join(str(n + 1) for n, r in enumerate(removed) if r["beyond_random"]["harms"])
                    or "none",
                    "; ".join(own) or "none",
                ]
            )
    header = [
        "reasoner", "weaver seed", "N", "rule", "blocks removed, % by cluster", "reward", "reward, random removal at that rate",
        "worse than random", "functions of their own",
    ]  # fmt: skip
    return section(f"{title}: one cluster removed", header, table, level=3)


# memgen ablate


def _ablation(data: Mapping[str, Any]) -> list[str]:
    tables = []
    for task, subject in data["subjects"].items():
        found = runs(data, task, "ablate")
        if found:
            mixed = " among tasks that need no memory" if subject["mixed"] else ""
            tables += _matrix(f"{subject['title']}{mixed}", found)
    if not tables:
        return []
    return [
        "",
        "## With, without and with what only looks like memory",
        "",
        "```",
        "memgen ablate --config conf/STAGE.yaml --config OVERLAY ... --checkpoint DIR --data.test_examples N --bon-temperature 0.7 \\",
        f"    --conditions {','.join(data['conditions'])}",
        "```",
        "",
        "docs/ablation.md says what each condition is. SmolLM2 is also asked with `cot`. Costs are means per answer.",
        *tables,
    ]


def _matrix(title: str, found: Sequence[Run]) -> list[str]:
    lines = [{line["name"]: line for line in run.found["lines"]} for run in found]
    table = []
    for name in dict.fromkeys(name for own in lines for name in own):
        own = [by_name[name] for by_name in lines if name in by_name]
        against = [
            effect["mean"]
            for run in found
            for effect in run.found["against_first"]
            if effect["condition"] == name
        ]
        behind = [
            effect["harms"]
            for run in found
            for effect in run.found["against_memory"]
            if effect["condition"] == name
        ]
        table.append(
            [
                name,
                mean_and_range([100 * line["reward"]["mean"] for line in own], 1),
                mean_and_range([100 * mean for mean in against], 1),
                f"{sum(behind)} of {len(behind)}" if behind else "",
                *(
                    mean_and_range([line["costs"][cost] for line in own], digits)
                    for cost, digits in (("latents", 1), ("positions", 0), ("tokens", 1))
                ),
                f"{1000 * sum(line['costs']['cpu_seconds'] for line in own) / len(own):.1f}",
            ]
        )
    first, memory = found[0].found["first"], found[0].found["memory"]
    header = [
        "condition", "reward", f"difference to {first}, points", f"worse than {memory}, p <= 0.05 after Holm", "latents",
        "positions", "tokens", "CPU ms",
    ]  # fmt: skip
    return section(
        f"{title} ({len(found)} runs, {found[0].found['items']} items each)", header, table, level=3
    )


# memgen oracle


def _oracle(data: Mapping[str, Any]) -> list[str]:
    table = []
    for task, subject in data["subjects"].items():
        for run in runs(data, task, "oracle"):
            found = run.found
            scores = [found[name] for name in ("never", "always", "shared", "optimum", "trigger")]
            shares = [*found["rescued"].values(), *found["broken"].values()]
            table.append(
                [
                    subject["title"],
                    *run.name,
                    *(
                        ""
                        if score is None
                        else f"{100 * score['accuracy']['mean']:.1f} ({score['insertions']:.1f})"
                        + (f", {score['name']}" if score is found["shared"] else "")
                        for score in scores
                    ),
                    *(f"{share['count']} of {share['total']}" for share in shares),
                ]
            )
    if not table:
        return []
    header = [
        "task", "reasoner", "weaver seed", "never", "always", "best shared policy, on its other half", "best of each item (upper bound)",
        "trained trigger", "failures of never that some policy solves", "failures of always", "successes of never that some "
        "insertion breaks", "successes of always that some omission breaks",
    ]  # fmt: skip
    return [
        *section("What a trigger can gain", header, table),
        "",
        f"`memgen oracle --config conf/STAGE.yaml --config OVERLAY ... --checkpoint DIR --data.test_examples N --budget {data['budget']}`.",
        "Accuracy in per cent, insertions per answer in brackets. The best policy of each item is chosen with its reward at hand: an",
        "upper bound, and what chance gives to the best of many is in it.",
    ]


# memgen continual


def _continual(data: Mapping[str, Any]) -> list[str]:
    found = runs(data, "chain", "continual")
    if not found:
        return []
    tasks = found[0].found["tasks"]
    methods = dict.fromkeys(method for run in found for method in run.found["methods"])
    matrix, summary = [], []
    for method in methods:
        own = [run.found["methods"][method] for run in found if method in run.found["methods"]]
        for step, row in enumerate(own[0]["matrix"]):
            cells = [mean_and_range([100 * each["matrix"][step][task] for each in own], 1) for task in tasks]
            matrix.append([method, row["after"], *cells])
        measures = [name for name, value in own[0]["measures"].items() if value is not None]
        summary.append(
            [
                method,
                *(
                    mean_and_range([100 * each["measures"][name]["mean"] for each in own], 1)
                    for name in measures
                ),
            ]
        )
    items = ", ".join(f"{count} of {task}" for task, count in found[0].found["items"].items())
    return [
        "",
        "## Tasks learnt one after another",
        "",
        "`memgen continual --config conf/continual.yaml --seed N`; docs/continual.md says what is measured. "
        f"{len(found)} runs; items: {items}.",
        *section("Mean reward after each task", ["method", "after", *tasks], matrix, level=3),
        *section("Measures, points", ["method", *measures], summary, level=3),
    ]


def _missing(names: Sequence[str]) -> list[str]:
    if not names:
        return ["", "Every cell was measured."]
    by_run: dict[str, list[str]] = {}
    for name in names:
        run, _, command = name.rpartition("/")
        by_run.setdefault(run, []).append(command)
    lines = [f"- {run}: {', '.join(commands)}" for run, commands in by_run.items()]
    return ["", "## Cells that were not measured", "", f"{len(names)}:", "", *lines]
