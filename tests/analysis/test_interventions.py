"""What each intervention does to a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from memgen.analysis.clusters import assign
from memgen.analysis.collection import VECTORS, Collection
from memgen.analysis.interventions import (
    REMOVE_ALL,
    SWAPPED_OTHER,
    SWAPPED_SAME,
    Directions,
    matched_removal,
    removals,
    whole_block_conditions,
)

RANDOM = np.random.default_rng(0)
VOCABULARY = torch.from_numpy(RANDOM.standard_normal((50, 16)).astype(np.float32))
CENTROIDS = RANDOM.standard_normal((4, 16)).astype(np.float32)
TASKS = {0: "a", 1: "b", 2: "a", 3: "b"}
COUNTS = {0: 2, 1: 1, 2: 1, 3: 0}
"""Blocks of each item."""


def collection(count: int = 3) -> Collection:
    owners = [index for index, count in COUNTS.items() for _ in range(count)]
    return Collection(
        answers=[{"index": index, "task": task, "reward": 1.0} for index, task in TASKS.items()],
        blocks=[
            {"index": index, "begin": count * number, "count": count} for number, index in enumerate(owners)
        ],
        latents=RANDOM.standard_normal((count * len(owners), 16)).astype(np.float32),
        vectors={name: np.zeros((4, 16), np.float32) for name in VECTORS},
    )


def changes(found: Collection) -> dict:
    return {condition.name: condition.change for condition in whole_block_conditions(found, seed=0)}


def test_whole_blocks_are_removed_zeroed_drowned_shuffled_or_reduced_to_a_latent():
    found = changes(collection())
    block = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert found[REMOVE_ALL](0, 0, block).shape == (0, 16)
    assert torch.equal(found["zeroed"](0, 0, block), torch.zeros(3, 16))
    noise = found["noise of equal norm"](0, 0, block)
    assert torch.allclose(noise.norm(dim=1), block.norm(dim=1))
    assert float(torch.cosine_similarity(noise, block).abs().max()) < 0.9
    assert torch.equal(noise, found["noise of equal norm"](0, 0, block)), "a resumed analysis draws the same"
    assert not torch.equal(noise, found["noise of equal norm"](0, 1, block))
    for number in range(8):
        shuffled = found["latents shuffled"](0, number, block)
        assert not torch.equal(shuffled, block)
        assert torch.equal(shuffled.sort(dim=0).values, block.sort(dim=0).values)
    assert torch.equal(found["latent 2 alone"](0, 0, block), block[1:2])


def test_swapped_blocks_are_another_items_of_the_same_task_or_of_another():
    blocks = collection()
    found = changes(blocks)
    own = torch.zeros(3, 16)
    same, other = found[SWAPPED_SAME], found[SWAPPED_OTHER]
    block = [torch.from_numpy(blocks.block(number)) for number in range(4)]
    assert torch.equal(same(0, 0, own), block[3])
    assert torch.equal(same(0, 1, own), block[3]), "its last one, where it has fewer"
    assert torch.equal(same(2, 0, own), block[0])
    assert torch.equal(same(2, 1, own), block[1])
    assert torch.equal(same(1, 0, own), own), "no other item of the task has a block"
    assert torch.equal(other(0, 0, own), block[2])
    assert torch.equal(other(3, 0, own), block[0])
    assert torch.equal(other(3, 0, torch.zeros(2, 16)), torch.zeros(2, 16)), "no block has two"


@pytest.mark.parametrize("top_k", [1, 3, 54, 1000])
def test_the_papers_rule_removes_a_block_whose_nearest_neighbours_hold_the_centroid(top_k):
    by_rule = [r for r in removals(CENTROIDS, Directions(VOCABULARY), top_k) if r.rule == "top_k"]
    everything = np.concatenate([VOCABULARY.numpy(), CENTROIDS])
    for _ in range(20):
        block = torch.from_numpy(RANDOM.standard_normal((3, 16)).astype(np.float32))
        cosines = cosine_similarity(block.mean(dim=0, keepdim=True).numpy(), everything)[0]
        nearest = np.argsort(-cosines)[:top_k]
        for removal in by_rule:
            removed = len(removal.condition.change(0, 0, block)) == 0
            assert removed == (50 + removal.cluster in nearest)


def test_by_the_nearest_centroid_every_block_is_of_one_cluster():
    by_rule = [r for r in removals(CENTROIDS, Directions(VOCABULARY), 10) if r.rule == "nearest"]
    for _ in range(20):
        block = torch.from_numpy(RANDOM.standard_normal((3, 16)).astype(np.float32))
        removed = [len(r.condition.change(0, 0, block)) == 0 for r in by_rule]
        assert removed.index(True) == assign(block.mean(dim=0, keepdim=True).numpy(), CENTROIDS)[0]
        assert sum(removed) == 1


def test_a_matched_removal_removes_at_the_rate_and_the_same_blocks_again():
    (removal, *_) = removals(CENTROIDS, Directions(VOCABULARY), 10)
    control = matched_removal(removal, 0.3, seed=0)
    block = torch.ones(3, 16)
    removed = [len(control.change(index, 0, block)) == 0 for index in range(1000)]
    assert abs(np.mean(removed) - 0.3) < 0.05
    assert removed[:50] == [len(control.change(index, 0, block)) == 0 for index in range(50)]
    assert control.file_name != matched_removal(removal, 0.4, seed=0).file_name


def test_conditions_that_do_something_else_have_files_of_their_own():
    first, second = (
        removals(CENTROIDS, Directions(VOCABULARY), 10),
        removals(CENTROIDS + 1, Directions(VOCABULARY), 10),
    )
    names = {r.condition.file_name for r in [*first, *second]}
    assert len(names) == 16
    assert {r.condition.name for r in first} == {r.condition.name for r in second}
