"""The supervised loss and the insertion curriculum."""

from __future__ import annotations

import pytest
import torch

from memgen.objectives.sft import Curriculum, choose_points, token_loss
from tolerance import assert_close


def test_the_loss_of_one_batch_is_the_mean_over_its_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -6.0])
    assert_close("loss", token_loss(logprobs, 3), torch.tensor(3.0))


def test_parts_of_unequal_size_average_to_the_mean_over_all_tokens():
    """A framework divides by the number of parts (micro-batches x ranks); the mean must come out, not a mean of means."""
    logprobs = -torch.arange(1.0, 11.0)
    parts = logprobs.split([1, 7, 2])
    losses = [token_loss(part, step_tokens=10, micro_batches=3) for part in parts]
    assert_close("loss", sum(losses) / 3, -logprobs.mean())
    mean_of_means = sum(-part.mean() for part in parts) / 3
    assert abs(float(mean_of_means + logprobs.mean())) > 0.1


def test_parts_of_unequal_size_add_up_to_the_gradient_of_one_batch():
    weight = torch.tensor(2.0, requires_grad=True)
    factors = -torch.arange(1.0, 11.0)
    (whole,) = torch.autograd.grad(token_loss(weight * factors, 10), weight)
    for part in factors.split([4, 6]):
        (token_loss(weight * part, step_tokens=10, micro_batches=2) / 2).backward()
    assert_close("gradient", weight.grad, whole)


def test_a_part_without_labels_contributes_nothing():
    assert float(token_loss(torch.zeros(0), step_tokens=5, micro_batches=2)) == 0.0


POINTS = [4, 7, 9, 15, 21]


def drawn(curriculum: Curriculum, seed: int, points=POINTS, cap: int = 3) -> list[int]:
    return choose_points(points, cap, curriculum, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        (Curriculum(), [4, 7, 9]),
        (Curriculum(first=0.0, all=1.0), POINTS),
        (Curriculum(first=0.0, none=1.0), []),
        (Curriculum(first=0.0, random=1.0, probability=1.0), [4, 7, 9]),
        (Curriculum(first=0.0, random=1.0, probability=0.0), []),
    ],
    ids=["first", "all", "none", "random 1", "random 0"],
)
def test_each_rule_chooses_its_points(curriculum, expected):
    assert all(drawn(curriculum, seed) == expected for seed in range(50))


def test_a_random_subset_takes_each_delimiter_with_its_probability_and_keeps_to_the_cap():
    curriculum = Curriculum(first=0.0, random=1.0, probability=0.3)
    free = [drawn(curriculum, seed, cap=99) for seed in range(2000)]
    for point in POINTS:
        share = sum(point in chosen for chosen in free) / len(free)
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    capped = [drawn(curriculum, seed, cap=1) for seed in range(2000)]
    assert capped == [chosen[:1] for chosen in free]
    assert max(map(len, free)) > 3


def test_rules_are_drawn_with_their_shares():
    curriculum = Curriculum(first=0.2, all=0.3, random=0.1, none=0.4, probability=0.5)
    count = 4000
    counts = {"first": 0, "all": 0, "none or random": 0}
    for seed in range(count):
        chosen = drawn(curriculum, seed, points=list(range(1, 30)), cap=3)
        match chosen:
            case [1, 2, 3]:
                counts["first"] += 1
            case [*_] if len(chosen) == 29:
                counts["all"] += 1
            case _:
                counts["none or random"] += 1
    # A random subset that happens to begin with 1, 2, 3 counts as the first rule: one in eight.
    for name, share in {"first": 0.2 + 0.1 / 8, "all": 0.3, "none or random": 0.4 + 0.1 * 7 / 8}.items():
        assert abs(counts[name] / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_the_same_generator_gives_the_same_points_and_no_point_is_invented():
    curriculum = Curriculum(first=0.25, all=0.25, random=0.25, none=0.25)
    for seed in range(50):
        chosen = drawn(curriculum, seed)
        assert chosen == drawn(curriculum, seed)
        assert chosen == [point for point in POINTS if point in chosen]
    assert len({tuple(drawn(curriculum, seed)) for seed in range(50)}) > 5


def test_an_answer_without_delimiters_has_no_points():
    for curriculum in (Curriculum(), Curriculum(first=0.0, all=1.0), Curriculum(first=0.0, random=1.0)):
        assert drawn(curriculum, 0, points=[]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 0.5}, "must be 0 or more and add up to 1, got"),
        ({"first": 1.5, "all": -0.5}, "must be 0 or more and add up to 1, got"),
        ({"probability": 1.5}, r"curriculum.probability must be in \[0, 1\], got 1.5"),
    ],
)
def test_shares_that_are_no_distribution_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**settings)
