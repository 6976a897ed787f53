"""Answers the test items under conditions, and records each item; what is recorded is not played again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

import memgen
from memgen.analysis import collection
from memgen.analysis.collection import Collection
from memgen.analysis.failures import failure_type
from memgen.analysis.interventions import TRAINED, Condition
from memgen.analysis.subject import Subject
from memgen.data import EnvironmentData, EvalBatch, Item
from memgen.environments.base import Example
from memgen.files import remove
from memgen.generation.decode import Decide, Intervention
from memgen.generation.rollout import Actor, rollout
from memgen.model.memgen import MemGenModel
from memgen.results.controls import always_invoking
from memgen.results.ledger import Entry, Ledger, read_lines
from memgen.results.recorded_test import code_hash, run_settings
from memgen.seeds import episode_seeds
from memgen.training.stage import build_model, require_context
from memgen.types import Decision, Trajectory

logger = logging.getLogger(__name__)

FOLDER = "analysis"
"""Folder of analyses below the folder of runs."""
FEWEST_ITEMS = 4
"""What is found on one half of the items is scored on the other, which needs two items each."""

Answers = dict[int, dict[str, Any]]
"""A record of each item's answer by the item's index: `id`, `task`, `reward`, `failure`, `fault`, `invoked`, `decisions`,
`removed`,
`text`, `messages`."""


@final
class Player(LightningModule):
    """Plays the test items with `Trainer.predict`, one answer each, with the seeds of `memgen test`. Nothing is trained.

    Args:
        subject: a checkpoint; `group_size` is set to 1. Records go to
            `<root>/<kind>/<environment>-<hash of the settings and the code>`, unless it names a folder.
        kind: of the analysis.
    """

    def __init__(self, subject: Subject, kind: str = FOLDER) -> None:
        super().__init__()
        self.config = subject.memgen
        self.data = subject.data
        self.generation = dataclasses.replace(subject.generation, group_size=1)
        self.episodes = subject.episodes
        self.init_from = subject.init_from
        self.environment = subject.environment
        self.resolve_asset = subject.resolve_asset
        self.root = subject.root
        self.out = subject.out
        self.kind = kind
        self.memgen: MemGenModel
        self.folder: Path
        """Where everything is written; known once the model is built."""
        self._settings: dict[str, Any] = {}
        self._conditions: dict[str, Condition] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._wanted: list[int] | None = None

    # Set-up

    @override
    def prepare_data(self) -> None:
        # Through its Trainer the data finds assets.
        self.data.trainer = self.trainer
        self.data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        if not hasattr(self, "memgen"):
            self._build()
        for condition in self._conditions.values():
            journal = self.folder / "conditions" / f"{condition.file_name}.journal"
            about = {"memgen": memgen.__version__, "code": code_hash(), "init_from": self.init_from}
            settings = {**self._settings, "condition": {"name": condition.name, **condition.about}}
            self._ledgers[condition.name] = Ledger(journal, [f"{condition.file_name}.jsonl"], settings, about)

    def _build(self) -> None:
        data = self.data
        # Items and prompts, no reference completions.
        data.learn_from = "rollouts"
        data.trainer = self.trainer
        data.setup("test")
        if len(self.items) < FEWEST_ITEMS:
            raise ValueError(
                f"the test split has {len(self.items)} items, but an analysis needs at least {FEWEST_ITEMS}: what is found "
                "on one half is scored on the other (data.test_examples)"
            )
        model = build_model(self.config, data, self.resolve_asset, self.init_from)
        if model.trigger.probability == 0.0:
            raise ValueError(
                "the trigger never invokes, so there is no latent memory to analyse; set model.memgen.trigger.kind"
            )
        require_context(model, data, "test", self.generation.max_new_tokens)
        self._settings = run_settings(
            model,
            self.config,
            self.generation,
            self.episodes,
            data,
            "test",
            str(self.trainer.precision),
            self.environment,
        )
        text = json.dumps([self._settings, code_hash()], sort_keys=True)
        name = f"{data.environment.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        self.folder = self.out or self.root / self.kind / name
        self.memgen = model

    @property
    def items(self) -> list[Item]:
        """The test items."""
        return self.data.items["test"]

    @override
    def predict_dataloader(self) -> DataLoader[tuple[str, EvalBatch]]:
        """Batches of what is not recorded yet, condition by condition."""
        wanted = range(len(self.items)) if self._wanted is None else self._wanted
        left = {
            name: [index for index in wanted if index not in ledger.notes]
            for name, ledger in self._ledgers.items()
        }
        return condition_batches(self.items, left, self.data.batch_settings.val_batch_size)

    # Playing

    def play(
        self, trainer: Trainer, conditions: Sequence[Condition], items: Sequence[int] | None = None
    ) -> dict[str, Answers]:
        """Plays items under conditions.

        Args:
            trainer: of one process.
            conditions: with different names.
            items: indices of the items; None: all.

        Returns:
            The answers of each condition, by its name.
        """
        self._conditions = {condition.name: condition for condition in conditions}
        self._wanted = None if items is None else list(items)
        try:
            trainer.predict(self, return_predictions=False)
        finally:
            for ledger in self._ledgers.values():
                ledger.close()
            self._ledgers = {}
        return {condition.name: self._answers(condition) for condition in conditions}

    def _answers(self, condition: Condition) -> Answers:
        folder, name = self.folder / "conditions", condition.file_name
        return {line["index"]: line for line in read_lines(folder / f"{name}.journal", f"{name}.jsonl")}

    @override
    def predict_step(self, batch: tuple[str, EvalBatch], batch_idx: int) -> int:
        """Plays a batch and records it. Returns the number of items."""
        name, items = batch
        if not items.examples:
            return 0
        condition = self._conditions[name]
        data = self.data
        actor = Actor(
            # Nothing has to be read for a trigger that does not decide.
            self.memgen if condition.decide is None else always_invoking(self.memgen),
            data.tokenizer_object,
            data.environment,
            self.generation,
            self.episodes,
            data.template,
        )
        collects = condition is TRAINED
        removed = dict.fromkeys(items.indices, 0)
        found = rollout(
            actor,
            items.examples,
            episode_seeds(self.generation.seed, items.indices),
            keep_latents=collects,
            intervene=_intervention(condition, items.indices, removed),
            decide=_decision(condition, items.indices),
        )
        blocks = self._collect(items, found.trajectories, found.latents) if found.latents is not None else {}
        lines = [
            {
                **_answer(index, _task(data, example), trajectory),
                "removed": removed[index],
                **({"blocks": blocks[index]} if collects else {}),
            }
            for index, example, trajectory in zip(
                items.indices, items.examples, found.trajectories, strict=True
            )
        ]
        self._ledgers[name].add(
            [Entry(line["index"], {f"{condition.file_name}.jsonl": [line]}, {}) for line in lines]
        )
        return len(lines)

    def _collect(
        self, batch: EvalBatch, trajectories: Sequence[Trajectory], latents: Sequence[Sequence[Tensor]]
    ) -> dict[int, list[dict[str, Any]]]:
        """Writes the tensors of a batch of items; returns the records of their blocks."""
        valid = [number for number, trajectory in enumerate(trajectories) if trajectory.fault is None]
        means = (
            collection.mean_vectors(self.memgen, [trajectories[number] for number in valid]) if valid else []
        )
        records: dict[int, list[dict[str, Any]]] = {index: [] for index in batch.indices}
        for number, vectors in zip(valid, means, strict=True):
            index = batch.indices[number]
            collection.write_item(self._item_folder, index, latents[number], vectors)
            records[index] = collection.block_records(
                self.data.tokenizer_object,
                index,
                _task(self.data, batch.examples[number]),
                trajectories[number],
            )
        return records

    @property
    def _item_folder(self) -> Path:
        return self.folder / "items"

    def collect(self, trainer: Trainer) -> Collection:
        """Plays all items as the checkpoint is and returns their blocks.

        Raises:
            ValueError: if too few answers have a block, or the folder lacks a part.
        """
        answers = self.play(trainer, [TRAINED])[TRAINED.name]
        folder = self.folder / collection.FOLDER
        valid = [answers[index] for index in sorted(answers) if answers[index]["fault"] is None]
        woven = sum(bool(answer["blocks"]) for answer in valid)
        if woven < FEWEST_ITEMS:
            raise ValueError(
                f"the agent wove latents into {woven} of {len(valid)} answers, but an analysis needs at least "
                f"{FEWEST_ITEMS}; does the trigger invoke, and are there boundaries in the answers?"
            )
        if not folder.is_dir():
            if not self._item_folder.is_dir():
                raise ValueError(
                    f"{self.folder} has the answers, but neither {folder.name} nor {self._item_folder.name} with their "
                    "latents; remove it, or choose another folder (--out DIR)"
                )
            rows = [
                {k: v for k, v in a.items() if k not in ("blocks", "parts", "decisions", "messages")}
                for a in valid
            ]
            blocks = [block for answer in valid for block in answer["blocks"]]
            collection.merge_items(folder, rows, blocks, self._item_folder)
        if self._item_folder.is_dir():
            remove(self._item_folder)
        return collection.read_collection(folder)


def _intervention(
    condition: Condition, indices: Sequence[int], removed: dict[int, int]
) -> Intervention | None:
    """A condition as decoding takes it; counts the blocks that it removes from each item."""
    change = condition.change
    if change is None:
        return None

    def intervene(places: Sequence[int], numbers: Sequence[int], latents: list[Tensor]) -> list[Tensor]:
        changed = []
        for place, number, block in zip(places, numbers, latents, strict=True):
            left = change(indices[place], number, block)
            removed[indices[place]] += int(len(left) == 0)
            changed.append(left)
        return changed

    return intervene


def _decision(condition: Condition, indices: Sequence[int]) -> Decide | None:
    decide = condition.decide
    return None if decide is None else lambda place, asked: decide(indices[place], asked)


def _task(data: EnvironmentData, example: Example) -> str:
    return str(example.meta.get("task", data.environment.name))


def _answer(index: int, task: str, trajectory: Trajectory) -> dict[str, Any]:
    return {
        "index": index,
        "id": trajectory.example,
        "task": task,
        "reward": trajectory.reward,
        "parts": dict(trajectory.parts),
        "failure": failure_type(trajectory),
        "fault": trajectory.fault,
        "text": "\n".join(turn.text for turn in trajectory.turns),
        "messages": [
            {"role": message["role"], "content": message["content"]} for message in trajectory.messages()
        ],
        "tokens": trajectory.tokens,
        "invoked": trajectory.invocations,
        "decisions": [
            decision
            for turn in trajectory.turns
            for decision in turn.decisions
            if decision != Decision.NOT_ASKED
        ],
    }


def condition_batches(
    items: Sequence[Item], left: Mapping[str, Sequence[int]], size: int
) -> DataLoader[tuple[str, EvalBatch]]:
    """Batches of the items that are left to play, condition by condition.

    Args:
        items: all items.
        left: indices of the items left, by the condition's name; at least one condition.
        size: items of a batch.
    """
    batches = [
        (name, tuple(indices[i : i + size]))
        for name, indices in left.items()
        for i in range(0, len(indices), size)
    ]
    # Lightning skips what has no batch, with a warning.
    batches = batches or [(name, ()) for name in list(left)[:1]]
    return DataLoader(_Items(items), batch_size=None, sampler=batches)


@final
class _Items(Dataset[tuple[str, EvalBatch]]):
    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, batch: tuple[str, tuple[int, ...]]) -> tuple[str, EvalBatch]:
        name, indices = batch
        return name, EvalBatch(examples=[self._items[i].example for i in indices], indices=indices, sft=None)
