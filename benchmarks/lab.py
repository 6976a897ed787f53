"""`make bench-lab`: every stage on the lab with its controls, over several weaver and base seeds.

Settings were chosen on the validation split; all figures here are from the test split. Each training run is the
command `memgen fit` in a process of its own, with its seeds. Finished parts are kept below `--root`, so an interrupted
benchmark goes on where it stopped. `benchmarks.lab_report` makes `docs/results/lab.md` of the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kept import kept
from benchmarks.lab_report import machine, write_report
from memgen.chat import load_tokenizer
from memgen.conf_files import conf_file
from memgen.generation.rollout import Actor, EpisodeSettings, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.lab.assets import RECIPE_VERSION, resolve_asset
from memgen.lab.environment import Lab
from memgen.lab.report import MAX_NEW_TOKENS, OTHERS, base_hash, held_out
from memgen.lab.text_world import TextWorld
from memgen.lab.trained import base_name, children_cpu, fit, stage_file, stopping_at
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.results.controls import (
    Outcome,
    Task,
    always_invoking,
    invoking_at,
    score,
    score_with_swapped_latents,
    without_memory,
)
from memgen.training.checkpoint import open_checkpoint

logger = logging.getLogger(__name__)

TARGET = "shop"
ITEMS = 600
"""Held-out items of each task."""
NEW_TOKENS = {"bill": 32}
"""Limits of an answer where `MAX_NEW_TOKENS` is less than twice the longest reference answer."""

MIX = (TARGET, "open", TARGET, "add", TARGET, "rev", TARGET, "walk")
"""Half of the items are the target's, as in conf/trigger_rl.yaml."""


@dataclass(frozen=True)
class Training:
    """A run of `memgen fit`.

    Attributes:
        stage: the stage file in `conf/`, without ending.
        overlays: configuration files on top of it, below `conf/`.
        start: the training that it starts from.
        settings: values on top of all.
    """

    stage: str
    overlays: tuple[str, ...] = ()
    start: str | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)


TRAININGS = {
    "weaver": Training("weaver_sft"),
    "half": Training("weaver_sft", settings=stopping_at(0.3)),
    "grpo": Training("weaver_grpo", start="half"),
    "trigger": Training("trigger_rl", start="weaver"),
    "trigger_free": Training("trigger_rl", start="weaver", settings={"model.objective.penalty": 0.0}),
    "trigger_target": Training(
        "trigger_rl", start="weaver", settings={"data.environment.tasks": f"[{TARGET}]"}
    ),
    "lora": Training("weaver_sft", ("baselines/lora_sft.yaml",)),
    "lora_replay": Training(
        "weaver_sft", ("baselines/lora_sft.yaml",), settings={"data.environment.tasks": f"[{', '.join(MIX)}]"}
    ),
    "bill": Training("weaver_sft", ("data/lab_bill.yaml", "curriculum/mostly_all.yaml")),
    "bill_end": Training(
        "weaver_sft",
        ("data/lab_bill.yaml", "curriculum/mostly_all.yaml"),
        settings={
            "model.curriculum.none": 1.0,
            "model.curriculum.all": 0.0,
            "model.curriculum.random": 0.0,
            "model.memgen.boundaries.max_inference_insertions": 0,
        },
    ),
    "bill_trigger": Training("trigger_rl", ("data/lab_bill_mix.yaml",), start="bill"),
    "text_world_half": Training(
        "weaver_sft", ("data/lab_text_world.yaml",), settings=stopping_at(0.3, monitor="val/reward")
    ),
    "text_world": Training("weaver_sft", ("data/lab_text_world.yaml",)),
    "text_world_grpo": Training(
        "weaver_grpo",
        ("data/lab_text_world.yaml",),
        start="text_world_half",
        settings={"trainer.max_steps": 120, "trainer.val_check_interval": 40},
    ),
}


class Bench:
    """One weaver seed on one reasoner: trains and scores, each once.

    Args:
        root: folder of the results.
        base_seed: which reasoner.
        seed: of initial weights, data order, curriculum and sampling.
    """

    def __init__(self, root: Path, base_seed: int, seed: int) -> None:
        self.folder = root / f"recipe{RECIPE_VERSION}_base{base_seed}_seed{seed}"
        self.base_seed = base_seed
        self.seed = seed
        self.base = resolve_asset(base_name(base_seed))
        self.tokenizer = load_tokenizer(self.base)

    # Training

    def train(self, name: str) -> Path:
        """The checkpoint of a training, made first if it is missing."""
        training = TRAININGS[name]
        checkpoint = self.folder / name / "latest" / "best"
        start = None if training.start is None else self.train(training.start)

        def make() -> dict[str, Any]:
            overrides: dict[str, object] = {
                "model.memgen.backbone.name": base_name(self.base_seed),
                "seed_everything": self.seed,
                "model.seed": self.seed,
                "data.seed": self.seed,
                "trainer.callbacks.0.root": self.folder / name,
                **training.settings,
            }
            if start is not None:
                overrides["model.init_from"] = start
            files = [stage_file(training.stage), *(conf_file(overlay) for overlay in training.overlays)]
            clock = children_cpu()
            fit(files, overrides)
            return {"cpu_seconds": round(children_cpu() - clock, 1)}

        self.once(f"fit_{name}", make)
        return checkpoint

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result, computed unless it is kept already."""
        return kept(self.folder / "results" / f"{name}.json", make)

    # Scoring

    def score(self, name: str, model: Callable[[], MemGenModel], tasks: Sequence[str]) -> dict[str, Any]:
        """Scores a model on the held-out items of some tasks."""

        def make() -> dict[str, Any]:
            ready = model()
            found = {task: _as_dict(score(name, ready, self.task(task))) for task in tasks}
            return {"tasks": found, "base_hash": base_hash(ready.reasoner.backbone)}

        return self.once(name, make)

    def task(self, name: str) -> Task:
        """The held-out items of a task."""
        environment = Lab((name,), test_size=ITEMS)
        return held_out(
            environment, "test", self.tokenizer, NEW_TOKENS.get(name, MAX_NEW_TOKENS), batch_size=100
        )

    def opened(self, checkpoint: Path) -> MemGenModel:
        """The model of a checkpoint, with its trigger if it has one and the constant one of its configuration else."""
        model, _ = open_checkpoint(checkpoint, load_tokenizer, resolve_asset)
        return model.eval()

    def bare(self, base: Path | str) -> MemGenModel:
        """A reasoner without memory."""
        config = MemGenConfig(
            backbone=BackboneConfig(str(base)),
            trigger=TriggerConfig(kind="never"),
            boundaries=BoundaryConfig(delimiters=(",", ".", "\n")),
        )
        return MemGenModel.build(config, self.tokenizer, resolve_asset).eval()

    def episodes(self, name: str, checkpoint: Path | None) -> dict[str, Any]:
        """Success in the text world on held-out houses."""

        def make() -> dict[str, Any]:
            world = TextWorld(test_size=ITEMS - 100)
            model = self.bare(self.base) if checkpoint is None else self.opened(checkpoint)
            settings = GenerationSettings(max_new_tokens=6)
            actor = Actor(model, self.tokenizer, world, settings, EpisodeSettings(), None)
            examples = world.examples("test")
            clock = time.process_time()
            played = []
            for begin in range(0, len(examples), 100):
                part = examples[begin : begin + 100]
                played += rollout(actor, part, list(range(begin, begin + len(part)))).trajectories
            return {
                "tasks": {
                    "text_world": {
                        "exact": "".join(str(int(trajectory.parts["success"])) for trajectory in played),
                        "insertions": sum(len(t.insertions) for p in played for t in p.turns) / len(played),
                        "offered": None,
                        "cpu_seconds": round(time.process_time() - clock, 1),
                    }
                }
            }

        return self.once(name, make)

    # Measurements

    def shop(self) -> None:
        """Weaver SFT and GRPO on the shop, with their controls."""
        tasks = (TARGET,)
        weaver = self.train("weaver")
        self.score("untrained latents", lambda: self.untrained(weaver), tasks)
        self.score("weaver, prompt end only", lambda: always_invoking(self.opened(weaver), 0), tasks)

        def swapped() -> dict[str, Any]:
            model = always_invoking(self.opened(weaver))
            return {"tasks": {TARGET: _as_dict(score_with_swapped_latents("", model, self.task(TARGET)))}}

        self.once("weaver, latents of another item", swapped)
        self.score("half-trained weaver", lambda: always_invoking(self.opened(self.train("half"))), tasks)
        self.score("weaver GRPO", lambda: always_invoking(self.opened(self.train("grpo"))), tasks)

    def untrained(self, weaver: Path) -> MemGenModel:
        """A weaver of the same form whose weights are random."""
        _, config = open_checkpoint(weaver, load_tokenizer, resolve_asset)
        return always_invoking(MemGenModel.build(config, self.tokenizer, resolve_asset)).eval()

    def forgetting(self) -> None:
        """What each way of learning the target does to the other tasks."""
        tasks = (TARGET, *OTHERS)
        weaver = self.train("weaver")
        self.score("reasoner alone", lambda: self.bare(self.base), tasks)
        self.score("weaver always on", lambda: always_invoking(self.opened(weaver)), tasks)
        learnt = self.score("trigger RL", lambda: self.opened(self.train("trigger")), tasks)
        # Half of the mixture is the target; the others share the rest.
        shares = {TARGET: 0.5, **{task: 0.5 / len(OTHERS) for task in OTHERS}}
        insertions, offered = (
            sum(share * learnt["tasks"][task][key] for task, share in shares.items())
            for key in ("insertions", "offered")
        )
        self.score(
            "random trigger, same rate", lambda: invoking_at(self.opened(weaver), insertions / offered), tasks
        )
        for name, training in (
            ("trigger RL, lambda = 0", "trigger_free"),
            ("trigger RL on the target only", "trigger_target"),
        ):
            self.score(name, lambda training=training: self.opened(self.train(training)), tasks)  # type: ignore[misc]
        self.score("LoRA-SFT of the reasoner", lambda: self.opened(self.train("lora")), tasks)
        self.score("LoRA-SFT with replay", lambda: self.opened(self.train("lora_replay")), tasks)

    def bills(self) -> None:
        """The task that needs latents after the prompt, too."""
        tasks = ("bill",)
        bill = self.train("bill")
        self.score("bill: reasoner alone", lambda: without_memory(self.opened(bill)), tasks)
        self.score("bill: weaver always on", lambda: always_invoking(self.opened(bill)), tasks)
        self.score("bill: the same, prompt end only", lambda: always_invoking(self.opened(bill), 0), tasks)
        end = self.train("bill_end")
        self.score("bill: trained for the prompt end", lambda: always_invoking(self.opened(end)), tasks)
        both = ("bill", *OTHERS)
        self.score("bill: trigger RL", lambda: self.opened(self.train("bill_trigger")), both)
        self.score("bill: reasoner alone, other tasks", lambda: self.bare(self.base), OTHERS)

    def text_world(self) -> None:
        """Episodes of several turns."""
        self.episodes("text world: reasoner alone", None)
        for name, training in (
            ("text world: weaver SFT", "text_world"),
            ("text world: half-trained weaver", "text_world_half"),
            ("text world: weaver GRPO", "text_world_grpo"),
        ):
            self.episodes(name, self.train(training))


PARTS: dict[str, Callable[[Bench], None]] = {
    "shop": Bench.shop,
    "forgetting": Bench.forgetting,
    "bill": Bench.bills,
    "text_world": Bench.text_world,
}


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    """A score for JSON: one digit per item, so that scores of the same items can be paired."""
    return {
        "exact": "".join(str(int(reward)) for reward in outcome.rewards),
        "answer": round(outcome.parts["answer"], 4),
        "insertions": round(outcome.insertions, 4),
        "offered": round(outcome.offered, 4),
        "cpu_seconds": round(outcome.cpu_seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing parts and writes the report.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--weaver-seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--base-seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/bench_lab"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("memgen.model").setLevel(logging.WARNING)
    begin = time.perf_counter()
    for part in options.parts:
        for seed in options.weaver_seeds:
            for base_seed in options.base_seeds:
                PARTS[part](Bench(options.root, base_seed, seed))
    runs = []
    for base_seed in options.base_seeds:
        for seed in options.weaver_seeds:
            bench = Bench(options.root, base_seed, seed)
            results = {
                path.stem: json.loads(path.read_text(encoding="utf-8"))
                for path in sorted((bench.folder / "results").glob("*.json"))
            }
            runs.append({"base_seed": base_seed, "seed": seed, "results": results})
    write_report({"machine": machine(), "items": ITEMS, "runs": runs}, options.out)
    logger.info("written to %s in %.0f s", options.out, time.perf_counter() - begin)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
