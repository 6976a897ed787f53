"""The fused latent insertion in Triton: one pass forward, and the gather of the latents' gradients backward.

The backward pass gathers: one program sums the gradients of all places of one latent in float32 and writes it once.
So the order of the sum is fixed, unlike that of atomic additions, and a resumed run stays bit exact.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memgen.kernels.dispatch import require_runnable

# T packed positions, M latents, V vocabulary, H hidden

_TILE_ELEMENTS = 4096  # of a (positions, hidden) tile: 32 for each of a program's 128 threads


@triton.jit
def _interleave_fwd_kernel(
    table, table_row, table_column, tokens, tokens_step, latents, latents_row, latents_column,
    sources, sources_step, packed, T, H, V, M,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = places < T
    source = tl.load(sources + places * sources_step, mask=inside, other=-1).to(tl.int64)
    is_latent = inside & (source >= 0)
    is_token = inside & (source < 0)
    ids = tl.load(tokens + places * tokens_step, mask=is_token, other=0).to(tl.int64)
    tl.device_assert((ids >= 0) & (ids < V), "token id outside the embedding table")
    tl.device_assert(source < M, "source outside the latents")
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns[None, :] < H
    embedded = tl.load(
        table + ids[:, None] * table_row + columns[None, :] * table_column,
        mask=is_token[:, None] & within, other=0.0,
    )  # fmt: skip
    latent = tl.load(
        latents + source[:, None] * latents_row + columns[None, :] * latents_column,
        mask=is_latent[:, None] & within, other=0.0,
    )  # fmt: skip
    value = tl.where(is_latent[:, None], latent.to(packed.dtype.element_ty), embedded)
    tl.store(packed + places[:, None] * H + columns[None, :], value, mask=inside[:, None] & within)


@triton.jit
def _interleave_bwd_kernel(
    grad, grad_row, grad_column, order, starts, latents_grad, H, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < H
    position = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    total = tl.full((BLOCK,), 0, WIDE)
    while position < end:
        place = tl.load(order + position)
        total += tl.load(grad + place * grad_row + columns * grad_column, mask=within, other=0.0).to(WIDE)
        position += 1
    tl.store(latents_grad + latent * H + columns, total.to(latents_grad.dtype.element_ty), mask=within)


def _wide(*tensors: Tensor) -> Any:
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def _block(hidden: int) -> int:
    """The largest power of two that divides the hidden size, so that no lane idles; else one that covers it."""
    for block in (1024, 512, 256, 128):
        if hidden % block == 0:
            return block
    return min(triton.next_power_of_2(max(hidden, 1)), 1024)


def _gather_gradient(grad: Tensor, sources: Tensor, latents: Tensor) -> Tensor:
    """Gradient of each latent: the sum over its places, (M, H)."""
    count, hidden = latents.shape
    gathered = torch.empty(count, hidden, dtype=latents.dtype, device=latents.device)
    if gathered.numel() == 0:
        return gathered
    ordered, order = torch.sort(sources, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=sources.device, dtype=ordered.dtype))
    block = _block(hidden)
    _interleave_bwd_kernel[(count, triton.cdiv(hidden, block))](
        grad, grad.stride(0), grad.stride(1), order, starts, gathered, hidden,
        WIDE=_wide(grad, latents), BLOCK=block,
    )  # fmt: skip
    return gathered


class Interleave(torch.autograd.Function):
    """`interleave`: forward as a gather of tokens and latents, backward as a gather of the latents' gradients."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor, latents: Tensor, sources: Tensor) -> Tensor:
        """Computes, and keeps what the backward pass reads."""
        length, hidden = tokens.shape[0], table.shape[1]
        packed = torch.empty(length, hidden, dtype=table.dtype, device=table.device)
        ctx.save_for_backward(sources, latents)
        if packed.numel() == 0:
            return packed
        block = _block(hidden)
        tile = max(1, _TILE_ELEMENTS // block)
        _interleave_fwd_kernel[(triton.cdiv(length, tile), triton.cdiv(hidden, block))](
            table, table.stride(0), table.stride(1), tokens, tokens.stride(0),
            latents, latents.stride(0), latents.stride(1), sources, sources.stride(0),
            packed, length, hidden, table.shape[0], latents.shape[0],
            TILE=tile, BLOCK=block,
        )  # fmt: skip
        return packed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
        """Gradient by the only argument that is trained."""
        sources, latents = ctx.saved_tensors
        return None, None, _gather_gradient(grad, sources, latents), None


def interleave(table: Tensor, tokens: Tensor, latents: Tensor, sources: Tensor) -> Tensor:
    """As `reference.interleave`."""
    require_runnable(_interleave_fwd_kernel, table.device)
    packed: Tensor = Interleave.apply(table, tokens, latents, sources)
    return packed
