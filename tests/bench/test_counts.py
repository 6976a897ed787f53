"""Figures that are derived from the engine's exact work counts."""

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

SETTINGS = ModelSettings(model="tiny", latents=3, cap=2, spacing=6)


@pytest.mark.parametrize("mode", INSERTION_MODES)
def test_prompts_are_read_once(mode):
    work = DecodingWorkload(batch=3, prompt=9, new=24)
    decoding = Decoding(SETTINGS)
    generation = decoding.ours(work, decoding.models[mode])
    inserted = insertions(generation)
    assert prompt_reads(work, generation.work, inserted * SETTINGS.latents) == 1.0
    if mode == "always":
        assert inserted > work.batch, "the case must insert inside answers"


def test_a_second_reading_of_the_prompts_would_show():
    work = DecodingWorkload(batch=1, prompt=4, new=6)
    # One insertion of 2 latents; the prompt's 4 positions twice.
    assert prompt_reads(work, WorkCount(reasoner_positions=9 + 2 + 4), 2) == 2.0


def test_cache_bytes_count_what_is_kept_but_not_the_queries():
    done = WorkCount(reasoner_positions=11, weaver_positions=6)
    per_position = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, float32
    assert cache_bytes(SETTINGS, done, 2) == (11 + 4) * per_position
