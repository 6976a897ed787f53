"""Clusters where there are some, none where there are none, and agreement with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from memgen.analysis.clusters import assign, fit, study


def blobs(count: int, size: int = 20, noise: float = 0.2, hidden: int = 12) -> np.ndarray:
    """`count` separate clouds of unequal size."""
    random = np.random.default_rng(3)
    centres = 3 * np.eye(hidden)[:count]
    sizes = [size + 2 * number for number in range(count)]
    return np.concatenate(
        [
            centre + noise * random.standard_normal((n, hidden))
            for centre, n in zip(centres, sizes, strict=True)
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("count", [2, 4])
def test_planted_clusters_are_counted(count):
    found = study(blobs(count), draws=19)
    assert found.found
    assert found.best == count
    assert found.p_value == 0.05
    best = next(c for c in found.counts if c.clusters == count)
    assert best.stability == pytest.approx(1.0)


@pytest.mark.parametrize("shape", ["round", "stretched"])
def test_a_cloud_without_clusters_has_none(shape):
    random = np.random.default_rng(0)
    stretch = np.ones(8) if shape == "round" else np.geomspace(10, 0.1, 8)
    clouds = [(random.standard_normal((60, 8)) * stretch).astype(np.float32) for _ in range(5)]
    assert sum(study(cloud, draws=19, counts=(2, 4)).found for cloud in clouds) <= 1


def test_silhouettes_are_scikit_learns_on_the_vectors_themselves():
    means = blobs(3)
    (count,) = study(means, draws=19, counts=(3,)).counts
    labels = KMeans(3, n_init=4, random_state=0).fit_predict(means)
    assert count.silhouette == pytest.approx(silhouette_score(means, labels), rel=1e-5)


def test_vectors_that_are_alike_are_not_clustered():
    means = np.ones((30, 8), np.float32) + 1e-5 * blobs(2)[:30, :8]
    found = study(means)
    assert found.alike
    assert (found.counts, found.best, found.p_value, found.found) == ((), None, None, False)


def test_two_different_vectors_are_too_few_to_cluster():
    found = study(np.asarray([[0.0, 1.0], [1.0, 0.0]] * 5, np.float32))
    assert not found.alike
    assert not found.found
    assert found.counts == ()


def test_centroids_are_the_means_of_their_members_the_largest_cluster_first():
    means = blobs(3)
    centroids, labels = fit(means, 3, seed=0)
    sizes = np.bincount(labels)
    assert sizes.tolist() == [24, 22, 20]
    for number in range(3):
        assert centroids[number] == pytest.approx(means[labels == number].mean(axis=0), rel=1e-5)
    assert (assign(means, centroids) == labels).all()


@pytest.mark.parametrize("clusters", [1, 3])
def test_clusters_that_the_vectors_do_not_allow_are_refused(clusters):
    with pytest.raises(ValueError, match=f"{clusters} clusters of 2 different blocks were asked for"):
        fit(np.asarray([[0.0, 1.0], [1.0, 0.0]] * 3, np.float32), clusters, seed=0)
