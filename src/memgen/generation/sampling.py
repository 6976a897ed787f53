"""Sampling tokens. Every row has its own seed, so what is sampled for it does not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memgen.kernels import row_logprob, tempered


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are sampled."""

    max_new_tokens: int = 256
    """Limit of an answer's length; an answer that reaches it is truncated and marked as unfinished."""
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this probability. 1 is off."""
    top_k: int = 0
    """Sample from this many most probable tokens. 0 is off."""
    sample_decisions: bool = False
    """Sample a learned trigger's decisions (paper, Eq. 4) instead of taking the more probable one (released code)."""
    group_size: int = 1
    """Answers per prompt; the prompt is read once for all of them."""
    seed: int = 0
    """The seed from which those of the rows are derived."""
    static_step: Literal["auto", "on", "off"] = "auto"
    """Whether steps in which no row inserts have a fixed shape: auto on CUDA only, where they are recorded and replayed.

    The answers are the same; a learned trigger is then asked while the reasoner reads the boundary token, so that latents
    take a pass of their own."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if self.static_step not in ("auto", "on", "off"):
            raise ValueError(f"static_step must be auto, on or off, got {self.static_step!r}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")


def row_uniforms(seeds: Sequence[int], count: int) -> Float[Tensor, "rows count"]:
    """Uniform numbers in [0, 1), float64, reproducible for each seed."""
    rows = [
        torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


class Sampled(NamedTuple):
    """The next token of each row.

    Attributes:
        tokens: token ids, int64 (R,).
        logprobs: log-probability of each at its temperature, before top-k and top-p (R,). Greedy
            decoding (temperature 0) reports the model's own distribution.
    """

    tokens: Int[Tensor, " rows"]
    logprobs: Float[Tensor, " rows"]


def truncated(
    logits: Float[Tensor, "rows vocab"], settings: GenerationSettings
) -> Float[Tensor, "rows vocab"]:
    """Logits with -inf for the tokens that top-k and top-p remove."""
    if 0 < settings.top_k < logits.shape[-1]:
        threshold = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if settings.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # A token stays if the more probable ones before it do not hold top_p yet: the first always stays.
        removed = probs.cumsum(dim=-1) - probs >= settings.top_p
        logits = logits.masked_fill(removed.scatter(-1, index, removed), -torch.inf)
    return logits


def sample(
    logits: Float[Tensor, "rows vocab"], settings: GenerationSettings, uniforms: Float[Tensor, " rows"] | None
) -> Sampled:
    """Samples the next token of each row.

    Args:
        logits: float32 (R, V).
        settings: how to sample.
        uniforms: a number in [0, 1) per row; None only if greedy.
    """
    if settings.temperature == 0:
        tokens = logits.argmax(dim=-1)
        return Sampled(tokens, row_logprob(logits, tokens))
    assert uniforms is not None, "sampling needs one uniform number per row"
    kept = truncated(tempered(logits, settings.temperature), settings)
    mass = kept.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniforms.to(mass.device)[:, None] * mass[:, -1:]
    tokens = torch.searchsorted(mass, target, right=True).squeeze(-1)
    # Rounding may land behind the last token that has any probability.
    last = (kept > -torch.inf).long().cumsum(dim=-1).argmax(dim=-1)
    tokens = torch.minimum(tokens, last)
    return Sampled(tokens, row_logprob(logits, tokens, settings.temperature))
