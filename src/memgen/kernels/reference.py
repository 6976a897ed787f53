"""The plain-torch definition of every fused operation: the specification, the CPU path, and the reference in tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

# T packed positions, M latents, V vocabulary, H hidden, N labels


def interleave(table: Tensor, tokens: Tensor, latents: Tensor, sources: Tensor) -> Tensor:
    """Interleaves token embeddings and latents in one packed stream.

    Args:
        table: embedding table, (V, H). It is frozen.
        tokens: token id of each stream position, integers (T,); any valid id where the position holds a latent.
        latents: (M, H), M may be 0.
        sources: index into `latents` where the position holds a latent, -1 where it holds a token, integers (T,).

    Returns:
        The stream, (T, H), in the table's type. Gradient reaches the latents, the sum over a latent's places,
        accumulated in float32 or wider.
    """
    packed = table[tokens]
    if latents.shape[0] == 0:
        return packed
    places = torch.nonzero(sources >= 0).squeeze(1)
    exact = latents.to(torch.promote_types(latents.dtype, torch.float32))
    # In place: `packed` is a copy of the table's rows already.
    return packed.index_copy_(0, places, exact[sources[places]].to(packed.dtype))


# What one chunk of logits may take, float32. Measured on a CPU, where chunks that fit its caches are as fast as large
# ones but for the re-reading of the weight; a GPU needs more rows than that to be busy.
CPU_CHUNK_BYTES = 32 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20
MAX_CHUNK_BYTES = 128 * 2**20
_CPU_ROWS = 128


def chunk_rows(weight: Tensor) -> int:
    """Rows of logits to hold at the same time: `MAX_CHUNK_BYTES` on a CPU and `GPU_CHUNK_BYTES` elsewhere, at most.

    On a CPU fewer are enough: what fits the caches, but no less than a matrix product needs to be efficient.
    """
    row = max(1, weight.shape[0] * torch.promote_types(weight.dtype, torch.float32).itemsize)
    if weight.device.type != "cpu":
        return max(1, GPU_CHUNK_BYTES // row)
    return max(1, min(max(CPU_CHUNK_BYTES // row, _CPU_ROWS), MAX_CHUNK_BYTES // row))


@dataclass(frozen=True)
class RowSoftmax:
    """Results for the rows of a chunk of logits.

    Attributes:
        logprobs: of the targets, (n,).
        normalisers: logarithm of the sum of exponentials, (n,).
        entropies: (n,), if they were asked for.
        derivative: of the log-probabilities by the logits, (n, V), if it was asked for. May share the logits' storage.
    """

    logprobs: Tensor
    normalisers: Tensor
    entropies: Tensor | None
    derivative: Tensor | None


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature: the one way in which tokens are sampled and scored.

    Args:
        logits: float32 or wider; lower types would round the quotients.
        temperature: above 0. At 1 the logits come back as they are.
    """
    # A product with the reciprocal, which a GPU's division by a number is too: one rounding, the same everywhere.
    return logits if temperature == 1.0 else logits * (1.0 / temperature)


@final
class TorchRows:
    """The row-wise part of `linear_logprob` in plain torch. Every method may overwrite the logits."""

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, *, entropy: bool, derivative: bool, temperature: float = 1.0
    ) -> RowSoftmax:
        """Log-probability of each row's target, and what else is asked for.

        The log-probabilities are the same, bit for bit, whatever else is asked for. Without entropy and derivative the
        logits are left as they are.

        Args:
            logits: (n, V).
            targets: (n,).
            entropy: whether to compute entropies.
            derivative: whether to compute the derivative by the logits.
            temperature: divides the logits, in float32 or wider.
        """
        exact = tempered(logits.to(torch.promote_types(logits.dtype, torch.float32)), temperature)
        largest = exact.amax(dim=-1, keepdim=True)
        target = exact.gather(1, targets[:, None]) - largest
        probs = exact.softmax(dim=-1)
        # The largest probability is at least 1/V, so its logarithm is exact enough to normalise with.
        log_sum = probs.amax(dim=-1, keepdim=True).log_().neg_()
        entropies = None
        if entropy:
            # A class that is ruled out (-inf) contributes 0, not 0 * inf.
            below = exact.sub_(largest).clamp_(min=torch.finfo(exact.dtype).min)
            entropies = log_sum[:, 0] - torch.linalg.vecdot(probs, below)
        if derivative:
            probs.neg_().scatter_add_(1, targets[:, None], torch.ones_like(target))
            if temperature != 1.0:
                probs.mul_(1.0 / temperature)
        return RowSoftmax(
            (target - log_sum)[:, 0], (largest + log_sum)[:, 0], entropies, probs if derivative else None
        )

    @staticmethod
    def entropy_gradient(
        logits: Tensor, normalisers: Tensor, entropies: Tensor, grad: Tensor, *, temperature: float = 1.0
    ) -> Tensor:
        """Gradient of sum(grad * entropies) by the logits, (n, V).

        Args:
            logits: (n, V).
            normalisers: as `forward` gave them, (n,).
            entropies: likewise.
            grad: upstream gradient, (n,).
            temperature: as in `forward`.
        """
        logprobs = tempered(logits.to(normalisers.dtype), temperature).sub_(normalisers[:, None])
        logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
        # d entropy / d logits = -p (log p + entropy)
        weights = logprobs.exp().mul_(tempered(-grad, temperature)[:, None])
        return weights.mul_(logprobs.add_(entropies[:, None]))


class Logprobs(NamedTuple):
    """Log-probability of a class per row, and the entropy of the distribution that it was read from."""

    logprobs: Tensor
    entropies: Tensor


def times_weight(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows @ weight, accumulated and returned in float32 or wider.

    Args:
        rows: (n, V), float32 or wider, or in `dtype`.
        weight: (V, H).
        dtype: what the factors are rounded to where a device multiplies low precision faster.
    """
    with torch.autocast(weight.device.type, enabled=False):
        if torch.promote_types(dtype, torch.float32) == dtype:
            return rows.to(dtype) @ weight.to(dtype)
        if weight.device.type == "cuda":
            return torch.mm(rows.to(dtype), weight.to(dtype), out_dtype=torch.float32)
        # Few CPUs multiply low precision fast, and torch rounds what they return: widen the weight, piece by piece.
        product = torch.zeros(rows.shape[0], weight.shape[1], dtype=torch.float32, device=rows.device)
        step = max(1, CPU_CHUNK_BYTES // 2 // (4 * max(1, weight.shape[1])))
        for begin in range(0, weight.shape[0], step):
            part = slice(begin, begin + step)
            product.addmm_(rows[:, part].float(), weight[part].to(dtype).float())
        return product


class LinearLogprob(torch.autograd.Function):
    """Chunked log-softmax of a linear map, read at one class per row; nothing of size (N, V) outlives a chunk.

    A row's log-probability is one number, so its gradient is the upstream number times a derivative that the forward
    pass can compute while the logits are there: the backward pass makes no logits again. The entropy is mostly watched
    and seldom trained, so its derivative is left to the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Any,
        chunk: int,
        entropy: bool,
        differentiable: bool,
        temperature: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes, and keeps what the backward pass reads."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(hidden.shape[0], dtype=exact, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else None
        derivative = torch.empty(hidden.shape, dtype=exact, device=hidden.device) if differentiable else None
        for begin in range(0, hidden.shape[0], chunk):
            part = slice(begin, begin + chunk)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            dtype = logits.dtype
            result = rows.forward(
                logits, targets[part], entropy=entropy, derivative=differentiable, temperature=temperature
            )
            del logits
            logprobs[part] = result.logprobs
            normalisers[part] = result.normalisers
            if entropies is not None:
                entropies[part] = result.entropies
            if derivative is not None:
                derivative[part] = times_weight(result.derivative, weight, dtype)
            del result
        if differentiable:
            kept = (hidden, weight, bias, normalisers, entropies) if entropy else (None,) * 5
            ctx.save_for_backward(derivative, *kept)
            ctx.set_materialize_grads(False)
            ctx.rows, ctx.chunk, ctx.dtype, ctx.temperature = rows, chunk, hidden.dtype, temperature
            # A backward pass runs outside autocast; its logits must be those whose normalisers were kept.
            device = hidden.device.type
            ctx.autocast = {
                "device_type": device,
                "dtype": torch.get_autocast_dtype(device),
                "enabled": torch.is_autocast_enabled(device),
            }
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Any, ...]:
        """Gradient by the only argument that is trained."""
        derivative, hidden, weight, bias, normalisers, entropies = ctx.saved_tensors
        grad = None
        if grad_logprobs is not None:
            grad = derivative * grad_logprobs[:, None]
        if grad_entropies is not None:
            grad = torch.zeros_like(derivative) if grad is None else grad
            for begin in range(0, hidden.shape[0], ctx.chunk):
                part = slice(begin, begin + ctx.chunk)
                with torch.autocast(**ctx.autocast):
                    logits = torch.nn.functional.linear(hidden[part], weight, bias)
                dtype = logits.dtype
                by_logits = ctx.rows.entropy_gradient(
                    logits,
                    normalisers[part],
                    entropies[part],
                    grad_entropies[part],
                    temperature=ctx.temperature,
                )
                del logits
                grad[part] += times_weight(by_logits, weight, dtype)
                del by_logits
        return (None if grad is None else grad.to(ctx.dtype), *(None,) * 8)


def chunked_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    rows: type,
    entropy: bool,
    chunk: int | None,
    temperature: float,
) -> Tensor | Logprobs:
    """`linear_logprob`, with the row-wise part given."""
    differentiable = torch.is_grad_enabled() and hidden.requires_grad
    logprobs, entropies = LinearLogprob.apply(
        hidden,
        weight,
        bias,
        targets.long(),
        rows,
        chunk or chunk_rows(weight),
        entropy,
        differentiable,
        temperature,
    )
    return logprobs if entropies is None else Logprobs(logprobs, entropies)


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
    """Log-probability of a class under softmax((hidden @ weight.T + bias) / temperature), for a frozen weight.

    Args:
        hidden: (N, H).
        weight: (V, H); no gradient is computed for it.
        targets: class of each row, integers (N,).
        bias: (V,) or None; no gradient is computed for it.
        entropy: whether to return the entropy of each row's distribution too.
        chunk: rows whose logits exist at the same time. Default: what `chunk_rows` finds.
        temperature: divides the logits, in float32 or wider.

    Returns:
        (N,), float32 or wider; with `entropy`, `Logprobs`, whose two tensors both carry gradient.
    """
    return chunked_logprob(
        hidden,
        weight,
        targets,
        bias,
        rows=TorchRows,
        entropy=entropy,
        chunk=chunk,
        temperature=temperature,
    )
