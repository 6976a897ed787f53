"""The comparison that the other tests rely on must itself be able to fail."""

from __future__ import annotations

import pytest
import torch

from tolerance import TOLERANCE, assert_close

FLOATS = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(7, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@FLOATS
def test_equal_tensors_pass(dtype):
    assert_close("same", sample(dtype), sample(dtype))


@FLOATS
def test_a_small_error_everywhere_fails(dtype):
    reference = sample(torch.float64)
    perturbed = reference * (1 + 3 * TOLERANCE[dtype].relative_rmse)
    with pytest.raises(AssertionError, match=r"logits: relative RMSE .* worst entry"):
        assert_close("logits", perturbed, reference, dtype=dtype)


@FLOATS
def test_one_wrong_entry_among_many_fails(dtype):
    reference = torch.ones(1_000_000, dtype=torch.float64)
    perturbed = reference.clone()
    perturbed[123] += 4 * TOLERANCE[dtype].max_abs
    with pytest.raises(AssertionError, match=r"grad: largest scaled error .* worst entry 123"):
        assert_close("grad", perturbed, reference, dtype=dtype)


@FLOATS
def test_rounding_to_the_dtype_passes(dtype):
    assert_close("rounded", sample(dtype), sample(torch.float64))


@pytest.mark.parametrize("side", ["ours", "reference"])
def test_nan_fails_on_either_side_and_on_both(side):
    clean, broken = sample(torch.float32), sample(torch.float32)
    broken[0, 0] = float("nan")
    pair = (broken, clean) if side == "ours" else (clean, broken)
    with pytest.raises(AssertionError, match=f"h: 1 of 231 entries of {side} are NaN"):
        assert_close("h", *pair)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close("h", broken, broken)


def test_shapes_must_match_and_do_not_broadcast():
    with pytest.raises(AssertionError, match=r"h: shape \(3, 1\) != \(3,\)"):
        assert_close("h", torch.zeros(3, 1), torch.zeros(3))


def test_infinities_must_stand_in_the_same_places():
    mask = torch.tensor([0.0, float("-inf")])
    assert_close("mask", mask, mask.clone())
    with pytest.raises(AssertionError, match="mask: infinities differ"):
        assert_close("mask", mask, mask.flip(0))


def test_integers_must_be_equal():
    assert_close("ids", torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="ids: 1 of 2 entries differ"):
        assert_close("ids", torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_a_float_is_not_compared_with_an_integer():
    with pytest.raises(AssertionError, match="dtype"):
        assert_close("ids", torch.tensor([1.0]), torch.tensor([1]))


def test_an_error_against_a_zero_reference_fails():
    with pytest.raises(AssertionError, match="relative RMSE"):
        assert_close("grad", torch.full((4,), 1e-3), torch.zeros(4))


def test_empty_tensors_are_equal():
    assert_close("nothing", torch.zeros(0, 3), torch.zeros(0, 3))
