"""What tests look at in a `Generation`."""

from __future__ import annotations

import torch
from torch import Tensor

from memgen.types import Decision, Generation


def logprobs(generation: Generation, row: int) -> Tensor:
    """Log-probability of each new token of an answer, float32."""
    return torch.tensor(generation.turns[row].logprobs)


def invoke_probs(generation: Generation, row: int) -> Tensor:
    """The trigger's probability before each new token of an answer, float32."""
    return torch.tensor(generation.turns[row].invoke_probs)


def asked_at(generation: Generation, row: int) -> list[int]:
    """The new tokens of an answer before which the trigger was asked."""
    return [i for i, d in enumerate(generation.turns[row].decisions) if d != Decision.NOT_ASKED]
