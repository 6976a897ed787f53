"""Effects of interventions: paired differences on the same items, with Holm's correction for many tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from memgen.analysis.failures import TYPES
from memgen.analysis.labels import MEANINGS, NONE, UNLABELLED
from memgen.results.statistics import Interval, mean_interval, paired_test

REWARD = "reward"


@dataclass(frozen=True)
class Outcome:
    """Something that an intervention may change.

    Attributes:
        name: `reward`, `reward on TASK`, or `failure: TYPE`.
        task: the task whose items count; None: all.
        failure: the type of failure whose frequency it is; None: the reward.
    """

    name: str
    task: str | None = None
    failure: str | None = None

    @property
    def better(self) -> int:
        """1 if more of it is better, -1 if less is."""
        return 1 if self.failure is None else -1

    def values(self, answers: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
        """Its value for each valid answer of those items, by index; a failure that people left without a label has no type."""
        return {
            index: answer["reward"] if self.failure is None else float(answer["failure"] == self.failure)
            for index, answer in answers.items()
            if answer["fault"] is None and self.task in (None, answer["task"])
            if self.failure is None or answer["failure"] != UNLABELLED
        }


@dataclass(frozen=True)
class Effect:
    """What one condition changes against another, on the items with a valid answer under both.

    Attributes:
        condition: its name.
        against: name of the other condition.
        outcome: what changes.
        items: number of items.
        difference: mean of condition - other, with a bootstrap interval.
        test: name of the paired test.
        p_value: two-sided.
        adjusted: p-value after Holm's correction over the tests that `effects` was called for.
    """

    condition: str
    against: str
    outcome: Outcome
    items: int
    difference: Interval
    test: str
    p_value: float
    adjusted: float

    def harms(self, level: float) -> bool:
        """Whether the condition makes the outcome worse, significantly."""
        return self.adjusted <= level and self.difference.mean * self.outcome.better < 0


def outcomes(answers: Sequence[Mapping[int, Mapping[str, Any]]]) -> list[Outcome]:
    """The outcomes that occur in the answers of some conditions: reward, reward on each of several tasks, failures."""
    records = [record for condition in answers for record in condition.values()]
    tasks = sorted({record["task"] for record in records})
    seen = {record["failure"] for record in records}
    kinds = [*TYPES, *(kind for kind in MEANINGS if kind != NONE)]
    return [
        Outcome(REWARD),
        *(Outcome(f"{REWARD} on {task}", task=task) for task in tasks if len(tasks) > 1),
        *(Outcome(f"failure: {kind}", failure=kind) for kind in kinds if kind in seen),
    ]


def effects(
    pairs: Sequence[tuple[str, str]],
    answers: Mapping[str, Mapping[int, Mapping[str, Any]]],
    measured: Sequence[Outcome],
) -> list[Effect]:
    """Compares pairs of conditions in every outcome, and corrects for all these tests together.

    Args:
        pairs: names of a condition and of the one that it is compared with.
        answers: of each condition, by item.
        measured: the outcomes. One that no item has under both conditions is left out.
    """
    found = []
    for condition, against in pairs:
        for outcome in measured:
            after, before = outcome.values(answers[condition]), outcome.values(answers[against])
            items = sorted(after.keys() & before.keys())
            if not items:
                continue
            first, second = [before[i] for i in items], [after[i] for i in items]
            test = paired_test(first, second)
            difference = mean_interval([b - a for a, b in zip(first, second, strict=True)])
            found.append(
                Effect(condition, against, outcome, len(items), difference, test.name, test.p_value, 1.0)
            )
    adjusted = holm([effect.p_value for effect in found])
    return [replace(effect, adjusted=p) for effect, p in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after Holm's correction (Holm 1979): the i-th smallest of m is multiplied by m - i + 1, monotonically."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.zeros(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return [float(p) for p in adjusted]


def filter_rate(answers: Mapping[int, Mapping[str, Any]]) -> float:
    """Share of the blocks that a condition removed; 0 if there were none."""
    valid = [answer for answer in answers.values() if answer["fault"] is None]
    removed, invoked = (sum(int(answer[key]) for answer in valid) for key in ("removed", "invoked"))
    return removed / max(1, invoked)
