"""From an environment to batches of tokens: the LightningDataModule of every stage.

Each split is tokenised once, in `setup`. So the order of an epoch, and with it the number of supervised tokens of
every gradient-accumulation window over all ranks, is known before the first step: a batch carries that number, and
the loss is divided by it, exactly and without communication. Differs from the released code: (1) items longer than
the limit are dropped and counted, never truncated; (2) supervision comes from where the assistant's turns lie, so
a padding token that equals the end token does no harm; (3) the order of an epoch depends on (seed, epoch) alone and
continues after a resume in the middle of an epoch.

A stage that learns from its own rollouts gets items instead of answers (`learn_from: rollouts`), each as often as it
takes steps on what it rolled out.

Needs `trainer.use_distributed_sampler=false`: the loaders share the items out between the ranks themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from memgen.chat import CHATML, ConversationTokens, Turn, conversation_ids, load_tokenizer, prompt_ids
from memgen.environments.base import Environment, Example, InteractiveEnvironment, Message, Split
from memgen.environments.trajectories import Trajectories
from memgen.run_context import run_context
from memgen.types import TokenBatch

log = logging.getLogger(__name__)

_BUCKET_BATCHES = 50
"""Global batches whose items are sorted by length together: enough to fill a batch with like lengths, few enough
that an epoch's order stays random."""


@dataclass(frozen=True)
class Item:
    """An example and its tokens."""

    example: Example
    """The environment's item."""
    conversation: ConversationTokens | None
    """Prompt and reference completion, for the loss. None where nothing is learned from reference completions."""


@dataclass(frozen=True)
class BatchIndex:
    """One micro-batch of one rank, before it is built."""

    indices: tuple[int, ...]
    """Items, as indices into `EnvironmentData.items`."""
    window_tokens: int
    """Supervised tokens of the accumulation window, over its micro-batches and all ranks."""
    epoch: int
    """The epoch whose order this is."""


@dataclass(frozen=True)
class SFTBatch:
    """One micro-batch of one rank."""

    tokens: TokenBatch
    """Rows to learn from. A conversation of several turns gives one row per turn, of which that turn is supervised;
    its rows share a number in `tokens.group`, their position in `examples`, and what lies before a row's turn counts
    as shared. `group` is None if each item gives one row."""
    examples: tuple[int, ...]
    """The items in the batch, as indices into `EnvironmentData.items`."""
    epoch: int
    """The epoch whose order this is; 0 in evaluation."""
    window_tokens: int
    """Supervised tokens of the whole gradient-accumulation window over all ranks, at least 1: what a summed loss is
    divided by. In evaluation: of this batch."""

    def to(self, device: torch.device | str) -> SFTBatch:
        """The same batch on another device."""
        return dataclasses.replace(self, tokens=self.tokens.to(device))


@dataclass(frozen=True)
class PromptIndex:
    """One training step of one rank on its rollouts, before the items are looked up."""

    indices: tuple[int, ...]
    """Items, as indices into `EnvironmentData.items`."""
    epoch: int
    """The epoch whose order this is."""
    rollout: int
    """Number of the rollout within the epoch."""
    part: int
    """Number of the step within those that one rollout serves. The first one rolls out."""


@dataclass(frozen=True)
class PromptBatch:
    """One training step of one rank on its rollouts."""

    examples: list[Example]
    """What to play. The same for every step that one rollout serves."""
    place: PromptIndex
    """Where in the run this is."""

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same: items are text."""
        return self


@dataclass(frozen=True)
class EvalBatch:
    """Items to answer, and in the validation of SFT the reference completions to score by their loss."""

    examples: list[Example]
    """What to reward against."""
    indices: tuple[int, ...]
    """The items, as indices into `EnvironmentData.items`: what their random draws depend on."""
    sft: SFTBatch | None
    """The same items with their reference completions; None where there is no such loss."""

    def to(self, device: torch.device | str) -> EvalBatch:
        """The same batch on another device."""
        return self if self.sft is None else dataclasses.replace(self, sft=self.sft.to(device))


class EpochSampler(Sampler[Any], ABC):
    """The steps of one rank, in an order that depends on (seed, epoch) alone."""

    epoch: int = 0
    """The epoch whose steps come next."""
    start: int = 0
    """The first step that comes."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    @property
    @abstractmethod
    def windows(self) -> int:
        """Optimizer steps of an epoch, within the trainer's limit."""

    @abstractmethod
    def order_key(self) -> dict[str, int | bool]:
        """What an offset into the epoch depends on: it means the same step only where this is equal."""


@final
class WindowSampler(EpochSampler):
    """The micro-batches of one rank, in an order that depends on (seed, epoch) alone.

    A global batch is `world_size * batch_size` consecutive items of the epoch's order; rank r takes every
    `world_size`-th of them, from the r-th on. All ranks do the same number of steps, and no item is repeated: the
    last, smaller global batch is shared out like the others if every rank gets at least one item of it, else its
    items (fewer than `world_size`) sit this epoch out.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        targets: Callable[[int], Sequence[int]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        limit: int | float = 1.0,
        seed: int = 0,
        bucket: bool = False,
        whole_windows: bool = False,
    ) -> None:
        """Plans nothing yet.

        Args:
            lengths: tokens of each item.
            targets: supervised tokens of each item, as a function of the epoch.
            batch_size: items per rank and step.
            rank: this process.
            world_size: processes.
            accumulate: steps per gradient-accumulation window; the last window of an epoch may be shorter.
            limit: the trainer's `limit_train_batches`: the epoch ends after so many steps, or after this share.
            seed: with the epoch, decides the order.
            bucket: whether a batch gathers items of like length.
            whole_windows: leaves out the steps behind the last whole window, for strategies that count steps
                themselves and would carry a shorter window into the next epoch (DeepSpeed).

        Raises:
            ValueError: if no step is left, or `limit` cuts a window that must be whole.
        """
        items, world_batch = len(lengths), world_size * batch_size
        whole, rest = divmod(items, world_batch)
        steps = whole + (rest >= world_size)
        if whole_windows:
            steps -= steps % accumulate
        if steps == 0:
            raise ValueError(
                f"{items} training items give no step for {world_size} ranks with batch_size {batch_size} and "
                f"accumulate_grad_batches {accumulate}; use more items or fewer ranks, or smaller values"
            )
        used = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        if whole_windows and used % accumulate:
            raise ValueError(
                f"limit_train_batches leaves {used} steps, no multiple of accumulate_grad_batches {accumulate}; "
                "this strategy accumulates by itself, so an epoch must end with a whole window"
            )
        self._lengths = np.asarray(lengths)
        self._targets = targets
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._accumulate = accumulate
        self._steps = steps
        self._used = used
        self._seed = seed
        self._bucket = bucket

    def __len__(self) -> int:
        """Steps of an epoch, before the trainer's limit."""
        return self._steps

    @property
    def windows(self) -> int:
        """Optimizer steps of an epoch, within the trainer's limit."""
        return -(-self._used // self._accumulate)

    def order_key(self) -> dict[str, int | bool]:
        """Items, batch, ranks, seed and bucketing."""
        return {
            "items": len(self._lengths),
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
            "bucket": self._bucket,
        }

    def global_batches(self, epoch: int) -> list[list[int]]:
        """The items of each step over all ranks."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._lengths))
        world_batch = self._world_size * self._batch_size
        if self._bucket:
            chunk = world_batch * _BUCKET_BATCHES
            order = np.concatenate(
                [
                    part[np.argsort(self._lengths[part], kind="stable")]
                    for part in np.split(order, range(chunk, len(order), chunk))
                ]
            )
        batches = [order[i : i + world_batch].tolist() for i in range(0, len(order), world_batch)]
        if self._bucket:  # Short and long batches alternate at random; a smaller last one stays last.
            whole = len(self._lengths) // world_batch
            batches[:whole] = [batches[i] for i in random.permutation(whole)]
        return batches[: self._steps]

    def __iter__(self) -> Iterator[BatchIndex]:
        """This rank's micro-batches of the current epoch, from step `start` on."""
        epoch = self.epoch
        batches = self.global_batches(epoch)
        targets = np.asarray(self._targets(epoch))
        step_tokens = [int(targets[batch].sum()) for batch in batches]
        for step in range(self.start, self._steps):
            first = step - step % self._accumulate
            # The trainer ends the last window of an epoch early; steps behind its limit are not taken.
            end = min(first + self._accumulate, self._used if step < self._used else self._steps)
            yield BatchIndex(
                indices=tuple(batches[step][self._rank :: self._world_size]),
                window_tokens=sum(step_tokens[first:end]),
                epoch=epoch,
            )


@final
class PromptSampler(EpochSampler):
    """The items that one rank plays, each batch of them for all steps that its rollout serves.

    A rollout takes `world_size * batch_size` consecutive items of the epoch's order; rank r plays every
    `world_size`-th of them, from the r-th on. What is left at the end of an epoch, too few for a whole rollout, sits
    this epoch out.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        steps_per_rollout: int = 1,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        limit: int | float = 1.0,
        seed: int = 0,
    ) -> None:
        """Plans nothing yet.

        Args:
            items: how many there are.
            batch_size: items per rank and rollout.
            steps_per_rollout: training steps that one rollout serves; a multiple of `accumulate`.
            rank: this process.
            world_size: processes.
            accumulate: steps per gradient-accumulation window.
            limit: the trainer's `limit_train_batches`.
            seed: with the epoch, decides the order.

        Raises:
            ValueError: if there are too few items for one rollout.
        """
        self._rollouts = items // (world_size * batch_size)
        if self._rollouts == 0:
            raise ValueError(
                f"{items} training items are too few for one rollout of {world_size} ranks with batch_size "
                f"{batch_size}; use more items, fewer ranks or a smaller batch_size"
            )
        self._items = items
        self._batch_size = batch_size
        self._parts = steps_per_rollout
        self._rank = rank
        self._world_size = world_size
        steps = self._rollouts * steps_per_rollout
        self._used = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        self._accumulate = accumulate
        self._seed = seed

    def __len__(self) -> int:
        """Steps of an epoch, before the trainer's limit."""
        return self._rollouts * self._parts

    @property
    def windows(self) -> int:
        """Optimizer steps of an epoch, within the trainer's limit."""
        return -(-self._used // self._accumulate)

    def order_key(self) -> dict[str, int | bool]:
        """Items, batch, steps of a rollout, ranks and seed."""
        return {
            "items": self._items,
            "batch_size": self._batch_size,
            "steps_per_rollout": self._parts,
            "world_size": self._world_size,
            "seed": self._seed,
        }

    def __iter__(self) -> Iterator[PromptIndex]:
        """This rank's steps of the current epoch, from step `start` on."""
        epoch = self.epoch
        order = np.random.default_rng((self._seed, epoch)).permutation(self._items)
        world_batch = self._world_size * self._batch_size
        for step in range(self.start, len(self)):
            rollout, part = divmod(step, self._parts)
            batch = order[rollout * world_batch : (rollout + 1) * world_batch].tolist()
            yield PromptIndex(tuple(batch[self._rank :: self._world_size]), epoch, rollout, part)


@final
class ResumableLoader(DataLoader[Any]):
    """A loader whose place within an epoch is part of a checkpoint.

    The place is counted where a batch is handed to the trainer, not where the sampler is asked, so that workers
    that read ahead do not shift it.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochSampler, num_workers: int = 0) -> None:
        """Wraps a dataset that builds a batch from what the sampler yields.

        Args:
            dataset: indexed by what the sampler yields.
            sampler: the order.
            num_workers: processes that build batches.
        """
        super().__init__(dataset, batch_size=None, sampler=sampler, num_workers=num_workers)
        self._order = sampler
        self._epoch = 0
        self._position = 0
        self._resume: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The next batch's place; the same on every rank."""
        if self._resume is not None:  # Loaded, but no batch was asked for since.
            return dict(self._resume)
        return {"epoch": self._epoch, "offset": self._position, "order": self._order.order_key()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues there, once: the following epochs start at their beginning."""
        self._resume = dict(state)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The rest of the current epoch.

        Raises:
            ValueError: if the checkpoint's place is in an epoch of another order.
        """
        # A generator's body runs at the first batch, when the Trainer has set the epoch.
        state, self._resume = self._resume, None
        self._epoch = self._order.epoch
        self._position = 0
        if state is not None and state["epoch"] == self._epoch and state["offset"] > 0:
            if state["order"] != self._order.order_key():
                raise ValueError(
                    f"the checkpoint lies within an epoch of {state['order']}, but the data is now "
                    f"{self._order.order_key()}; resume with the same settings, or from the end of an epoch"
                )
            self._position = int(state["offset"])
        self._order.start = self._position
        for batch in super().__iter__():
            self._position += 1
            yield batch


@final
class _TrainDataset(Dataset[SFTBatch]):
    def __init__(self, build: _RowBuilder) -> None:
        self._build = build

    def __len__(self) -> int:
        return len(self._build.conversations)

    def __getitem__(self, index: BatchIndex) -> SFTBatch:
        if not isinstance(index, BatchIndex):
            raise _replaced_sampler(index)
        return self._build.batch(index.indices, epoch=index.epoch, window_tokens=index.window_tokens)


@final
class _PromptDataset(Dataset[PromptBatch]):
    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: PromptIndex) -> PromptBatch:
        if not isinstance(index, PromptIndex):
            raise _replaced_sampler(index)
        return PromptBatch(examples=[self._items[i].example for i in index.indices], place=index)


@final
class _EvalDataset(Dataset[EvalBatch]):
    def __init__(self, items: Sequence[Item], build: _RowBuilder | None) -> None:
        self._items = items
        self._build = build

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, indices: tuple[int, ...]) -> EvalBatch:
        if not isinstance(indices, tuple):
            raise _replaced_sampler(indices)
        return EvalBatch(
            examples=[self._items[i].example for i in indices],
            indices=indices,
            sft=None if self._build is None else self._build.batch(indices),
        )


def _replaced_sampler(index: object) -> TypeError:
    return TypeError(
        f"the data was asked for item {index!r}: the Trainer has replaced its sampler; set "
        "trainer.use_distributed_sampler=false, and use data.train_examples in place of overfit_batches"
    )


@final
class _RowBuilder:
    """Makes the rows of a batch from tokenised conversations."""

    def __init__(
        self,
        conversations: Sequence[ConversationTokens],
        *,
        keep_turn_latents: bool,
        max_turns: int | None,
        seed: int,
    ) -> None:
        self.conversations = conversations
        self._keep_turn_latents = keep_turn_latents
        self._max_turns = max_turns
        self._seed = seed

    def turns(self, index: int, epoch: int) -> tuple[Turn, ...]:
        """The turns of a conversation that are learned from in an epoch."""
        turns = self.conversations[index].turns
        if self._max_turns is None or len(turns) <= self._max_turns:
            return turns
        random = np.random.default_rng((self._seed, epoch, index))
        chosen = random.choice(len(turns), self._max_turns, replace=False)
        return tuple(turns[i] for i in sorted(chosen))

    def targets(self, epoch: int) -> list[int]:
        """Supervised tokens of each conversation in an epoch."""
        return [
            sum(turn.end - turn.prompt_end for turn in self.turns(index, epoch))
            for index in range(len(self.conversations))
        ]

    def batch(self, indices: Sequence[int], epoch: int = 0, window_tokens: int | None = None) -> SFTBatch:
        rows: list[list[int]] = []
        marks: list[list[bool]] = []
        group: list[int] = []
        shared: list[int] = []
        for position, index in enumerate(indices):
            ids, turns = self.conversations[index].ids, self.turns(index, epoch)
            for part in [turns] if self._keep_turn_latents else [(turn,) for turn in turns]:
                row = ids[: part[-1].end]
                supervised = [False] * len(row)
                for turn in part:
                    supervised[turn.prompt_end : turn.end] = [True] * (turn.end - turn.prompt_end)
                rows.append(row)
                marks.append(supervised)
                group.append(position)
                shared.append(part[0].prompt_end)
        tokens = TokenBatch.from_rows(rows, marks)
        if len(rows) > len(indices):
            tokens = dataclasses.replace(tokens, group=torch.tensor(group), shared=torch.tensor(shared))
        return SFTBatch(
            tokens=tokens,
            examples=tuple(indices),
            epoch=epoch,
            window_tokens=tokens.supervised_tokens if window_tokens is None else window_tokens,
        )


@final
class EnvironmentData(LightningDataModule):
    """Batches of an environment's splits.

    Training yields `SFTBatch`, validation `EvalBatch` with the reference completions, test and predict `EvalBatch`
    without. With `learn_from: rollouts`, training yields `PromptBatch`, and no reference completion is needed. In
    evaluation rank r takes every world_size-th item from the r-th on, none twice, so ranks may differ
    by one batch.
    """

    def __init__(
        self,
        environment: Environment,
        path: str | None = None,
        tokenizer: str = "lab:reasoner",
        chat_template: Literal["tokenizer", "chatml"] = "tokenizer",
        learn_from: Literal["answers", "rollouts"] = "answers",
        trajectories: str | None = None,
        batch_size: int = 8,
        val_batch_size: int = 16,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        train_examples: int | None = None,
        val_examples: int | None = None,
        test_examples: int | None = None,
        keep_turn_latents: bool = False,
        max_turns: int | None = None,
        bucket: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Reads nothing yet.

        Args:
            environment: the task.
            path: where the data is. Configurations let the environment's own `path` refer to it
                (`path: ${data.path}`), so that `--data.path DIR` suffices; here it is only reported.
            tokenizer: a directory, a name of the hub, or an asset's name for `resolve_asset`.
            chat_template: "tokenizer": the tokenizer's template if it has one, else ChatML; "chatml": ChatML.
            learn_from: "answers": the reference completions; "rollouts": what the agent itself does.
            trajectories: a file of `memgen collect`: its conversations are learned from in place of the training
                split's reference completions. Validation and test stay the environment's.
            batch_size: training items per rank and step, or per rank and rollout.
            val_batch_size: items per rank and step in validation, test and predict.
            max_length: tokens a conversation may have, latents not counted; longer ones are dropped and counted.
            max_prompt_length: tokens a prompt may have; None: `max_length`.
            train_examples: uses only the first so many items of the split, counted before any is dropped.
            val_examples: likewise.
            test_examples: likewise.
            keep_turn_latents: a conversation is one row with all its turns supervised, so that the latents of one
                turn stay in the stream for the next; False: one row per turn.
            max_turns: learns from at most so many turns of a conversation, drawn anew each epoch; None: from all.
            bucket: whether a training batch gathers items of like length.
            num_workers: processes that build batches.
            seed: decides the order of the training items and the turns drawn.

        Raises:
            ValueError: if a number is out of its range.
        """
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("max_length", max_length, 2),
            ("max_prompt_length", max_prompt_length, 1),
            ("train_examples", train_examples, 1),
            ("val_examples", val_examples, 1),
            ("test_examples", test_examples, 1),
            ("max_turns", max_turns, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")
        if trajectories is not None and learn_from == "rollouts":
            raise ValueError(
                f"data.trajectories is {trajectories}, but data.learn_from is rollouts, which learns from none; leave "
                "one of them out"
            )
        # A rank has no test item if there are more ranks than items.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.environment = environment
        self.path = path
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.learn_from = learn_from
        self.trajectories = trajectories
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.max_length = max_length
        self.max_prompt_length = max_length if max_prompt_length is None else max_prompt_length
        self.limits: Mapping[Split, int | None] = {
            "train": train_examples,
            "val": val_examples,
            "test": test_examples,
        }
        self.keep_turn_latents = keep_turn_latents
        self.max_turns = max_turns
        self.bucket = bucket
        self.num_workers = num_workers
        self.seed = seed
        self.items: dict[Split, list[Item]] = {}
        """Tokenised items of each split that was set up, without the dropped ones."""
        self.dropped: dict[Split, int] = {}
        """Items of each split that were too long."""
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def resolve_asset(self, name: str) -> str:
        """The directory of an asset, by the Trainer's `RunContext`; other names pass through."""
        return run_context(self.trainer).resolve_asset(name)

    @property
    def tokenizer_object(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.resolve_asset(self.tokenizer))
        return self._tokenizer

    @property
    def steps_per_rollout(self) -> int:
        """Training steps that one rollout serves, as the stage in training says."""
        assert self.trainer is not None, "a stage trains with a Trainer"
        stage: Any = self.trainer.lightning_module
        return int(stage.steps_per_rollout)

    @property
    def template(self) -> str | None:
        """The chat template to give to `memgen.chat`: None means the tokenizer's."""
        return CHATML if self.chat_template == "chatml" else None

    def prepare_data(self) -> None:
        """Fetches or builds the tokenizer once per machine."""
        self.resolve_asset(self.tokenizer)

    def setup(self, stage: str) -> None:
        """Tokenises the splits of a stage (fit, validate, test, predict; collect: the training split alone).

        Raises:
            FileNotFoundError: if the data or the tokenizer is absent.
            ValueError: if the data is broken, an item has an empty prompt or completion, or no item is short enough.
        """
        splits: tuple[Split, ...]
        match stage:
            case "fit":
                splits = ("train", "val")
            case "validate":
                splits = ("val",)
            case "test" | "predict":
                splits = ("test",)
            case "collect":
                splits = ("train",)
            case _:
                raise ValueError(f"stage must be fit, validate, test, predict or collect, got {stage!r}")
        for split in splits:
            if split not in self.items:
                self.items[split] = self._tokenized(split)

    def train_dataloader(self) -> ResumableLoader:
        """Micro-batches of this rank, `SFTBatch` or `PromptBatch`."""
        if self.learn_from == "rollouts":
            dataset: Dataset[Any] = _PromptDataset(self.items["train"])
        else:
            dataset = _TrainDataset(self._rows(self.items["train"], self.max_turns))
        return ResumableLoader(dataset, self._sampler(), self.num_workers)

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, over all its epochs.

        For schedules: reading `trainer.estimated_stepping_batches` instead makes the Trainer set up its loaders before
        it restores a checkpoint, and then drop the place within the epoch that the checkpoint holds.

        Raises:
            ValueError: if the run has no end.
        """
        trainer = self.trainer
        assert trainer is not None, "a schedule belongs to a run"
        if trainer.max_epochs in (None, -1):
            if trainer.max_steps == -1:
                raise ValueError("a run needs an end: set trainer.max_steps or trainer.max_epochs")
            return trainer.max_steps
        steps = self._sampler().windows * int(trainer.max_epochs or 0)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def _sampler(self) -> EpochSampler:
        trainer = self.trainer
        if self.learn_from == "rollouts":
            return PromptSampler(
                items=len(self.items["train"]),
                batch_size=self.batch_size,
                steps_per_rollout=self.steps_per_rollout,
                rank=self._rank,
                world_size=self._world_size,
                accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
                limit=1.0 if trainer is None else trainer.limit_train_batches,
                seed=self.seed,
            )
        build = self._rows(self.items["train"], self.max_turns)
        return WindowSampler(
            lengths=[len(conversation.ids) for conversation in build.conversations],
            targets=build.targets,
            batch_size=self.batch_size,
            rank=self._rank,
            world_size=self._world_size,
            accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
            limit=1.0 if trainer is None else trainer.limit_train_batches,
            seed=self.seed,
            bucket=self.bucket,
            whole_windows=trainer is not None and trainer.strategy.handles_gradient_accumulation,
        )

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Items of this rank with their reference completions, `EvalBatch`."""
        items = self.items["val"]
        rows = None if self.learn_from == "rollouts" else self._rows(items, max_turns=None)
        return self._eval_loader(items, rows)

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """Items of this rank, `EvalBatch`."""
        return self._eval_loader(self.items["test"], None)

    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """The same as `test_dataloader`."""
        return self.test_dataloader()

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _rows(self, items: Sequence[Item], max_turns: int | None) -> _RowBuilder:
        return _RowBuilder(
            [item.conversation for item in items if item.conversation is not None],
            keep_turn_latents=self.keep_turn_latents,
            max_turns=max_turns,
            seed=self.seed,
        )

    def _eval_loader(self, items: Sequence[Item], build: _RowBuilder | None) -> DataLoader[EvalBatch]:
        mine = range(self._rank, len(items), self._world_size)
        batches = [
            tuple(mine[first : first + self.val_batch_size])
            for first in range(0, len(mine), self.val_batch_size)
        ]
        # A list of index tuples as the sampler: a sampler that the Trainer puts in its place is noticed.
        return DataLoader(
            _EvalDataset(items, build), batch_size=None, sampler=batches, num_workers=self.num_workers
        )

    def _tokenized(self, split: Split) -> list[Item]:
        """The items of a split that are short enough."""
        source = self._source(split)
        name = source.name
        examples = source.examples(split)
        examples = examples[: self.limits[split]]
        if not examples:
            if split != "val":
                raise ValueError(f"{name} has no {split} items{self._place}")
            log.warning("%s has no validation items%s: nothing is validated", name, self._place)
            self.dropped[split] = 0
            return []
        items, excess = [], []
        learned = split != "test" and self.learn_from == "answers"
        conversations = source.conversations(examples) if learned else itertools.repeat(None)
        for example in examples:
            try:
                item, over = self._item(source, example, next(conversations))
            except ValueError as error:
                raise ValueError(f"{name}, {split} item {example.id}: {error}") from error
            if over > 0:
                excess.append(over)
            else:
                items.append(item)
        self.dropped[split] = len(excess)
        limits = f"data.max_length {self.max_length}, data.max_prompt_length {self.max_prompt_length}"
        if not items:
            raise ValueError(
                f"all {len(excess)} {split} items of {name}{self._place} are longer than {limits} tokens; "
                f"the shortest by {min(excess)}: raise the limits"
            )
        if self._rank == 0:
            level = logging.WARNING if excess else logging.INFO
            log.log(
                level,
                "%s, %s: %d items%s, %d dropped as longer than %s tokens",
                name,
                split,
                len(items),
                self._place,
                len(excess),
                limits,
            )
        return items

    @property
    def _place(self) -> str:
        return "" if self.path is None else f" from {self.path}"

    def _source(self, split: Split) -> Environment:
        """Whose items a split has."""
        if split != "train" or self.trajectories is None or self.learn_from != "answers":
            return self.environment
        source = Trajectories(self.trajectories)
        others = source.collected_on() - {self.environment.name}
        if others and self._rank == 0:
            log.warning(
                "%s was collected on %s, not on %s",
                self.trajectories,
                ", ".join(sorted(others)),
                self.environment.name,
            )
        return source

    def _item(
        self, environment: Environment, example: Example, messages: list[Message] | None
    ) -> tuple[Item, int]:
        """An item's tokens, and how many there are beyond a limit."""
        tokenizer = self.tokenizer_object
        prompt: list[int] = []
        conversation = None
        if messages is not None:
            conversation = conversation_ids(tokenizer, messages, self.template)
            # Answers that the prompt shows as examples are read, not learned.
            shown = sum(message["role"] == "assistant" for message in environment.messages(example))
            # What follows the last turn teaches nothing.
            conversation = dataclasses.replace(
                conversation,
                ids=conversation.ids[: conversation.turns[-1].end],
                turns=conversation.turns[shown:],
            )
        # The prompt of an interactive task may need its first observation: the rollout looks after it.
        if not isinstance(environment, InteractiveEnvironment):
            prompt = prompt_ids(tokenizer, environment.messages(example), self.template)
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in [*prompt, *(conversation.ids if conversation else ())]:
            raise ValueError(
                f"its text has words that the tokenizer {self.tokenizer} does not know ({tokenizer.unk_token}); "
                "data and backbone do not belong together: change data.tokenizer with model.memgen.backbone.name"
            )
        item = Item(example=example, conversation=conversation)
        return item, self._excess(len(prompt), conversation)

    def _excess(self, prompt: int, conversation: ConversationTokens | None) -> int:
        """Tokens beyond a limit; not positive if the item fits."""
        excess = [prompt - self.max_prompt_length]
        if conversation is not None:
            first = conversation.turns[0].prompt_end
            excess += [len(conversation.ids) - self.max_length, first - self.max_prompt_length]
        return max(excess)
