"""Summary statistics of a test's scores: mean reward with its interval, pass@k, mean costs per item."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memgen.results.statistics import Interval, mean_interval, pass_at_k
from memgen.tracking.metrics import Measured

Row = Mapping[str, Any]
"""A line of `scores.jsonl`: the scores of one answer."""


@dataclass(frozen=True)
class Summary:
    """Summary statistics of a run. Every item counts the same, however many of its answers are valid.

    Attributes:
        items: number of items with at least one valid answer.
        answers: number of valid answers.
        faulted: number of answers with an environment error; they are left out of all scores.
        reward: mean over items of an item's mean reward.
        parts: likewise for each reward component, over the items that have it.
        pass_at_k: by k; over the items that have at least k valid answers.
        per_item: mean cost of an item, all its answers together: tokens, positions read, seconds.
    """

    items: int
    answers: int
    faulted: int
    reward: Interval | None
    parts: Mapping[str, Interval]
    pass_at_k: Mapping[int, Interval]
    per_item: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return dataclasses.asdict(self)

    def metrics(self) -> dict[str, float]:
        """Metrics by name, in addition to the means that `AnswerMetrics` logs."""
        found = {f"{name}_per_item": value for name, value in self.per_item.items()}
        if self.reward is not None and self.reward.low is not None and self.reward.high is not None:
            found |= {"reward_low": self.reward.low, "reward_high": self.reward.high}
        return found | {f"pass_at_{k}": interval.mean for k, interval in self.pass_at_k.items()}

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        if self.reward is None:
            return [f"no valid answer: all {self.faulted} had an environment error"]
        lines = [f"reward {self.reward} of {self.items} items"]
        if self.faulted:
            lines.append(f"{self.faulted} answers with an environment error are not counted")
        lines += [f"pass@{k} {interval}" for k, interval in self.pass_at_k.items()]
        cost = ", ".join(f"{value:,.4g} {name.replace('_', ' ')}" for name, value in self.per_item.items())
        return [*lines, f"per item: {cost}"]


_COSTS = ("tokens", "reasoner_positions", "weaver_positions", "trigger_positions", "seconds")


def summarise(rows: Sequence[Row]) -> Summary:
    """Summarises the scores of all answers of a run."""
    by_item: dict[int, list[Row]] = {}
    for row in rows:
        by_item.setdefault(int(row["index"]), []).append(row)
    valid = {i: [r for r in group if r["fault"] is None] for i, group in sorted(by_item.items())}
    valid = {index: group for index, group in valid.items() if group}
    answers = sum(map(len, valid.values()))
    names = sorted({name for group in valid.values() for row in group for name in row["parts"]})
    parts = {
        name: [m for m in (_mean_part(group, name) for group in valid.values()) if m is not None]
        for name in names
    }
    samples = max(map(len, valid.values()), default=0)
    return Summary(
        items=len(valid),
        answers=answers,
        faulted=len(rows) - answers,
        reward=mean_interval([item_score(group) for group in valid.values()]) if valid else None,
        parts={name: mean_interval(values) for name, values in parts.items()},
        pass_at_k={k: _pass_at(k, valid.values()) for k in _ks(samples)},
        per_item={name: sum(row[name] for row in rows) / len(by_item) for name in _COSTS if rows and by_item},
    )


def item_score(rows: Sequence[Row], metric: str = "reward") -> float:
    """An item's mean reward, or mean reward component, over its valid answers.

    Args:
        rows: scores of the item's valid answers.
        metric: `reward`, or the name of a reward component.

    Raises:
        ValueError: if no answer has this component.
    """
    found = sum(row["reward"] for row in rows) / len(rows) if metric == "reward" else _mean_part(rows, metric)
    if found is None:
        known = sorted({name for row in rows for name in row["parts"]})
        raise ValueError(
            f"item {rows[0]['id']} has no reward component {metric!r}; there are: reward, {', '.join(known)}"
        )
    return float(found)


def _mean_part(rows: Sequence[Row], name: str) -> float | None:
    values = [row["parts"][name] for row in rows if name in row["parts"]]
    return sum(values) / len(values) if values else None


def _ks(samples: int) -> list[int]:
    """The powers of two up to the number of answers, and that number; none for a single answer."""
    if samples < 2:
        return []
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return powers if powers[-1] == samples else [*powers, samples]


def _pass_at(k: int, groups: Iterable[Sequence[Row]]) -> Interval:
    right = [
        (len(group), sum(Measured.from_record(row).right for row in group))
        for group in groups
        if len(group) >= k
    ]
    return mean_interval([pass_at_k(answers, correct, k) for answers, correct in right])
