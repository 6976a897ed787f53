"""Which implementation of an operation runs: its Triton kernel on CUDA, its plain-torch definition elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Implementation = Literal["reference", "triton"]

# A plain variable, not one of a context or thread: autograd recomputes checkpointed segments in threads of its own,
# and they must choose what their forward pass chose.
_forced: Implementation | None = None


@contextmanager
def forced(implementation: Implementation) -> Iterator[None]:
    """Makes every operation of this package run in one implementation, whatever the device. May be nested.

    Activation checkpointing recomputes in the backward pass: keep that inside too.

    Args:
        implementation: "reference" (plain torch) or "triton".

    Raises:
        ValueError: if there is no such implementation.
        ModuleNotFoundError: if "triton" is asked for and triton is not installed.
    """
    global _forced
    if implementation not in get_args(Implementation):
        raise ValueError(f'kernels are "reference" or "triton", got {implementation!r}')
    if implementation == "triton" and not _triton_installed():
        raise ModuleNotFoundError(
            "the Triton kernels were asked for, but triton is not installed: pip install triton, "
            'or use the "reference" kernels'
        )
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def chosen(device: torch.device) -> Implementation:
    """The implementation that runs on tensors of a device."""
    if _forced is not None:
        return _forced
    if device.type != "cuda":
        return "reference"
    return "triton" if _triton_for_cuda() else "reference"


def require_runnable(kernel: object, device: torch.device) -> None:
    """Compiled kernels need a GPU; interpreted ones run anywhere.

    Args:
        kernel: what `triton.jit` made. It looks at TRITON_INTERPRET once, when it sees a function.
        device: of the tensors.

    Raises:
        RuntimeError: if the kernel is compiled and the device is no GPU.
    """
    if device.type != "cuda" and type(kernel).__name__ != "InterpretedFunction":
        raise RuntimeError(
            f"the Triton kernels run on CUDA, but the tensors are on {device}; use the reference kernels there, or, "
            "to try the kernels without a GPU, set TRITON_INTERPRET=1 before they are used for the first time"
        )


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _triton_for_cuda() -> bool:
    if _triton_installed():
        return True
    warnings.warn(
        "triton is not installed: the kernels' plain-torch definitions run on the GPU, which is slower",
        stacklevel=2,
    )
    return False
