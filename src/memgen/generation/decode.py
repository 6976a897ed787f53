"""Decoding with memory: rows insert at different steps, and nobody's work is repeated because another row inserts.

One pass of the reasoner per step feeds each live row its new token, and K latents behind it where the row inserts.
Weaver and trigger keep memories of their own and read only what is new. Finished rows leave the batch at once. Steps in
which no row inserts may have a fixed shape (`static_step.py`); then the host waits for the device once per pass of the
reasoner.

Differs from the released code: it re-reads the whole batch at every insertion, keeps finished rows going, and asks
nobody to say at which temperature the tokens behind the cap are drawn; see docs/architecture.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memgen.generation.sampling import Draw, GenerationSettings, choose, row_uniforms
from memgen.generation.static_step import StaticStep
from memgen.kernels import interleave
from memgen.model.cache import RowCache, Segment, upload
from memgen.model.memgen import MemGenModel
from memgen.model.stream import Stream
from memgen.model.trigger import Boundary, ConstantTrigger
from memgen.types import Decision, Generation, InsertionKind, InsertionPlan, RowWork, TokenBatch, WorkCount

# P prompts, n live rows, K latents, H hidden size

Observer = Callable[[int, int | None], None]
"""Called with (row, token id) for each new token, and with (row, None) where latents are inserted before the next."""

Intervention = Callable[[Sequence[int], Sequence[int], list[Tensor]], list[Tensor]]
"""Called with rows, how many insertions each had before, and each row's latents (K, H); returns what to insert."""

Stop = Callable[[Sequence[int]], bool]
"""Called with an answer's new token ids so far; True ends the answer there. It must not keep or change them."""


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
) -> Generation:
    """Answers prompts, weaving memory in where the trigger says so.

    Args:
        model: in evaluation mode, so that no dropout acts.
        prompts: token ids of each prompt, not padded.
        settings: how to draw; `group_size` answers per prompt, those of a prompt one behind the other.
        row_seeds: a seed for each answer; a row's draws depend on its own seed alone. Default: from `settings.seed`.
        observe: is told of each token and insertion as it happens.
        intervene: replaces latents before they are inserted (analysis); only with one answer per prompt.
        keep_latents: whether to return the inserted latents.
        earlier: where latents of earlier turns lie inside the prompts (boundaries.keep_turn_latents), one line per
            prompt. Reasoner and weaver read them; they count for no cap, and the result's plan leaves them out.
        earlier_latents: those latents, for each prompt in order of its points, (K, H) each. Set together with
            `earlier`.
        stop: ends an answer besides the end tokens; asked for each live row after each token that is not an end
            token. An answer that it ends is marked as finished.

    Raises:
        ValueError: if a prompt is empty or does not fit into the reasoner's context with its answer, or if earlier
            latents do not fit their prompts.
        RuntimeError: if the model is in training mode.
    """
    if model.training:
        raise RuntimeError(
            "generate needs model.eval(): dropout in rollouts would train on another distribution"
        )
    earlier_streams = _earlier_streams(model, prompts, earlier, earlier_latents)
    return _Decoder(
        model,
        prompts,
        settings,
        row_seeds,
        observe,
        intervene,
        stop,
        earlier_streams,
        keep_latents=keep_latents,
    ).run()


@dataclass(frozen=True)
class _Prompts:
    """The prompts as streams: their tokens with the latents of earlier turns between them."""

    streams: list[Stream]
    latents: Tensor  # of all prompts, (M, H); the streams' sources count in it


def _earlier_streams(
    model: MemGenModel,
    prompts: Sequence[Sequence[int]],
    earlier: InsertionPlan | None,
    latents: Sequence[Sequence[Tensor]] | None,
) -> _Prompts:
    if (earlier is None) != (latents is None):
        raise ValueError("earlier and earlier_latents belong together; give both or neither")
    points = [[] for _ in prompts] if earlier is None else earlier.rows()
    blocks = [[] for _ in prompts] if latents is None else [list(row) for row in latents]
    if not len(points) == len(blocks) == len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts need as many lines in earlier and earlier_latents, "
            f"got {len(points)} and {len(blocks)}"
        )
    hidden = model.reasoner.backbone.hidden_size
    streams, total = [], 0
    for index, (prompt, row_points, row_blocks) in enumerate(zip(prompts, points, blocks, strict=True)):
        if len(row_points) != len(row_blocks):
            raise ValueError(
                f"prompt {index} has {len(row_points)} earlier points but {len(row_blocks)} blocks of latents"
            )
        for (point, _), block in zip(row_points, row_blocks, strict=True):
            if point >= len(prompt):
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens, but earlier latents lie before token {point}"
                )
            if block.ndim != 2 or block.shape[1] != hidden:
                raise ValueError(
                    f"prompt {index}: earlier latents have shape {tuple(block.shape)}, not (K, {hidden})"
                )
        numbers = []
        for block in row_blocks:
            numbers.append(np.arange(total, total + len(block)))
            total += len(block)
        streams.append(Stream(np.asarray(prompt, dtype=np.int64), row_points, numbers))
    flat = [block.to(model.device) for row in blocks for block in row]
    return _Prompts(streams, torch.cat(flat) if flat else torch.zeros(0, hidden, device=model.device))


@dataclass
class _Row:
    """One answer."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    invoke_probs: list[float] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    finished: bool = False
    inserted: int = 0  # insertions inside the answer: what the cap counts
    # What the weaver has not read yet: reasoner-space vectors, and behind them token ids (none if it reads states).
    weaver_pending: list[Tensor] = field(default_factory=list)
    weaver_unread: list[int] = field(default_factory=list)
    trigger_read: int = 0  # tokens of prompt + answer that the trigger has read
    work: dict[str, float] = field(default_factory=lambda: {"reasoner": 0.0, "weaver": 0.0, "trigger": 0.0})


class _Decoder:
    def __init__(
        self,
        model: MemGenModel,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        row_seeds: Sequence[int] | None,
        observe: Observer | None,
        intervene: Intervention | None,
        stop: Stop | None,
        woven_prompts: _Prompts,
        *,
        keep_latents: bool,
    ) -> None:
        group = settings.group_size
        if intervene is not None and group > 1:
            raise ValueError(f"intervene works with group_size 1, got {group}")
        if row_seeds is not None and len(row_seeds) != len(prompts) * group:
            raise ValueError(
                f"{len(prompts)} prompts x group_size {group} need as many row_seeds, got {len(row_seeds)}"
            )
        if not prompts:
            raise ValueError("there is no prompt to answer")
        self.model, self.settings = model, settings
        self.observe, self.intervene, self.keep_latents = observe, intervene, keep_latents
        self.stop, self.woven_prompts = stop, woven_prompts
        self.prompts = [list(prompt) for prompt in prompts]
        self.rows = [_Row(prompt) for prompt in self.prompts for _ in range(group)]
        self.device = model.device
        weaver, boundaries = model.weaver.config, model.boundaries
        self.cap = min(boundaries.config.max_inference_insertions, settings.max_new_tokens)
        if not weaver.inference_latents:
            self.cap = 0
        self.reads_states = weaver.reads == "hidden_states"
        self.states_first = self.reads_states or model.trigger.needs_states
        switch = settings.static_step
        self.static_step = switch == "on" or (switch == "auto" and self.device.type == "cuda")
        self.static: StaticStep | None = None
        self._size_caches()
        # The tables on the host, where the tokens are already: on a device each look-up would have to wait for it.
        self.boundaries = copy.deepcopy(boundaries).cpu()
        seeds = row_seeds or [settings.seed * 1_000_003 + index for index in range(len(self.rows))]
        steps = settings.max_new_tokens
        self.draws_decisions = settings.sample_decisions or model.trigger.stochastic
        # Tokens and decisions have their own numbers, so that one more decision does not move the tokens.
        draws = (
            row_uniforms(seeds, 2 * steps).tolist()
            if settings.temperature > 0 or self.draws_decisions
            else None
        )
        self.token_draws = [line[:steps] for line in draws] if draws else None
        self.decision_draws = [line[steps:] for line in draws] if draws else None
        self.work = dict.fromkeys(WorkCount.__dataclass_fields__, 0)
        self.rows_of: Callable[[int], Sequence[int]] = self._group  # rows that a cache line is read for

    def _size_caches(self) -> None:
        weaver = self.model.weaver.config
        latents = weaver.prompt_latents + self.cap * weaver.inference_latents
        for index, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; it needs at least one token")
        longest = max(stream.length for stream in self.woven_prompts.streams)
        self.capacity = longest + latents + self.settings.max_new_tokens
        context = self.model.reasoner.backbone.context_length
        if context is not None and self.capacity > context:
            raise ValueError(
                f"a prompt of {longest} positions, {self.settings.max_new_tokens} new tokens and up to {latents} latents "
                f"need {self.capacity} positions, but the reasoner's context is {context}; shorten the prompt or "
                "lower max_new_tokens"
            )
        # A GPU reads rows of slots whose number is a multiple of 8 without copying their mask.
        self.capacity = -(-self.capacity // 8) * 8 if self.static_step else self.capacity
        self.queries = max(weaver.prompt_latents, weaver.inference_latents)
        self.text_capacity = max(map(len, self.prompts)) + self.settings.max_new_tokens

    # The prompt

    def run(self) -> Generation:
        live = list(range(len(self.rows)))  # row of each cache line
        self._choose(self._read_prompts(), live, 0)
        self.rows_of = lambda line: (live[line],)
        if self.static_step:
            self.static = StaticStep(self.model.reasoner, self.reasoner_cache, self.settings)
        for step in range(1, self.settings.max_new_tokens + 1):
            for row in live:
                self.rows[row].finished = self._ended(self.rows[row].tokens)
            if step == self.settings.max_new_tokens or all(self.rows[row].finished for row in live):
                break
            self._drop_finished(live)
            self._step(live, step)
        return self._result()

    def _ended(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.model.reasoner.end_ids or (self.stop is not None and self.stop(tokens))

    def _read_prompts(self) -> Tensor:
        """Reads each distinct prompt once and returns the state that predicts each row's first token, (B, H)."""
        model, count = self.model, len(self.prompts)
        streams = self.woven_prompts.streams
        lengths = [stream.length for stream in streams]
        lines = list(range(count))
        embeddings = interleave(
            model.reasoner.backbone.embedding,
            upload(np.concatenate([stream.ids for stream in streams]), self.device),
            self.woven_prompts.latents,
            upload(np.concatenate([stream.sources for stream in streams]), self.device),
        )
        self.reasoner_cache = RowCache(count, self.capacity, self.device)
        self.weaver_cache = RowCache(count, self.capacity + self.queries, self.device)
        self.trigger_cache = model.trigger.memory(count, self.text_capacity, self.device)
        # Behind the prompts only their last states are wanted, unless the weaver reads them all.
        everybody = Segment(lines, lengths, read=None if self.reads_states else [1] * count)
        states = self._reasoner(embeddings, [everybody]) if self.states_first else None
        end_states = states
        if states is not None and self.reads_states:
            end_states = states[upload(np.cumsum(lengths) - 1, self.device)]
        invoked = self._decide_at_prompt_end(end_states)
        woven = [p for p in lines if any(invoked[row] for row in self._group(p))]
        latents: list[Tensor] = []
        source = states if self.reads_states else embeddings
        assert source is not None, "states were read first if the weaver reads them"
        parts = source.split(lengths)
        if woven:
            latents = self._weave(
                torch.cat([parts[p] for p in woven]),
                [lengths[p] for p in woven],
                [InsertionKind.PROMPT] * len(woven),
                woven,
                [0] * len(woven),
                [self._group(p)[0] for p in woven],
            )
        hidden, latent_states = self._read_prompt_latents(embeddings, end_states, everybody, woven, latents)
        self._spread_groups(parts, woven, latents, invoked, latent_states)
        final = []
        for row, invoke in enumerate(invoked):
            prompt = row // self.settings.group_size
            final.append(latent_states[woven.index(prompt)][-1] if invoke else hidden[prompt])
        return torch.stack(final)

    def _group(self, prompt: int) -> range:
        size = self.settings.group_size
        return range(prompt * size, (prompt + 1) * size)

    def _decide_at_prompt_end(self, states: Tensor | None) -> list[bool]:
        """The prompt end is a boundary like any other: the trigger is asked once per prompt, each row decides."""
        if not self.model.weaver.config.prompt_latents:
            for row in self.rows:
                self._record(row, Decision.NOT_ASKED, 0.0)
            return [False] * len(self.rows)
        boundary = Boundary(rows=range(len(self.prompts)), unread=self.prompts, states=states)
        probs = self._ask(boundary).tolist()
        invoked = []
        for index, row in enumerate(self.rows):
            row.trigger_read = len(row.prompt)
            invoked.append(self._decide(index, row, probs[index // self.settings.group_size], 0))
        return invoked

    def _read_prompt_latents(
        self,
        embeddings: Tensor,
        end_states: Tensor | None,
        everybody: Segment,
        woven: list[int],
        latents: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """States at every prompt's last token, (P, H), and behind the latents of the prompts that have some."""
        if end_states is None:
            packed = torch.cat([embeddings, *(block.to(embeddings.dtype) for block in latents)])
            states = self._reasoner(packed, [everybody, *self._latent_segment(woven, latents)])
            end_states, latent_states = states[: len(self.prompts)], states[len(self.prompts) :]
        elif woven:
            latent_states = self._reasoner(torch.cat(latents), self._latent_segment(woven, latents))
        return end_states, list(latent_states.split(self._latents_read(latents))) if woven else []

    def _latents_read(self, latents: list[Tensor]) -> list[int]:
        """From how many latents of each block the state is wanted: the last predicts, a weaver may read all."""
        return [block.shape[0] if self.reads_states else 1 for block in latents]

    def _latent_segment(self, lines: list[int], latents: list[Tensor]) -> list[Segment]:
        if not lines:
            return []
        sizes = [block.shape[0] for block in latents]
        return [Segment(lines, sizes, read=self._latents_read(latents))]

    def _spread_groups(
        self,
        parts: Sequence[Tensor],
        woven: list[int],
        latents: list[Tensor],
        invoked: list[bool],
        latent_states: list[Tensor],
    ) -> None:
        """Gives each row its own line of every memory."""
        size = self.settings.group_size
        if size > 1:
            source = [row // size for row in range(len(self.rows))]
            self.reasoner_cache = self.reasoner_cache.select(source, self.capacity)
            self.weaver_cache = self.weaver_cache.select(source, self.capacity + self.queries)
            if self.trigger_cache is not None:
                self.trigger_cache = self.trigger_cache.select(source, self.trigger_cache.capacity)
        for index, row in enumerate(self.rows):
            prompt = index // size
            if prompt not in woven:
                row.weaver_pending = [parts[prompt]]
                continue
            block = woven.index(prompt)
            if invoked[index]:
                self._insert(row, index, latents[block], InsertionKind.PROMPT)
                if self.reads_states:
                    row.weaver_pending = [latent_states[block]]
            else:
                self.reasoner_cache.truncate(index, parts[prompt].shape[0])

    # A step

    def _draws(self, live: list[int], step: int) -> list[float] | None:
        return None if self.token_draws is None else [self.token_draws[row][step] for row in live]

    def _drawn(self, hidden: Tensor, live: list[int], step: int) -> Draw:
        draws = self._draws(live, step)
        uniforms = None if draws is None else upload(draws, self.device)
        return choose(self.model.reasoner.logits(hidden), self.settings, uniforms)

    def _choose(self, hidden: Tensor, live: list[int], step: int) -> None:
        tokens, logprobs = _numbers(*self._drawn(hidden, live, step))
        self._take(live, tokens, logprobs)

    def _take(self, live: list[int], tokens: Sequence[int | float], logprobs: Sequence[float]) -> None:
        for row, token, logprob in zip(live, tokens, logprobs, strict=True):
            self.rows[row].tokens.append(int(token))
            self.rows[row].logprobs.append(logprob)
            if self.observe is not None:
                self.observe(row, int(token))

    def _drop_finished(self, live: list[int]) -> None:
        """Fills the lines of finished rows with the last lines, so that the live rows stay in front."""
        line = 0
        while line < len(live):
            if not self.rows[live[line]].finished:
                line += 1
                continue
            last = live.pop()
            if line < len(live):
                for cache in (self.reasoner_cache, self.weaver_cache, self.trigger_cache):
                    if cache is not None:
                        cache.move(len(live), line)
                live[line] = last

    def _step(self, live: list[int], step: int) -> None:
        """Feeds every live row its newest token, and latents where it inserts, and draws the next tokens."""
        asked = self._at_boundary(live)
        # A learned trigger is asked while a static step runs, so that both are waited for at once.
        learned = not isinstance(self.model.trigger, ConstantTrigger)
        if self.states_first or (self.static is not None and learned):
            self._tokens_then_latents(asked, live, step)
        else:
            self._tokens_with_latents(asked, live, step)

    def _at_boundary(self, live: list[int]) -> list[int]:
        """Lines where the trigger is asked: behind a delimiter, and below the cap."""
        rows = [self.rows[row] for row in live]
        newest = torch.tensor([row.tokens[-1] for row in rows])
        previous = torch.tensor([(row.prompt[-1:] + row.tokens[-2:])[-2] for row in rows])
        delimited: list[bool] = self.boundaries.after(newest, previous).tolist()
        return [line for line, row in enumerate(rows) if delimited[line] and row.inserted < self.cap]

    def _tokens_with_latents(self, asked: list[int], live: list[int], step: int) -> None:
        """One pass for both: who inserts is known before it."""
        for row in live:
            self.rows[row].weaver_unread.append(self.rows[row].tokens[-1])
        probs = self._ask_at_delimiters(asked, live, None)
        inserting = self._decide_at_delimiters(asked, [] if probs is None else probs.tolist(), live, step)
        if not inserting and self.static is not None:
            self._run_static(self.static, live, step)
            self._take(live, *_numbers(*self.static.outputs[:, : len(live)]))
            return
        everybody, embeddings = self._newest(live)
        if not inserting:
            self._choose(self._reasoner(embeddings, [everybody]), live, step)
            return
        latents = self._weave_unread(inserting, live)
        packed = torch.cat([embeddings, *(block.to(embeddings.dtype) for block in latents)])
        states = self._reasoner(packed, [everybody, *self._latent_segment(inserting, latents)])
        hidden, latent_states = states[: len(live)], states[len(live) :]
        behind = self._insert_all(inserting, live, latents, latent_states)
        self._choose(hidden.index_copy(0, upload(inserting, self.device), behind), live, step)

    def _tokens_then_latents(self, asked: list[int], live: list[int], step: int) -> None:
        """Two passes, if anybody inserts: a weaver or a trigger looks at the tokens' states, or is asked meanwhile."""
        static = self.static
        if static is None:
            everybody, embeddings = self._newest(live)
            states = self._reasoner(embeddings, [everybody])
            drawn = None
        else:
            self._run_static(static, live, step)
            # Every row's next token, should it not insert.
            drawn = static.outputs[:, : len(live)]
            states = static.states[: len(live)]
            if self.reads_states:
                states = states.clone()  # The next step writes there again, and the weaver reads them later.
        for line, row in enumerate(live):
            if self.reads_states:
                self.rows[row].weaver_pending.append(states[line : line + 1])
            else:
                self.rows[row].weaver_unread.append(self.rows[row].tokens[-1])
        probs = self._ask_at_delimiters(asked, live, states)
        waited_for = [*([] if drawn is None else drawn), *([] if probs is None else [probs])]
        numbers = _numbers(*waited_for) if waited_for else []
        inserting = self._decide_at_delimiters(asked, [] if probs is None else numbers.pop(), live, step)
        behind = self._read_latents(inserting, live) if inserting else None
        if drawn is None:
            hidden = (
                states if behind is None else states.index_copy(0, upload(inserting, self.device), behind)
            )
            self._choose(hidden, live, step)
            return
        tokens, logprobs = numbers
        if behind is not None:
            again = _numbers(*self._drawn(behind, [live[line] for line in inserting], step))
            for line, token, logprob in zip(inserting, *again, strict=True):
                tokens[line], logprobs[line] = token, logprob
        self._take(live, tokens, logprobs)

    def _newest(self, live: list[int]) -> tuple[Segment, Tensor]:
        """Every live row's newest token, to be fed: (n, H)."""
        tokens = upload([self.rows[row].tokens[-1] for row in live], self.device)
        return Segment(range(len(live)), [1] * len(live)), self.model.reasoner.backbone.embed(tokens)

    def _run_static(self, static: StaticStep, live: list[int], step: int) -> None:
        self._count("reasoner", range(len(live)), [1] * len(live))
        static.run([self.rows[row].tokens[-1] for row in live], self._draws(live, step))

    def _read_latents(self, inserting: list[int], live: list[int]) -> Tensor:
        """Writes latents, reads them in a pass of their own and returns the states behind them."""
        latents = self._weave_unread(inserting, live)
        states = self._reasoner(torch.cat(latents), self._latent_segment(inserting, latents))
        return self._insert_all(inserting, live, latents, states)

    def _insert_all(
        self, inserting: list[int], live: list[int], latents: list[Tensor], states: Tensor
    ) -> Tensor:
        """Records the insertions of a step. Returns the state behind each block, from those that were wanted."""
        sizes = self._latents_read(latents)
        for line, block, block_states in zip(inserting, latents, states.split(sizes), strict=True):
            answer = self.rows[live[line]]
            self._insert(answer, live[line], block, InsertionKind.INFERENCE)
            answer.inserted += 1
            if self.reads_states:
                answer.weaver_pending = [block_states]
        return states.index_select(0, upload(np.cumsum(sizes) - 1, self.device))

    def _ask_at_delimiters(self, asked: list[int], live: list[int], states: Tensor | None) -> Tensor | None:
        if not asked:
            return None
        unread = []
        for line in asked:
            answer = self.rows[live[line]]
            unread.append((answer.prompt + answer.tokens)[answer.trigger_read :])
            answer.trigger_read = len(answer.prompt) + len(answer.tokens)
        if not self.model.trigger.needs_states:
            states = None
        at = None if states is None else states.index_select(0, upload(asked, self.device))
        return self._ask(Boundary(asked, unread, at))

    def _decide_at_delimiters(
        self, asked: list[int], probs: list[float], live: list[int], step: int
    ) -> list[int]:
        """Lines that insert now."""
        by_line = dict(zip(asked, probs, strict=True))
        inserting = []
        for line, row in enumerate(live):
            if line not in by_line:
                self._record(self.rows[row], Decision.NOT_ASKED, 0.0)
            elif self._decide(row, self.rows[row], by_line[line], step):
                inserting.append(line)
        return inserting

    def _weave_unread(self, lines: list[int], live: list[int]) -> list[Tensor]:
        pieces, counts, events = [], [], []
        for line in lines:
            row = self.rows[live[line]]
            new = row.weaver_pending
            if row.weaver_unread:
                ids = upload(row.weaver_unread, self.device)
                new = [*new, self.model.reasoner.backbone.embed(ids)]
            pieces += new
            counts.append(sum(piece.shape[0] for piece in new))
            events.append(len(row.points))
            row.weaver_pending, row.weaver_unread = [], []
        kinds = [InsertionKind.INFERENCE] * len(lines)
        return self._weave(torch.cat(pieces), counts, kinds, lines, events, [live[line] for line in lines])

    # Shared by both

    def _reasoner(self, embeddings: Tensor, segments: Sequence[Segment]) -> Tensor:
        view = self.reasoner_cache.open(segments)
        lines = [line for segment in segments for line in segment.rows]
        self._count("reasoner", lines, [count for segment in segments for count in segment.counts])
        return self.model.reasoner.read(embeddings, view)

    def _weave(
        self,
        states: Tensor,
        counts: list[int],
        kinds: list[InsertionKind],
        lines: list[int],
        events: list[int],
        rows: list[int],
    ) -> list[Tensor]:
        weaver = self.model.weaver
        sizes = [weaver.config.latents(kind) for kind in kinds]
        latents = weaver.weave(states, counts, kinds, lines, self.weaver_cache)
        self._count("weaver", lines, [read + size for read, size in zip(counts, sizes, strict=True)])
        blocks = list(latents.split(sizes))
        return blocks if self.intervene is None else self.intervene(rows, events, blocks)

    def _ask(self, boundary: Boundary) -> Tensor:
        """Probability of INVOKE for each row; not waited for yet. A constant one is on the host."""
        if self.trigger_cache is not None:
            self._count("trigger", boundary.rows, [len(ids) for ids in boundary.unread])
        probs: Tensor = self.model.trigger.invoke_probs(boundary, self.trigger_cache)
        return probs

    def _count(self, model: str, lines: Sequence[int], positions: Sequence[int]) -> None:
        """Counts a pass of a model that reads so many positions of each cache line."""
        self.work[f"{model}_forwards"] += 1
        self.work[f"{model}_positions"] += sum(positions)
        for line, count in zip(lines, positions, strict=True):
            rows = self.rows_of(line)
            for row in rows:
                self.rows[row].work[model] += count / len(rows)

    def _decide(self, index: int, row: _Row, prob: float, step: int) -> bool:
        if self.draws_decisions:
            assert self.decision_draws is not None, "drawn decisions need draws"
            invoke = bool(self.decision_draws[index][step] < prob)
        else:
            invoke = prob > 0.5
        self._record(row, Decision.INVOKE if invoke else Decision.SKIP, prob)
        return invoke

    @staticmethod
    def _record(row: _Row, decision: Decision, prob: float) -> None:
        row.decisions.append(int(decision))
        row.invoke_probs.append(prob)

    def _insert(self, row: _Row, index: int, latents: Tensor, kind: InsertionKind) -> None:
        row.points.append(len(row.prompt) + len(row.tokens))
        row.kinds.append(int(kind))
        if not self.reads_states:
            row.weaver_pending = [latents.to(self.model.reasoner.backbone.embedding.dtype)]
        if self.keep_latents:
            row.latents.append(latents)
        if self.observe is not None:
            self.observe(index, None)

    def _result(self) -> Generation:
        rows, width = self.rows, max(len(row.tokens) for row in self.rows)
        shape = (len(rows), width)
        tokens = torch.zeros(shape, dtype=torch.int64)
        logprobs = torch.zeros(shape)
        decisions = torch.full(shape, int(Decision.NOT_ASKED))
        probs = torch.zeros(shape)
        for line, row in enumerate(rows):
            count = len(row.tokens)
            tokens[line, :count] = torch.tensor(row.tokens)
            logprobs[line, :count] = torch.tensor(row.logprobs)
            decisions[line, :count] = torch.tensor(row.decisions[:count])
            probs[line, :count] = torch.tensor(row.invoke_probs[:count])
        on = self.device
        return Generation(
            prompt=TokenBatch.from_rows([row.prompt for row in rows]).to(on),
            tokens=tokens.to(on),
            lengths=torch.tensor([len(row.tokens) for row in rows], device=on),
            finished=torch.tensor([row.finished for row in rows], device=on),
            logprobs=logprobs.to(on),
            decisions=decisions.to(on),
            invoke_probs=probs.to(on),
            plan=InsertionPlan.from_rows([row.points for row in rows], [row.kinds for row in rows]),
            work=WorkCount(**self.work),
            row_work=tuple(RowWork(**row.work) for row in rows),
            latents=[row.latents for row in rows] if self.keep_latents else None,
        )


def _numbers(*parts: Tensor) -> list[list[Any]]:
    """Lines of numbers for the host, which waits for the device once for all of them."""
    copied = iter(_one_copy([part for part in parts if not part.is_cpu]))
    return [part.tolist() if part.is_cpu else next(copied) for part in parts]


def _one_copy(parts: Sequence[Tensor]) -> list[list[float]]:
    if not parts:
        return []
    sizes = [len(part) for part in parts]
    # Token ids are exact in float64.
    flat: list[float] = torch.cat([part.double() for part in parts]).tolist()
    return [flat[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
