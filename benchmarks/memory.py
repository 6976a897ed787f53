"""What the memory does, on the lab and on SmolLM2, with the controls that could refute it: `python -m benchmarks.memory`.

A cell is one command of `memgen` on one task's checkpoint, of one weaver seed on one reasoner. Each is kept as a JSON file
below `--root` when it is there, and the commands go on inside their own folders, so an interrupted benchmark goes on where it
stopped, and parts of it (`--only`, `--tasks`, `--weaver-seeds`, `--base-seeds`) may be made on different days. Checkpoints are
those of `make bench-lab` (`--lab-root`), and on SmolLM2 those of `make demo-real`, trained first where they are missing. `benchmarks.memory_report` makes
`docs/results/memory.md` of the cells that are there and names those that are not.

All figures are from the test split.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import lab
from benchmarks.kept import kept
from benchmarks.lab_report import machine
from benchmarks.memory_report import write_report
from memgen.analysis.clusters import LEVEL
from memgen.analysis.effects import REWARD, Effect, Outcome
from memgen.analysis.interventions import RULES
from memgen.analysis.verdict import ClusterEffects, RemovalResult
from memgen.conf_files import conf_file
from memgen.lab.assets import resolve_asset
from memgen.lab.trained import STDERR, asset_query, base_name, children_cpu, run_memgen, stage_file
from memgen.results.statistics import Interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A task whose memory is looked at.

    Attributes:
        title: for the report.
        weaver: training of `benchmarks.lab` that learns it.
        overlays: configuration files of its items, below `conf/`.
        items: held-out items of an analysis; half of them are played under every condition.
        trigger: training of the trigger on the weaver, or None.
        mix: configuration files of the items that the trigger learns from: half of them are the task's.
        inside: whether there are boundaries inside of its answers.
        ablation_items: held-out items of an ablation and of an oracle.
        backbone: configuration files of a reasoner other than the lab's: its trainings are assets of the lab, of one seed.
        own: configuration files of its stages, by stage.
        more_conditions: of an ablation.
    """

    title: str
    weaver: str
    overlays: tuple[str, ...]
    items: int
    trigger: str | None = None
    mix: tuple[str, ...] = ()
    inside: bool = True
    ablation_items: int = 200
    backbone: tuple[str, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)
    more_conditions: tuple[str, ...] = ()


SUBJECTS = {
    "shop": Subject("Closed-book shop", "weaver", ("data/lab.yaml",), 300, "trigger", ("data/lab_mix.yaml",)),
    "bill": Subject(
        "Bill of six items", "bill", ("data/lab_bill.yaml",), 160, "bill_trigger", ("data/lab_bill_mix.yaml",)
    ),
    "text_world": Subject("Text world", "text_world", ("data/lab_text_world.yaml",), 160, inside=False),
    "english": Subject(
        "English shop on SmolLM2-135M",
        "smollm2_weaver_sft",
        ("data/lab_english.yaml",),
        120,
        "smollm2_trigger_rl",
        ("data/lab_english_mix.yaml",),
        inside=False,
        ablation_items=100,
        backbone=("backbone/smollm2-135m.yaml",),
        own={"weaver_sft": "smollm2/weaver_sft.yaml", "trigger_rl": "smollm2/trigger_rl.yaml"},
        more_conditions=("cot",),
    ),
}
CONDITIONS = (
    "vanilla", "never", "always", "prompt_only", "delimiters", "random:0.5", "trained", "entropy:1", "pause", "swapped",
    "bon:3",
)  # fmt: skip
"""Of every task. Not `cot`: the lab's tokenizer has no words for an instruction."""
_INSIDE = ("prompt_only", "delimiters")
"""Conditions that need boundaries inside of answers."""
BUDGET = 16
"""Policies that an oracle tries on an item."""
NULL_DRAWS = 39
"""Samples without clusters; the smallest p-value is 0.025."""


@dataclass(frozen=True)
class Cell:
    """One weaver seed of a task on one reasoner.

    Attributes:
        task: name in `SUBJECTS`.
        base_seed: which reasoner.
        seed: of the weaver.
    """

    task: str
    base_seed: int
    seed: int

    @property
    def folder(self) -> Path:
        """Its folder below the root."""
        return Path(self.task) / f"base{self.base_seed}_seed{self.seed}"


@dataclass(frozen=True)
class Bench:
    """Runs the commands.

    Attributes:
        root: folder of the cells.
        lab_root: folder of the checkpoints.
    """

    root: Path
    lab_root: Path

    def checkpoint(self, cell: Cell, training: str) -> Path:
        """What a training leaves, trained first if it is missing."""
        if SUBJECTS[cell.task].backbone:
            return Path(resolve_asset(f"lab:{training}{asset_query(cell.seed, cell.base_seed)}"))
        return lab.Bench(self.lab_root, cell.base_seed, cell.seed).train(training)

    def analyze(self, cell: Cell) -> dict[str, Any]:
        """`memgen analyze`."""
        subject = SUBJECTS[cell.task]
        own = ("--data.test_examples", str(subject.items), "--null-draws", str(NULL_DRAWS))
        command = self.command("analyze", cell, "weaver_sft", subject.overlays, subject.weaver)
        return _run([*command, *own], self.root / cell.folder / "analyze" / "analysis.json", _analysis)

    def ablate(self, cell: Cell) -> dict[str, Any]:
        """`memgen ablate`, on the items that the trigger learns from where there is one."""
        subject = SUBJECTS[cell.task]
        left_out = (() if subject.trigger else ("trained",)) + (() if subject.inside else _INSIDE)
        conditions = [name for name in (*CONDITIONS, *subject.more_conditions) if name not in left_out]
        command = self.command("ablate", cell, *self._with_trigger(subject, subject.mix))
        own = ("--conditions", ",".join(conditions), "--bon-temperature", "0.7", *_items(subject))
        return _run([*command, *own], self.root / cell.folder / "ablate" / "ablation.json", _ablation)

    def oracle(self, cell: Cell) -> dict[str, Any]:
        """`memgen oracle` on the task alone."""
        subject = SUBJECTS[cell.task]
        command = self.command("oracle", cell, *self._with_trigger(subject, subject.overlays))
        own = ("--budget", str(BUDGET), *_items(subject))
        return _run([*command, *own], self.root / cell.folder / "oracle" / "oracle.json", _oracle)

    def continual(self, cell: Cell) -> dict[str, Any]:
        """`memgen continual`."""
        out = self.root / cell.folder / "continual"
        command = (
            *("continual", "--config", str(conf_file("continual.yaml")), "--seed", str(cell.seed)),
            *("--all.settings.model.memgen.backbone.name", base_name(cell.base_seed)),
            *("--all.settings.trainer.logger", "false", "--out", str(out)),
        )
        return _run(command, out / "continual.json", dict)

    def _with_trigger(self, subject: Subject, overlays: Sequence[str]) -> tuple[str, Sequence[str], str]:
        """Stage, overlays and training of a trained trigger, or of the weaver where there is none."""
        if subject.trigger is None:
            return "weaver_sft", subject.overlays, subject.weaver
        return "trigger_rl", overlays, subject.trigger

    def command(self, name: str, cell: Cell, stage: str, overlays: Sequence[str], training: str) -> list[str]:
        """A command that plays the test items of a task with a checkpoint."""
        subject = SUBJECTS[cell.task]
        own = [subject.own[stage]] if stage in subject.own else []
        files = [stage_file(stage), *map(conf_file, (*subject.backbone, *overlays, *own))]
        reasoner = () if subject.backbone else ("--model.memgen.backbone.name", base_name(cell.base_seed))
        return [
            *(name, *(argument for file in files for argument in ("--config", str(file)))),
            *("--checkpoint", str(self.checkpoint(cell, training))),
            *(*reasoner, "--trainer.logger", "false"),
            *("--out", str(self.root / cell.folder / name)),
        ]


def _items(subject: Subject) -> tuple[str, str]:
    return ("--data.test_examples", str(subject.ablation_items))


@dataclass(frozen=True)
class Part:
    """What a command is run on.

    Attributes:
        run: makes a cell.
        tasks: those of its cells.
    """

    run: Callable[[Bench, Cell], dict[str, Any]]
    tasks: tuple[str, ...] = tuple(SUBJECTS)


CHAIN = "chain"
"""In the place of a task: all those of conf/continual.yaml."""
PARTS = {
    "analyze": Part(Bench.analyze),
    "ablate": Part(Bench.ablate),
    "oracle": Part(Bench.oracle),
    "continual": Part(Bench.continual, (CHAIN,)),
}


def cells(
    parts: Sequence[str], tasks: Sequence[str], base_seeds: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[str, Cell]]:
    """Seed by seed, so that an interrupted benchmark has something of everything."""
    for seed in seeds:
        for base_seed in base_seeds:
            for task in tasks:
                if task in SUBJECTS and SUBJECTS[task].backbone and (base_seed, seed) != (0, 0):
                    continue
                yield from (
                    (part, Cell(task, base_seed, seed)) for part in parts if task in PARTS[part].tasks
                )


def _run(
    command: Sequence[str], numbers: Path, read: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Runs a command; what the report needs of its numbers, and what it took."""
    clock, begin = children_cpu(), time.perf_counter()
    run_memgen(*command, stdout=STDERR)
    return {
        **read(json.loads(numbers.read_text(encoding="utf-8"))),
        "cpu_seconds": round(children_cpu() - clock, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def _analysis(found: Mapping[str, Any]) -> dict[str, Any]:
    whole = (
        "items",
        "blocks",
        "scoring",
        "reward",
        "latents",
        "conditions",
        "study",
        "probes",
        "notes",
        "verdict",
    )
    return {
        **{key: found[key] for key in whole},
        "overall": [_difference(effect) for effect in map(_effect, found["overall"])],
        "removals": [row for removal in found["removals"] for row in _removals(removal)],
    }


def _ablation(found: Mapping[str, Any]) -> dict[str, Any]:
    whole = ("items", "environment", "first", "memory", "lines", "notes")
    return {
        **{key: found[key] for key in whole},
        "against_first": [_difference(_effect(effect)) for effect in found["against_first"]],
        "against_memory": [_difference(_turned(_effect(effect))) for effect in found["of_memory"]],
    }


def _turned(effect: Effect) -> Effect:
    """The same comparison from the other side."""
    found = effect.difference
    low, high = (None if end is None else -end for end in (found.high, found.low))
    turned = Interval(-found.mean, low, high, found.count)
    return replace(effect, condition=effect.against, against=effect.condition, difference=turned)


def _oracle(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in ("details", "policies", "settings")}


def _removals(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A clustering's removals by each rule."""
    effects = ClusterEffects(
        clusters=found["clusters"],
        results=tuple(RemovalResult(**result) for result in found["results"]),
        beyond_random=tuple(map(_effect, found["beyond_random"])),
        between=tuple(map(_effect, found["between"])),
        agreement=found["agreement"],
    )
    for rule in RULES:
        removed = [result for result in effects.results if result.rule == rule]
        beyond = {e.condition: e for e in effects.beyond_random if e.outcome.name == REWARD}
        functions = effects.functions(rule)
        yield {
            "clusters": effects.clusters,
            "rule": rule,
            "agreement": dict(effects.agreement),
            "removed": [
                {
                    "condition": result.condition,
                    "control": result.control,
                    "rate": result.rate,
                    "beyond_random": _difference(beyond[result.condition]),
                    "functions": functions.get(result.cluster, []),
                }
                for result in removed
            ],
        }


def _effect(found: Mapping[str, Any]) -> Effect:
    outcome, difference = Outcome(**found["outcome"]), Interval(**found["difference"])
    return Effect(**{**found, "outcome": outcome, "difference": difference})


def _difference(effect: Effect) -> dict[str, Any]:
    return {
        "condition": effect.condition,
        "outcome": effect.outcome.name,
        "mean": effect.difference.mean,
        "adjusted": effect.adjusted,
        "harms": effect.harms(LEVEL),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the missing cells and writes the report.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="commands (all)")
    parser.add_argument(
        "--tasks", nargs="+", choices=[*SUBJECTS, CHAIN], default=[*SUBJECTS, CHAIN], help="tasks (all)"
    )
    parser.add_argument("--weaver-seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--base-seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument(
        "--report", action="store_true", help="make no cell, write the report of those that are there"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("runs/bench_memory"), help="folder of the cells and runs"
    )
    parser.add_argument(
        "--lab-root", type=Path, default=Path("runs/bench_lab"), help="folder of make bench-lab's trainings"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    bench = Bench(options.root, options.lab_root)
    if not options.report:
        for part, cell in cells(options.only, options.tasks, options.base_seeds, options.weaver_seeds):
            kept(
                options.root / cell.folder / f"{part}.json",
                lambda part=part, cell=cell: PARTS[part].run(bench, cell),  # type: ignore[misc]
            )
    expected = [
        f"{cell.folder}/{part}" for part, cell in cells(list(PARTS), [*SUBJECTS, CHAIN], [0, 1], [0, 1, 2])
    ]
    found = {
        str(path.relative_to(options.root).with_suffix("")): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(options.root.glob("*/*/*.json"))
    }
    described = {
        "subjects": {
            name: {
                "title": s.title,
                "items": s.items,
                "mixed": bool(s.mix),
                "reasoner": "SmolLM2" if s.backbone else None,
            }
            for name, s in SUBJECTS.items()
        },
        "null_draws": NULL_DRAWS,
        "budget": BUDGET,
        "conditions": CONDITIONS,
        "missing": [cell for cell in expected if cell not in found],
        "cells": found,
    }
    write_report(described, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
