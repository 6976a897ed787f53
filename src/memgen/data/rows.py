"""Batches of tokens from tokenised items."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch.utils.data import Dataset

from memgen.chat import ConversationTokens, TurnSpan
from memgen.data.batches import BatchIndex, EvalBatch, Item, PromptBatch, PromptIndex, SFTBatch
from memgen.types import TokenBatch


@final
class RowBuilder:
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

    def turns(self, index: int, epoch: int) -> tuple[TurnSpan, ...]:
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
        """The rows of some items: one per turn, or one per conversation with `keep_turn_latents`.

        Args:
            indices: the items.
            epoch: decides which turns are learned from.
            window_tokens: supervised tokens of the accumulation window; None: of this batch.
        """
        rows: list[list[int]] = []
        marks: list[list[bool]] = []
        group: list[int] = []
        shared: list[int] = []
        fixed: list[tuple[int, int, int]] = []
        for position, index in enumerate(indices):
            ids, turns = self.conversations[index].ids, self.turns(index, epoch)
            for part in [turns] if self._keep_turn_latents else [(turn,) for turn in turns]:
                row = ids[: part[-1].end]
                supervised = [False] * len(row)
                for turn in part:
                    supervised[turn.prompt_end : turn.end] = [True] * (turn.end - turn.prompt_end)
                fixed += [
                    (len(rows), *span) for span in self.conversations[index].fixed if span[1] <= len(row)
                ]
                rows.append(row)
                marks.append(supervised)
                group.append(position)
                shared.append(part[0].prompt_end)
        tokens = TokenBatch.from_rows(rows, marks)
        if len(rows) > len(indices):
            tokens = dataclasses.replace(tokens, group=torch.tensor(group), shared=torch.tensor(shared))
        if fixed:
            marked = torch.zeros_like(tokens.supervised)
            for row_number, begin, end in fixed:
                marked[row_number, begin:end] = True
            tokens = dataclasses.replace(tokens, fixed=marked)
        return SFTBatch(
            tokens=tokens,
            examples=tuple(indices),
            epoch=epoch,
            window_tokens=tokens.supervised_tokens if window_tokens is None else window_tokens,
        )


@final
class TrainDataset(Dataset[SFTBatch]):
    """Micro-batches with reference completions, indexed by what a WindowSampler yields."""

    def __init__(self, build: RowBuilder) -> None:
        self._build = build

    def __len__(self) -> int:
        return len(self._build.conversations)

    def __getitem__(self, index: BatchIndex) -> SFTBatch:
        if not isinstance(index, BatchIndex):
            raise _replaced_sampler(index)
        return self._build.batch(index.indices, epoch=index.epoch, window_tokens=index.window_tokens)


@final
class PromptDataset(Dataset[PromptBatch]):
    """Items to roll out, indexed by what a PromptSampler yields."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: PromptIndex) -> PromptBatch:
        if not isinstance(index, PromptIndex):
            raise _replaced_sampler(index)
        return PromptBatch(examples=[self._items[i].example for i in index.indices], place=index)


@final
class EvalDataset(Dataset[EvalBatch]):
    """Items to answer, indexed by tuples of item indices."""

    def __init__(self, items: Sequence[Item], build: RowBuilder | None) -> None:
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
            sft=None if self._build is None or not indices else self._build.batch(indices),
        )


def _replaced_sampler(index: object) -> TypeError:
    return TypeError(
        f"the data was asked for item {index!r}: the Trainer has replaced its sampler; set "
        "trainer.use_distributed_sampler=false, and use data.train_examples in place of overfit_batches"
    )
