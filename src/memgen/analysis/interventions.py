"""Interventions on woven latents: the conditions under which the test items are answered again, with the same seeds.

The paper's only intervention removes a cluster j of latents: a block is dropped if the centroid of j is among the k = 10
nearest neighbours, by cosine, of the block's mean vector, among all token embeddings and all centroids (App. G). Latents
lie far from every token embedding, so that all centroids may be among the ten for every block, and "removing cluster j"
then removes nearly everything for every j. So each removal is also made by the nearest centroid, its filter rate is
recorded, and each has a random removal at that rate beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from memgen.analysis.collection import Collection, Floats
from memgen.seeds import seed_of

# K latents of a block, H hidden size, V vocabulary size, N clusters

Change = Callable[[int, int, Tensor], Tensor]
"""Called with an item's index, the number of the block in its episode and its latents (K, H); returns what to insert, an
empty block if nothing."""
Decisions = Callable[[int, int], bool]
"""Called with an item's index and how often the trigger was asked in its episode before; True invokes."""
Rule = Literal["nearest", "top_k"]
RULES: tuple[Rule, ...] = ("nearest", "top_k")

REMOVE_ALL = "remove all"
SWAPPED_SAME = "swapped within the task"
SWAPPED_OTHER = "swapped between tasks"


@dataclass(frozen=True)
class Condition:
    """A way of answering the items.

    Attributes:
        name: unique among the conditions of an analysis.
        change: what happens to each block; None: nothing.
        about: everything that decides what it does, as JSON values.
        decide: decides in place of the trigger; None: the trigger does.
    """

    name: str
    change: Change | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    decide: Decisions | None = None

    @property
    def file_name(self) -> str:
        """A file name that other conditions do not have."""
        text = json.dumps([self.name, self.about], sort_keys=True)
        slug = "".join(c if c.isalnum() else "_" for c in self.name)
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


TRAINED = Condition("trained")
"""The checkpoint as it is: the condition whose blocks are collected."""


def digest(array: Floats) -> str:
    """Hash of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def random_generator(seed: int, name: str, index: int, number: int) -> torch.Generator:
    """Random numbers of one block: they depend on nothing else, so a resumed analysis draws the same."""
    return torch.Generator().manual_seed(seed_of("analyze", seed, name, index, number))


def whole_block_conditions(collection: Collection, seed: int) -> list[Condition]:
    """Conditions that treat every block alike: removed, zeroed, replaced by noise, shuffled, one latent, swapped.

    Args:
        collection: gives the blocks to swap in, and the number of latents in one.
        seed: of noise and shuffling.
    """
    most = max(block["count"] for block in collection.blocks)
    several = most > 1
    conditions = [
        Condition(REMOVE_ALL, lambda index, number, block: block[:0]),
        Condition("zeroed", lambda index, number, block: torch.zeros_like(block)),
        Condition("noise of equal norm", _noise(seed), {"seed": seed}),
        *([Condition("latents shuffled", _shuffled(seed), {"seed": seed})] if several else []),
        *(Condition(f"latent {k + 1} alone", _only(k)) for k in range(most) if several),
    ]
    about = {"latents": digest(collection.latents)}
    if len({answer["task"] for answer in collection.answers}) > 1:
        conditions.append(Condition(SWAPPED_OTHER, swapped(collection, same_task=False), about))
    return [*conditions, Condition(SWAPPED_SAME, swapped(collection, same_task=True), about)]


def _noise(seed: int) -> Change:
    def change(index: int, number: int, block: Tensor) -> Tensor:
        drawn = torch.randn(block.shape, generator=random_generator(seed, "noise", index, number))
        drawn = drawn.to(block)
        noise: Tensor = drawn * (block.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True))
        return noise

    return change


def _shuffled(seed: int) -> Change:
    def change(index: int, number: int, block: Tensor) -> Tensor:
        order = torch.randperm(len(block), generator=random_generator(seed, "shuffle", index, number))
        if bool((order == torch.arange(len(block))).all()):
            order = order.roll(1)
        return block[order.to(block.device)]

    return change


def _only(number: int) -> Change:
    return lambda index, event, block: block[number : number + 1]


def swapped(collection: Collection, *, same_task: bool) -> Change:
    """Gives each item the blocks of the next item that has some of as many latents; its last one where it has fewer.

    Args:
        collection: the blocks.
        same_task: whether the other item has to be of the same task, or of another one. An item without such another
            keeps its own.
    """
    blocks: dict[tuple[int, int], list[Floats]] = {}
    for number, block in enumerate(collection.blocks):
        blocks.setdefault((block["index"], block["count"]), []).append(collection.block(number))
    order = [answer["index"] for answer in collection.answers]
    tasks = {answer["index"]: answer["task"] for answer in collection.answers}
    place = {index: number for number, index in enumerate(order)}

    def change(index: int, number: int, block: Tensor) -> Tensor:
        start = place.get(index, 0)
        for other in [*order[start + 1 :], *order[:start]]:
            found = blocks.get((other, len(block)))
            if found and other != index and (tasks[other] == tasks.get(index)) == same_task:
                return torch.from_numpy(found[min(number, len(found) - 1)]).to(block)
        return block

    return change


@dataclass(frozen=True)
class Removal:
    """The removal of one cluster.

    Attributes:
        cluster: its number, from 0.
        clusters: N.
        rule: how a block is assigned to it: by the nearest centroid, or by the paper's top-k rule.
        condition: the removal as a condition.
    """

    cluster: int
    clusters: int
    rule: Rule
    condition: Condition


@final
class Directions:
    """Token embeddings of length 1, on the device where they are used.

    Args:
        embeddings: (V, H).
    """

    def __init__(self, embeddings: Tensor) -> None:
        self._directions = normalize(embeddings.detach().float(), dim=1)

    def cosines(self, vector: Tensor) -> Tensor:
        """With a vector of length 1, (H,): (V,)."""
        self._directions = self._directions.to(vector.device)
        return self._directions @ vector


def removals(centroids: Floats, vocabulary: Directions, top_k: int) -> list[Removal]:
    """The removal of each cluster by each rule.

    Args:
        centroids: (N, H).
        vocabulary: directions of the token embeddings.
        top_k: k of the paper's rule.
    """
    found = []
    clusters = len(centroids)
    for rule in RULES:
        chosen = _nearest(centroids) if rule == "nearest" else _top_k(centroids, vocabulary, top_k)
        for cluster in range(clusters):
            shown = "nearest centroid" if rule == "nearest" else f"top {top_k}"
            about = {"centroids": digest(centroids), "cluster": cluster, "rule": rule, "top_k": top_k}
            condition = Condition(
                f"cluster {cluster + 1} of {clusters} removed ({shown})", _removing(chosen, cluster), about
            )
            found.append(Removal(cluster, clusters, rule, condition))
    return found


def matched_removal(removal: Removal, rate: float, seed: int) -> Condition:
    """Removes each block at random, at the filter rate of another removal."""

    def change(index: int, number: int, block: Tensor) -> Tensor:
        drawn = torch.rand(1, generator=random_generator(seed, "remove", index, number))
        return block[:0] if float(drawn) < rate else block

    return Condition(
        f"random, at the rate of: {removal.condition.name}",
        change,
        {"rate": rate, "seed": seed, "of": dict(removal.condition.about)},
    )


Members = Callable[[Tensor], Sequence[int]]
"""The clusters that a mean vector (H,) belongs to."""


def _removing(members: Members, cluster: int) -> Change:
    return lambda index, number, block: block[:0] if cluster in members(block.float().mean(dim=0)) else block


def _nearest(centroids: Floats) -> Members:
    known = torch.from_numpy(centroids)
    return lambda mean: [int((known - mean.cpu()).norm(dim=1).argmin())]


def _top_k(centroids: Floats, vocabulary: Directions, top_k: int) -> Members:
    known = normalize(torch.from_numpy(centroids), dim=1)

    def members(mean: Tensor) -> list[int]:
        direction = normalize(mean, dim=0)
        cosines = torch.cat([known.to(direction.device) @ direction, vocabulary.cosines(direction)])
        nearest = cosines.topk(min(top_k, len(cosines))).indices.tolist()
        return [number for number in nearest if number < len(known)]

    return members
