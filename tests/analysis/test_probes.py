"""Probes read off what is there, on items that they have not seen, and nothing else."""

from __future__ import annotations

import numpy as np

from memgen.analysis.probes import item_probe, probe_of

ITEMS = np.repeat(np.arange(24), 3)
RANDOM = np.random.default_rng(0)


def measured(means, labels, *, of_item):
    return probe_of("it", means.astype(np.float32), labels, ITEMS, of_item=of_item, seed=0)


def test_what_the_latents_tell_is_read_off_held_out_items():
    labels = np.where(ITEMS % 2 == 0, "even", "odd")
    means = RANDOM.standard_normal((72, 10))
    means[:, 0] += np.where(ITEMS % 2 == 0, 5.0, -5.0)
    probe = measured(means, labels, of_item=True)
    assert probe.accuracy == 1.0
    assert probe.p_value < 0.05
    assert (probe.majority, probe.classes, probe.blocks) == (0.5, 2, 72)
    assert 0.3 < probe.chance < 0.7


def test_an_items_identity_is_not_taken_for_its_label():
    # All blocks of an item are alike, and labels are drawn by item: other blocks of the same items would give them away.
    means = RANDOM.standard_normal((24, 40))[ITEMS] + 0.01 * RANDOM.standard_normal((72, 40))
    labels = np.asarray(["x", "y"])[RANDOM.permutation(24) % 2][ITEMS]
    assert measured(means, labels, of_item=True).accuracy < 0.8
    found = item_probe(means.astype(np.float32), ITEMS, seed=0)
    assert found.accuracy == 1.0
    assert found.p_value < 0.05
    assert found.held_out == "other blocks of the same items"


def test_chance_is_measured_within_items_for_what_differs_within_them():
    labels = np.tile(np.asarray(["first", "second", "third"]), 24)
    means = RANDOM.standard_normal((72, 10))
    probe = measured(means, labels, of_item=False)
    assert probe.p_value > 0.05
    assert abs(probe.accuracy - 1 / 3) < 0.25


def test_there_is_no_probe_of_what_has_one_class_or_one_item_for_it():
    means = RANDOM.standard_normal((72, 10))
    assert measured(means, np.full(72, "same"), of_item=True) is None
    assert measured(means, np.where(ITEMS == 3, "rare", "common"), of_item=True) is None
    assert item_probe(means[::3].astype(np.float32), ITEMS[::3], seed=0) is None
