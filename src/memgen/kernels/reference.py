"""The plain-torch definition of every fused operation: the specification, the CPU path, and the tests' other side."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

# T packed positions, M latents, V vocabulary, H hidden, N labels


def weave(table: Tensor, tokens: Tensor, latents: Tensor, sources: Tensor) -> Tensor:
    """Interleaves token embeddings and latents.

    Args:
        table: embedding table, (V, H).
        tokens: token id of each stream position, int64 (T,); any valid id where the position holds a latent.
        latents: (M, H), M may be 0.
        sources: index into `latents` where the position holds a latent, -1 where it holds a token, int64 (T,).

    Returns:
        The woven rows, (T, H), in the table's type. Gradient reaches the latents, each position's its own.
    """
    woven = table[tokens]
    places = torch.nonzero(sources >= 0).squeeze(1)
    if latents.shape[0] == 0:
        return woven
    return woven.index_copy(0, places, latents[sources[places]].to(woven.dtype))


class _LinearLogprob(torch.autograd.Function):
    """Chunked log-softmax of a linear map, read at one class per row; nothing of size (N, V) outlives a chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(hidden.shape[0], dtype=exact, device=hidden.device)
        normalisers = torch.empty_like(logprobs)
        for begin in range(0, hidden.shape[0], chunk):
            part = slice(begin, begin + chunk)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).to(exact)
            normalisers[part] = logits.logsumexp(dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - normalisers[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.chunk = chunk
        # A backward pass runs outside autocast; its logits must be those whose normalisers were kept.
        device = hidden.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        for begin in range(0, hidden.shape[0], ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            with torch.autocast(**ctx.autocast):
                logits = torch.nn.functional.linear(hidden[part], weight, bias).to(normalisers.dtype)
            # d logprob[target] / d logits = onehot - softmax
            grad_logits = (logits - normalisers[part, None]).exp_().mul_(-grad[part, None])
            grad_logits.scatter_add_(1, targets[part, None], grad[part, None])
            grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
        return grad_hidden, None, None, None, None


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk: int = 512
) -> Tensor:
    """Log-probability of a class under softmax(hidden @ weight.T + bias), for a frozen weight.

    Args:
        hidden: (N, H).
        weight: (V, H); no gradient is computed for it.
        targets: class of each row, int64 (N,).
        bias: (V,) or None; no gradient is computed for it.
        chunk: rows whose logits exist at the same time.

    Returns:
        (N,), float32 or wider.
    """
    return cast(Tensor, _LinearLogprob.apply(hidden, weight, bias, targets, chunk))
