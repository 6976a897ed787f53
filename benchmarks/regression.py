"""Prices of work: measured seconds fitted as a sum of prices times exact counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fit:
    """seconds = sum of price x count.

    Attributes:
        prices: seconds per unit of each count; 0 where the data show no cost of it.
        r_squared: share of the variance of the seconds that the fit explains.
        largest_relative_error: of any case.
    """

    prices: dict[str, float]
    r_squared: float
    largest_relative_error: float

    def predict(self, counts: Mapping[str, float]) -> float:
        """Seconds for given counts."""
        return sum(price * counts[name] for name, price in self.prices.items())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prices_seconds": self.prices,
            "r_squared": round(self.r_squared, 6),
            "largest_relative_error": round(self.largest_relative_error, 4),
        }


def fit_prices(cases: Sequence[Mapping[str, float]], seconds: Sequence[float], names: Sequence[str]) -> Fit:
    """Least squares on relative errors, so that short cases count as much as long ones.

    No work has a negative price: where the plain solution says so, that count is left out and the rest fitted again.

    Args:
        cases: counts of each case.
        seconds: of each case.
        names: the counts to price.

    Raises:
        ValueError: if there are fewer cases than prices.
    """
    if len(cases) < len(names):
        raise ValueError(f"{len(cases)} cases cannot price {len(names)} counts; measure more cases")
    measured = np.asarray(seconds, dtype=float)
    counts = np.asarray([[float(case[name]) for name in names] for case in cases])
    weighted = counts / measured[:, None]
    kept = [column for column in range(len(names)) if weighted[:, column].any()]
    prices = np.zeros(len(names))
    while kept:
        # Columns of one size, so that the solver does not take a small one for nothing.
        size = np.abs(weighted[:, kept]).max(axis=0)
        solution = np.linalg.lstsq(weighted[:, kept] / size, np.ones(len(measured)), rcond=None)[0] / size
        if (solution >= 0).all():
            prices[kept] = solution
            break
        kept.pop(int(np.argmin(solution * size)))
    predicted = counts @ prices
    spread = float(((measured - measured.mean()) ** 2).sum())
    residual = float(((measured - predicted) ** 2).sum())
    return Fit(
        prices={name: float(price) for name, price in zip(names, prices, strict=True)},
        r_squared=1.0 - residual / spread if spread else float(residual == 0.0),
        largest_relative_error=float(np.abs(predicted / measured - 1).max()),
    )


@dataclass(frozen=True)
class Line:
    """y = intercept + slope x."""

    intercept: float
    slope: float
    r_squared: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Ordinary least squares.

    Raises:
        ValueError: if all x are equal.
    """
    if len(set(x)) < 2:
        raise ValueError(f"a line needs two different x, got {sorted(set(x))}")
    slope, intercept = np.polyfit(np.asarray(x, float), np.asarray(y, float), 1)
    predicted = intercept + slope * np.asarray(x, float)
    spread = float(((np.asarray(y) - np.mean(y)) ** 2).sum())
    residual = float(((np.asarray(y) - predicted) ** 2).sum())
    return Line(float(intercept), float(slope), 1.0 - residual / spread if spread else 1.0)
