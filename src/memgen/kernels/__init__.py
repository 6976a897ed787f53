"""Tensor operations: plain-torch definitions and their Triton kernels.

The functions here run the kernel on CUDA and the definition elsewhere; `forced` makes either run. Triton is imported
when a kernel is used for the first time.

A kernel's indices are not checked against their tables, as that would wait for the device: TRITON_DEBUG=1 checks them
on it.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from memgen.kernels import reference
from memgen.kernels.dispatch import Implementation, chosen, forced
from memgen.kernels.reference import Logprobs, chunk_rows, tempered

__all__ = [
    "Implementation",
    "Logprobs",
    "chosen",
    "chunk_rows",
    "forced",
    "interleave",
    "linear_logprob",
    "row_logprob",
    "tempered",
]

# T packed positions, M latents, V vocabulary, H hidden, N labels


def interleave(table: Tensor, tokens: Tensor, latents: Tensor, sources: Tensor) -> Tensor:
    """Interleaves token embeddings and latents in one packed stream.

    Args:
        table: embedding table, (V, H). It is frozen: no gradient is computed for it.
        tokens: token id of each stream position, integers (T,); any valid id where the position holds a latent.
        latents: (M, H), M may be 0.
        sources: index into `latents` where the position holds a latent, -1 where it holds a token, integers (T,).

    Returns:
        The stream, (T, H), in the table's type. Gradient reaches the latents, the sum over a latent's places,
        accumulated in float32 or wider.

    Raises:
        ValueError: if shapes do not fit, an index is no integer, or the table would need a gradient.
    """
    _check_table(table, latents)
    _check_integers(tokens=tokens, sources=sources)
    if tokens.ndim != 1 or tokens.shape != sources.shape:
        raise ValueError(
            f"tokens and sources must be vectors of the same length, got {_shape(tokens)} and {_shape(sources)}"
        )
    if chosen(table.device) == "reference":
        return reference.interleave(table, tokens, latents, sources)
    from memgen.kernels import triton_interleave

    return triton_interleave.interleave(table, tokens, latents, sources)


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: Literal[False] = False,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: Literal[True],
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Logprobs: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    entropy: bool = False,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Tensor | Logprobs:
    """Log-probability of a class under softmax((hidden @ weight.T + bias) / temperature), for a frozen weight.

    Args:
        hidden: (N, H).
        weight: (V, H). It is frozen: no gradient is computed for it.
        targets: class of each row, integers (N,).
        bias: (V,) or None; likewise frozen.
        entropy: whether to return the entropy of each row's distribution too.
        chunk: rows whose logits exist at the same time. Default: as many as fit a number of bytes
            (`reference.chunk_rows`).
        temperature: divides the logits, in float32 or wider, as `tempered` does.

    Returns:
        (N,), float32 or wider; with `entropy`, `Logprobs`, whose two tensors both carry gradient.

    Raises:
        ValueError: if shapes do not fit, targets are no integers, or weight or bias would need a gradient.
    """
    _check_integers(targets=targets)
    _check_frozen(weight=weight, bias=bias)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (rows, {weight.shape[-1]}) for a weight {_shape(weight)}, got {_shape(hidden)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"every row has one target: hidden is {_shape(hidden)}, targets {_shape(targets)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one row, got {chunk}")
    if not temperature > 0:
        raise ValueError(f"a temperature that logits are divided by is above 0, got {temperature}")
    if chosen(hidden.device) == "reference":
        return reference.linear_logprob(
            hidden, weight, targets, bias, entropy=entropy, chunk=chunk, temperature=temperature
        )
    from memgen.kernels import triton_logprob

    return triton_logprob.linear_logprob(
        hidden, weight, targets, bias, entropy=entropy, chunk=chunk, temperature=temperature
    )


def row_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of a class in each row of logits, computed as `linear_logprob` computes it from its own.

    Args:
        logits: float32 or wider, (N, V). They are left as they are; no gradient is computed.
        targets: class of each row, int64 (N,).
        temperature: divides the logits, as `tempered` does.

    Returns:
        (N,), in the logits' type.
    """
    if chosen(logits.device) == "reference":
        return reference.TorchRows.forward(
            logits, targets, entropy=False, derivative=False, temperature=temperature
        ).logprobs
    from memgen.kernels import triton_logprob

    return triton_logprob.row_logprob(logits, targets, temperature)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_frozen(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which is not computed: the reasoner is frozen; "
                f"call requires_grad_(False) on it, or pass {name}.detach()"
            )


def _check_table(table: Tensor, latents: Tensor) -> None:
    _check_frozen(table=table)
    if table.ndim != 2 or latents.ndim != 2 or table.shape[1] != latents.shape[1]:
        raise ValueError(
            f"table and latents must be (entries, hidden) of one hidden size, got {_shape(table)} and {_shape(latents)}"
        )


def _check_integers(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
