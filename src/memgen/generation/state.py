"""The state of one call of `generate`: the answers, the KV caches, and the operations that prompt and step share.

Every pass of the reasoner, the weaver and the trigger goes through here, where its work is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from memgen.generation.sampling import GenerationSettings, Sampled, row_uniforms, sample
from memgen.generation.static_step import StaticStep, take_step
from memgen.kernels import tempered
from memgen.model.cache import PassSegment, RowKVCache, upload
from memgen.model.inside import TextReader
from memgen.model.memgen import MemGenModel
from memgen.model.trigger import Boundary
from memgen.seeds import episode_seeds
from memgen.types import AgentTurn, Decision, Generation, InsertionKind, RowWork, WorkCount

# A answers, P prompts, K latents, H hidden size

Observer = Callable[[int, int | None], None]
"""Called with (answer, token id) for each new token, and with (answer, None) where latents go before the next one."""

Intervention = Callable[[Sequence[int], Sequence[int], list[Tensor]], list[Tensor]]
"""Called with answers, how often the trigger invoked for each before, and each one's latents (K, H); returns what to
insert, of any number of latents up to K. An empty block inserts nothing; it counts towards the limit on insertions."""

Decide = Callable[[int, int], bool]
"""Called with an answer and how often the trigger was asked for it before; True invokes, whatever the trigger says."""

Stop = Callable[[Sequence[int]], bool]
"""Called with an answer's new token ids so far; True ends the answer there. It must not keep or change them."""


@dataclass(frozen=True)
class Hooks:
    """What the caller of `generate` may observe and change; its parameters of these names."""

    observe: Observer | None = None
    intervene: Intervention | None = None
    stop: Stop | None = None
    keep_latents: bool = False
    decide: Decide | None = None


@dataclass
class Answer:
    """One answer while it is written."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    invoke_probs: list[float] = field(default_factory=list)
    insertions: list[tuple[int, int]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    finished: bool = False
    # Of an answer in a batch whose answers differ in them (`continuous.py`); else those of the whole batch.
    settings: GenerationSettings | None = None
    stop: Stop | None = None
    cancelled: bool = False
    alternatives: int = 0  # how many most probable tokens of each place to keep in `tops`
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    inserted: int = 0  # insertions inside the answer, which the configuration limits
    # What the weaver has not read yet: vectors of the reasoner, and behind them token ids (none if it reads states).
    weaver_pending: list[Tensor] = field(default_factory=list)
    weaver_unread: list[int] = field(default_factory=list)
    trigger_read: int = 0  # tokens of prompt + answer that the trigger has read
    reader: TextReader | None = None  # reads the answer's text for boundaries.skip_inside
    invoked_at: int | None = None  # index of the token before which the trigger invoked last
    ruled_out: dict[str, int] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=lambda: {"reasoner": 0.0, "weaver": 0.0, "trigger": 0.0})

    @property
    def over(self) -> bool:
        """Whether it gets no more tokens: it has ended, was cancelled, or has reached a limit of its own."""
        full = self.settings is not None and len(self.tokens) >= self.settings.max_new_tokens
        return self.finished or self.cancelled or full

    def turn(self) -> AgentTurn:
        """The answer as a record."""
        # A decision may have been made after the last token, for a next one that the limit ruled out.
        count = len(self.tokens)
        return AgentTurn(
            context=self.prompt,
            tokens=self.tokens,
            logprobs=self.logprobs,
            decisions=self.decisions[:count],
            invoke_probs=self.invoke_probs[:count],
            insertions=self.insertions,
            finished=self.finished,
            work=RowWork(**self.work),
            ruled_out=self.ruled_out,
        )


@final
class DecodingState:
    """Answers, caches, and what is done to them.

    Args:
        model: in evaluation mode.
        prompts: token ids of each prompt, P.
        longest: positions of the longest prompt, latents of earlier turns included.
        settings: how to sample; `group_size` answers per prompt.
        row_seeds: a seed for each answer; None: from `settings.seed`.
        hooks: what the caller observes and changes.

    Raises:
        ValueError: if a prompt and its answer do not fit into the reasoner's context.
    """

    def __init__(
        self,
        model: MemGenModel,
        prompts: Sequence[Sequence[int]],
        longest: int,
        settings: GenerationSettings,
        row_seeds: Sequence[int] | None,
        hooks: Hooks,
    ) -> None:
        self.model, self.settings, self.hooks = model, settings, hooks
        self.device = model.device
        self.prompts = [list(prompt) for prompt in prompts]
        bounds = model.boundaries
        reasons = [*bounds.config.skip_inside, *(["cooldown"] if bounds.config.cooldown else [])]
        self.answers = [
            Answer(prompt, reader=bounds.reader(), ruled_out=dict.fromkeys(reasons, 0))
            for prompt in self.prompts
            for _ in range(settings.group_size)
        ]
        weaver = model.weaver.config
        limit = min(model.boundaries.config.max_inference_insertions, settings.max_new_tokens)
        self.max_insertions = limit if weaver.inference_latents else 0
        self.reads_states = model.weaver.reads_states
        """Whether the weaver reads the reasoner's hidden states: then the reasoner reads first."""
        switch = settings.static_step
        self.static_steps = switch == "on" or (switch == "auto" and self.device.type == "cuda")
        self.work = dict.fromkeys(WorkCount.__dataclass_fields__, 0)
        self.live: list[int] | None = None
        """The answer in each row of the caches; None while a row is a prompt's, shared by the answers to it."""
        self._make_caches(longest)
        self._draw_uniforms(row_seeds)

    def _make_caches(self, longest: int) -> None:
        """One cache row for each prompt; `spread` gives each answer its own."""
        weaver, new = self.model.weaver.config, self.settings.max_new_tokens
        latents = weaver.prompt_latents + self.max_insertions * weaver.inference_latents
        capacity = longest + latents + new
        context = self.model.reasoner.backbone.context_length
        if context is not None and capacity > context:
            raise ValueError(
                f"a prompt of {longest} positions, {new} new tokens and up to {latents} latents "
                f"need {capacity} positions, but the reasoner's context is {context}; shorten the prompt or "
                "lower max_new_tokens"
            )
        # A GPU reads a number of slots that is a multiple of 8 without copying their mask.
        capacity = -(-capacity // 8) * 8 if self.static_steps else capacity
        text = max(map(len, self.prompts)) + new
        count = len(self.prompts)
        self.static: StaticStep | None = None
        """The step of fixed shape; the reasoner's cache is its cache as soon as each answer has a row."""
        if self.static_steps:
            self.static = take_step(self.model.reasoner, len(self.answers), capacity, self.settings)
        if self.static is not None and self.settings.group_size == 1:
            self.reasoner_cache = self.static.cache
        else:
            self.reasoner_cache = RowKVCache(count, capacity, self.device)
        self.weaver_cache = RowKVCache(count, capacity + self.model.weaver.forgotten, self.device)
        self.trigger_cache = self.model.trigger.kv_cache(count, text, self.device)

    def _draw_uniforms(self, row_seeds: Sequence[int] | None) -> None:
        settings, steps = self.settings, self.settings.max_new_tokens
        seeds = row_seeds or episode_seeds(settings.seed, range(len(self.answers)))
        self.samples_decisions = settings.sample_decisions or self.model.trigger.stochastic
        self._token_uniforms: list[list[float]] | None = None
        self._decision_uniforms: list[list[float]] | None = None
        if settings.temperature > 0 or self.samples_decisions:
            # Tokens and decisions have their own numbers, so that one more decision does not move the tokens.
            drawn = row_uniforms(seeds, 2 * steps).tolist()
            self._token_uniforms = [row[:steps] for row in drawn]
            self._decision_uniforms = [row[steps:] for row in drawn]

    # Caches

    def spread(self) -> None:
        """Gives each answer a row of every cache: a copy of its prompt's."""
        size = self.settings.group_size
        self.live = list(range(len(self.answers)))
        if size == 1:
            return
        source = [index // size for index in range(len(self.answers))]
        self.reasoner_cache = self.reasoner_cache.select(
            source, self.reasoner_cache.capacity, None if self.static is None else self.static.cache
        )
        self.weaver_cache = self.weaver_cache.select(source, self.weaver_cache.capacity)
        if self.trigger_cache is not None:
            self.trigger_cache = self.trigger_cache.select(source, self.trigger_cache.capacity)

    def move(self, source: int, target: int) -> None:
        """Overwrites a row of every cache with another."""
        for cache in (self.reasoner_cache, self.weaver_cache, self.trigger_cache):
            if cache is not None:
                cache.move(source, target)

    def take_in(self, index: int, row: int, other: DecodingState, source: int) -> None:
        """Takes over an answer, which another state has begun, with its rows of every cache.

        Args:
            index: what the answer is called here.
            row: the cache row that it gets.
            other: the state that has begun it, after its first token.
            source: the answer there.
        """
        assert self._token_uniforms is not None, "a running batch has a place for every answer's numbers"
        assert self._decision_uniforms is not None, "likewise"
        answer = self.answers[index] = other.answers[source]
        answer.settings, answer.stop = other.settings, other.hooks.stop
        self._token_uniforms[index] = [] if other._token_uniforms is None else other._token_uniforms[source]
        draws = other._decision_uniforms
        self._decision_uniforms[index] = [] if draws is None else draws[source]
        own = (self.reasoner_cache, self.weaver_cache, self.trigger_cache)
        for cache, begun in zip(
            own, (other.reasoner_cache, other.weaver_cache, other.trigger_cache), strict=True
        ):
            if cache is not None and begun is not None:
                cache.reserve(begun.capacity)
                cache.copy_in(row, begun, source)

    def run_on(self) -> None:
        """Turns a new state into an empty batch that answers join (`take_in`) and leave."""
        assert not self.static_steps, "a step of fixed shape samples all rows alike"
        weaver, count = self.model.weaver.config, len(self.answers)
        self.max_insertions = (
            self.model.boundaries.config.max_inference_insertions if weaver.inference_latents else 0
        )
        self._token_uniforms = [[] for _ in range(count)]
        self._decision_uniforms = [[] for _ in range(count)]
        self.live = []

    # Passes

    def read(self, embeddings: Tensor, segments: Sequence[PassSegment]) -> Tensor:
        """A pass of the reasoner. Returns the hidden states of the positions that the segments read."""
        view = self.reasoner_cache.open(segments)
        rows = [row for segment in segments for row in segment.rows]
        self.count("reasoner", rows, [count for segment in segments for count in segment.counts])
        return self.model.reasoner.read(embeddings, view)

    def latent_segments(self, rows: list[int], latents: list[Tensor]) -> list[PassSegment]:
        """The part of a reasoner pass that feeds a block of latents to each of the cache rows; none if there is none."""
        if not rows:
            return []
        sizes = [block.shape[0] for block in latents]
        return [PassSegment(rows, sizes, read=self.latents_read(latents))]

    def latents_read(self, latents: list[Tensor]) -> list[int]:
        """From how many latents of each block the state is needed: the last one predicts, a weaver may read all."""
        return [block.shape[0] if self.reads_states else 1 for block in latents]

    def weave(
        self, states: Tensor, counts: list[int], kind: InsertionKind, rows: list[int], answers: list[int]
    ) -> list[Tensor]:
        """A pass of the weaver: one block of latents for each row.

        Args:
            states: what it has not read yet, packed row by row.
            counts: positions of each row in it.
            kind: of the insertion.
            rows: rows of the weaver's cache.
            answers: the answer that each block is for (its first one, where a prompt has several).
        """
        weaver = self.model.weaver
        kinds = [kind] * len(rows)
        texts = None
        if weaver.reads_text:
            texts = [self.answers[answer].prompt + self.answers[answer].tokens for answer in answers]
        latents = weaver.weave(states, counts, kinds, rows, self.weaver_cache, texts)
        size = weaver.config.latents(kind)
        self.count("weaver", rows, weaver.positions(counts, kinds, texts))
        blocks = list(latents.split([size] * len(rows)))
        if self.hooks.intervene is None:
            return blocks
        before = [self.answers[a].decisions.count(Decision.INVOKE) - 1 for a in answers]
        changed = self.hooks.intervene(answers, before, blocks)
        for block in changed:
            if block.shape[0] > size:
                raise ValueError(
                    f"an intervention gave {block.shape[0]} latents in place of {size}; give at most those"
                )
        return changed

    def ask(self, boundary: Boundary) -> Tensor:
        """The trigger's probability of INVOKE for each row; a GPU is not waited for. A constant one is on the host."""
        if self.trigger_cache is not None:
            self.count("trigger", boundary.rows, [len(ids) for ids in boundary.unread])
        probs: Tensor = self.model.trigger.invoke_probs(boundary, self.trigger_cache)
        return probs

    def read_shared_prompts(self, rows: Sequence[int]) -> None:
        """Lets the trigger read the prompts of answers that it asks for the first time, once for each prompt's answers.

        Args:
            rows: cache rows of the answers that are asked.
        """
        size, cache, live = self.settings.group_size, self.trigger_cache, self.live
        trigger = self.model.trigger
        if size == 1 or cache is None or not trigger.shares_prompts or trigger.needs_states:
            return
        assert live is not None, "each answer has its own cache rows"
        first = {live[row] // size: row for row in reversed(rows) if not self.answers[live[row]].trigger_read}
        if not first:
            return
        unread = [self.prompts[prompt] for prompt in first]
        self.work["trigger_forwards"] += 1
        self.work["trigger_positions"] += sum(map(len, unread))
        trigger.invoke_probs(Boundary(list(first.values()), unread, None), cache)
        for prompt, source in first.items():
            for answer in self.answers[prompt * size : (prompt + 1) * size]:
                answer.trigger_read = len(answer.prompt)
                answer.work["trigger"] += len(answer.prompt) / size
            others = [row for row, index in enumerate(live) if index // size == prompt and row != source]
            cache.begin_like(source, others)

    def count(self, model: str, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Counts a pass of reasoner, weaver or trigger that reads so many positions of each cache row.

        A latent source may have none: then there was no pass.
        """
        self.work[f"{model}_forwards"] += int(any(positions))
        self.work[f"{model}_positions"] += sum(positions)
        size = self.settings.group_size
        for row, count in zip(rows, positions, strict=True):
            readers = range(row * size, (row + 1) * size) if self.live is None else (self.live[row],)
            for index in readers:
                self.answers[index].work[model] += count / len(readers)

    # Decisions, insertions and tokens

    def decide(self, index: int, prob: float, step: int) -> bool:
        """Decides for an answer at a boundary, and records the decision. True: it inserts."""
        if self.hooks.decide is not None:
            decisions = self.answers[index].decisions
            invoke = self.hooks.decide(index, len(decisions) - decisions.count(Decision.NOT_ASKED))
        elif self.samples_decisions:
            assert self._decision_uniforms is not None, "sampled decisions need random numbers"
            invoke = bool(self._decision_uniforms[index][step] < prob)
        else:
            invoke = prob > 0.5
        if invoke:
            self.answers[index].invoked_at = len(self.answers[index].tokens)
        self._record(index, Decision.INVOKE if invoke else Decision.SKIP, prob)
        return invoke

    def rules_out(self, answer: Answer) -> bool:
        """Whether the settings rule out the boundary behind an answer's newest token, which is counted."""
        reason = None if answer.reader is None else answer.reader.inside
        if reason is None and self.model.boundaries.rests(len(answer.tokens), answer.invoked_at):
            reason = "cooldown"
        if reason is not None:
            answer.ruled_out[reason] += 1
        return reason is not None

    def no_decision(self, index: int) -> None:
        """Records that the trigger was not asked."""
        self._record(index, Decision.NOT_ASKED, 0.0)

    def _record(self, index: int, decision: Decision, prob: float) -> None:
        self.answers[index].decisions.append(int(decision))
        self.answers[index].invoke_probs.append(prob)

    def insert(self, index: int, latents: Tensor, kind: InsertionKind, states: Tensor | None = None) -> None:
        """Records an insertion before an answer's next token.

        Args:
            index: the answer.
            latents: what is inserted, (K, H).
            kind: of the insertion.
            states: the reasoner's hidden states of the latents, (K, H); only if the weaver reads states.
        """
        answer = self.answers[index]
        answer.insertions.append((len(answer.prompt) + len(answer.tokens), int(kind)))
        # The weaver reads the latents in place of its queries at the answer's next insertion.
        embedded = latents.to(self.model.reasoner.backbone.embedding.dtype) if states is None else states
        answer.weaver_pending = [embedded]
        if self.hooks.keep_latents:
            answer.latents.append(latents)
        if self.hooks.observe is not None:
            self.hooks.observe(index, None)

    def uniforms(self, live: Sequence[int]) -> list[float] | None:
        """The random number of each answer's next token, 0 for one that needs none; None if there are none at all."""
        drawn = self._token_uniforms
        if drawn is None:
            return None
        return [drawn[index][len(self.answers[index].tokens)] if drawn[index] else 0.0 for index in live]

    def sample(self, hidden: Tensor, live: Sequence[int]) -> Sampled:
        """Samples the next token of each answer from the state that predicts it; a GPU is not waited for."""
        numbers = self.uniforms(live)
        uniforms = None if numbers is None else upload(numbers, self.device)
        logits = self.model.reasoner.logits(hidden)
        self._keep_alternatives(logits, live)
        alike: dict[tuple[float, float, int], list[int]] = {}
        for row, index in enumerate(live):
            own = self.answers[index].settings or self.settings
            alike.setdefault((own.temperature, own.top_p, own.top_k), []).append(row)
        if len(alike) == 1:
            return sample(logits, self.answers[live[0]].settings or self.settings, uniforms)
        assert uniforms is not None, "answers with settings of their own have numbers of their own"
        tokens = torch.empty(len(live), dtype=torch.int64, device=self.device)
        logprobs = torch.empty(len(live), dtype=logits.dtype, device=self.device)
        for rows in alike.values():
            at = upload(rows, self.device)
            own = self.answers[live[rows[0]]].settings or self.settings
            tokens[at], logprobs[at] = sample(logits[at], own, uniforms[at])
        return Sampled(tokens, logprobs)

    def _keep_alternatives(self, logits: Tensor, live: Sequence[int]) -> None:
        """Keeps the most probable tokens of this place for the answers that ask for them, (n, V)."""
        for row, index in enumerate(live):
            answer = self.answers[index]
            if answer.alternatives:
                temperature = (answer.settings or self.settings).temperature
                own = logits[row] if temperature == 0 else tempered(logits[row], temperature)
                top = own.log_softmax(dim=-1).topk(min(answer.alternatives, own.shape[0]))
                answer.tops.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))

    def append(self, live: Sequence[int], tokens: Sequence[int | float], logprobs: Sequence[float]) -> None:
        """Adds a token to each answer."""
        for index, token, logprob in zip(live, tokens, logprobs, strict=True):
            self.answers[index].tokens.append(int(token))
            self.answers[index].logprobs.append(logprob)
            if self.hooks.observe is not None:
                self.hooks.observe(index, int(token))

    def mark_finished(self, live: Sequence[int]) -> None:
        """Marks the answers that an end token or the caller's `stop` ended."""
        ends = self.model.reasoner.end_ids
        for index in live:
            answer = self.answers[index]
            stop, tokens = answer.stop or self.hooks.stop, answer.tokens
            answer.finished = tokens[-1] in ends or (stop is not None and stop(tokens))

    def result(self) -> Generation:
        """The answers as records."""
        return Generation(
            turns=[answer.turn() for answer in self.answers],
            work=WorkCount(**self.work),
            latents=[answer.latents for answer in self.answers] if self.hooks.keep_latents else None,
        )


def to_host(*parts: Tensor) -> list[list[Any]]:
    """The numbers of several vectors; a GPU is waited for once, for all of them."""
    copied = iter(_one_copy([part for part in parts if not part.is_cpu]))
    return [part.tolist() if part.is_cpu else next(copied) for part in parts]


def _one_copy(parts: Sequence[Tensor]) -> list[list[float]]:
    if not parts:
        return []
    sizes = [len(part) for part in parts]
    # Token ids are exact in float64.
    flat: list[float] = torch.cat([part.double() for part in parts]).tolist()
    return [flat[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
