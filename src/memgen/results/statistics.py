"""Statistics of scores: intervals of means, pass@k, and paired tests of two runs on the same items.

scipy computes what it has; its import takes a while, so it is imported where it is used.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence level of intervals."""
RESAMPLES = 10_000
"""Of a bootstrap, and of a permutation test that has more arrangements than this."""
_NUMBERS_AT_ONCE = 5_000_000
"""Resampled numbers that are held in memory together."""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap confidence interval.

    Attributes:
        mean: of the values.
        low: lower end; None of a single value, which says nothing about others.
        high: upper end, likewise.
        count: values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ({LEVEL:.0%} interval {self.low:.4f} to {self.high:.4f})"


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap over the values, which are one per item.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("a mean needs at least one value, got none")
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, None, None, 1)
    result = importlib.import_module("scipy.stats").bootstrap(
        (data,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // len(data)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = (float(end) for end in result.confidence_interval)
    return Interval(mean, low, high, len(data))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Args:
        answers: how many were drawn.
        right: how many of them are right.
        k: at most `answers`.

    Raises:
        ValueError: if the numbers do not go together.
    """
    if not 0 <= right <= answers or not 1 <= k <= answers:
        raise ValueError(
            f"pass@k needs 0 <= right <= answers and 1 <= k <= answers, got {right}, {answers}, {k}"
        )
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


@dataclass(frozen=True)
class PairedTest:
    """A two-sided test of whether two runs differ on the same items.

    Attributes:
        name: of the test.
        p_value: chance of a difference as large as this one, or larger, if the runs were exchangeable.
    """

    name: str
    p_value: float


def paired_test(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedTest:
    """McNemar's exact test if every score is 0 or 1, else a sign-flip permutation test on the differences.

    Args:
        first: a score for each item.
        second: the other run's, in the same order.
        seed: of the permutations, if there are too many to try all.

    Raises:
        ValueError: if there is no item, or the runs have different numbers of them.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"paired scores need the same items, at least one; got {len(first)} and {len(second)}"
        )
    stats = importlib.import_module("scipy.stats")
    if set(first) | set(second) <= {0.0, 1.0}:
        won = sum(b > a for a, b in zip(first, second, strict=True))
        lost = sum(b < a for a, b in zip(first, second, strict=True))
        p = float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0
        return PairedTest("McNemar, exact", p)
    data = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    # An item without a difference is the same under either sign.
    data = data[data != 0.0]
    if len(data) < 2:  # One difference is as likely as its opposite.
        return PairedTest("sign-flip permutation", 1.0)
    result = stats.permutation_test(
        (data,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // len(data)),
        rng=np.random.default_rng(seed),
    )
    return PairedTest("sign-flip permutation", float(result.pvalue))
