"""Geometry of the latents: size, direction, dimension, and nearness to tokens, contexts and trajectories.

A number without a yardstick says little, so each has one: norms stand beside those of token embeddings, cosines
with the vocabulary beside those of random vectors, cosines within a block beside those between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances

from memgen.analysis.collection import Collection, Floats

# M latents, V vocabulary size, H hidden size

MOST_VECTORS = 2000
"""Vectors that are compared with each other or with the vocabulary; of more, a random sample."""
NEAREST = 5
"""Vocabulary tokens that are named for a vector."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Quantiles:
    """Distribution of a number: 5 %, 50 % and 95 % quantile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Floats | Sequence[float]) -> Quantiles:
        """Of some values, at least one."""
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.05, 0.5, 0.95])
        return cls(float(low), float(median), float(high))


@dataclass(frozen=True)
class VocabularyMatch:
    """Are latents near tokens? Largest cosine of a vector with any token embedding.

    Attributes:
        latents: of the latents.
        random: of Gaussian vectors without a preferred direction, as many.
        beyond_random: share of the latents above the 95 % quantile of the random vectors; 0.05 is chance.
    """

    latents: Quantiles
    random: Quantiles
    beyond_random: float

    @property
    def beats_random(self) -> bool:
        """Whether the median latent is nearer to a token than 95 % of random vectors are."""
        return self.latents.median > self.random.high


@dataclass(frozen=True)
class Distance:
    """Mean over all pairs of vectors of two kinds.

    Attributes:
        euclidean: distance. It also compares lengths: latents may be far longer than what they are compared with.
        cosine: cosine, which does not.
    """

    euclidean: float
    cosine: float


@dataclass(frozen=True)
class Geometry:
    """See the fields; no latent is compared with itself.

    Attributes:
        latent_norms: norms of the latents.
        token_norms: norms of the token embeddings.
        within_blocks: mean cosine between two latents of a block; None if blocks have one.
        between_blocks: mean cosine between the k-th latents of different blocks; None for a single block.
        effective_rank: of all latents, centred.
        effective_rank_of_means: of the blocks' mean vectors, centred.
        dimension: H.
        vocabulary: nearness to tokens.
        distances: by "KIND to KIND in SPACE"; kinds are latent, context and successful trajectory (App. H.4).
    """

    latent_norms: Quantiles
    token_norms: Quantiles
    within_blocks: float | None
    between_blocks: float | None
    effective_rank: float
    effective_rank_of_means: float
    dimension: int
    vocabulary: VocabularyMatch
    distances: Mapping[str, Distance]


def describe(collection: Collection, vocabulary: Floats, success: float, seed: int = 0) -> Geometry:
    """Measures the latents of a collection.

    Args:
        collection: at least one block.
        vocabulary: token embeddings, (V, H).
        success: reward from which a trajectory counts as successful.
        seed: of random vectors and samples.
    """
    means = collection.means()
    return Geometry(
        latent_norms=Quantiles.of(np.linalg.norm(collection.latents, axis=1)),
        token_norms=Quantiles.of(np.linalg.norm(vocabulary, axis=1)),
        within_blocks=within_blocks([collection.block(n) for n in range(len(collection.blocks))]),
        between_blocks=between_blocks(collection, seed),
        effective_rank=effective_rank(collection.latents),
        effective_rank_of_means=effective_rank(means),
        dimension=collection.latents.shape[1],
        vocabulary=vocabulary_match(collection.latents, vocabulary, seed),
        distances=_distances(collection, means, success, seed),
    )


def effective_rank(vectors: Floats) -> float:
    """Effective rank of the centred vectors (Roy and Vetterli 2007): exp of the entropy of their normalised singular values.

    It is 0 if all vectors are equal.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    values = np.linalg.svd(centred, compute_uv=False)
    if values.sum() <= np.finfo(np.float32).eps * np.linalg.norm(vectors):
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def within_blocks(blocks: Sequence[Floats]) -> float | None:
    """Mean cosine between two latents of a block; None if no block has two."""
    found = []
    for block in blocks:
        if len(block) > 1:
            cosines = _directions(block) @ _directions(block).T
            found.append(float(cosines[np.triu_indices(len(block), 1)].mean()))
    return float(np.mean(found)) if found else None


def between_blocks(collection: Collection, seed: int) -> float | None:
    """Mean cosine between the k-th latents of two blocks of one kind; None if there are no two blocks of a kind."""
    found, weights = [], []
    for kind in sorted({block["kind"] for block in collection.blocks}):
        numbers = [n for n, block in enumerate(collection.blocks) if block["kind"] == kind]
        blocks = np.stack([collection.block(n) for n in _sample(np.asarray(numbers), seed)])
        count = len(blocks)
        if count > 1:
            # The mean over all pairs of n unit vectors, from the length of their sum.
            sums = _directions(blocks).sum(axis=0)
            found.append(float((((sums**2).sum(axis=-1) - count) / (count * (count - 1))).mean()))
            weights.append(count)
    return float(np.average(found, weights=weights)) if found else None


def nearest_tokens(vectors: Floats, vocabulary: Floats, count: int = NEAREST) -> tuple[Ints, Floats]:
    """The tokens with the largest cosines, for each vector (`forced decoding`, App. G).

    Args:
        vectors: (M, H).
        vocabulary: (V, H).
        count: how many.

    Returns:
        Their ids and cosines, (M, count) each, the nearest first.
    """
    tokens = _directions(vocabulary)
    ids, cosines = [], []
    for begin in range(0, len(vectors), 256):
        found = _directions(vectors[begin : begin + 256]) @ tokens.T
        order = np.argsort(-found, axis=1, kind="stable")[:, :count]
        ids.append(order)
        cosines.append(np.take_along_axis(found, order, axis=1))
    return np.concatenate(ids), np.concatenate(cosines)


def vocabulary_match(latents: Floats, vocabulary: Floats, seed: int = 0) -> VocabularyMatch:
    """Compares the latents' largest cosines with the vocabulary with those of random vectors."""
    some = latents[_sample(np.arange(len(latents)), seed)]
    drawn = np.random.default_rng(seed).standard_normal((len(some), latents.shape[1])).astype(np.float32)
    found, random = (_largest(vectors, vocabulary) for vectors in (some, drawn))
    bound = np.quantile(random, 0.95)
    return VocabularyMatch(Quantiles.of(found), Quantiles.of(random), float((found > bound).mean()))


def _largest(vectors: Floats, vocabulary: Floats) -> Floats:
    tokens = _directions(vocabulary)
    parts = [(_directions(vectors[i : i + 256]) @ tokens.T).max(axis=1) for i in range(0, len(vectors), 256)]
    return np.concatenate(parts)


def _distances(collection: Collection, means: Floats, success: float, seed: int) -> dict[str, Distance]:
    right = np.asarray([answer["reward"] >= success for answer in collection.answers])
    found = {}
    for space in ("embedding", "state"):
        kinds = {
            "latent": means,
            "context": collection.vectors[f"context_{space}"],
            "successful trajectory": collection.vectors[f"trajectory_{space}"][right],
        }
        kinds = {name: x[_sample(np.arange(len(x)), seed)] for name, x in kinds.items() if len(x)}
        for a, b in (
            ("context", "latent"),
            ("context", "successful trajectory"),
            ("latent", "successful trajectory"),
        ):
            if a in kinds and b in kinds:
                found[f"{a} to {b} in {space}s"] = distance(kinds[a], kinds[b])
    return found


def distance(first: Floats, second: Floats) -> Distance:
    """Between all pairs of a vector of the first and one of the second."""
    return Distance(
        float(pairwise_distances(first, second).mean()),
        float((_directions(first) @ _directions(second).T).mean()),
    )


def _directions(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions: Floats = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return directions


def _sample(numbers: Ints, seed: int) -> Ints:
    if len(numbers) <= MOST_VECTORS:
        return numbers
    return np.sort(np.random.default_rng(seed).choice(numbers, MOST_VECTORS, replace=False))
