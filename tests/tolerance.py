"""How close two tensors must be: one table by dtype, and the one comparison that every test uses."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the error of a tensor against its reference.

    Attributes:
        relative_rmse: root mean square of the error over that of the reference.
        max_abs: largest error, in units of the reference's largest magnitude (of 1, where that is smaller).
    """

    relative_rmse: float
    max_abs: float


TOLERANCE = MappingProxyType(
    {
        torch.float64: Tolerance(relative_rmse=1e-10, max_abs=1e-9),
        torch.float32: Tolerance(relative_rmse=1e-5, max_abs=5e-5),
        torch.float16: Tolerance(relative_rmse=2e-3, max_abs=1e-2),
        torch.bfloat16: Tolerance(relative_rmse=1.5e-2, max_abs=6e-2),
    }
)


def assert_close(
    name: str, ours: Tensor, reference: Tensor, *, dtype: torch.dtype | None = None, factor: float = 1.0
) -> None:
    """Fails unless `ours` equals `reference` within the tolerance of the coarser of their dtypes.

    Integer and boolean tensors must be equal. Infinities must stand in the same places with the same sign.

    Args:
        name: what is compared; it begins the message.
        ours: the tensor under test.
        reference: what it should be, of the same shape.
        dtype: looks the tolerance up under this dtype instead (the dtype that the computation ran in).
        factor: widens both bounds, where a reason is given beside the call.

    Raises:
        AssertionError: naming the tensor, the figure that is too large, its bound and the worst place.
    """
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)} != {tuple(reference.shape)}"
    floating = ours.is_floating_point()
    assert floating == reference.is_floating_point(), f"{name}: dtype {ours.dtype} against {reference.dtype}"
    ours, reference = ours.detach().cpu(), reference.detach().cpu()
    if not floating:
        wrong = int((ours != reference).sum())
        assert wrong == 0, f"{name}: {wrong} of {ours.numel()} entries differ"
        return
    looked_up = dtype or max(
        (ours.dtype, reference.dtype), key=lambda candidate: TOLERANCE[candidate].relative_rmse
    )
    tolerance = TOLERANCE[looked_up]
    a, b = ours.double(), reference.double()
    for side, tensor in (("ours", a), ("reference", b)):
        nans = int(tensor.isnan().sum())
        assert nans == 0, f"{name}: {nans} of {tensor.numel()} entries of {side} are NaN"
    infinite = a.isinf() | b.isinf()
    assert torch.equal(a[infinite], b[infinite]), f"{name}: infinities differ in place or sign"
    a, b = a[~infinite], b[~infinite]
    if a.numel() == 0:
        return
    error = (a - b).abs()
    rmse = float(error.square().mean().sqrt())
    scale = float(b.square().mean().sqrt())
    relative = rmse / scale if scale > 0 else rmse
    largest = float(error.max()) / max(1.0, float(b.abs().max()))
    where = int(error.argmax())
    place = (
        f"worst entry {where} (flat): {float(a.flatten()[where]):.8g} against {float(b.flatten()[where]):.8g}"
    )
    bound = tolerance.relative_rmse * factor
    assert relative <= bound, f"{name}: relative RMSE {relative:.3g} > {bound:.3g} ({looked_up}); {place}"
    bound = tolerance.max_abs * factor
    assert largest <= bound, (
        f"{name}: largest scaled error {largest:.3g} > {bound:.3g} ({looked_up}); {place}"
    )
