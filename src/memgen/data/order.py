"""Which items each rank takes at each step of an epoch, and a loader that continues in the middle of one.

The order depends on (seed, epoch) alone, so the supervised tokens of every gradient-accumulation window over all ranks
are known before the first step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset, Sampler

from memgen.data.batches import BatchIndex, PromptIndex
from memgen.data.workers import Loader

_BUCKET_BATCHES = 50
"""Global batches whose items are sorted by length together: enough to fill a batch with like lengths, few enough
that an epoch's order stays random."""


class EpochSampler(Sampler[Any], ABC):
    """The steps of one rank, in an order that depends on (seed, epoch) alone."""

    epoch: int = 0
    """The epoch whose steps come next."""
    start: int = 0
    """The first step to yield."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    @property
    @abstractmethod
    def windows(self) -> int:
        """Optimizer steps of an epoch, within the trainer's limit."""

    @abstractmethod
    def order_key(self) -> dict[str, int | bool]:
        """Settings that the epoch's order depends on: an offset means the same step only if they are equal."""


@final
class WindowSampler(EpochSampler):
    """The micro-batches of one rank, in an order that depends on (seed, epoch) alone.

    A global batch is `world_size * batch_size` consecutive items of the epoch's order; rank r takes every
    `world_size`-th of them, from the r-th on. All ranks do the same number of steps, and no item is repeated: the
    last, smaller global batch is divided like the others if every rank gets at least one item of it; otherwise its
    items (fewer than `world_size`) are left out of this epoch.

    Replayed items lie behind the others in `lengths`, and an epoch is one of the others: `replay` items of every rank and step
    are taken from them in turn, in an order that is shuffled anew each time all were taken.
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
        replayed: int = 0,
        replay: int = 0,
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
            whole_windows: leaves out the steps after the last whole window, for strategies that count steps
                themselves and would continue a shorter window in the next epoch (DeepSpeed).
            replayed: items, the last ones, that are replayed.
            replay: how many of `batch_size` are taken from them.

        Raises:
            ValueError: if no step is left, or `limit` ends within a window that must be whole.
        """
        items, world_batch = len(lengths) - replayed, world_size * (batch_size - replay)
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
        self._items = items
        self._replayed = replayed
        self._replay = replay

    def __len__(self) -> int:
        """Steps of an epoch, before the trainer's limit."""
        return self._steps

    @property
    def windows(self) -> int:
        """Optimizer steps of an epoch, within the trainer's limit."""
        return -(-self._used // self._accumulate)

    def order_key(self) -> dict[str, int | bool]:
        """Items, batch, ranks, seed and bucketing; what is replayed, if anything is."""
        replay = {"replayed": self._replayed, "replay": self._replay} if self._replay else {}
        return {
            "items": len(self._lengths),
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
            "bucket": self._bucket,
            **replay,
        }

    def global_batches(self, epoch: int) -> list[list[int]]:
        """The items of each step over all ranks."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(self._items)
        world_batch = self._world_size * (self._batch_size - self._replay)
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
            whole = self._items // world_batch
            batches[:whole] = [batches[i] for i in random.permutation(whole)]
        return self._with_replay(batches[: self._steps], random)

    def _with_replay(self, batches: list[list[int]], random: np.random.Generator) -> list[list[int]]:
        if not self._replay:
            return batches
        count = self._world_size * self._replay
        rounds = -(-len(batches) * count // self._replayed)
        again = np.concatenate([self._items + random.permutation(self._replayed) for _ in range(rounds)])
        return [
            batch + again[step * count : (step + 1) * count].tolist() for step, batch in enumerate(batches)
        ]

    def __iter__(self) -> Iterator[BatchIndex]:
        """This rank's micro-batches of the current epoch, from step `start` on."""
        epoch = self.epoch
        batches = self.global_batches(epoch)
        targets = np.asarray(self._targets(epoch))
        step_tokens = [int(targets[batch].sum()) for batch in batches]
        for step in range(self.start, self._steps):
            first = step - step % self._accumulate
            # The trainer ends the last window of an epoch early; steps after its limit are not taken.
            end = min(first + self._accumulate, self._used if step < self._used else self._steps)
            yield BatchIndex(
                indices=tuple(batches[step][self._rank :: self._world_size]),
                window_tokens=sum(step_tokens[first:end]),
                epoch=epoch,
            )


@final
class PromptSampler(EpochSampler):
    """The items that one rank rolls out, each batch of them for all steps that its rollout serves.

    A rollout takes `world_size * batch_size` consecutive items of the epoch's order; rank r takes every
    `world_size`-th of them, from the r-th on. Items left at the end of an epoch, too few for a whole
    rollout, are left out of it.
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
class ResumableLoader(Loader):
    """A loader whose place within an epoch is part of a checkpoint.

    Batches are counted when the trainer receives them, not when the sampler yields, so workers that read ahead do
    not shift the place.
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
        if self._resume is not None:  # loaded, and no batch was requested since
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
