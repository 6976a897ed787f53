"""Rollouts: the agent plays episodes, and what it did can be replayed token for token.

Differs from the released code: (1) tokens go in and come out, nothing that the agent wrote is decoded and encoded
again; (2) episodes of unequal length run side by side and leave when they are over; (3) a trajectory keeps its
insertion plan, so that later passes read exactly what the rollout read; (4) an environment that fails marks its
episode instead of scoring it; (5) a turn keeps its text, and the text observed before it, beside its tokens: an
observation cannot be had back from token ids through an arbitrary chat template.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memgen.chat import ChatTemplate, end_of_turn_id, observation_ids, prompt_ids, text_ids
from memgen.environments.base import (
    Environment,
    Episode,
    Example,
    InteractiveEnvironment,
    Message,
    Reward,
    checked_reward,
)
from memgen.environments.search.retrieval import Passage
from memgen.generation.decode import Decide, Intervention, generate
from memgen.generation.sampling import GenerationSettings
from memgen.memories.base import Place, with_memory
from memgen.model.memgen import MemGenModel
from memgen.seeds import turn_seed
from memgen.types import AgentTurn, Decision, InsertionPlan, TokenBatch, Trajectory, WorkCount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# E episodes, R rows, N tokens of an episode, D decisions of an episode


@dataclass(frozen=True)
class EpisodeSettings:
    """Limits of episodes of several turns. `GenerationSettings.max_new_tokens` limits each turn."""

    max_turns: int | None = None
    """Turns after which an episode is truncated. null: the environment's own limit."""
    max_observation_tokens: int = 512
    """Tokens of an observation; a longer one is truncated."""
    max_length: int | None = None
    """Tokens of an episode, observations included, latents not counted: no turn begins that might exceed it.
    null: the reasoner's context."""
    bad_rewards: Literal["leave_out", "stop"] = "leave_out"
    """What happens where a reward is no finite number: its episode is neither trained on nor scored, or the run stops."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_observation_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"episodes.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Actor:
    """The agent and its task.

    Attributes:
        model: in evaluation mode.
        tokenizer: the reasoner's.
        environment: the task.
        generation: how each turn is sampled; `group_size` episodes per item.
        episodes: limits.
        template: a chat template in place of the tokenizer's.
        instruction: a text at the end of the last message that the agent reads before its first turn, on a line of its
            own; empty: none.
        passages: what a text memory found for the item; they stand in the prompt before its first turn.
        place: where in it.
        headings: whether words of ours stand above them.
    """

    model: MemGenModel
    tokenizer: PreTrainedTokenizerBase
    environment: Environment
    generation: GenerationSettings
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    template: ChatTemplate | str | None = None
    instruction: str = ""
    passages: Sequence[Passage] = ()
    place: Place = "before_task"
    headings: bool = True

    def instructed(self, messages: Sequence[Message]) -> list[Message]:
        """A prompt with the passages and the instruction."""
        messages = with_memory(messages, self.passages, self.place, headings=self.headings)
        if not self.instruction:
            return messages
        *before, last = messages
        content = last["content"]
        separator = "" if content.endswith("\n") else "\n"
        return [*before, Message(role=last["role"], content=f"{content}{separator}{self.instruction}")]

    @property
    def max_turns(self) -> int:
        """Turns after which an episode is truncated: 1 for a task of a single turn."""
        if not isinstance(self.environment, InteractiveEnvironment):
            return 1
        return self.episodes.max_turns or self.environment.max_turns


@dataclass(frozen=True)
class Rollouts:
    """Result of a rollout: trajectories, work, timings.

    Attributes:
        trajectories: `group_size` of each item, those of an item next to each other.
        latents: inserted latents of each trajectory in order, each (K, H), if they were asked for.
        work: exact work counts of all turns.
        seconds: wall time of decoding.
        environment_seconds: wall time of environment and rewards.
    """

    trajectories: list[Trajectory]
    latents: list[list[Tensor]] | None
    work: WorkCount
    seconds: float
    environment_seconds: float


def rollout(
    actor: Actor,
    examples: Sequence[Example],
    seeds: Sequence[int],
    *,
    keep_latents: bool = False,
    intervene: Intervention | None = None,
    decide: Decide | None = None,
) -> Rollouts:
    """Plays `group_size` episodes of each item.

    Args:
        actor: the agent and its task.
        examples: the items.
        seeds: a seed for each episode; what is sampled in it depends on nothing else in the batch.
        keep_latents: whether to return the inserted latents.
        intervene: as in `generate`, with one episode per item; it is told of items, as indices into `examples`, and of
            the invocations in the whole episode.
        decide: as in `generate`; it is told of episodes, as indices into the result, and of what was asked in the whole
            episode.

    Raises:
        RuntimeError: if the model is in training mode: with dropout, another distribution would be trained on.
        ValueError: if a prompt is empty, has words that the tokenizer does not know, or does not fit into the context.
    """
    player = _Rollout(actor, examples, seeds, keep_latents=keep_latents, intervene=intervene, decide=decide)
    return player.run()


@dataclass
class _Playing:
    """An episode that is being played."""

    example: Example
    seed: int
    prompt: list[Message]
    context: list[int]
    episode: Episode | None  # None for a single-turn task
    place: int  # among the episodes
    observation: str = ""  # read since the last turn
    turns: list[AgentTurn] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    over: bool = False
    truncated: bool = False
    fault: str | None = None
    reward: Reward | None = None


class _Rollout:
    def __init__(
        self,
        actor: Actor,
        examples: Sequence[Example],
        seeds: Sequence[int],
        *,
        keep_latents: bool,
        intervene: Intervention | None,
        decide: Decide | None,
    ) -> None:
        group = actor.generation.group_size
        if len(seeds) != len(examples) * group:
            raise ValueError(
                f"{len(examples)} items x group_size {group} need as many seeds, got {len(seeds)}"
            )
        self.actor = actor
        self.examples = [example for example in examples for _ in range(group)]
        self.seeds = list(seeds)
        self.keep_latents = keep_latents
        self.intervene = intervene
        self.decide = decide
        self.keep_turns = actor.model.boundaries.config.keep_turn_latents
        self.work = dict.fromkeys(WorkCount.__dataclass_fields__, 0)
        self.seconds = 0.0
        self.environment_seconds = 0.0
        self.bad_rewards: list[str] = []

    def run(self) -> Rollouts:
        environment = self.actor.environment
        playing: list[_Playing]
        if isinstance(environment, InteractiveEnvironment):
            episodes = [environment.episode() for _ in self.examples]
            try:
                playing = self._begin(environment, episodes)
                self._play(environment, playing)
            finally:
                for episode in episodes:
                    episode.close()
        else:
            playing = self._answer(environment)
        if self.bad_rewards:
            logger.warning(
                "%d of %d rewards are no finite numbers, and their episodes are left out (the first: %s)",
                len(self.bad_rewards),
                len(playing),
                self.bad_rewards[0],
            )
        return Rollouts(
            trajectories=[_trajectory(p) for p in playing],
            latents=[p.latents for p in playing] if self.keep_latents else None,
            work=WorkCount(**self.work),
            seconds=self.seconds,
            environment_seconds=self.environment_seconds,
        )

    def _score(self, playing: _Playing, reward: object) -> None:
        """Gives an episode its reward; one that is no finite number is an environment error."""
        try:
            playing.reward = checked_reward(reward)
        except ValueError as error:
            playing.fault = f"{self.actor.environment.name} gave item {playing.example.id} {error}"
            self.bad_rewards.append(playing.fault)
            if self.actor.episodes.bad_rewards == "stop":
                raise ValueError(
                    f"{playing.fault}: a reward must be a finite number. Mend the environment, or set "
                    "episodes.bad_rewards to leave_out"
                ) from error

    # One turn

    def _answer(self, environment: Environment) -> list[_Playing]:
        playing: list[_Playing] = []
        for index, (example, seed) in enumerate(zip(self.examples, self.seeds, strict=True)):
            first = index - index % self.actor.generation.group_size
            if first < index:
                messages, context = playing[first].prompt, playing[first].context
            else:
                messages = self.actor.instructed(environment.messages(example))
                context = self._prompt(messages)
            playing.append(_Playing(example, seed, messages, context, episode=None, place=index))
        texts = self._turn(playing, grouped=True)
        clock = time.perf_counter()
        for episode, reward in zip(playing, environment.rewards(self.examples, texts), strict=True):
            self._score(episode, reward)
        self.environment_seconds += time.perf_counter() - clock
        return playing

    # Several turns

    def _begin(self, environment: InteractiveEnvironment, episodes: Sequence[Episode]) -> list[_Playing]:
        clock = time.perf_counter()
        observations = environment.reset_all(episodes, self.examples)
        self.environment_seconds += time.perf_counter() - clock
        playing = []
        for place, (example, seed, episode, observation) in enumerate(
            zip(self.examples, self.seeds, episodes, observations, strict=True)
        ):
            messages = environment.messages(example)
            if observation.text:
                messages = [*messages, Message(role="user", content=_characters(observation.text))]
            messages = self.actor.instructed(messages)
            playing.append(_Playing(example, seed, messages, self._prompt(messages), episode, place))
        return playing

    def _play(self, environment: InteractiveEnvironment, playing: list[_Playing]) -> None:
        group = self.actor.generation.group_size
        alike = all(p.context == playing[i - i % group].context for i, p in enumerate(playing))
        for turn in range(self.actor.max_turns):
            live = [p for p in playing if not p.over]
            if turn > 0:
                for p in live:
                    p.over = p.truncated = self._room(p) < 0
                live = [p for p in live if not p.over]
            if not live:
                break
            texts = self._turn(live, grouped=turn == 0 and alike)
            clock = time.perf_counter()
            steps = environment.step_all([p.episode for p in live if p.episode is not None], texts)
            self.environment_seconds += time.perf_counter() - clock
            for p, step in zip(live, steps, strict=True):
                p.fault = step.fault
                p.over = step.done or step.fault is not None
                if not p.over:
                    p.observation = self._truncated(_characters(step.observation))
                    p.context = [
                        *p.turns[-1].context,
                        *p.turns[-1].tokens,
                        *self._observation_ids(p),
                    ]
        for p in playing:
            p.truncated = p.truncated or not p.over
            if p.fault is None and p.episode is not None:
                self._score(p, p.episode.reward())

    def _room(self, playing: _Playing) -> int:
        """Positions that are left after the longest turn that may follow. Negative: no turn fits."""
        model, new = self.actor.model, self.actor.generation.max_new_tokens
        weaver = model.weaver.config
        length = len(playing.context) + new
        latents = (
            weaver.prompt_latents
            + model.boundaries.config.max_inference_insertions * weaver.inference_latents
        )
        kept = sum(block.shape[0] for block in playing.latents) if self.keep_turns else 0
        room = [
            limit - used
            for limit, used in (
                (self.actor.episodes.max_length, length),
                (model.reasoner.backbone.context_length, length + latents + kept),
            )
            if limit is not None
        ]
        return min(room, default=0)

    def _truncated(self, observation: str) -> str:
        """An observation's text, as much of it as fits into the limit when it is encoded."""
        tokenizer, limit = self.actor.tokenizer, self.actor.episodes.max_observation_tokens
        ids = text_ids(tokenizer, observation)
        if len(ids) <= limit:
            return observation
        for keep in range(limit, 1, -1):
            text: str = tokenizer.decode(ids[:keep])
            # A character that is truncated in the middle may need more tokens than it had.
            if len(text_ids(tokenizer, text)) <= limit:
                return text
        return str(tokenizer.decode(ids[:1]))

    def _observation_ids(self, playing: _Playing) -> list[int]:
        """Token ids of the last observation; a turn that the agent did not end itself is ended here."""
        tokenizer, template = self.actor.tokenizer, self.actor.template
        try:
            ids = observation_ids(tokenizer, playing.observation, template)
        except ValueError as error:
            raise ValueError(f"an observation of {self.actor.environment.name}: {error}") from error
        end = end_of_turn_id(tokenizer, template)
        return ids if playing.turns[-1].tokens[-1] == end else [end, *ids]

    # Shared by both

    def _prompt(self, messages: list[Message]) -> list[int]:
        try:
            return prompt_ids(self.actor.tokenizer, messages, self.actor.template)
        except ValueError as error:
            raise ValueError(f"a prompt of {self.actor.environment.name}: {error}") from error

    def _turn(self, playing: Sequence[_Playing], *, grouped: bool) -> list[str]:
        """Lets each episode's agent write a turn. Returns the texts."""
        actor = self.actor
        size = actor.generation.group_size if grouped else 1
        settings = dataclasses.replace(actor.generation, group_size=size)
        earlier = self.keep_turns and any(p.turns for p in playing)
        clock = time.perf_counter()
        generation = generate(
            actor.model,
            [p.context for p in playing[::size]],
            settings,
            row_seeds=[turn_seed(p.seed, len(p.turns)) for p in playing],
            earlier=_plan([p.turns for p in playing]) if earlier else None,
            earlier_latents=[p.latents for p in playing] if earlier else None,
            intervene=self._intervention(playing),
            decide=self._decision(playing),
            stop=self._stop(),
            keep_latents=self.keep_latents or self.keep_turns,
        )
        self.seconds += time.perf_counter() - clock
        for name in self.work:
            self.work[name] += getattr(generation.work, name)
        texts: list[str] = actor.tokenizer.batch_decode(generation.answers(), skip_special_tokens=True)
        for p, turn, text in zip(playing, generation.turns, texts, strict=True):
            p.turns.append(dataclasses.replace(turn, text=text, observation=p.observation))
        if generation.latents is not None:
            for p, blocks in zip(playing, generation.latents, strict=True):
                p.latents += blocks
        return texts

    def _intervention(self, playing: Sequence[_Playing]) -> Intervention | None:
        intervene = self.intervene
        if intervene is None:
            return None
        before = [sum(turn.invocations for turn in p.turns) for p in playing]

        def in_episodes(
            answers: Sequence[int], invocations: Sequence[int], latents: list[Tensor]
        ) -> list[Tensor]:
            places = [playing[answer].place for answer in answers]
            counts = [before[a] + n for a, n in zip(answers, invocations, strict=True)]
            return intervene(places, counts, latents)

        return in_episodes

    def _decision(self, playing: Sequence[_Playing]) -> Decide | None:
        decide = self.decide
        if decide is None:
            return None
        before = [sum(turn.offered for turn in p.turns) for p in playing]
        return lambda answer, asked: decide(playing[answer].place, before[answer] + asked)

    def _stop(self) -> Callable[[Sequence[int]], bool] | None:
        environment, decode = self.actor.environment, self.actor.tokenizer.decode
        texts = environment.stop_texts if isinstance(environment, InteractiveEnvironment) else ()
        if not texts:
            return None
        # A text has at most as many tokens as bytes, and the token that completes it is the newest.
        tail = max(len(text.encode()) for text in texts) + 1
        return lambda tokens: any(text in decode(list(tokens[-tail:])) for text in texts)


def _characters(text: str) -> str:
    """A text of an environment with "?" in place of half surrogate pairs, which are no characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _trajectory(playing: _Playing) -> Trajectory:
    reward = playing.reward or Reward(0.0)
    return Trajectory(
        example=playing.example.id,
        turns=tuple(playing.turns),
        reward=reward.total,
        parts=dict(reward.parts),
        truncated=playing.truncated or any(not turn.finished for turn in playing.turns),
        fault=playing.fault,
        prompt=tuple(playing.prompt),
    )


def _plan(rows: Sequence[Sequence[AgentTurn]]) -> InsertionPlan:
    """All insertions of each row's turns."""
    return InsertionPlan([[pair for turn in turns for pair in turn.insertions] for turns in rows])


@dataclass(frozen=True)
class Replay:
    """Trajectories as rows of a teacher-forced pass, and the episode that each of its values belongs to.

    A row per turn, or per episode if later turns see the latents of earlier ones. The agent's tokens are supervised:
    observations are read, never trained on. Tensors are on the host; the losses move what they compute with.

    Attributes:
        batch: rows of tokens.
        plan: where their latents lie.
        tokens: True where an episode has a token, bool (E, N): the agent's tokens of all turns, concatenated.
        logprobs: what the rollout recorded for them, float32 (E, N).
        at: True at the boundary tokens behind which a decision was made, bool (R, L).
        decided: True where an episode has a decision, bool (E, D): those of all turns, concatenated.
        decisions: SKIP or INVOKE, int64 (E, D).
        invoke_probs: the trigger's probability of INVOKE in the rollout, float32 (E, D).
    """

    batch: TokenBatch
    plan: InsertionPlan
    tokens: Bool[Tensor, "episodes tokens"]
    logprobs: Float[Tensor, "episodes tokens"]
    at: Bool[Tensor, "rows length"]
    decided: Bool[Tensor, "episodes decisions"]
    decisions: Tensor
    invoke_probs: Float[Tensor, "episodes decisions"]

    def by_episode(self, values: Tensor, mask: Tensor) -> Tensor:
        """Packed values of a pass, in the order of rows, as (E, N) or (E, D); 0 where `mask` is False."""
        # Rows of an episode are neighbours and in the order of its turns, so their values are already in place.
        return values.new_zeros(mask.shape).masked_scatter(mask.to(values.device), values)


def replay(
    trajectories: Sequence[Trajectory], groups: Sequence[int], *, keep_turn_latents: bool
) -> Replay | None:
    """Rows with the same tokens and latents as in the trajectories.

    Args:
        trajectories: E of them; those with an environment error have no rows.
        groups: a number for each; trajectories with the same number have the same prompt, which is read once.
        keep_turn_latents: whether later turns saw the latents of earlier ones.

    Returns:
        None if every trajectory has an environment error.
    """
    valid = [() if t.fault is not None else t.turns for t in trajectories]
    if not any(valid):
        return None
    one_turn = all(len(turns) <= 1 for turns in valid)
    rows: list[list[int]] = []
    marks: list[list[bool]] = []
    row_turns: list[Sequence[AgentTurn]] = []
    group: list[int] = []
    shared: list[int] = []
    for episode, turns in enumerate(valid):
        for part in [turns] if keep_turn_latents and turns else [(turn,) for turn in turns]:
            ids = [*part[-1].context, *part[-1].tokens]
            mark = [False] * len(ids)
            for turn in part:
                begin = len(turn.context)
                mark[begin : begin + len(turn.tokens)] = [True] * len(turn.tokens)
            rows.append(ids)
            marks.append(mark)
            row_turns.append(part)
            # Turns of an episode share their beginning, and so do answers to a prompt: a row can be in one group only.
            group.append(groups[episode] if one_turn or keep_turn_latents else episode)
            shared.append(len(part[0].context))
    batch = dataclasses.replace(
        TokenBatch.from_rows(rows, marks), group=torch.tensor(group), shared=torch.tensor(shared)
    )
    at = torch.zeros_like(batch.supervised)
    for row, written in enumerate(row_turns):
        for turn in written:
            for index, decision in enumerate(turn.decisions):
                if decision != Decision.NOT_ASKED:
                    at[row, len(turn.context) + index - 1] = True
    decisions = [
        [(d, p) for turn in turns for d, p in zip(turn.decisions, turn.invoke_probs, strict=True)]
        for turns in valid
    ]
    offered = [[pair for pair in row if pair[0] != Decision.NOT_ASKED] for row in decisions]
    decided, values = _padded([[float(d) for d, _ in row] for row in offered])
    tokens, logprobs = _padded([[x for turn in turns for x in turn.logprobs] for turns in valid])
    return Replay(
        batch=batch,
        plan=_plan(row_turns),
        tokens=tokens,
        logprobs=logprobs,
        at=at,
        decided=decided,
        decisions=values.long(),
        invoke_probs=_padded([[p for _, p in row] for row in offered])[1],
    )


def _padded(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Rows of different length as a mask and a rectangle of values."""
    width = max((len(row) for row in rows), default=0)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    values = torch.zeros(mask.shape)
    values[mask] = torch.tensor([x for row in rows for x in row])
    return mask, values
