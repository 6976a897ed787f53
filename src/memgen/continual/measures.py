"""What became of each task while a chain of tasks was learnt: the after-task x task matrix and its measures.

R[i, j] is the mean reward on the test items of task j after the first i tasks of the chain; R[0, j] is that of the
reasoner before any of them. T is the number of tasks of the chain, numbered from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from memgen.results.statistics import LEVEL, Interval

Floats = NDArray[np.float64]

RESAMPLES = 2000
"""Bootstrap resamples of the items."""


@dataclass(frozen=True)
class Scores:
    """One method's rewards, item by item.

    Attributes:
        chain: the tasks in the order in which they were learnt.
        tasks: all tasks that were tested; the chain's among them.
        rewards: before the first task and after each: for each tested task the rewards of its items, the same items in the
            same order in every row.
    """

    chain: tuple[str, ...]
    tasks: tuple[str, ...]
    rewards: tuple[Mapping[str, Sequence[float]], ...]

    def __post_init__(self) -> None:
        if len(self.rewards) != len(self.chain) + 1:
            raise ValueError(
                f"a chain of {len(self.chain)} tasks has {len(self.chain) + 1} rows (the first before it), got {len(self.rewards)}"
            )
        for task in self.tasks:
            counts = {len(row[task]) for row in self.rewards}
            if len(counts) != 1 or 0 in counts:
                raise ValueError(
                    f"{task} needs the same items in every row, at least one; got {sorted(counts)}"
                )

    def matrix(self) -> Floats:
        """R, (T + 1, tasks)."""
        return np.asarray([[np.mean(row[task]) for task in self.tasks] for row in self.rewards])


@dataclass(frozen=True)
class Measures:
    """Measures of a chain; None where they need more tasks than there are."""

    average: Interval
    """Average accuracy after the whole chain, over its tasks: (1 / T) sum_j R[T, j] (GEM, Lopez-Paz & Ranzato 2017,
    arXiv 1706.08840, Eq. 2)."""
    forgetting: Interval | None
    """Mean over all tasks but the last of max_{i < T} R[i, j] - R[T, j], i from 1 (Chaudhry et al. 2018, arXiv 1801.10112,
    Sec. 4.1): what was known at some time and is lost at the end. The maximum is of noisy means, so it is above 0 for a model
    that changes nothing measurable; the backward transfer has no such bias."""
    backward: Interval | None
    """Backward transfer: mean over all tasks but the last of R[T, j] - R[j, j] (GEM, Eq. 3). Negative: forgetting."""
    forward: Interval | None
    """Forward transfer: mean over all tasks but the first of R[j - 1, j] - R[0, j] (GEM, Eq. 4). GEM's baseline is the
    accuracy at random initialisation; here it is the reasoner's before any learning."""
    other: Interval | None
    """Transfer to tasks that were tested and not learnt: mean of R[T, j] - R[0, j]. Of a chain of one task, this is
    the paper's cross-domain generalisation."""

    def as_dict(self) -> dict[str, Interval | None]:
        """The measures by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


NAMES = {
    "average": "average accuracy",
    "forgetting": "forgetting",
    "backward": "backward transfer",
    "forward": "forward transfer",
    "other": "transfer to other tasks",
}
"""For people."""


def measure(scores: Scores, seed: int = 0, resamples: int = RESAMPLES) -> Measures:
    """The measures with intervals over test items.

    Intervals are percentile bootstrap intervals: the items of each task are drawn anew, the same ones in every row. They
    say nothing about other seeds of training.

    Args:
        scores: of one method.
        seed: of the resampling.
        resamples: number of resamples.
    """
    columns = [scores.tasks.index(task) for task in scores.chain]
    others = [index for index, task in enumerate(scores.tasks) if task not in scores.chain]
    found = _measures(scores.matrix()[None], columns, others)
    random = np.random.default_rng(seed)
    drawn = []
    for task in scores.tasks:
        rewards = np.asarray([row[task] for row in scores.rewards], dtype=np.float64)  # (T + 1, items)
        counts = random.multinomial(
            rewards.shape[1], np.full(rewards.shape[1], 1 / rewards.shape[1]), resamples
        )
        drawn.append(counts @ rewards.T / rewards.shape[1])  # (resamples, T + 1)
    ranges = _measures(np.stack(drawn, axis=2), columns, others)
    items = sum(len(scores.rewards[0][task]) for task in scores.tasks)

    def interval(name: str) -> Interval | None:
        if name not in found:
            return None
        low, high = np.quantile(ranges[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(found[name][0]), float(low), float(high), items)

    average = interval("average")
    assert average is not None, "it needs one task"
    return Measures(average, *(interval(name) for name in ("forgetting", "backward", "forward", "other")))


def _measures(matrices: Floats, columns: Sequence[int], others: Sequence[int]) -> dict[str, Floats]:
    """The measures of several matrices at once, by name; those that need more tasks are left out.

    Args:
        matrices: (matrices, T + 1, tasks).
        columns: of the chain's tasks, in its order.
        others: columns of the other tasks.
    """
    chain = matrices[:, :, columns]  # (matrices, T + 1, T)
    last = len(columns)
    found = {"average": chain[:, last].mean(axis=1)}
    if last > 1:
        earlier = range(last - 1)
        found["forgetting"] = (chain[:, 1:last].max(axis=1) - chain[:, last])[:, :-1].mean(axis=1)
        found["backward"] = np.mean([chain[:, last, j] - chain[:, j + 1, j] for j in earlier], axis=0)
        found["forward"] = np.mean([chain[:, j, j] - chain[:, 0, j] for j in range(1, last)], axis=0)
    if others:
        found["other"] = (matrices[:, last] - matrices[:, 0])[:, others].mean(axis=1)
    return found
