"""Exact work, by formula and by the engine."""

from __future__ import annotations

import pytest

from memgen.bench.counts import prompt_reads, stream_counts
from memgen.bench.generation import MEMORIES, Decoding, Work, cache_bytes, matches
from memgen.bench.shapes import ModelSettings

SETTINGS = ModelSettings(model="tiny", latents=3, cap=2, spacing=6)


def test_counts_of_one_row_by_hand():
    # 4 prompt tokens and 6 new ones; K = 2 before token 4 and before token 7.
    counts = stream_counts([10], [4], [[(4, 0), (7, 1)]], lambda kind: 2)
    assert counts.reasoner_positions == 9 + 4
    # Text up to the last insertion, the first insertion's latents, two times two queries.
    assert counts.weaver_positions == 7 + 2 + 4
    assert counts.reasoner_pairs == 13 * 14 // 2
    text = 9 * 10 // 2
    first, second = 2 * 4 + 3, 2 * 9 + 3
    assert counts.weaver_pairs == text + first + second
    assert (counts.latents, counts.insertions, counts.prompt_positions) == (4, 2, 4)


def test_a_row_without_insertions_costs_the_weaver_nothing():
    counts = stream_counts([10, 10], [4, 4], [[], [(4, 0)]], lambda kind: 2)
    assert counts.weaver_positions == 4 + 2
    assert counts.reasoner_positions == 9 + 9 + 2


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_engine_does_the_work_of_the_formula_and_no_more(memory):
    work = Work(batch=3, prompt=9, new=24)
    decoding = Decoding(SETTINGS)
    model = decoding.models[memory]
    generation = decoding.ours(work, model)
    counts = decoding.counts(generation, model)
    assert matches(generation.work, counts)
    assert prompt_reads(generation.work.reasoner_positions, counts, work.tokens_fed) == 1.0
    if memory == "always":
        assert counts.insertions > work.batch, "the case must insert inside answers"
    if memory == "trigger":
        assert generation.work.trigger_positions > 0


def test_a_second_reading_of_the_prompts_would_show():
    counts = stream_counts([10], [4], [[(4, 0)]], lambda kind: 2)
    assert prompt_reads(counts.reasoner_positions + 4, counts, 5) == 2.0


def test_cache_bytes_count_what_is_kept_but_not_the_queries():
    counts = stream_counts([10], [4], [[(4, 0)]], lambda kind: 2)
    per_position = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    assert cache_bytes(SETTINGS, counts) == (11 + 4) * per_position
