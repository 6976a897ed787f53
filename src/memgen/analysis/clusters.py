"""Do the latents form clusters at all? K-means against a null without clusters, and its stability over seeds.

The paper runs K-means with N = 4 on the blocks' mean vectors (App. G) and reports no other N and no test, and K-means
returns four clusters of anything. Here the silhouette of N = 2 to 8 is compared with that of Gaussian samples of the
same number, mean and covariance, so that "no clusters" is a possible result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from memgen.analysis.collection import Floats

# n blocks, H hidden size, r principal components with variance

COUNTS = range(2, 9)
"""N that are tried."""
PAPER_COUNT = 4
"""The paper's N."""
LEVEL = 0.05
"""Significance level."""
STABLE = 0.8
"""Mean adjusted Rand index between seeds from which a clustering counts as stable."""
ALIKE = 1e-3
"""Spread of the blocks, relative to their size, below which all count as alike."""
MOST_BLOCKS = 1000
"""Blocks that are compared with the null; of more, a random sample."""
SEEDS = 5
"""K-means runs that are compared for stability."""
_STARTS = 4

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Count:
    """K-means with one N.

    Attributes:
        clusters: N.
        silhouette: mean silhouette coefficient.
        null_silhouette: its mean over the samples without clusters.
        stability: mean adjusted Rand index between pairs of seeds.
    """

    clusters: int
    silhouette: float
    null_silhouette: float
    stability: float

    @property
    def excess(self) -> float:
        """Silhouette above that of the null."""
        return self.silhouette - self.null_silhouette


@dataclass(frozen=True)
class ClusterStudy:
    """Whether there are clusters, and how many.

    Attributes:
        blocks: number of blocks that were clustered.
        spread: root mean square distance of a block from the mean, relative to the root mean square norm.
        counts: every N that was possible.
        best: N with the largest excess; None if none was possible.
        p_value: share of samples without clusters whose largest excess is at least as large; None likewise.
    """

    blocks: int
    spread: float
    counts: tuple[Count, ...]
    best: int | None
    p_value: float | None

    @property
    def alike(self) -> bool:
        """Whether all blocks are practically one vector."""
        return self.spread < ALIKE

    @property
    def found(self) -> bool:
        """Whether there are clusters: more than the null has, and the same ones for every seed."""
        if self.best is None or self.p_value is None:
            return False
        best = next(count for count in self.counts if count.clusters == self.best)
        return self.p_value <= LEVEL and best.stability >= STABLE


def fit(means: Floats, clusters: int, seed: int) -> tuple[Floats, Ints]:
    """K-means.

    Args:
        means: (n, H).
        clusters: N.
        seed: of the starts.

    Returns:
        Centroids (N, H), float32, in the order of their size, the largest first, and each row's cluster (n,).

    Raises:
        ValueError: if there are not N different rows.
    """
    different = len(np.unique(means, axis=0))
    if clusters < 2 or different < clusters:
        raise ValueError(
            f"{clusters} clusters of {different} different blocks were asked for; it takes at least 2 clusters, "
            "and as many different blocks"
        )
    labels = _labels(means.astype(np.float64), clusters, seed, starts=10)
    order = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    labels = np.argsort(order)[labels]
    centroids = np.stack([means[labels == number].mean(axis=0) for number in range(clusters)])
    return centroids.astype(np.float32), labels


def assign(means: Floats, centroids: Floats) -> Ints:
    """The cluster with the nearest centroid for each row, (n,)."""
    distances = np.linalg.norm(means[:, None, :] - centroids[None, :, :], axis=2)
    nearest: Ints = distances.argmin(axis=1)
    return nearest


def study(means: Floats, seed: int = 0, draws: int = 99, counts: Sequence[int] = COUNTS) -> ClusterStudy:
    """Tries N = 2 to 8 on blocks and on samples without clusters.

    Args:
        means: mean vectors of the blocks, (n, H).
        seed: of samples and starts.
        draws: samples without clusters; the smallest p-value is 1 / (draws + 1).
        counts: N to try, as far as there are more different blocks than that.
    """
    random = np.random.default_rng(seed)
    blocks = len(means)
    if blocks > MOST_BLOCKS:
        means = means[np.sort(random.choice(blocks, MOST_BLOCKS, replace=False))]
    data = means.astype(np.float64)
    centred = data - data.mean(axis=0)
    size = float(np.sqrt((data**2).sum(axis=1).mean()))
    spread = float(np.sqrt((centred**2).sum(axis=1).mean())) / max(size, np.finfo(float).tiny)
    different = len(np.unique(means, axis=0))
    tried = [] if spread < ALIKE else [count for count in counts if count < different]
    if not tried:
        return ClusterStudy(blocks, spread, (), None, None)
    # Distances are those between coordinates along the principal axes, in which a Gaussian is easily drawn.
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-6 * values[0]
    coordinates = left[:, kept] * values[kept]
    deviations = values[kept] / np.sqrt(len(data) - 1)
    observed = _silhouettes(coordinates, tried, seed)
    null = np.stack(
        [
            _silhouettes(random.standard_normal(coordinates.shape) * deviations, tried, seed)
            for _ in range(draws)
        ]
    )
    expected = null.mean(axis=0)
    largest = (observed - expected).max()
    beyond = int(((null - expected).max(axis=1) >= largest).sum())
    found = tuple(
        Count(count, float(o), float(e), _stability(coordinates, count, seed))
        for count, o, e in zip(tried, observed, expected, strict=True)
    )
    best = max(found, key=lambda count: count.excess).clusters
    return ClusterStudy(blocks, spread, found, best, (1 + beyond) / (draws + 1))


def _silhouettes(points: NDArray[np.float64], counts: Sequence[int], seed: int) -> NDArray[np.float64]:
    return np.asarray([silhouette_score(points, _labels(points, count, seed)) for count in counts])


def _stability(points: NDArray[np.float64], clusters: int, seed: int) -> float:
    runs = [_labels(points, clusters, seed + number) for number in range(SEEDS)]
    return float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(runs, 2)]))


def _labels(points: NDArray[np.float64], clusters: int, seed: int, starts: int = _STARTS) -> Ints:
    labels: Ints = KMeans(clusters, n_init=starts, random_state=seed).fit_predict(points)
    return labels
