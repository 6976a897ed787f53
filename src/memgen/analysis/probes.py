"""Probes: what can be read off a block by logistic regression, against chance.

Accuracy is measured on items that the probe has not seen, since blocks of one item resemble each other; only which item
a block is of has to be asked of other blocks of the same items. Chance is measured by the same probe on permuted labels,
permuted between items where a label belongs to the item, and within items where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from memgen.analysis.collection import Collection, Floats

FOLDS = 5
PERMUTATIONS = 20
MOST_COMPONENTS = 64
"""Principal components that a probe reads, of the blocks that it learns from."""
MOST_ITEMS = 50
"""Items that the probe of the item tells apart."""

Labels = NDArray[np.str_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """Accuracy of one probe.

    Attributes:
        target: what it predicts.
        blocks: number of blocks.
        classes: number of classes.
        accuracy: on held-out blocks.
        majority: share of the most frequent class.
        chance: mean accuracy with permuted labels.
        p_value: share of permutations, and of the labels as they are, that are at least as accurate.
        held_out: what the test blocks are: other items, or other blocks of the same items.
    """

    target: str
    blocks: int
    classes: int
    accuracy: float
    majority: float
    chance: float
    p_value: float
    held_out: str


def probes(collection: Collection, seed: int = 0) -> list[Probe]:
    """The probes of task, boundary kind, position and item, as far as there are two classes to tell apart."""
    means = collection.means()
    items = np.asarray([block["index"] for block in collection.blocks])
    found = []
    for target, labels, of_item in (
        ("task", np.asarray([block["task"] for block in collection.blocks]), True),
        ("boundary", np.asarray([block["boundary"] for block in collection.blocks]), False),
        ("position", _thirds([block["share"] for block in collection.blocks]), False),
    ):
        probe = probe_of(target, means, labels, items, of_item=of_item, seed=seed)
        found += [] if probe is None else [probe]
    probe = item_probe(means, items, seed)
    return found if probe is None else [*found, probe]


def _thirds(shares: Sequence[float]) -> Labels:
    """Where in its turn a block lies; at the prompt's end, or in the first, second or last third."""
    values = np.asarray(shares)
    names = np.asarray(["end of prompt", "first third", "second third", "last third"])
    return names[np.where(values == 0, 0, 1 + np.minimum(2, (3 * values).astype(int)))]


def probe_of(
    target: str, means: Floats, labels: Labels, items: Ints, *, of_item: bool, seed: int
) -> Probe | None:
    """A probe on held-out items.

    Args:
        target: what it predicts.
        means: mean vectors of the blocks, (n, H).
        labels: of each block, (n,).
        items: the item of each block, (n,).
        of_item: whether all blocks of an item have one label.
        seed: of the permutations.

    Returns:
        None if fewer than two classes have blocks of two items.
    """
    common = [c for c in np.unique(labels) if len(np.unique(items[labels == c])) > 1]
    kept = np.isin(labels, common)
    if len(common) < 2:
        return None
    means, labels, items = means[kept], labels[kept], items[kept]
    folds = min(FOLDS, len(np.unique(items)))
    splits = list(GroupKFold(folds).split(means, labels, items))
    random = np.random.default_rng(seed)
    permuted = [
        _permuted_between(labels, items, random) if of_item else _permuted_within(labels, items, random)
        for _ in range(PERMUTATIONS)
    ]
    return _measured(target, means, labels, permuted, splits, "other items")


def item_probe(means: Floats, items: Ints, seed: int) -> Probe | None:
    """A probe of the item on held-out blocks of the same items; None if no two items have two blocks each."""
    numbers, counts = np.unique(items, return_counts=True)
    several = numbers[counts > 1][:MOST_ITEMS]
    if len(several) < 2:
        return None
    kept = np.isin(items, several)
    means, labels = means[kept], items[kept].astype(str)
    folds = min(FOLDS, int(counts[counts > 1].min()))
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(means, labels))
    random = np.random.default_rng(seed)
    permuted = [random.permutation(labels) for _ in range(PERMUTATIONS)]
    return _measured("item", means, labels, permuted, splits, "other blocks of the same items")


def _measured(
    target: str,
    means: Floats,
    labels: Labels,
    permuted: Sequence[Labels],
    splits: Sequence[tuple[Ints, Ints]],
    held_out: str,
) -> Probe:
    accuracy = _accuracy(means, labels, splits)
    chance = [_accuracy(means, other, splits) for other in permuted]
    _, counts = np.unique(labels, return_counts=True)
    return Probe(
        target=target,
        blocks=len(labels),
        classes=len(counts),
        accuracy=accuracy,
        majority=float(counts.max() / counts.sum()),
        chance=float(np.mean(chance)),
        p_value=(1 + sum(other >= accuracy for other in chance)) / (1 + len(chance)),
        held_out=held_out,
    )


def _accuracy(means: Floats, labels: Labels, splits: Sequence[tuple[Ints, Ints]]) -> float:
    """Share of all held-out blocks that are told right."""
    right = 0
    for train, test in splits:
        names, counts = np.unique(labels[train], return_counts=True)
        if len(names) == 1 or np.ptp(means[train], axis=0).max() == 0:  # There is nothing to learn.
            right += int((labels[test] == names[counts.argmax()]).sum())
            continue
        components = min(MOST_COMPONENTS, len(train) - 1, means.shape[1])
        model = make_pipeline(
            StandardScaler(), PCA(components, svd_solver="full"), LogisticRegression(max_iter=1000)
        )
        right += int((model.fit(means[train], labels[train]).predict(means[test]) == labels[test]).sum())
    return right / sum(len(test) for _, test in splits)


def _permuted_between(labels: Labels, items: Ints, random: np.random.Generator) -> Labels:
    numbers, first = np.unique(items, return_index=True)
    shuffled = random.permutation(labels[first])
    return shuffled[np.searchsorted(numbers, items)]


def _permuted_within(labels: Labels, items: Ints, random: np.random.Generator) -> Labels:
    permuted = labels.copy()
    for item in np.unique(items):
        own = np.flatnonzero(items == item)
        permuted[own] = labels[random.permutation(own)]
    return permuted
