"""Every stage on a real language model with its controls, over several weaver seeds: `python -m benchmarks.real`.

A cell is a condition on a task with a seed. Each is kept as a JSON file below `--root` when it is there, and a training
goes on inside its run, so an interrupted benchmark goes on where it stopped, and parts of it (`--only`, `--seeds`) may be
made on different days and machines. `benchmarks/real.yaml` says what is measured; `benchmarks.real_report` makes
`docs/results/real.md` of the cells that are there and names those that are not.

Settings were chosen on the val split; all figures are from the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

from benchmarks.kept import kept
from benchmarks.lab_report import machine
from benchmarks.real_report import write_report
from memgen.chat import conversation_ids, load_tokenizer
from memgen.conf_files import conf_file
from memgen.environments.base import Environment
from memgen.files import new_folder
from memgen.lab.assets import resolve_asset
from memgen.lab.report import held_out
from memgen.lab.trained import children_cpu, fit, stage_file, stopping_at
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import ConstantTrigger, TriggerConfig
from memgen.results.controls import Task, always_invoking, score, score_with_swapped_latents
from memgen.running.resume import Saved, last_checkpoint
from memgen.training.checkpoint import open_checkpoint
from memgen.types import InsertionKind, InsertionPlan, TokenBatch

logger = logging.getLogger(__name__)

SETTINGS = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Subject:
    """A task that is learnt.

    Attributes:
        title: for the report.
        data: configuration files of its items.
        mix: those of its items among others that need no memory: for the trigger, and for replay.
        values: values on top of the files of its items, by key.
        mix_values: values on top of those of the mixture.
        weaver_sft: files of the stage.
        weaver_grpo: likewise.
        trigger_rl: likewise.
        half: share of right answers on the val split at which the half-trained weaver is stopped.
        stop: at which the weaver is.
        check_every: optimizer steps between two looks at that.
        others: tasks on which harm is measured.
        text: whether the perplexity of text is, too.
    """

    title: str
    data: list[str]
    mix: list[str]
    values: dict[str, Any] = field(default_factory=dict)
    mix_values: dict[str, Any] = field(default_factory=dict)
    weaver_sft: list[str] = field(default_factory=list)
    weaver_grpo: list[str] = field(default_factory=list)
    trigger_rl: list[str] = field(default_factory=list)
    half: float = 0.3
    stop: float = 0.98
    check_every: int = 25
    others: list[str] = field(default_factory=list)
    text: bool = False


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        backbone: configuration files of the reasoner.
        tasks: what is learnt, by name.
        items: held-out items of each task.
        batch_size: answers decoded together.
        shots: worked examples of the few-shot prompt.
        others: environments that need no memory, by name: `class_path`, arguments, and `shots`, the worked examples in the
            prompt (0).
        other_items: held-out items of each.
        other_new_tokens: limit of an answer there.
        text: an environment whose reference answers are the text, or None.
        text_items: how many of them.
        overrides: values on top of all files, by key.
    """

    backbone: list[str]
    tasks: dict[str, Subject]
    items: int = 300
    batch_size: int = 25
    shots: int = 3
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    other_items: int = 100
    other_new_tokens: int = 32
    text: dict[str, Any] | None = None
    text_items: int = 50
    overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, text: Path | None = None) -> Settings:
        """Reads a settings file.

        Args:
            path: of the file.
            text: where the text's data is; None: where the file says, and if it does not, the text is not measured.
        """
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        values["tasks"] = {name: Subject(**given) for name, given in values["tasks"].items()}
        found = cls(**values)
        if text is None or found.text is None:
            return found
        return dataclasses.replace(found, text={**found.text, "path": str(text)})


CONDITIONS = {
    "bare": "bare model",
    "shots": "worked examples in the prompt",
    "untrained": "untrained latents",
    "other_item": "latents of another item",
    "half": "half-trained weaver",
    "weaver": "weaver SFT",
    "grpo": "half-trained, then weaver GRPO",
    "trigger": "weaver SFT, then trigger RL",
    "lora": "LoRA-SFT",
    "lora_replay": "LoRA-SFT with replay",
}
LORA = ("lora", "lora_replay")
"""Controls without latents: LoRA on the reasoner, for as many optimizer steps and items as the weaver took."""
WITHOUT_SEED = ("bare", "shots")
"""Conditions in which nothing is trained and nothing random: one cell for all seeds."""
HARM = ("bare", "weaver", "trigger", "lora", "lora_replay")
"""Conditions that are also scored on the other tasks."""


def cells(settings: Settings, task: str, seed: int) -> list[str]:
    """The cells of a task and seed, by their paths below the root without ending."""
    subject = settings.tasks[task]
    found = []
    for condition in CONDITIONS:
        folder = f"{task}/all" if condition in WITHOUT_SEED else f"{task}/seed{seed}"
        found.append(f"{folder}/{condition}")
        if condition in HARM:
            found += [f"{folder}/{condition} on {other}" for other in subject.others]
            found += [f"{folder}/{condition} on text"] if subject.text and settings.text else []
    return found


class Bench:
    """One task with one seed: trains and scores, each once.

    Args:
        root: folder of all cells.
        settings: what is measured.
        task: which of its tasks.
        seed: of initial weights, data order and sampling.
    """

    def __init__(self, root: Path, settings: Settings, task: str, seed: int) -> None:
        self.root = root
        self.settings = settings
        self.task = task
        self.subject = settings.tasks[task]
        self.seed = seed
        self.folder = root / task / f"seed{seed}"
        self.overrides: dict[str, object] = {
            "seed_everything": seed,
            "model.seed": seed,
            "data.seed": seed,
            "trainer.logger": "false",
            "trainer.callbacks.1.every_minutes": 2,
        }

    # What is asked

    @cached_property
    def conf(self) -> Any:
        """The merged configuration of weaver SFT, whose items and limits hold for every condition."""
        return self._merged("weaver_sft", mixed=False)

    def _merged(self, stage: str, *, mixed: bool) -> Any:
        merged = OmegaConf.merge(*(OmegaConf.load(file) for file in self.files(stage, mixed=mixed)))
        for key, value in self._values(mixed=mixed).items():
            OmegaConf.update(merged, key, value)
        return merged

    def files(self, stage: str, *, mixed: bool) -> list[Path]:
        """The configuration files of a stage, on the task alone or in its mixture with others."""
        own: list[str] = getattr(self.subject, stage)
        data = self.subject.mix if mixed else self.subject.data
        return [stage_file(stage), *map(conf_file, [*self.settings.backbone, *data, *own])]

    def _values(self, *, mixed: bool) -> dict[str, Any]:
        return {**(self.subject.mix_values if mixed else self.subject.values), **self.settings.overrides}

    @cached_property
    def base(self) -> str:
        """Directory of the reasoner."""
        return resolve_asset(self.conf.model.memgen.backbone.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The reasoner's."""
        return load_tokenizer(self.base)

    @cached_property
    def questions(self) -> Task:
        """The held-out items of the task."""
        return self._held_out(self._environment(self.conf), self.conf.model.generation.max_new_tokens)

    def _environment(self, conf: Any) -> Environment:
        values: Any = OmegaConf.to_container(conf.data.environment, resolve=True)
        return environment({**values, "test_size": self.settings.items})

    def _held_out(self, asked: Environment, new_tokens: int, shots: int = 0) -> Task:
        return held_out(asked, "test", self.tokenizer, new_tokens, self.settings.batch_size, shots)

    # Training

    def train(self, name: str) -> Path:
        """The checkpoint of a training (half, weaver, grpo, trigger, lora or lora_replay), made first if it is missing."""
        checkpoint = self.folder / "checkpoints" / name
        earlier = None
        if name != "half":
            earlier = self.train("weaver" if name in ("trigger", *LORA) else "half")

        def make() -> dict[str, Any]:
            clock, begin = children_cpu(), time.perf_counter()
            run = self._fit(name, earlier)
            best = run / "best" if (run / "best").is_dir() else run / "last"
            with new_folder(checkpoint) as folder:
                shutil.copytree(best, folder, dirs_exist_ok=True)
            last = last_checkpoint(run)
            saved = None if last is None else Saved.read(last)
            return {"steps": None if saved is None else saved.step, **_spent(clock, begin, children_cpu)}

        kept(self.folder / f"fit_{name}.json", make)
        return checkpoint

    def _fit(self, name: str, earlier: Path | None) -> Path:
        """Runs a training in its folder. The weaver's goes on in the run of the half-trained one."""
        subject, overrides = self.subject, dict(self.overrides)
        stages = {"grpo": "weaver_grpo", "trigger": "trigger_rl"}
        stage, mixed = stages.get(name, "weaver_sft"), name in ("trigger", "lora_replay")
        files, run = self.files(stage, mixed=mixed), self.folder / "runs" / stage
        if name in LORA:
            files, run = [*files, conf_file("baselines/lora_sft.yaml")], run.with_name(name)
            spent = json.loads((self.folder / "fit_weaver.json").read_text(encoding="utf-8"))
            # It stops where the weaver did, so nothing need be validated.
            overrides |= {"trainer.max_steps": spent["steps"], "trainer.limit_val_batches": 0}
        elif stage == "weaver_sft":
            stop = subject.half if name == "half" else subject.stop
            overrides |= stopping_at(stop, check_every=subject.check_every)
        else:
            overrides["model.init_from"] = earlier
        values = {key: json.dumps(value) for key, value in self._values(mixed=mixed).items()}
        fit(files, {**values, **overrides}, run)
        return run

    # Scoring

    def measure(self) -> None:
        """All cells of the task and seed."""
        for condition in CONDITIONS:
            names = [
                name for name in cells(self.settings, self.task, self.seed) if _condition(name) == condition
            ]
            missing = [
                name for name in names if not (self.root / f"{name}.json").is_file() and self._can(name)
            ]
            if not missing:
                continue
            model = self.model(condition)
            for name in missing:
                kept(self.root / f"{name}.json", lambda name=name, model=model: self._cell(name, model))  # type: ignore[misc]

    def _can(self, name: str) -> bool:
        """Whether a cell can be measured: the text only if somebody said where it is."""
        return not name.endswith(" on text") or "path" in (self.settings.text or {})

    def model(self, condition: str) -> MemGenModel:
        """The model of a condition."""
        match condition:
            case "bare" | "shots":
                return self._bare(self.base)
            case "untrained":
                _, config = open_checkpoint(self.train("weaver"), load_tokenizer, resolve_asset)
                torch.manual_seed(self.seed)
                return always_invoking(MemGenModel.build(config, self.tokenizer, resolve_asset)).eval()
            case "trigger" | "lora" | "lora_replay":
                return self._opened(self.train(condition))
            case "other_item":
                return always_invoking(self._opened(self.train("weaver")))
            case _:
                return always_invoking(self._opened(self.train(condition)))

    def _opened(self, checkpoint: Path) -> MemGenModel:
        return open_checkpoint(checkpoint, load_tokenizer, resolve_asset)[0].eval()

    def _bare(self, base: Path | str) -> MemGenModel:
        config = MemGenConfig(
            backbone=BackboneConfig(str(base), dtype=self.conf.model.memgen.backbone.dtype),
            trigger=TriggerConfig(kind="never"),
            boundaries=BoundaryConfig(delimiters=(",",)),
        )
        return MemGenModel.build(config, self.tokenizer, resolve_asset).eval()

    def _cell(self, name: str, model: MemGenModel) -> dict[str, Any]:
        condition, _, other = Path(name).name.partition(" on ")
        clock, begin = time.process_time(), time.perf_counter()
        if other == "text":
            found = self._perplexity(model)
        elif other:
            values = {**self.settings.others[other], "test_size": self.settings.other_items}
            shots = values.pop("shots", 0)
            found = _scored(model, self._held_out(environment(values), self.settings.other_new_tokens, shots))
        elif condition == "shots":
            task = self.questions
            shown = self._held_out(task.environment, task.settings.max_new_tokens, self.settings.shots)
            found = _scored(model, shown)
        else:
            found = _scored(model, self.questions, swapped=condition == "other_item")
        return {**found, **_spent(clock, begin, time.process_time)}

    def _perplexity(self, model: MemGenModel) -> dict[str, Any]:
        """Log-likelihood of the text's reference answers, latents where the trigger (greedily) invokes."""
        assert self.settings.text is not None, "the cell is not listed without"
        text = environment(self.settings.text)
        losses, counts, insertions = [], [], 0
        for example in text.examples("test")[: self.settings.text_items]:
            chat = conversation_ids(self.tokenizer, text.conversation(example))
            marks = [index >= chat.turns[-1].prompt_end for index in range(len(chat.ids))]
            batch = TokenBatch.from_rows([chat.ids], [marks])
            with torch.no_grad():
                plan = decided_plan(model, batch)
                losses.append(-float(model.label_logprobs(batch, plan)[0].sum()))
            counts.append(sum(marks))
            insertions += sum(plan.counts)
        return {"nll": losses, "tokens": counts, "insertions": insertions / len(losses)}


def decided_plan(model: MemGenModel, batch: TokenBatch) -> InsertionPlan:
    """Where a model that wrote these answers itself would have inserted, deciding greedily.

    Args:
        model: its trigger is constant, or reads tokens alone.
        batch: rows whose supervised tokens are the answers, one turn each.
    """
    offered = model.boundaries.plan(batch, lambda row, points: points).rows()
    if isinstance(model.trigger, ConstantTrigger):
        invoked = iter([model.trigger.probability >= 0.5] * sum(map(len, offered)))
    else:
        at = torch.zeros_like(batch.supervised)
        for row, points in enumerate(offered):
            at[row, [point - 1 for point, _ in points]] = True
        logits = model.decision_logits(batch, InsertionPlan.empty(len(offered)), at)
        invoked = iter((logits[:, 1] > logits[:, 0]).tolist())
    cap = model.boundaries.config.max_inference_insertions
    rows = []
    for points in offered:
        taken = [point for point in points if next(invoked)]
        first = [point for point in taken if point[1] == InsertionKind.PROMPT]
        rows.append(first + [point for point in taken if point[1] == InsertionKind.INFERENCE][:cap])
    return InsertionPlan(rows)


def environment(values: Mapping[str, Any]) -> Environment:
    """The environment of a class path and arguments, as a configuration file gives them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--environment", type=Environment)
    arguments = {name: value for name, value in values.items() if name != "class_path"}
    given = {"class_path": values["class_path"], "init_args": arguments}
    found: Environment = parser.instantiate_classes(parser.parse_object({"environment": given})).environment
    return found


def _condition(cell: str) -> str:
    return Path(cell).name.partition(" on ")[0]


def _scored(model: MemGenModel, task: Task, *, swapped: bool = False) -> dict[str, Any]:
    """A score for JSON: one digit per item, so that scores of the same items can be paired."""
    outcome = (score_with_swapped_latents if swapped else score)("", model, task)
    return {
        "exact": "".join(str(int(reward)) for reward in outcome.rewards),
        "prices": outcome.parts.get("prices"),
        "insertions": round(outcome.insertions, 4),
        "offered": round(outcome.offered, 4),
        "positions": round(outcome.positions, 2),
    }


def _spent(clock: float, begin: float, cpu: Callable[[], float]) -> dict[str, Any]:
    """What a cell took, and where and when it was made."""
    return {
        "cpu_seconds": round(cpu() - clock, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the missing cells and writes the report.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--settings", type=Path, default=SETTINGS, help="what is measured (benchmarks/real.yaml)"
    )
    parser.add_argument("--only", nargs="+", metavar="TASK", help="make cells of these tasks (all)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="make cells of these seeds"
    )
    parser.add_argument(
        "--expected-seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds of a whole report",
    )
    parser.add_argument(
        "--text", type=Path, metavar="PATH", help="folder of GSM8K, for the perplexity of its answers"
    )
    parser.add_argument(
        "--report", action="store_true", help="make no cell, write the report of those that are there"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("runs/bench_real"), help="folder of the cells and runs"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    options = parser.parse_args(argv)
    settings = Settings.read(options.settings, options.text)
    unknown = sorted(set(options.only or []) - set(settings.tasks))
    if unknown:
        parser.error(f"there is no task {unknown[0]!r}; there are {', '.join(settings.tasks)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("memgen.model").setLevel(logging.WARNING)
    if not options.report:
        for task in options.only or settings.tasks:
            for seed in options.seeds:
                Bench(options.root, settings, task, seed).measure()
    seeds = sorted({*options.seeds, *options.expected_seeds})
    expected = [cell for task in settings.tasks for seed in seeds for cell in cells(settings, task, seed)]
    found = {
        str(path.relative_to(options.root).with_suffix("")): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(options.root.glob("*/*/*.json"))
    }
    described = {
        "items": settings.items,
        "other_items": settings.other_items,
        "shots": settings.shots,
        "seeds": seeds,
        "tasks": {name: {"title": s.title, "others": s.others} for name, s in settings.tasks.items()},
        "conditions": CONDITIONS,
        "without_seed": WITHOUT_SEED,
        "harm": HARM,
        "missing": [cell for cell in dict.fromkeys(expected) if cell not in found],
        "cells": found,
    }
    write_report(described, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
