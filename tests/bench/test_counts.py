"""Exact work of decoding, by the engine and by formula."""

from __future__ import annotations

import pytest

from memgen.bench.generation import (
    INSERTION_MODES,
    Decoding,
    DecodingWorkload,
    cache_bytes,
    insertions,
    prompt_reads,
)
from memgen.bench.shapes import ModelSettings
from memgen.types import WorkCount
from work_formula import decoding_positions, stream_positions

SETTINGS = ModelSettings(model="tiny", latents=3, cap=2, spacing=6)


def test_the_formula_of_one_row_by_hand():
    # 10 tokens; K = 2 before token 4 and before token 7.
    reasoner, weaver = stream_positions([10], [[(4, 0), (7, 1)]], 2)
    assert reasoner == 9 + 4
    # Text up to the last insertion, the first insertion's latents, two times two queries.
    assert weaver == 7 + 2 + 4


def test_a_row_without_insertions_costs_the_weaver_nothing():
    assert stream_positions([10, 10], [[], [(4, 0)]], 2) == (9 + 9 + 2, 4 + 2)


@pytest.mark.parametrize("mode", INSERTION_MODES)
def test_the_engine_does_the_work_of_the_formula_and_no_more(mode):
    work = DecodingWorkload(batch=3, prompt=9, new=24)
    decoding = Decoding(SETTINGS)
    generation = decoding.ours(work, decoding.models[mode])
    done = generation.work
    expected = decoding_positions(generation, SETTINGS.latents, trigger_reads=mode == "trigger")
    assert (done.reasoner_positions, done.weaver_positions, done.trigger_positions) == expected
    assert prompt_reads(work, done, insertions(generation) * SETTINGS.latents) == 1.0
    if mode == "always":
        assert insertions(generation) > work.batch, "the case must insert inside answers"
    if mode == "trigger":
        assert done.trigger_positions > 0


def test_a_second_reading_of_the_prompts_would_show():
    work = DecodingWorkload(batch=1, prompt=4, new=6)
    # One insertion of 2 latents; the prompt's 4 positions twice.
    assert prompt_reads(work, WorkCount(reasoner_positions=9 + 2 + 4), 2) == 2.0


def test_cache_bytes_count_what_is_kept_but_not_the_queries():
    done = WorkCount(reasoner_positions=11, weaver_positions=6)
    per_position = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    assert cache_bytes(SETTINGS, done, 2) == (11 + 4) * per_position
