"""Decoding with latent memory: answers insert at different steps, and none waits for another or is read again for it.

One pass of the reasoner per step feeds each live answer its new token, and K latents behind it where the answer inserts
(`step.py`). Weaver and trigger keep KV caches of their own and read only what is new. Finished answers leave the batch at
once. A prompt is read once for all its answers (`prompt.py`).

Differs from the released code: it re-reads the whole batch at every insertion, keeps finished rows going, and samples
the tokens behind the limit on insertions at another temperature; see docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memgen.generation.prompt import prompt_streams, read_prompts
from memgen.generation.sampling import GenerationSettings
from memgen.generation.state import Decide, DecodingState, Hooks, Intervention, Observer, Stop, to_host
from memgen.generation.static_step import keep_step
from memgen.generation.step import DecodingSteps
from memgen.model.memgen import MemGenModel
from memgen.types import Generation, InsertionPlan

__all__ = ["Decide", "Intervention", "Observer", "Stop", "generate"]


@torch.no_grad()
def generate(
    model: MemGenModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    row_seeds: Sequence[int] | None = None,
    observe: Observer | None = None,
    intervene: Intervention | None = None,
    keep_latents: bool = False,
    earlier: InsertionPlan | None = None,
    earlier_latents: Sequence[Sequence[Tensor]] | None = None,
    stop: Stop | None = None,
    decide: Decide | None = None,
) -> Generation:
    """Answers prompts, inserting latents where the trigger says so.

    Args:
        model: in evaluation mode, so that no dropout acts.
        prompts: token ids of each prompt, not padded.
        settings: how to sample; `group_size` answers per prompt, those of a prompt next to each other.
        row_seeds: a seed for each answer; what is sampled for it depends on its own seed alone. Default: from
            `settings.seed`.
        observe: is told of each token and insertion as it happens.
        intervene: replaces or removes latents before they are inserted (analysis); only with one answer per prompt.
        keep_latents: whether to return the inserted latents.
        earlier: where latents of earlier turns lie inside the prompts (boundaries.keep_turn_latents), one row per
            prompt. Reasoner and weaver read them; they do not count as insertions, and the result's plan leaves them out.
        earlier_latents: those latents, for each prompt in order of its points, (K, H) each. Set together with
            `earlier`.
        stop: ends an answer besides the end tokens; asked for each live answer after each token that is not an end
            token. An answer that it ends is marked as finished.
        decide: decides in place of the trigger (analysis), which is asked all the same.

    Raises:
        ValueError: if a prompt is empty or does not fit into the reasoner's context with its answer, or if earlier
            latents do not fit their prompts.
        RuntimeError: if the model is in training mode.
    """
    if model.training:
        raise RuntimeError(
            "generate needs model.eval(): dropout in rollouts would train on another distribution"
        )
    _check(prompts, settings, row_seeds, intervene)
    streams = prompt_streams(model, prompts, earlier, earlier_latents)
    hooks = Hooks(observe, intervene, stop, keep_latents, decide)
    state = DecodingState(model, prompts, max(streams.lengths), settings, row_seeds, hooks)
    first = read_prompts(state, streams)
    steps = DecodingSteps(state)
    state.append(steps.live, *to_host(*state.sample(first, steps.live)))
    for step in range(1, settings.max_new_tokens + 1):
        state.mark_finished(steps.live)
        if step == settings.max_new_tokens or all(state.answers[index].finished for index in steps.live):
            break
        steps.drop_finished()
        steps.run()
    if state.static is not None:
        keep_step(state.static)
    return state.result()


def _check(
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    row_seeds: Sequence[int] | None,
    intervene: Intervention | None,
) -> None:
    size = settings.group_size
    if intervene is not None and size > 1:
        raise ValueError(f"intervene works with group_size 1, got {size}")
    if row_seeds is not None and len(row_seeds) != len(prompts) * size:
        raise ValueError(
            f"{len(prompts)} prompts x group_size {size} need as many row_seeds, got {len(row_seeds)}"
        )
    if not prompts:
        raise ValueError("there is no prompt to answer")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
