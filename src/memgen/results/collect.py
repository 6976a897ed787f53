"""An agent's own trajectories as training data: it plays the training items, and good trajectories are kept.

Rejection sampling, as in STaR (arXiv 2203.14465) and RFT (arXiv 2308.01825). A trajectory is kept if its reward is high
enough, none of its turns was truncated (training on it would teach not to end), the tokenizer's chat template can render
it, and it is no duplicate of another one of its item.
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
from memgen.generation.latent_bank import bank_to_write, remember_episodes
from memgen.generation.rollout import Actor, EpisodeSettings, Rollouts, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.results.controls import without_memory
from memgen.results.ledger import Entry, Ledger, read_journal
from memgen.results.recorded_test import code_hash, require_different_answers, run_settings
from memgen.seeds import seed_of
from memgen.training.stage import build_model
from memgen.types import Trajectory

logger = logging.getLogger(__name__)

JOURNAL_SUFFIX = ".journal"
"""The journal of FILE is FILE.journal."""


@dataclass(frozen=True)
class KeepRule:
    """Which trajectories are kept."""

    min_reward: float = 1.0
    """Lowest total reward of a kept trajectory."""
    best: bool = False
    """Keep only those trajectories of an item that have its highest reward."""
    max_per_item: int | None = None
    """Most trajectories kept per item, those of higher reward first. null: all."""

    def __post_init__(self) -> None:
        if self.max_per_item is not None and self.max_per_item < 1:
            raise ValueError(f"max_per_item must be at least 1, got {self.max_per_item}")


@dataclass(frozen=True)
class Candidate:
    """What `select` needs to know about a trajectory.

    Attributes:
        text: the agent's turns, to recognise duplicates.
        reward: total reward.
        cut: whether a turn was truncated at its limit.
        fault: whether there was an environment error.
        flaw: why it cannot be trained on, or None.
    """

    text: tuple[str, ...]
    reward: float
    cut: bool = False
    fault: bool = False
    flaw: str | None = None


def select(candidates: Sequence[Candidate], rule: KeepRule) -> tuple[list[int], Counter[str]]:
    """Selects an item's trajectories to keep.

    Args:
        candidates: all trajectories of the item.
        rule: the rule.

    Returns:
        Indices of the kept ones, ascending, and counts of the reasons against the others (the first that applies):
        `faulted`, `below` the reward, `cut`, `unlearnable`, `worse` than the best, `repeated`, `beyond` the most per item.
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
    """Totals over a file of collected trajectories.

    Attributes:
        total: number of items to play.
        items: number of items played so far.
        empty: number of those without a kept trajectory.
        played: number of trajectories.
        kept: number of kept trajectories.
        reasons: number of the others by the reason against them.
        reward: mean reward over the trajectories without an environment error; None if there is none.
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
        """Sums the notes of the journal."""
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
        """The totals as lines of text."""
        what = {
            "below": f"below a reward of {rule.min_reward:g}",
            "worse": "worse than the best of their item",
            "repeated": "duplicates",
            "beyond": f"beyond {rule.max_per_item} of an item",
            "cut": "with a truncated turn",
            "unlearnable": "not trainable with this chat template",
            "faulted": "with an environment error",
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
    """Plays the training items of a stage's data with `Trainer.predict` and keeps good trajectories.

    Nothing is trained. With a checkpoint, its weaver and trigger play, without one the bare reasoner.

    Args:
        memgen: the model.
        data: the items; its training split is played.
        rollout: sampling settings; `group_size` trajectories per item.
        episodes: limits of episodes.
        keep: which trajectories are kept.
        out: file for them, one JSON line each. The journal lies beside it.
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
        """Open on the first rank only."""
        self._remaining: list[int] = []

    # Set-up

    @override
    def prepare_data(self) -> None:
        # Through its Trainer the data finds assets.
        self.data.trainer = self.trainer
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
        """All items to play."""
        return self.data.items["train"]

    @override
    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """Batches of this rank, of the remaining items. All ranks have the same number; some may be empty."""
        size = self.data.batch_settings.val_batch_size
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        mine = self._remaining[rank::ranks]
        steps = max(1, -(-len(self._remaining) // (size * ranks)))
        batches = [tuple(mine[step * size : (step + 1) * size]) for step in range(steps)]
        return DataLoader(_Items(self.items), batch_size=None, sampler=batches)

    # Playing

    @override
    def predict_step(self, batch: EvalBatch, batch_idx: int) -> int:
        """Plays a batch and writes the kept trajectories. Returns the number of items over all ranks."""
        rollouts = self._played(batch)
        own = [] if rollouts is None else self._entries(batch, rollouts.trajectories)
        entries = [entry for part in objects_of_all_ranks(own) for entry in part]
        if self.ledger is not None and entries:
            self.ledger.add(entries)
        bank = bank_to_write(self.memgen)
        if bank is not None and rollouts is not None:
            remember_episodes(bank, self.data.environment.name, rollouts)
        return len(entries)

    def _seeds(self, batch: EvalBatch) -> list[int]:
        # Independent of group_size, so that a larger group begins with the same trajectories.
        return [
            seed_of("collect", self.rollout.seed, index, sample)
            for index in batch.indices
            for sample in range(self.rollout.group_size)
        ]

    def _played(self, batch: EvalBatch) -> Rollouts | None:
        if not batch.examples:
            return None
        data = self.data
        actor = Actor(
            self.memgen, data.tokenizer_object, data.environment, self.rollout, self.episodes, data.template
        )
        keep_latents = bank_to_write(self.memgen) is not None
        return rollout(actor, batch.examples, self._seeds(batch), keep_latents=keep_latents)

    def _entries(self, batch: EvalBatch, trajectories: Sequence[Trajectory]) -> list[Entry]:
        size, seeds = self.rollout.group_size, self._seeds(batch)
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
        """Closes the files."""
        if self.ledger is not None:
            self.ledger.close()

    def collected(self) -> Collected | None:
        """Totals over the file; None on other ranks than the first, and before anything was opened."""
        if self.ledger is None:
            return None
        # From the file: after Ctrl-C, what was written last may not be in `ledger.notes` yet.
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
