"""Prices of exact work."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.regression import fit_line, fit_prices

NAMES = ("steps", "positions", "pairs")


def synthetic(prices, count=12, noise=0.0):
    draw = np.random.default_rng(0)
    cases = [dict(zip(NAMES, row, strict=True)) for row in draw.integers(1, 1000, (count, 3)).tolist()]
    seconds = [sum(p * case[n] for p, n in zip(prices, NAMES, strict=True)) for case in cases]
    return cases, [s * (1 + noise * draw.standard_normal()) for s in seconds]


def test_known_prices_are_recovered():
    cases, seconds = synthetic((3e-3, 2e-5, 1e-7))
    fit = fit_prices(cases, seconds, NAMES)
    assert list(fit.prices.values()) == pytest.approx([3e-3, 2e-5, 1e-7], rel=1e-6)
    assert fit.r_squared == pytest.approx(1.0)
    assert fit.largest_relative_error < 1e-6
    assert fit.predict(cases[0]) == pytest.approx(seconds[0])


def test_noise_moves_prices_a_little():
    cases, seconds = synthetic((3e-3, 2e-5, 1e-7), count=200, noise=0.05)
    fit = fit_prices(cases, seconds, NAMES)
    assert fit.prices["steps"] == pytest.approx(3e-3, rel=0.05)
    assert 0 < fit.largest_relative_error < 0.3


def test_what_costs_nothing_has_no_price_and_never_a_negative_one():
    cases, seconds = synthetic((3e-3, -1e-5, 0.0))
    prices = fit_prices(cases, seconds, NAMES).prices
    assert prices["positions"] == 0
    assert all(price >= 0 for price in prices.values())


def test_a_count_that_never_occurs_has_no_price():
    cases, seconds = synthetic((3e-3, 0.0, 1e-7))
    fit = fit_prices([case | {"positions": 0} for case in cases], seconds, NAMES)
    assert fit.prices["positions"] == 0
    assert fit.prices["steps"] == pytest.approx(3e-3)


def test_too_few_cases_are_refused():
    with pytest.raises(ValueError, match="2 cases cannot price 3 counts"):
        fit_prices([dict.fromkeys(NAMES, 1)] * 2, [1.0, 1.0], NAMES)


def test_a_line_is_recovered_and_needs_two_places():
    line = fit_line([0, 1, 2, 3], [5.0, 7.0, 9.0, 11.0])
    assert (line.intercept, line.slope, line.r_squared) == pytest.approx((5.0, 2.0, 1.0))
    with pytest.raises(ValueError, match="two different x"):
        fit_line([1, 1], [2.0, 3.0])
