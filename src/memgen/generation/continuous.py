"""A batch that answers join and leave while it runs, for serving and streaming.

Rows differ in prompt, length and insertions in every batch; here they also differ in settings, seed and stop, and begin at
different times. A newcomer's prompt is read by itself, by the same operations as in `generate`, and its rows of the caches
are then copied into the running ones (`DecodingState.take_in`). So what is written for it is what `generate` writes, up to
the rounding of larger batches, and a prompt that cannot be read fails alone. Steps of a fixed shape (`static_step.py`) are
not used: they sample all rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import final

import torch

from memgen.generation.prompt import prompt_streams, read_prompts
from memgen.generation.sampling import GenerationSettings
from memgen.generation.state import DecodingState, Hooks, Stop, to_host
from memgen.generation.step import DecodingSteps
from memgen.model.memgen import MemGenModel
from memgen.types import AgentTurn


@dataclass(frozen=True)
class Newcomer:
    """An answer that is to join a running batch.

    Attributes:
        prompt: token ids.
        settings: of this answer alone; its `seed` is not read, and `group_size` is 1.
        row_seed: what is sampled for it depends on this alone, as on `row_seeds` of `generate`.
        stop: ends it besides the end tokens. It is asked once for each token that is not an end token.
        alternatives: how many of each place's most probable tokens are kept in `Written.tops`.
    """

    prompt: Sequence[int]
    settings: GenerationSettings
    row_seed: int = 0
    stop: Stop | None = None
    alternatives: int = 0


@dataclass(frozen=True)
class Written:
    """What has been written of an answer. The lists go on growing.

    Attributes:
        tokens: token ids.
        logprobs: log-probability of each.
        insertions: for each insertion, the index in `tokens` before which it lies.
        tops: for each token the most probable tokens of its place, best first, with their log-probabilities at the answer's
            temperature, before top-k and top-p; empty if none are kept.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    insertions: Sequence[int]
    tops: Sequence[Sequence[tuple[int, float]]]


def positions_needed(model: MemGenModel, prompt: int, new: int) -> int:
    """Positions of the reasoner's context that a prompt of so many tokens needs with its latents and its answer.

    Args:
        model: the agent's.
        prompt: tokens of the prompt.
        new: limit of the answer's length.
    """
    weaver = model.weaver.config
    inside = min(model.boundaries.config.max_inference_insertions, new) if weaver.inference_latents else 0
    return prompt + weaver.prompt_latents + inside * weaver.inference_latents + new


@final
class ContinuousBatch:
    """Live answers, up to a number of them.

    Args:
        model: in evaluation mode.
        rows: how many answers may be live at the same time.

    Raises:
        RuntimeError: if the model is in training mode.
    """

    def __init__(self, model: MemGenModel, rows: int) -> None:
        if model.training:
            raise RuntimeError("a batch needs model.eval(): dropout would change the answers")
        self.model, self.rows = model, rows
        settings = GenerationSettings(max_new_tokens=1, static_step="off")
        # A placeholder in each place, which the first answer there replaces.
        self._state = DecodingState(model, [[0]] * rows, 1, settings, None, Hooks())
        self._state.run_on()
        self._steps = DecodingSteps(self._state)

    @property
    def live(self) -> list[int]:
        """The places of the live answers."""
        return list(self._steps.live)

    @property
    def free(self) -> int:
        """How many answers can join."""
        return self.rows - len(self._steps.live)

    @torch.no_grad()
    def join(self, newcomers: Sequence[Newcomer]) -> list[int]:
        """Reads the prompts of newcomers and writes the first token of each.

        Newcomers with equal settings are read together. If one of them cannot be read, none of those that have not been
        read yet joins: call it with one at a time to know which.

        Returns:
            Their places, which are theirs until they leave.

        Raises:
            ValueError: if a prompt is empty or does not fit into the reasoner's context with its answer.
        """
        assert len(newcomers) <= self.free, "the caller counts the free places"
        places: list[int] = []
        for _, alike in groupby(newcomers, key=lambda newcomer: replace(newcomer.settings, seed=0)):
            places += self._join_alike(list(alike))
        return places

    def _join_alike(self, newcomers: Sequence[Newcomer]) -> list[int]:
        for newcomer in newcomers:
            self._check(newcomer)
        used = set(self._steps.live)
        places = [place for place in range(self.rows) if place not in used][: len(newcomers)]
        prompts = [list(newcomer.prompt) for newcomer in newcomers]
        state = DecodingState(
            self.model,
            prompts,
            max(map(len, prompts)),
            replace(newcomers[0].settings, static_step="off"),
            [newcomer.row_seed for newcomer in newcomers],
            Hooks(),
        )
        for answer, newcomer in zip(state.answers, newcomers, strict=True):
            answer.alternatives = newcomer.alternatives
        first = read_prompts(state, prompt_streams(self.model, prompts, None, None))
        begun = list(range(len(newcomers)))
        state.append(begun, *to_host(*state.sample(first, begun)))
        for source, (place, newcomer) in enumerate(zip(places, newcomers, strict=True)):
            self._state.take_in(place, len(self._steps.live), state, source)
            self._state.answers[place].stop = newcomer.stop
            self._steps.live.append(place)
        self._state.mark_finished(places)
        return places

    def _check(self, newcomer: Newcomer) -> None:
        if not newcomer.prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        if newcomer.settings.group_size != 1 or newcomer.settings.sample_decisions:
            raise ValueError("an answer of a running batch has group_size 1 and does not sample decisions")

    @torch.no_grad()
    def step(self) -> None:
        """Writes the next token of every live answer; those that are over have left before."""
        if self._steps.live:
            self._steps.run()
            self._state.mark_finished(self._steps.live)

    def cancel(self, place: int) -> None:
        """Ends an answer as it is."""
        self._state.answers[place].cancelled = True

    def leave(self) -> list[tuple[int, AgentTurn]]:
        """The answers that are over, with their places, which are free again."""
        over = [place for place in self._steps.live if self._state.answers[place].over]
        self._steps.drop_finished()
        for place in over:
            self._state.answers[place].weaver_pending.clear()
        return [(place, self._state.answers[place].turn()) for place in over]

    def written(self, place: int) -> Written:
        """What an answer says so far; one that has left, until another takes its place."""
        answer = self._state.answers[place]
        points = [point - len(answer.prompt) for point, _ in answer.insertions]
        return Written(answer.tokens, answer.logprobs, points, answer.tops)
