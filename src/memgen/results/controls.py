"""Control conditions for the effect of latent memory: the same items answered with it, without it and with swapped latents.

Conditions: the bare reasoner; untrained latents; the trained weaver at all boundaries, or at the end of the prompt only;
and the trained weaver with every item's latents given to another item, which keeps everything but the item's content.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from memgen.environments.base import Environment, Example, Reward
from memgen.generation.decode import Intervention, generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.latent_source import LatentSource
from memgen.model.memgen import MemGenModel
from memgen.model.trigger import ConstantTrigger, Trigger
from memgen.seeds import episode_seeds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """Items to answer, and the sampling settings.

    Attributes:
        environment: computes the rewards.
        examples: the items.
        prompts: token ids of each item's prompt.
        tokenizer: the reasoner's tokenizer.
        settings: sampling settings.
        batch_size: number of items decoded together.
    """

    environment: Environment
    examples: Sequence[Example]
    prompts: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationSettings
    batch_size: int = 64


@dataclass(frozen=True)
class Outcome:
    """One condition's score.

    Attributes:
        name: name of the condition.
        rewards: total reward of each item, in the items' order.
        parts: mean of each reward component over the items that have it.
        insertions: mean number of insertions per answer.
        offered: mean number of trigger decisions per answer.
        cpu_seconds: process CPU time of answering.
        positions: mean number of positions that reasoner, weaver and trigger read per answer, the prompt included.
    """

    name: str
    rewards: tuple[float, ...]
    parts: dict[str, float]
    insertions: float
    offered: float
    cpu_seconds: float
    positions: float = 0.0

    @property
    def mean(self) -> float:
        """Mean total reward."""
        return float(np.mean(self.rewards))

    def interval(self, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap confidence interval of the mean over items (percentile method)."""
        values = np.asarray(self.rewards)
        draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
        low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def without_memory(model: MemGenModel) -> MemGenModel:
    """The model with a trigger that never invokes."""
    return MemGenModel(model.reasoner, model.weaver, ConstantTrigger(0.0), model.boundaries).eval()


def always_invoking(model: MemGenModel, insertions: int | None = None) -> MemGenModel:
    """The model with a trigger that invokes at every boundary.

    Args:
        model: the model.
        insertions: most insertions inside an answer; 0: at the end of the prompt only. None: the model's own limit.
    """
    boundaries = model.boundaries if insertions is None else model.boundaries.capped(insertions)
    return MemGenModel(model.reasoner, model.weaver, ConstantTrigger(1.0), boundaries).eval()


def bare_reasoner(model: MemGenModel) -> MemGenModel:
    """The reasoner by itself: plain decoding, in which no trigger is asked and no weaver has a place."""
    nothing = _with_latents(model.weaver, 0, 0)
    return MemGenModel(model.reasoner, nothing, ConstantTrigger(0.0), model.boundaries.capped(0)).eval()


def invoking_inside(model: MemGenModel) -> MemGenModel:
    """The model with a trigger that invokes behind every delimiter, and never at the end of the prompt."""
    weaver = _with_latents(model.weaver, 0, model.weaver.config.inference_latents)
    return MemGenModel(model.reasoner, weaver, ConstantTrigger(1.0), model.boundaries).eval()


def deciding_by(model: MemGenModel, trigger: Trigger) -> MemGenModel:
    """The model with another trigger."""
    return MemGenModel(model.reasoner, model.weaver, trigger, model.boundaries).eval()


def writing_by(model: MemGenModel, source: LatentSource) -> MemGenModel:
    """The model with another source of latents, which invokes at every boundary."""
    return MemGenModel(model.reasoner, source, ConstantTrigger(1.0), model.boundaries).eval()


def _with_latents(weaver: LatentSource, prompt: int, inference: int) -> LatentSource:
    """The same weaver, tensors shared, with kinds of insertion switched off."""
    twin = copy.copy(weaver)
    twin.config = dataclasses.replace(weaver.config, prompt_latents=prompt, inference_latents=inference)
    return twin


def invoking_at(model: MemGenModel, probability: float) -> MemGenModel:
    """The model with a trigger that invokes at random, with the same probability at every boundary."""
    return MemGenModel(model.reasoner, model.weaver, ConstantTrigger(probability), model.boundaries).eval()


def score(name: str, model: MemGenModel, task: Task) -> Outcome:
    """Answers every item and rewards the answers."""
    return _score(name, model, task, lambda begin: None)


def score_with_swapped_latents(name: str, model: MemGenModel, task: Task) -> Outcome:
    """Answers every item with the latents of the next item, insertion by insertion.

    If the other item had fewer insertions, its last latents are repeated.

    Raises:
        ValueError: if an item got no latents.
    """
    recorded: list[list[Tensor]] = []
    for begin, prompts in _batches(task):
        generation = generate(
            model, prompts, task.settings, row_seeds=_seeds(task, begin, prompts), keep_latents=True
        )
        assert generation.latents is not None, "they were asked for"
        recorded += generation.latents
    if not all(recorded):
        raise ValueError(
            "an item got no latents, so there is nothing to swap; use a trigger that always invokes"
        )

    def swap(begin: int) -> Intervention:
        def intervene(rows: Sequence[int], events: Sequence[int], latents: list[Tensor]) -> list[Tensor]:
            others = [recorded[(begin + row + 1) % len(recorded)] for row in rows]
            return [other[min(event, len(other) - 1)] for other, event in zip(others, events, strict=True)]

        return intervene

    return _score(name, model, task, swap)


def _score(
    name: str, model: MemGenModel, task: Task, intervention: Callable[[int], Intervention | None]
) -> Outcome:
    clock = time.process_time()
    rewards: list[Reward] = []
    insertions = offered = positions = 0
    for begin, prompts in _batches(task):
        generation = generate(
            model,
            prompts,
            task.settings,
            row_seeds=_seeds(task, begin, prompts),
            intervene=intervention(begin),
        )
        texts = task.tokenizer.batch_decode(generation.answers(), skip_special_tokens=True)
        examples = task.examples[begin : begin + len(prompts)]
        rewards += [task.environment.reward(e, text) for e, text in zip(examples, texts, strict=True)]
        insertions += sum(generation.plan.counts)
        offered += sum(turn.offered for turn in generation.turns)
        work = generation.work
        positions += work.reasoner_positions + work.weaver_positions + work.trigger_positions
    names = sorted({part for reward in rewards for part in reward.parts})
    return Outcome(
        name=name,
        rewards=tuple(reward.total for reward in rewards),
        parts={
            part: float(np.mean([reward.parts[part] for reward in rewards if part in reward.parts]))
            for part in names
        },
        insertions=insertions / len(rewards),
        offered=offered / len(rewards),
        cpu_seconds=time.process_time() - clock,
        positions=positions / len(rewards),
    )


def _batches(task: Task) -> Iterator[tuple[int, list[list[int]]]]:
    for begin in range(0, len(task.prompts), task.batch_size):
        yield begin, [list(prompt) for prompt in task.prompts[begin : begin + task.batch_size]]


def _seeds(task: Task, begin: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed for each item, so that its samples do not depend on the batch size."""
    return episode_seeds(task.settings.seed, range(begin, begin + len(prompts)))
