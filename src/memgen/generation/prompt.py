"""Reading the prompts: each distinct prompt once, with the latents of earlier turns in it and those of its own end.

The end of a prompt is a boundary like any other: the trigger is asked once per prompt, and each answer decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memgen.generation.state import DecodingState, to_host
from memgen.kernels import interleave
from memgen.model.cache import PassSegment, upload
from memgen.model.memgen import MemGenModel
from memgen.model.stream import Stream
from memgen.model.trigger import Boundary
from memgen.types import InsertionKind, InsertionPlan

# P prompts, A answers, M latents of earlier turns, K latents, H hidden size


@dataclass(frozen=True)
class PromptStreams:
    """The prompts as streams: their tokens with the latents of earlier turns between them.

    Attributes:
        streams: one for each prompt.
        latents: those of all prompts, (M, H); the streams' sources are indices into it.
    """

    streams: list[Stream]
    latents: Tensor

    @property
    def lengths(self) -> list[int]:
        """Positions of each prompt."""
        return [stream.length for stream in self.streams]


def prompt_streams(
    model: MemGenModel,
    prompts: Sequence[Sequence[int]],
    earlier: InsertionPlan | None,
    latents: Sequence[Sequence[Tensor]] | None,
) -> PromptStreams:
    """Puts the latents of earlier turns into the prompts.

    Args:
        model: who reads them.
        prompts: token ids of each prompt.
        earlier: where latents of earlier turns lie inside the prompts; None: there are none.
        latents: those latents, for each prompt in order of its points, (K, H) each. None together with `earlier`.

    Raises:
        ValueError: if the two do not fit each other or the prompts.
    """
    if (earlier is None) != (latents is None):
        raise ValueError("earlier and earlier_latents belong together; give both or neither")
    points = [[] for _ in prompts] if earlier is None else earlier.rows()
    blocks = [[] for _ in prompts] if latents is None else [list(row) for row in latents]
    if not len(points) == len(blocks) == len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need as many rows in earlier and earlier_latents, "
            f"got {len(points)} and {len(blocks)}"
        )
    hidden = model.reasoner.backbone.hidden_size
    streams, total = [], 0
    for index, (prompt, row_points, row_blocks) in enumerate(zip(prompts, points, blocks, strict=True)):
        _check_earlier(index, len(prompt), row_points, row_blocks, hidden)
        numbers = []
        for block in row_blocks:
            numbers.append(np.arange(total, total + len(block)))
            total += len(block)
        streams.append(Stream(np.asarray(prompt, dtype=np.int64), row_points, numbers))
    flat = [block.to(model.device) for row in blocks for block in row]
    return PromptStreams(streams, torch.cat(flat) if flat else torch.zeros(0, hidden, device=model.device))


def _check_earlier(
    index: int, length: int, points: Sequence[tuple[int, int]], blocks: Sequence[Tensor], hidden: int
) -> None:
    if len(points) != len(blocks):
        raise ValueError(
            f"prompt {index} has {len(points)} earlier points but {len(blocks)} blocks of latents"
        )
    for (point, _), block in zip(points, blocks, strict=True):
        if point >= length:
            raise ValueError(
                f"prompt {index} has {length} tokens, but earlier latents lie before token {point}"
            )
        if block.ndim != 2 or block.shape[1] != hidden:
            raise ValueError(
                f"prompt {index}: earlier latents have shape {tuple(block.shape)}, not (K, {hidden})"
            )


def read_prompts(state: DecodingState, prompts: PromptStreams) -> Tensor:
    """Reads each prompt once, inserts at its end where the trigger says so, and gives each answer its own cache rows.

    Returns:
        The state that predicts each answer's first token, (A, H).
    """
    lengths, count = prompts.lengths, len(state.prompts)
    embeddings = _embeddings(state, prompts)
    # Behind the prompts only their last states are needed, unless the weaver reads them all.
    text = PassSegment(range(count), lengths, read=None if state.reads_states else [1] * count)
    states = end_states = None
    if state.reads_states or state.model.trigger.needs_states:
        states = end_states = state.read(embeddings, [text])
        if state.reads_states:
            end_states = states[upload(np.cumsum(lengths) - 1, state.device)]
    invoked = _decide(state, end_states)
    woven = [prompt for prompt in range(count) if any(invoked[index] for index in _answers(state, prompt))]
    readable = states if state.reads_states else embeddings
    assert readable is not None, "states were read first if the weaver reads them"
    unread = list(readable.split(lengths))
    latents = _weave(state, unread, lengths, woven)
    woven, latents = _left(unread, woven, latents, invoked)
    end_states, behind = _read_latents(state, embeddings, end_states, text, woven, latents)
    state.spread()
    _insert(state, unread, woven, latents, behind, invoked)
    final = []
    for index, invoke in enumerate(invoked):
        prompt = index // state.settings.group_size
        final.append(behind[woven.index(prompt)][-1] if invoke else end_states[prompt])
    return torch.stack(final)


def _embeddings(state: DecodingState, prompts: PromptStreams) -> Tensor:
    return interleave(
        state.model.reasoner.backbone.embedding,
        upload(np.concatenate([stream.ids for stream in prompts.streams]), state.device),
        prompts.latents,
        upload(np.concatenate([stream.sources for stream in prompts.streams]), state.device),
    )


def _answers(state: DecodingState, prompt: int) -> range:
    """The answers to a prompt."""
    size = state.settings.group_size
    return range(prompt * size, (prompt + 1) * size)


def _decide(state: DecodingState, end_states: Tensor | None) -> list[bool]:
    """Whether each answer inserts at the end of its prompt."""
    if not state.model.weaver.config.prompt_latents:
        for index in range(len(state.answers)):
            state.no_decision(index)
        return [False] * len(state.answers)
    boundary = Boundary(rows=range(len(state.prompts)), unread=state.prompts, states=end_states)
    (probs,) = to_host(state.ask(boundary))
    invoked = []
    for index, answer in enumerate(state.answers):
        answer.trigger_read = len(answer.prompt)
        invoked.append(state.decide(index, probs[index // state.settings.group_size], 0))
    return invoked


def _weave(state: DecodingState, unread: list[Tensor], lengths: list[int], woven: list[int]) -> list[Tensor]:
    """A block of latents for each prompt that some answer inserts at."""
    if not woven:
        return []
    return state.weave(
        torch.cat([unread[prompt] for prompt in woven]),
        [lengths[prompt] for prompt in woven],
        InsertionKind.PROMPT,
        woven,
        [_answers(state, prompt)[0] for prompt in woven],
    )


def _left(
    unread: list[Tensor], woven: list[int], latents: list[Tensor], invoked: list[bool]
) -> tuple[list[int], list[Tensor]]:
    """The prompts that keep a block, and the blocks; an intervention may have removed some, of one answer per prompt."""
    left = []
    for prompt, block in zip(woven, latents, strict=True):
        if block.shape[0]:
            left.append((prompt, block))
        else:
            unread[prompt] = unread[prompt][:0]  # The weaver has read the prompt.
            invoked[prompt] = False
    return [prompt for prompt, _ in left], [block for _, block in left]


def _read_latents(
    state: DecodingState,
    embeddings: Tensor,
    end_states: Tensor | None,
    text: PassSegment,
    woven: list[int],
    latents: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """States at every prompt's last token, (P, H), and those of each block of latents that are needed."""
    segments, sizes = state.latent_segments(woven, latents), state.latents_read(latents)
    if end_states is None:
        packed = torch.cat([embeddings, *(block.to(embeddings.dtype) for block in latents)])
        states = state.read(packed, [text, *segments])
        count = len(state.prompts)
        return states[:count], list(states[count:].split(sizes)) if woven else []
    if not woven:
        return end_states, []
    return end_states, list(state.read(torch.cat(latents), segments).split(sizes))


def _insert(
    state: DecodingState,
    unread: list[Tensor],
    woven: list[int],
    latents: list[Tensor],
    behind: list[Tensor],
    invoked: list[bool],
) -> None:
    """Records who inserted. The others' cache rows forget the latents that another answer to their prompt inserted."""
    for index, answer in enumerate(state.answers):
        prompt = index // state.settings.group_size
        if prompt not in woven:
            answer.weaver_pending = [unread[prompt]]
        elif invoked[index]:
            block = woven.index(prompt)
            states = behind[block] if state.reads_states else None
            state.insert(index, latents[block], InsertionKind.PROMPT, states)
        else:
            state.reasoner_cache.truncate(index, unread[prompt].shape[0])
