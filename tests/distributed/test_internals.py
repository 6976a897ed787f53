"""What this package expects of DeepSpeed's and torch's private state; a release that changes it fails here."""

from __future__ import annotations

from pathlib import Path

import pytest

from launched import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("internals") / "seen"
    worker = Path(__file__).with_name("internals_worker.py")
    return launch(worker, 2, out, out, seconds=500)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_shards_of_a_weight_cover_it_and_hold_its_numbers(ranks, level):
    for seen in ranks:
        assert (seen[level]["numel"], seen[level]["shape"]) == (9, [3, 3])
        assert seen[level]["sharded"] == (level == 3)
        assert seen[level]["shard"]
    first, second = sorted(seen[level]["range"] for seen in ranks)
    assert (first[0], first[0] + first[1], sum(second)) == (0, second[0], 9)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_weight_that_is_set_is_the_one_that_is_read(ranks, level):
    assert all(seen[level]["set"] for seen in ranks)


def test_a_sharded_weight_is_whole_between_gather_and_release(ranks):
    for seen in ranks:
        assert seen[3]["missing"] == [1, 0, 1]
        assert seen[3]["gathered"]


def test_every_group_of_ranks_gets_the_timeout(ranks):
    assert all(set(seen["timeouts"]) == {77.0} for seen in ranks)
