"""Experience replay: training items of tasks that were learnt before, in every batch of the present one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from memgen.environments.base import Environment


@final
@dataclass(frozen=True)
class Replay:
    """Which items are learnt again, and how many of a batch they are."""

    environments: list[Environment]
    """The tasks that were learnt before."""
    items: int = 256
    """First training items of each that are kept."""
    share: float = 0.5
    """Share of a batch's items, rounded to whole ones: at least one, and not all."""

    def __post_init__(self) -> None:
        if not self.environments:
            raise ValueError(
                "data.replay.environments is empty; name the earlier tasks, or set data.replay to null"
            )
        if self.items < 1:
            raise ValueError(f"data.replay.items must be at least 1, got {self.items}")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"data.replay.share must be above 0 and below 1, got {self.share}")

    def of_batch(self, batch_size: int) -> int:
        """Items of a batch that are learnt again.

        Raises:
            ValueError: if a batch has no room for an item of both.
        """
        if batch_size < 2:
            raise ValueError(
                f"a batch of {batch_size} has no room for replay; set data.batch_size to 2 or more"
            )
        return min(max(1, round(self.share * batch_size)), batch_size - 1)
