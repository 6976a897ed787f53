"""Statistics of scores: confidence intervals of means, pass@k, and paired tests of two runs on the same items.

scipy is imported where it is used, because its import takes a while.
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
"""Resamples of a bootstrap, and of a permutation test that has more arrangements than this."""
_NUMBERS_AT_ONCE = 5_000_000
"""Resampled numbers that are held in RAM at once."""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap confidence interval.

    Attributes:
        mean: of the values.
        low: lower end; None for a single value.
        high: upper end; None for a single value.
        count: number of values.
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
    """Mean with a percentile bootstrap interval.

    Args:
        values: one value per item.
        seed: seed of the resampling.

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


@dataclass(frozen=True)
class Share:
    """A share of some items, and its Wilson confidence interval (Wilson 1927).

    Attributes:
        count: number of items.
        total: of so many.
        low: lower end of the interval of the share; None if there are none.
        high: upper end; None if there are none.
    """

    count: int
    total: int
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return "none of 0"
        return f"{self.count / self.total:.4f} ({LEVEL:.0%} interval {self.low:.4f} to {self.high:.4f})"


def share(count: int, total: int) -> Share:
    """A share with its interval, which is not empty at 0 and 1, as a bootstrap's would be."""
    if not total:
        return Share(count, total, None, None)
    test = importlib.import_module("scipy.stats").binomtest(count, total)
    interval = test.proportion_ci(LEVEL, method="wilson")
    return Share(count, total, float(interval.low), float(interval.high))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers is correct (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Args:
        answers: number of sampled answers.
        right: number of correct ones among them.
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
        name: name of the test.
        p_value: probability of a difference at least this large if the runs were exchangeable.
    """

    name: str
    p_value: float


def paired_test(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedTest:
    """McNemar's exact test if every score is 0 or 1, else a sign-flip permutation test on the differences.

    Args:
        first: one run's score for each item.
        second: the other run's scores, in the same order.
        seed: seed of the sampled permutations, if there are too many to enumerate.

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
