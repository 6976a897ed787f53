"""How a figure is taken."""

from __future__ import annotations

import pytest
import torch

from memgen.bench.timing import ProcessMeter, Sample, Timing, measure_in_turn, paired_ratio


def test_sides_take_turns_and_the_order_is_reversed_in_every_other_repeat(meter):
    order = []
    measure_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, meter)
    assert "".join(order) == "ba" + "ab" + "ba"


def test_the_first_pass_is_dropped(meter):
    meter.seconds = [99.0, 98.0, 1.0, 2.0]
    timings = measure_in_turn({"a": lambda: None, "b": lambda: None}, 1, meter)
    assert timings["a"].wall == [1.0]
    assert timings["b"].wall == [2.0]


def test_without_a_warm_up_every_pass_counts(meter):
    meter.seconds = [1.0, 2.0]
    timings = measure_in_turn({"a": lambda: None}, 2, meter, warm_up=False)
    assert timings["a"].wall == [1.0, 2.0]


def test_progress_is_told_of_every_run_the_dropped_ones_included(meter):
    ticks = []
    measure_in_turn({"a": lambda: None, "b": lambda: None}, 3, meter, lambda: ticks.append(1))
    assert len(ticks) == 8


def test_no_repeat_is_refused(meter):
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_in_turn({"a": lambda: None}, 0, meter)


def test_minimum_median_and_peak_are_over_the_counted_runs():
    timing = Timing(tuple(Sample(wall=w, cpu=w * 2, peak_bytes=int(w)) for w in (5.0, 1.0, 4.0)))
    assert timing.as_dict() == {
        "wall_seconds_min": 1.0,
        "wall_seconds_median": 4.0,
        "cpu_seconds_min": 2.0,
        "cpu_seconds_median": 8.0,
        "peak_memory_bytes": 5,
    }


def test_a_ratio_is_the_median_of_ratios_within_a_repeat():
    # The machine is ten times slower in the second repeat, for both sides: the ratio does not see it.
    assert paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_the_process_meter_sees_memory_that_was_held_for_a_moment():
    meter = ProcessMeter()
    if meter.held() is None:
        pytest.skip("this system does not report a process's peak memory")
    idle = meter.measure(lambda: None)
    # Larger than what an allocator keeps for later: always fresh from the system.
    sample = meter.measure(lambda: torch.ones(40_000_000))
    assert sample.peak_bytes - idle.peak_bytes > 120_000_000
    assert meter.measure(lambda: None).peak_bytes < sample.peak_bytes
