"""What the method's work would cost at plain prices."""

from __future__ import annotations

import pytest

from memgen.bench.generation import DecodingWorkload, decoding_floor, step_bytes_floor
from memgen.bench.timing import Sample, Timing
from memgen.bench.training import work_floor
from memgen.types import WorkCount


def timing(wall, cpu):
    return Timing((Sample(wall=wall, cpu=cpu, peak_bytes=None),))


def test_the_floor_of_decoding_by_hand():
    work = DecodingWorkload(batch=1, prompt=100, new=51)
    # 10 latents behind the prompt and behind 20 new tokens; plain reads 150.
    done = WorkCount(reasoner_positions=150 + 20, weaver_positions=120 + 10 + 20)
    floor = decoding_floor(work, done, 20, plain=timing(3.0, 6.0), prefill=timing(1.0, 1.0))
    assert floor.positions == pytest.approx((170 + 150) / 150)
    # A position beside others costs 0.01 wall seconds: prompt 100 + latents 20 + weaver 150; the steps cost 2.
    assert floor.two_price_wall == pytest.approx((2.7 + 2.0) / 3.0)
    assert floor.two_price_cpu == pytest.approx((2.7 + 5.0) / 6.0)


def test_without_memory_the_floor_is_plain_decoding():
    work = DecodingWorkload(batch=2, prompt=10, new=5)
    floor = decoding_floor(
        work, WorkCount(reasoner_positions=2 * 14), 0, plain=timing(3.0, 3.0), prefill=timing(0.5, 0.5)
    )
    assert (floor.positions, floor.two_price_wall, floor.two_price_cpu) == pytest.approx((1, 1, 1))


def test_a_training_position_without_gradient_is_half_as_dear():
    done = WorkCount(reasoner_positions=100, weaver_positions=50)
    assert work_floor(done, 0, 100) == 1.5
    assert work_floor(done, 40, 100) == pytest.approx(1.3)


def test_the_bandwidth_floor_reads_weights_and_half_the_cache_per_step():
    assert step_bytes_floor(weights=1000, cache=200, steps=10, bandwidth=1e3) == pytest.approx(11.0)
