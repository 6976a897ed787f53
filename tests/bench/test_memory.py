"""Memory of decoding and training."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from memgen.bench import memory, probe
from memgen.bench.generation import Decoding, DecodingWorkload
from memgen.bench.memory import (
    DECODING_SIDES,
    decoding_cache,
    measure_decoding_memory,
    measure_training_memory,
)
from memgen.bench.shapes import ModelSettings
from memgen.bench.timing import ProcessMeter
from memgen.bench.training import TrainingWorkload

SETTINGS = ModelSettings(model="tiny", latents=2, cap=2, spacing=4)
WORK = DecodingWorkload(batch=2, prompt=6, new=12)


def test_hugging_faces_cache_is_the_formula_to_the_byte():
    sizes = decoding_cache(Decoding(SETTINGS), WORK, "plain")
    assert sizes["cache_bytes_held"] == sizes["cache_bytes_needed"] == 2 * (6 + 11) * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("side", ["never", "always", "trigger"])
def test_our_caches_hold_what_is_needed_and_less_than_twice_the_full_size(side):
    sizes = decoding_cache(Decoding(SETTINGS), WORK, side)
    assert sizes["cache_bytes_needed"] <= sizes["cache_bytes_held"]
    full = 6 + 12 + 3 * 2 + 2
    assert sizes["cache_bytes_held"] <= 2 * 3 * 2 * full * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(
    "request_of",
    [
        {"kind": "training", "side": "ours", "stage": "sft", "work": asdict(TrainingWorkload(2, 24, 4, 2))},
        {"kind": "training", "side": "plain", "stage": "grpo", "work": asdict(TrainingWorkload(2, 24, 4, 2))},
        {"kind": "generation", "side": "plain", "work": asdict(WORK)},
        {"kind": "generation", "side": "always", "work": asdict(WORK)},
    ],
    ids=["ours-sft", "plain-grpo", "plain-decode", "ours-decode"],
)
def test_a_probe_writes_one_line_of_json(request_of, capsys):
    request = request_of | {"settings": asdict(SETTINGS), "threads": 1}
    assert probe.main([json.dumps(request)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    if ProcessMeter().held() is None:
        assert result["peak_above_weights_bytes"] is None
    else:
        assert result["peak_above_weights_bytes"] >= 0
        assert result["held_before_bytes"] > 1_000_000


def test_ratios_are_to_the_plain_side(monkeypatch):
    peaks = {"plain": 200, "never": 100, "always": 300, "ours": 250}
    monkeypatch.setattr(
        memory,
        "peak_in_own_process",
        lambda request: {"peak_above_weights_bytes": peaks[request["side"]], "held_before_bytes": 1},
    )
    decoding = list(measure_decoding_memory(SETTINGS, WORK))
    assert [case["side"] for case in decoding] == list(DECODING_SIDES)
    assert [case["memory_ratio"] for case in decoding] == [1.0, 0.5, 1.5]
    training = list(measure_training_memory(SETTINGS, TrainingWorkload(2, 24, 4, 2)))
    assert [case["memory_ratio"] for case in training] == [1.0, 1.25]
