"""Two real gloo processes with unequal token counts against one process on the same items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launched import launch
from sft_runs import TARGETS, assert_gradients_close, save_tiny
from tolerance import assert_close

WORKER = Path(__file__).with_name("two_ranks_worker.py")


def run(
    ranks: int, base: Path, out: Path, targets: list[str], accumulate: int = 1, val: int = 3
) -> list[dict]:
    """What each rank of a supervised run wrote."""
    return launch(WORKER, ranks, base, out, json.dumps(targets), str(accumulate), str(val))


# Half of the answers have no delimiter, so that a rank may insert nothing inside its answers.
MANY = [*TARGETS, "abc", "defghij", "k", "l, m"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    base = save_tiny(directory / "base")
    return {
        "one": run(1, base, directory / "one", MANY),
        # Micro-batches of one item: a rank often inserts nothing inside its answer while the other does.
        "two": run(2, base, directory / "two", MANY, accumulate=2),
    }


def test_two_ranks_with_unequal_token_counts_take_the_steps_of_one(runs):
    (one,), two = runs["one"], runs["two"]
    assert any(first != second for first, second in zip(two[0]["tokens"], two[1]["tokens"], strict=True))
    assert sum(two[0]["tokens"] + two[1]["tokens"]) == sum(one["tokens"])
    assert len(one["gradients"]) == 3
    for rank in two:
        for step in range(3):
            # Later steps start from parameters that AdamW has moved by slightly other gradients.
            assert_gradients_close(
                f"step {step}", rank["gradients"][step], one["gradients"][step], factor=10 ** min(step, 2)
            )
        for name, reference in one["parameters"].items():
            assert_close(name, rank["parameters"][name], reference, factor=100)


def test_both_ranks_end_with_the_same_parameters(runs):
    first, second = (rank["parameters"] for rank in runs["two"])
    for name, reference in first.items():
        assert torch.equal(second[name], reference), name


def test_validation_measures_of_three_items_on_two_ranks_are_those_of_one(runs):
    (one,) = runs["one"]
    assert {"val/loss", "val/token_accuracy", "val/exact_match", "val/insertions_per_answer"} <= set(
        one["measures"]
    )
    for rank in runs["two"]:
        assert set(rank["measures"]) == set(one["measures"])
        for name, value in one["measures"].items():
            assert rank["measures"][name] == pytest.approx(value, rel=1e-3), name


def test_a_rank_without_evaluation_items_waits_for_the_other(tmp_path):
    base = save_tiny(tmp_path / "base")
    first, second = run(2, base, tmp_path / "out", MANY, accumulate=2, val=1)
    assert first["measures"] == second["measures"]
    assert {"val/loss", "val/exact_match"} <= set(first["measures"])


@pytest.mark.parametrize(
    "share", [0, 1, 2], ids=["four and two", "the second has none", "the first has none"]
)
def test_answer_metrics_agree_however_the_answers_lie_on_the_ranks(runs, share):
    expected = runs["one"][0]["answers"][share]
    assert {"reward_even", "reward_odd", "exact_match", "insertions_per_answer"} <= set(expected)
    for rank in runs["two"]:
        assert rank["answers"][share] == pytest.approx(expected)


@pytest.mark.parametrize("stage", ["weaver", "trigger"])
def test_ranks_whose_episodes_have_one_and_five_turns_take_the_steps_of_one_rank(tmp_path, stage):
    base = save_tiny(tmp_path / "base", max_position_embeddings=1024)
    worker = Path(__file__).with_name("rl_ranks_worker.py")
    (one,) = launch(worker, 1, base, tmp_path / "one", stage)
    two = launch(worker, 2, base, tmp_path / "two", stage)
    assert sorted([two[0]["turns"][0], two[1]["turns"][0]]) == [[1] * 4, [5] * 4]
    assert sorted(two[0]["tokens"][0] + two[1]["tokens"][0]) == sorted(one["tokens"][0])
    if stage == "weaver":
        assert min(one["tokens"][0]) == 1
    for rank in two:
        assert len(rank["gradients"]) == 3
        for step in range(2):
            assert_gradients_close(
                f"step {step}", rank["gradients"][step], one["gradients"][step], factor=10 ** min(step, 2)
            )
        for name in ("rollout/reward", "train/kl", "rollout/tokens", "rollout/dead_groups"):
            assert rank["metrics"][0][name] == pytest.approx(one["metrics"][0][name], abs=1e-6), name
    for name, reference in two[0]["parameters"].items():
        assert torch.equal(two[1]["parameters"][name], reference), name
