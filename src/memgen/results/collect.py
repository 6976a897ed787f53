"""An agent's own experience as training data: it plays the training items, and what went well is kept.

Rejection sampling, as in STaR (arXiv 2203.14465) and RFT (arXiv 2308.01825). A trajectory is kept if its reward is high enough, none of its turns was cut (it would teach not to end), it can be
learned from with the tokenizer's chat template, and no other one of its item says the same.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, final

from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

import memgen
from memgen.chat import conversation_ids
from memgen.data import EnvironmentData, EvalBatch, Item
from memgen.distributed.collectives import objects_of_all_ranks
from memgen.environments.base import Message
from memgen.generation.rollout import Actor, EpisodeSettings, rollout
from memgen.generation.sampling import GenerationSettings, seed_of
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.results.controls import without_memory
from memgen.results.ledger import Entry, Ledger, read_journal
from memgen.results.recorded_test import code_hash, require_different_answers, run_settings
from memgen.training.stage import build_model
from memgen.types import Trajectory

logger = logging.getLogger(__name__)

JOURNAL_SUFFIX = ".journal"
"""The journal of FILE is FILE.journal."""


@dataclass(frozen=True)
class KeepRule:
    """Which trajectories are kept."""

    min_reward: float = 1.0
    """Lowest total reward."""
    best: bool = False
    """Of an item's trajectories, only those with the highest reward among them."""
    max_per_item: int | None = None
    """At most so many of an item, those of higher reward first. null: all."""

    def __post_init__(self) -> None:
        if self.max_per_item is not None and self.max_per_item < 1:
            raise ValueError(f"max_per_item must be at least 1, got {self.max_per_item}")


@dataclass(frozen=True)
class Candidate:
    """One trajectory of an item, as far as the choice depends on it.

    Attributes:
        text: what was said, to tell equal ones.
        reward: total.
        cut: whether a turn was cut at its limit.
        fault: whether the environment failed.
        flaw: why it cannot be learned from, or None.
    """

    text: tuple[str, ...]
    reward: float
    cut: bool = False
    fault: bool = False
    flaw: str | None = None


def select(candidates: Sequence[Candidate], rule: KeepRule) -> tuple[list[int], Counter[str]]:
    """Chooses among an item's trajectories.

    Args:
        candidates: all that were played.
        rule: what is kept.

    Returns:
        The chosen ones in the order of their playing, and for every other one the first reason against it: `faulted`,
        `below` the reward, `cut`, `unlearnable`, `worse` than the best, `repeated`, `beyond` the most of an item.
    """
    reasons: Counter[str] = Counter()
    passed: list[int] = []
    for index, candidate in enumerate(candidates):
        reason = _against(candidate, rule)
        if reason is None:
            passed.append(index)
        else:
            reasons[reason] += 1
    passed.sort(key=lambda index: -candidates[index].reward)
    chosen: list[int] = []
    said: set[tuple[str, ...]] = set()
    for index in passed:
        candidate = candidates[index]
        if rule.best and candidate.reward < candidates[passed[0]].reward:
            reasons["worse"] += 1
        elif candidate.text in said:
            reasons["repeated"] += 1
        elif rule.max_per_item is not None and len(chosen) == rule.max_per_item:
            reasons["beyond"] += 1
        else:
            said.add(candidate.text)
            chosen.append(index)
    return sorted(chosen), reasons


def _against(candidate: Candidate, rule: KeepRule) -> str | None:
    if candidate.fault:
        return "faulted"
    if candidate.reward < rule.min_reward:
        return "below"
    if candidate.cut:
        return "cut"
    return None if candidate.flaw is None else "unlearnable"


@dataclass(frozen=True)
class Collected:
    """What came of collecting, over all that is in the file.

    Attributes:
        total: items that there are.
        items: of them, those that were played.
        empty: of these, those of which nothing was kept.
        played: trajectories.
        kept: of them.
        reasons: against the others, by name.
        reward: mean over the trajectories that the environment did not fail; None if there is none.
    """

    total: int
    items: int
    empty: int
    played: int
    kept: int
    reasons: Mapping[str, int]
    reward: float | None

    @classmethod
    def of(cls, notes: Mapping[int, Mapping[str, Any]], total: int) -> Collected:
        """Adds up what the journal says of the items."""
        reasons: Counter[str] = Counter()
        for note in notes.values():
            reasons.update(note["reasons"])
        kept = [int(note["kept"]) for note in notes.values()]
        played = sum(int(note["played"]) for note in notes.values())
        valid = played - reasons["faulted"]
        rewards = sum(float(note["reward"]) for note in notes.values())
        return cls(
            total=total,
            items=len(notes),
            empty=kept.count(0),
            played=played,
            kept=sum(kept),
            reasons=dict(reasons),
            reward=rewards / valid if valid else None,
        )

    def lines(self, rule: KeepRule) -> list[str]:
        """The counts as text."""
        what = {
            "below": f"below a reward of {rule.min_reward:g}",
            "worse": "worse than the best of their item",
            "repeated": "repetitions",
            "beyond": f"beyond {rule.max_per_item} of an item",
            "cut": "with a turn that was cut",
            "unlearnable": "not learnable with this chat template",
            "faulted": "failed by the environment",
        }
        others = [f"{self.reasons[name]} {text}" for name, text in what.items() if self.reasons.get(name)]
        lines = [
            f"kept {self.kept} of {self.played} trajectories; {self.items} of {self.total} items played, "
            f"{self.empty} of them without one"
        ]
        if self.reward is not None:
            lines.append(f"mean reward of all {self.reward:.4f}")
        return [*lines, *([f"left out: {', '.join(others)}"] if others else [])]


@final
class Collector(LightningModule):
    """Plays the training items of a stage's data and keeps trajectories, by `Trainer.predict`.

    Nothing is trained. Where a checkpoint is given its weaver and trigger play, else the bare reasoner.

    Args:
        memgen: the model.
        data: the items; its training split is played.
        rollout: how trajectories are drawn; `group_size` of each item.
        episodes: limits of episodes.
        keep: which trajectories are kept.
        out: where they go, one JSON line each. The journal lies beside it.
        init_from: a checkpoint directory or an asset's name; None: the bare reasoner.
        environment: the environment's settings, so that others are noticed.
        resolve_asset: turns an asset's name into a directory.
    """

    def __init__(
        self,
        memgen: MemGenConfig,
        data: EnvironmentData,
        rollout: GenerationSettings,
        episodes: EpisodeSettings,
        keep: KeepRule,
        out: Path,
        init_from: str | None,
        environment: Mapping[str, Any],
        resolve_asset: Callable[[str], str],
    ) -> None:
        super().__init__()
        self.config = memgen
        self.data = data
        self.rollout = rollout
        self.episodes = episodes
        self.keep = keep
        self.out = out
        self.init_from = init_from
        self.environment = environment
        self.resolve_asset = resolve_asset
        self.memgen: MemGenModel
        self.ledger: Ledger | None = None
        """Of the first rank alone."""
        self._remaining: list[int] = []

    # Set-up

    @override
    def prepare_data(self) -> None:
        self.data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        # Items and prompts, no reference completions.
        self.data.learn_from = "rollouts"
        self.data.trainer = self.trainer
        self.data.setup("collect")
        model = build_model(self.config, self.data, self.resolve_asset, self.init_from)
        if self.init_from is None:
            logger.warning("no checkpoint was given: the bare reasoner plays (--checkpoint DIR)")
            model = without_memory(model)
        self.memgen = model
        require_different_answers(model, self.rollout, "--temperature T")
        done: list[int] = []
        if self.trainer.is_global_zero:
            self.ledger = self._opened()
            done = sorted(self.ledger.notes)
        done = self.trainer.strategy.broadcast(done)
        if done and self.trainer.is_global_zero:
            logger.warning("%s: %d of %d items were played before", self.out, len(done), len(self.items))
        played = set(done)
        self._remaining = [index for index in range(len(self.items)) if index not in played]

    def _opened(self) -> Ledger:
        settings = run_settings(
            self.memgen,
            self.config,
            self.rollout,
            self.episodes,
            self.data,
            "train",
            str(self.trainer.precision),
            self.environment,
        )
        about = {"memgen": memgen.__version__, "code": code_hash(), "init_from": self.init_from}
        journal = self.out.with_name(self.out.name + JOURNAL_SUFFIX)
        return Ledger(journal, [self.out.name], {**settings, "keep": asdict(self.keep)}, about)

    @property
    def items(self) -> list[Item]:
        """All items that are to be played."""
        return self.data.items["train"]

    @override
    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """Batches of this rank, of the items that are left. All ranks have equally many; some may be empty."""
        size, rank, ranks = self.data.val_batch_size, self.trainer.global_rank, self.trainer.world_size
        mine = self._remaining[rank::ranks]
        steps = max(1, -(-len(self._remaining) // (size * ranks)))
        batches = [tuple(mine[step * size : (step + 1) * size]) for step in range(steps)]
        return DataLoader(_Items(self.items), batch_size=None, sampler=batches)

    # Playing

    @override
    def predict_step(self, batch: EvalBatch, batch_idx: int) -> int:
        """Plays a batch and writes down what is kept. Returns how many items of all ranks were in it."""
        entries = [entry for part in objects_of_all_ranks(self._played(batch)) for entry in part]
        if self.ledger is not None and entries:
            self.ledger.add(entries)
        return len(entries)

    def _played(self, batch: EvalBatch) -> list[Entry]:
        if not batch.examples:
            return []
        data = self.data
        actor = Actor(
            self.memgen, data.tokenizer_object, data.environment, self.rollout, self.episodes, data.template
        )
        size = self.rollout.group_size
        # They do not depend on how many are drawn, so more of them begin with the same.
        seeds = [
            seed_of("collect", self.rollout.seed, index, sample)
            for index in batch.indices
            for sample in range(size)
        ]
        trajectories = rollout(actor, batch.examples, seeds).trajectories
        entries = []
        for number, index in enumerate(batch.indices):
            part = slice(number * size, (number + 1) * size)
            entries.append(self._entry(index, trajectories[part], seeds[part]))
        return entries

    def _entry(self, index: int, trajectories: Sequence[Trajectory], seeds: Sequence[int]) -> Entry:
        candidates = [self._candidate(trajectory) for trajectory in trajectories]
        chosen, reasons = select(candidates, self.keep)
        lines = [
            {
                "index": index,
                "id": trajectories[sample].example,
                "environment": self.data.environment.name,
                "sample": sample,
                "seed": seeds[sample],
                "reward": trajectories[sample].reward,
                "parts": dict(trajectories[sample].parts),
                "messages": _marked(trajectories[sample]),
            }
            for sample in chosen
        ]
        note = {
            "id": trajectories[0].example,
            "played": len(trajectories),
            "kept": len(chosen),
            "reasons": dict(reasons),
            "reward": sum(t.reward for t in trajectories if t.fault is None),
        }
        return Entry(index, {self.out.name: lines}, note)

    def _candidate(self, trajectory: Trajectory) -> Candidate:
        candidate = Candidate(
            text=tuple(turn.text for turn in trajectory.turns),
            reward=trajectory.reward,
            # An episode may be cut at its last turn; a turn may not.
            cut=any(not turn.finished for turn in trajectory.turns),
            fault=trajectory.fault is not None,
        )
        if _against(candidate, self.keep) is not None:
            return candidate
        try:
            conversation_ids(
                self.data.tokenizer_object, cast(list[Message], trajectory.messages()), self.data.template
            )
        except ValueError as error:
            return dataclasses.replace(candidate, flaw=str(error))
        return candidate

    @override
    def on_predict_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Lets the files go."""
        if self.ledger is not None:
            self.ledger.close()

    def collected(self) -> Collected | None:
        """What is in the file; None on other ranks than the first, and before anything began."""
        if self.ledger is None:
            return None
        # From the file: what was written may not be in memory yet when Ctrl-C comes.
        journal = read_journal(self.ledger.path)
        assert journal is not None, "an open ledger has begun its journal"
        return Collected.of(journal.notes, len(self.items))


def _marked(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The conversation, the agent's own turns marked and with their insertion points."""
    messages = trajectory.messages()
    # From the end of the prompt on, every other message is the agent's.
    for message, turn in zip(messages[len(trajectory.prompt) :: 2], trajectory.turns, strict=True):
        message |= {"agent": True, "insertion_points": turn.insertion_points}
    return messages


@final
class _Items(Dataset[EvalBatch]):
    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, indices: tuple[int, ...]) -> EvalBatch:
        return EvalBatch(examples=[self._items[i].example for i in indices], indices=indices, sft=None)
