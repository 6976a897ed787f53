"""A decoding step: feeds every live answer its newest token, and latents where it inserts, and samples the next tokens.

One pass of the reasoner serves both, unless something has to look at the tokens' states before it is known what is
inserted: then the latents take a second pass. Steps in which no answer inserts may have a fixed shape
(`static_step.py`); then the host waits for the device once per pass.
"""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor

from memgen.generation.state import DecodingState, to_host
from memgen.generation.static_step import StaticStep
from memgen.model.cache import PassSegment, upload
from memgen.model.trigger import Boundary
from memgen.types import InsertionKind

# n live answers, K latents, H hidden size


@final
class DecodingSteps:
    """The steps behind the prompts.

    The live answers take the first rows of every cache: `live[row]` is the answer in a row.

    Args:
        state: after the prompts were read and each answer has its first token.
    """

    def __init__(self, state: DecodingState) -> None:
        self.state = state
        assert state.live is not None, "each answer has its own cache rows"
        self.live = state.live
        model = state.model
        self._static = state.static
        # While a static step runs, a learned trigger can be asked, so that the host waits for both at once.
        asked_meanwhile = self._static is not None and model.trigger.probability is None
        self._tokens_first = state.reads_states or model.trigger.needs_states or asked_meanwhile

    def drop_finished(self) -> None:
        """Moves the last rows into the rows of finished answers, so that the live answers stay in front."""
        row = 0
        while row < len(self.live):
            if not self.state.answers[self.live[row]].over:
                row += 1
                continue
            last = self.live.pop()
            if row < len(self.live):
                self.state.move(len(self.live), row)
                self.live[row] = last

    def run(self) -> None:
        """Feeds every live answer its newest token, and latents where it inserts, and adds the next tokens."""
        asked = self._at_boundary()
        if self._tokens_first:
            self._tokens_then_latents(asked)
        else:
            self._tokens_with_latents(asked)

    def _at_boundary(self) -> list[int]:
        """Rows where the trigger is asked: behind a delimiter, below the limit on insertions, and not ruled out."""
        answers = [self.state.answers[index] for index in self.live]
        newest = np.asarray([answer.tokens[-1] for answer in answers])
        previous = np.asarray([(answer.prompt[-1:] + answer.tokens[-2:])[-2] for answer in answers])
        delimited = self.state.model.boundaries.after(newest, previous)
        texts = self.state.model.boundaries.texts
        for answer in answers:
            if answer.reader is not None:
                answer.reader.read(texts[answer.tokens[-1]])
        limit = self.state.max_insertions
        below = [row for row in np.flatnonzero(delimited).tolist() if answers[row].inserted < limit]
        return [row for row in below if not self.state.rules_out(answers[row])]

    # One pass

    def _tokens_with_latents(self, asked: list[int]) -> None:
        """One pass for both: which answers insert is known before it."""
        state, live = self.state, self.live
        for index in live:
            state.answers[index].weaver_unread.append(state.answers[index].tokens[-1])
        probs = self._ask(asked, None)
        inserting = self._decide(asked, [] if probs is None else to_host(probs)[0])
        if not inserting and self._static is not None:
            self._run_static(self._static)
            state.append(live, *to_host(*self._static.outputs[:, : len(live)]))
            return
        segment, embeddings = self._newest()
        inserting, latents = self._weave(inserting)
        if not inserting:
            hidden = state.read(embeddings, [segment])
        else:
            packed = torch.cat([embeddings, *(block.to(embeddings.dtype) for block in latents)])
            states = state.read(packed, [segment, *state.latent_segments(inserting, latents)])
            behind = self._insert(inserting, latents, states[len(live) :])
            hidden = states[: len(live)].index_copy(0, upload(inserting, state.device), behind)
        state.append(live, *to_host(*state.sample(hidden, live)))

    def _newest(self) -> tuple[PassSegment, Tensor]:
        """Every live answer's newest token, to be fed: (n, H)."""
        tokens = [self.state.answers[index].tokens[-1] for index in self.live]
        embeddings = self.state.model.reasoner.backbone.embed(upload(tokens, self.state.device))
        return PassSegment(range(len(tokens)), [1] * len(tokens)), embeddings

    def _run_static(self, static: StaticStep) -> None:
        state = self.state
        state.count("reasoner", range(len(self.live)), [1] * len(self.live))
        static.run([state.answers[index].tokens[-1] for index in self.live], state.uniforms(self.live))

    # Two passes

    def _tokens_then_latents(self, asked: list[int]) -> None:
        """Two passes, if any answer inserts: weaver or trigger read the tokens' states, or are asked meanwhile."""
        state, live, static = self.state, self.live, self._static
        sampled = None
        if static is None:
            segment, embeddings = self._newest()
            states = state.read(embeddings, [segment])
        else:
            self._run_static(static)
            # Every answer's next token, should it not insert.
            sampled = static.outputs[:, : len(live)]
            states = static.states[: len(live)]
            if state.reads_states:
                states = states.clone()  # The next step writes there again, and the weaver reads them later.
        for row, index in enumerate(live):
            answer = state.answers[index]
            if state.reads_states:
                answer.weaver_pending.append(states[row : row + 1])
            else:
                answer.weaver_unread.append(answer.tokens[-1])
        probs = self._ask(asked, states)
        waited_for = [*([] if sampled is None else sampled), *([] if probs is None else [probs])]
        numbers = to_host(*waited_for) if waited_for else []
        inserting = self._decide(asked, [] if probs is None else numbers.pop())
        inserting, latents = self._weave(inserting)
        behind = self._read_latents(inserting, latents) if inserting else None
        if sampled is None:
            if behind is not None:
                states = states.index_copy(0, upload(inserting, state.device), behind)
            state.append(live, *to_host(*state.sample(states, live)))
            return
        tokens, logprobs = numbers
        if behind is not None:
            again = to_host(*state.sample(behind, [live[row] for row in inserting]))
            for row, token, logprob in zip(inserting, *again, strict=True):
                tokens[row], logprobs[row] = token, logprob
        state.append(live, tokens, logprobs)

    def _read_latents(self, inserting: list[int], latents: list[Tensor]) -> Tensor:
        """Reads latents in a pass of their own and returns the states behind them."""
        states = self.state.read(torch.cat(latents), self.state.latent_segments(inserting, latents))
        return self._insert(inserting, latents, states)

    # Shared by both

    def _ask(self, asked: list[int], states: Tensor | None) -> Tensor | None:
        """The trigger's probabilities for the rows at a boundary; None if there is none."""
        if not asked:
            return None
        self.state.read_shared_prompts(asked)
        unread = []
        for row in asked:
            answer = self.state.answers[self.live[row]]
            unread.append((answer.prompt + answer.tokens)[answer.trigger_read :])
            answer.trigger_read = len(answer.prompt) + len(answer.tokens)
        if states is not None and self.state.model.trigger.needs_states:
            states = states.index_select(0, upload(asked, self.state.device))
        else:
            states = None
        return self.state.ask(Boundary(asked, unread, states))

    def _decide(self, asked: list[int], probs: list[float]) -> list[int]:
        """Rows that insert now."""
        by_row = dict(zip(asked, probs, strict=True))
        inserting = []
        for row, index in enumerate(self.live):
            if row not in by_row:
                self.state.no_decision(index)
            elif self.state.decide(index, by_row[row], len(self.state.answers[index].tokens)):
                inserting.append(row)
        return inserting

    def _weave(self, inserting: list[int]) -> tuple[list[int], list[Tensor]]:
        """Feeds the weaver what it has not read of the rows. Returns those that insert and a block for each, (K, H)."""
        if not inserting:
            return [], []
        state = self.state
        pieces, counts = [], []
        for row in inserting:
            answer = state.answers[self.live[row]]
            new = answer.weaver_pending
            if answer.weaver_unread:
                ids = upload(answer.weaver_unread, state.device)
                new = [*new, state.model.reasoner.backbone.embed(ids)]
            pieces += new
            counts.append(sum(piece.shape[0] for piece in new))
            answer.weaver_pending, answer.weaver_unread = [], []
            answer.inserted += 1
        answers = [self.live[row] for row in inserting]
        latents = state.weave(torch.cat(pieces), counts, InsertionKind.INFERENCE, inserting, answers)
        # An intervention may have removed some.
        kept = [number for number, block in enumerate(latents) if block.shape[0]]
        return [inserting[number] for number in kept], [latents[number] for number in kept]

    def _insert(self, inserting: list[int], latents: list[Tensor], states: Tensor) -> Tensor:
        """Records the insertions of a step. Returns the state behind each block, from those that were needed."""
        state = self.state
        sizes = state.latents_read(latents)
        for row, block, block_states in zip(inserting, latents, states.split(sizes), strict=True):
            index = self.live[row]
            state.insert(index, block, InsertionKind.INFERENCE, block_states if state.reads_states else None)
        return states.index_select(0, upload(np.cumsum(sizes) - 1, state.device))
