"""Fused operations: their forms agree, and what they must move is counted."""

from __future__ import annotations

import pytest
import torch

from memgen.bench import kernels
from memgen.bench.kernels import (
    DIRECTIONS,
    InterleaveSize,
    LogprobSize,
    interleave_problem,
    logprob_problem,
)
from tolerance import assert_close

INTERLEAVE = InterleaveSize(rows=2, length=10, points=3, latents=2, hidden=8, vocabulary=20)
LOGPROB = LogprobSize(labels=7, hidden=8, vocabulary=20)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("make", "size"),
    [(interleave_problem, INTERLEAVE), (logprob_problem, LOGPROB)],
    ids=["interleave", "linear_logprob"],
)
def test_all_forms_compute_the_same(make, size, direction):
    forms = make("cpu", torch.float32, direction, 0, size).forms
    assert list(forms) == ["naive", "reference"]
    assert_close("result", forms["reference"](), forms["naive"]())


def test_bytes_of_an_insertion_by_hand():
    forward, both = (interleave_problem("cpu", torch.float32, d, 0, INTERLEAVE) for d in DIRECTIONS)
    assert forward.size == {"positions": 32, "latents": 12, "hidden": 8}
    # Two indices per position; each token's embedding and each latent is read and written, and so is the gradient.
    assert forward.least_bytes == 32 * 2 * 8 + 2 * 32 * 8 * 4
    assert both.least_bytes == forward.least_bytes + 2 * 12 * 8 * 4


def test_a_cpu_runs_no_triton_kernel():
    assert kernels.implementations("cpu") == ("reference",)


def test_cases_have_every_form_beside_the_copy(meter, monkeypatch):
    monkeypatch.setitem(kernels.COPY_BYTES, "cpu", 1000)
    monkeypatch.setitem(kernels.LOGPROB_SIZES, "cpu", LOGPROB)
    monkeypatch.setattr(kernels, "PROBLEMS", (logprob_problem,))
    ticks = []
    copy, forward, both = kernels.measure_kernels("cpu", "float32", 2, meter, 0, lambda: ticks.append(1))
    assert copy["bandwidth_bytes_per_second"] == 2000
    assert len(ticks) == kernels.runs_of("cpu", 2)
    assert forward["copy_seconds"] == forward["least_bytes"] / 2000
    assert list(both["forms"]) == ["naive", "reference"]
    assert both["forms"]["reference"]["share_of_copy_bandwidth"] == both["copy_seconds"]
