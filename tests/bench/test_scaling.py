"""How cost grows."""

from __future__ import annotations

import pytest

from memgen.bench.generation import Work
from memgen.bench.scaling import (
    PRICED,
    SWEEPS,
    Point,
    find_sweep,
    measure_point,
    points,
    runs_of,
    summarise,
    warm_up,
)
from memgen.bench.shapes import ModelSettings

SETTINGS = ModelSettings(model="tiny", latents=2, cap=3, spacing=4)


def test_an_unknown_sweep_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown sweep 'rows'; choose among: batch, new, insertions"):
        find_sweep("rows")


def test_sweeps_cover_what_is_asked_of_them():
    assert SWEEPS["batch"].values[0] == 1
    assert SWEEPS["batch"].values[-1] == 64
    assert SWEEPS["new"].values[-1] == 2048
    assert (SWEEPS["insertions"].values[0], SWEEPS["insertions"].values[-1]) == (0, 32)
    for sweep in SWEEPS.values():
        assert [point.x for point in points(sweep, SETTINGS)] == list(sweep.values)


def test_the_insertion_sweep_sets_the_cap_without_the_prompt_end():
    made = {point.x: point for point in points(SWEEPS["insertions"], SETTINGS)}
    assert made[0].memory == "never"
    assert (made[1].memory, made[1].settings.cap) == ("always", 0)
    assert made[32].settings.cap == 31


@pytest.mark.parametrize("inserting", [0, 1, 3])
def test_a_row_that_never_inserts_is_fed_the_same_whatever_the_others_do(inserting, meter):
    point = Point("others", inserting, SETTINGS, Work(batch=4, prompt=6, new=24), "always", inserting)
    ticks = []
    case = measure_point(point, 1, meter, lambda: ticks.append(1))
    assert case["positions_of_a_row_that_never_inserts"] == 6 + 23
    assert case["rows_inserting"] == inserting
    assert case["counts_match_formula"]
    assert (case["insertions"] > inserting) == (inserting > 0)
    assert 0 < case["quiet_steps"] <= 23
    assert len(ticks) == runs_of(point, 1)
    if not inserting:
        assert case["quiet_steps"] == 23
        assert case["same_text_as_plain"] == 1.0


def case_of(sweep, x, insertions, seconds, quiet=None):
    counts = dict(zip(PRICED, (10, 20 + x, insertions, 5 * insertions, 100 + x * x), strict=True))
    return counts | {
        "model": "tiny",
        "sweep": sweep,
        "x": x,
        "insertions": insertions,
        "ours": {"cpu_seconds_median": seconds},
        "quiet_step_cpu_seconds_median": quiet,
    }


def test_the_summary_recovers_a_constant_cost_per_insertion_and_a_flat_step():
    cases = [case_of("others", x, 6 * x, 2.0 + 0.012 * x, 0.005) for x in range(8)]
    found = summarise(cases)["tiny"]
    assert found["others"]["cpu_seconds_per_insertion"] == pytest.approx(0.002)
    assert found["others"]["quiet_step_growth_at_most_insertions"] == pytest.approx(0.0)
    assert found["fit"]["r_squared"] == pytest.approx(1.0, abs=1e-3)


def test_the_summary_shows_a_step_that_grows_with_other_rows_insertions():
    cases = [case_of("others", x, 6 * x, 2.0, 0.005 * (1 + 0.1 * x)) for x in range(8)]
    assert summarise(cases)["tiny"]["others"]["quiet_step_growth_at_most_insertions"] == pytest.approx(0.7)


def test_few_points_of_one_sweep_are_not_fitted():
    assert summarise([case_of("batch", 1, 6, 2.0)]) == {"tiny": {}}


def test_the_warm_up_runs_both_sides(meter):
    warm_up(SETTINGS, meter)
    assert meter.runs == 4
