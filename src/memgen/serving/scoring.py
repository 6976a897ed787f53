"""Log-probabilities of a prompt's own tokens, for harnesses that compare given answers (`echo` and `logprobs`).

The reasoner reads the prompt without latents: where in it a question ends and an answer begins is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memgen.kernels import chunk_rows
from memgen.model.memgen import MemGenModel
from memgen.types import InsertionPlan, TokenBatch


@dataclass(frozen=True)
class PromptScores:
    """Scores of a prompt's tokens from the second on.

    Attributes:
        logprobs: log-probability of each.
        tops: the most probable tokens in its place, best first, with their log-probabilities.
    """

    logprobs: list[float]
    tops: list[list[tuple[int, float]]]


@torch.no_grad()
def prompt_scores(model: MemGenModel, prompt: Sequence[int], alternatives: int = 1) -> PromptScores:
    """Scores a prompt.

    Args:
        model: its reasoner reads.
        prompt: token ids, at least one.
        alternatives: how many most probable tokens of each place to give.

    Raises:
        ValueError: if the prompt is empty or longer than the reasoner's context.
    """
    context = model.reasoner.backbone.context_length
    if context is not None and len(prompt) > context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens does not fit into the reasoner's context of {context}"
        )
    batch = TokenBatch.from_rows([list(prompt)])
    if len(prompt) == 1:
        return PromptScores([], [])
    read = torch.ones_like(batch.ids, dtype=torch.bool)
    read[0, -1] = False
    hidden = model(batch, InsertionPlan.empty(1), read).hidden
    targets = batch.ids[0, 1:].to(hidden.device)
    scores = PromptScores([], [])
    size = chunk_rows(model.reasoner.backbone.head.weight)
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logprobs = model.reasoner.logits(part).log_softmax(dim=-1)
        top = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
        scores.logprobs.extend(logprobs.gather(-1, wanted[:, None]).squeeze(-1).tolist())
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            scores.tops.append(list(zip(ids, values, strict=True)))
    return scores
