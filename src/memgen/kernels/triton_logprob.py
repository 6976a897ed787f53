"""Linear log-probability with its row-wise part in Triton: cuBLAS makes the logits of a chunk, one kernel does the rest.

One program reads a row of logits once for normaliser, target and entropy, and once more to put the derivative in their
place, in their type, for the matrix product that follows. The chunks, the products and the autograd Function are those
of `reference.py`. The file is not called as its function: importing it would replace `memgen.kernels.linear_logprob`.
"""

from __future__ import annotations

from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from memgen.kernels.dispatch import require_runnable
from memgen.kernels.reference import RowSoftmax, chunked_logprob

# n rows of a chunk, V vocabulary

_MAX_BLOCK = 8192


# Our own, because `tl.sum` and `tl.max` cannot be interpreted if triton was imported before TRITON_INTERPRET was
# set.
@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _linear_logprob_fwd_kernel(
    logits, logits_row, targets, targets_step, logprobs, normalisers, entropies,
    V: tl.constexpr, WIDE: tl.constexpr, ENTROPY: tl.constexpr, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    # V is a constant: one vocabulary, one compilation, and Triton 3.6's interpreter cannot loop up to a variable.
    row = tl.program_id(0).to(tl.int64)
    pointer = logits + row * logits_row
    target = tl.load(targets + row * targets_step).to(tl.int64)
    tl.device_assert((target >= 0) & (target < V), "target outside the vocabulary")
    # INVERSE is the reciprocal of the temperature, as in `reference.tempered`.
    target_logit = tl.load(pointer + target).to(WIDE) * INVERSE
    columns = tl.arange(0, BLOCK)
    # Per lane, so that lanes are combined once, behind the loop. -1e30 stands for -inf: inf - inf is no number.
    largest = tl.full((BLOCK,), -1.0e30, WIDE)
    total = tl.full((BLOCK,), 0.0, WIDE)
    weighted = tl.full((BLOCK,), 0.0, WIDE)
    for begin in range(0, V, BLOCK):
        within = begin + columns < V
        value = tl.maximum(
            tl.load(pointer + begin + columns, mask=within, other=-float("inf")).to(WIDE) * INVERSE, -1.0e30
        )
        higher = tl.maximum(largest, value)
        shrink = tl.exp(largest - higher)
        share = tl.exp(value - higher)
        if ENTROPY:
            # sum of exp(z - largest) * (z - largest), moved to the new maximum
            weighted = shrink * (weighted + (largest - higher) * total)
            weighted += share * (value - higher)
        total = total * shrink + share
        largest = higher
    top = tl.reduce(largest, 0, _larger)
    shrink = tl.exp(largest - top)
    all_total = tl.reduce(total * shrink, 0, _add)
    log_total = tl.log(all_total)
    normaliser = top + log_total
    tl.store(normalisers + row, normaliser)
    tl.store(logprobs + row, (target_logit - top) - log_total)
    if ENTROPY:
        moved = shrink * (weighted + (largest - top) * total)
        tl.store(entropies + row, log_total - tl.reduce(moved, 0, _add) / all_total)
    if DERIVATIVE:
        for begin in range(0, V, BLOCK):
            within = begin + columns < V
            value = tl.load(pointer + begin + columns, mask=within, other=-float("inf")).to(WIDE) * INVERSE
            derivative = tl.where(begin + columns == target, 1.0, 0.0) - tl.exp(value - top) / all_total
            tl.store(
                pointer + begin + columns, (derivative * INVERSE).to(logits.dtype.element_ty), mask=within
            )


@triton.jit
def _linear_logprob_bwd_kernel(
    logits, logits_row, normalisers, entropies, grads, grads_step, V,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < V
    pointer = logits + row * logits_row + columns
    logit = tl.maximum(tl.load(pointer, mask=within, other=-float("inf")).to(WIDE) * INVERSE, -1.0e30)
    logprob = logit - tl.load(normalisers + row)
    # d entropy / d logits = -p (log p + entropy)
    slope = tl.exp(logprob) * (logprob + tl.load(entropies + row))
    grad = -tl.load(grads + row * grads_step) * slope
    tl.store(pointer, (grad * INVERSE).to(logits.dtype.element_ty), mask=within)


def _block(vocabulary: int) -> int:
    return min(triton.next_power_of_2(vocabulary), _MAX_BLOCK)


def _wide(logits: Tensor) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if logits.dtype == torch.float64 else (torch.float32, tl.float32)


@final
class TritonRows:
    """The row-wise part of `linear_logprob` in Triton. What is derived by the logits overwrites them."""

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, *, entropy: bool, derivative: bool, temperature: float = 1.0
    ) -> RowSoftmax:
        """As `reference.TorchRows.forward`; the derivative takes the logits' place, in their type."""
        count, vocabulary = logits.shape
        exact, wide = _wide(logits)
        logprobs = torch.empty(count, dtype=exact, device=logits.device)
        normalisers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        block = _block(vocabulary)
        _linear_logprob_fwd_kernel[(count,)](
            logits, logits.stride(0), targets, targets.stride(0), logprobs, normalisers,
            logprobs if entropies is None else entropies,
            V=vocabulary, WIDE=wide, ENTROPY=entropy, DERIVATIVE=derivative, BLOCK=block, INVERSE=1.0 / temperature,
            num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
        return RowSoftmax(logprobs, normalisers, entropies, logits if derivative else None)

    @staticmethod
    def entropy_gradient(
        logits: Tensor, normalisers: Tensor, entropies: Tensor, grad: Tensor, *, temperature: float = 1.0
    ) -> Tensor:
        """As `reference.TorchRows.entropy_gradient`; the gradient takes the logits' place, in their type."""
        count, vocabulary = logits.shape
        block = _block(vocabulary)
        _linear_logprob_bwd_kernel[(count, triton.cdiv(vocabulary, block))](
            logits, logits.stride(0), normalisers, entropies, grad, grad.stride(0), vocabulary,
            WIDE=_wide(logits)[1], BLOCK=block, INVERSE=1.0 / temperature, num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
        return logits


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = False,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Any:
    """As `reference.linear_logprob`."""
    require_runnable(_linear_logprob_fwd_kernel, hidden.device)
    return chunked_logprob(
        hidden,
        weight,
        targets,
        bias,
        rows=TritonRows,
        entropy=entropy,
        chunk=chunk,
        temperature=temperature,
    )


def row_logprob(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """As `kernels.row_logprob`."""
    require_runnable(_linear_logprob_fwd_kernel, logits.device)
    return TritonRows.forward(
        logits.contiguous(), targets, entropy=False, derivative=False, temperature=temperature
    ).logprobs
