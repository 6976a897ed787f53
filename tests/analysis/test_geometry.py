"""Geometry against brute force, scikit-learn and what is known of special cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import cosine_similarity

from memgen.analysis.collection import VECTORS, Collection
from memgen.analysis.geometry import (
    between_blocks,
    describe,
    distance,
    effective_rank,
    nearest_tokens,
    vocabulary_match,
    within_blocks,
)

RANDOM = np.random.default_rng(1)
VOCABULARY = RANDOM.standard_normal((200, 32)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def collection(slots: int = 3, blocks: int = 6) -> Collection:
    """Two items with three blocks each; one was answered rightly."""
    return Collection(
        answers=[{"index": i, "task": "a", "reward": float(i)} for i in range(2)],
        blocks=[
            {"index": i % 2, "kind": "prompt", "begin": slots * i, "count": slots} for i in range(blocks)
        ],
        latents=normal(slots * blocks, 32),
        vectors={name: normal(2, 32) for name in VECTORS},
    )


def test_the_effective_rank_counts_directions_of_equal_size():
    axes = np.eye(10, dtype=np.float32)[:4]
    assert effective_rank(np.concatenate([axes, -axes])) == pytest.approx(4.0)
    assert effective_rank(np.outer(np.arange(5.0), np.ones(10)).astype(np.float32)) == pytest.approx(1.0)
    assert effective_rank(np.ones((5, 10), np.float32)) == 0.0


def test_the_effective_rank_depends_neither_on_scale_nor_on_rotation():
    vectors = normal(20, 6)
    rotation = np.linalg.qr(normal(6, 6))[0]
    assert effective_rank(7 * vectors @ rotation + 3) == pytest.approx(effective_rank(vectors), rel=1e-4)


def test_cosines_within_and_between_blocks_are_those_of_all_pairs():
    found = collection()
    blocks = [found.block(number) for number in range(6)]
    within = [cosine_similarity(block)[i, j] for block in blocks for i in range(3) for j in range(i)]
    between = [
        cosine_similarity([blocks[a][slot], blocks[b][slot]])[0, 1]
        for slot in range(3)
        for a in range(6)
        for b in range(a)
    ]
    assert within_blocks(blocks) == pytest.approx(np.mean(within), abs=1e-6)
    assert between_blocks(found, seed=0) == pytest.approx(np.mean(between), abs=1e-6)
    assert within_blocks([block[:1] for block in blocks]) is None


def test_the_nearest_tokens_are_those_of_all_cosines():
    vectors = normal(300, 32)
    ids, cosines = nearest_tokens(vectors, VOCABULARY, 4)
    everything = cosine_similarity(vectors, VOCABULARY)
    assert (ids == np.argsort(-everything, axis=1)[:, :4]).all()
    assert cosines == pytest.approx(np.sort(everything, axis=1)[:, :-5:-1], abs=1e-5)


def test_only_latents_that_are_near_tokens_beat_random_vectors():
    near = VOCABULARY[:100] + 0.3 * normal(100, 32)
    assert vocabulary_match(5 * near, VOCABULARY).beats_random
    other = vocabulary_match(normal(100, 32), VOCABULARY)
    assert not other.beats_random
    assert other.beyond_random < 0.2


def test_distances_are_means_over_all_pairs():
    first, second = normal(4, 32), normal(7, 32)
    found = distance(first, second)
    assert found.euclidean == pytest.approx(cdist(first, second).mean(), rel=1e-5)
    assert found.cosine == pytest.approx(cosine_similarity(first, second).mean(), abs=1e-6)


def test_latents_are_compared_with_contexts_and_with_trajectories_that_succeeded():
    found = collection()
    measured = describe(found, VOCABULARY, success=1.0)
    assert len(measured.distances) == 6
    right = found.vectors["trajectory_state"][1:]
    assert measured.distances["latent to successful trajectory in states"] == distance(found.means(), right)
    assert measured.dimension == 32
    without = describe(found, VOCABULARY, success=2.0)
    assert set(without.distances) == {"context to latent in embeddings", "context to latent in states"}
