"""The records that travel between the parts. Start reading here.

Axis letters, in the whole package: B rows, L token positions, E episodes, K latents per insertion, N new tokens,
H hidden size, V vocabulary size, T packed stream positions.

Conventions:
- Rows are left-aligned: row b's tokens are `ids[b, :lengths[b]]`; the values behind them have no meaning. Padding is
  never inferred from token ids (the pad token may be the end-of-sequence token).
- An insertion point p of a row means "directly before token p": the latents follow token p - 1.
- What a rollout records (turns, plans, texts) is host data: Python lists. Tensors are made where a pass needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Decision(IntEnum):
    """The trigger's decision before a token."""

    NOT_ASKED = -1
    """No boundary, a boundary that the settings rule out, or the cap on insertions was reached: the trigger was not asked."""
    SKIP = 0
    INVOKE = 1


class InsertionKind(IntEnum):
    """Which query bank of the weaver writes the latents."""

    PROMPT = 0
    """At the end of a prompt (of every turn)."""
    INFERENCE = 1
    """After a delimiter inside an answer."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of token ids of different length, left-aligned.

    Attributes:
        ids: token ids, int64 (B, L).
        lengths: tokens of each row, int64 (B,), each at least 1.
        supervised: True where the token is a target of the loss, bool (B, L). Never True behind a row's end.
        group: rows with the same number begin with the same tokens (the turns of one conversation, the answers to
            one prompt), int64 (B,). None: nothing is known to be shared. The forward then reads the shared part once.
        shared: how many leading tokens of a row are of that kind, int64 (B,): of two rows of a group, the one that
            shares more begins with the other's shared tokens. Set together with `group`.
        fixed: True where the chat template writes the token whatever a message says, so that no boundary lies behind
            it, bool (B, L). None: nowhere.
    """

    ids: Int[Tensor, "batch length"]
    lengths: Int[Tensor, " batch"]
    supervised: Bool[Tensor, "batch length"]
    group: Int[Tensor, " batch"] | None = None
    shared: Int[Tensor, " batch"] | None = None
    fixed: Bool[Tensor, "batch length"] | None = None

    def __post_init__(self) -> None:
        assert self.ids.shape == self.supervised.shape, "ids and supervised are aligned"
        assert self.lengths.shape == self.ids.shape[:1], "one length per row"
        assert (self.group is None) == (self.shared is None), "group and shared go together"

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]] | None = None
    ) -> TokenBatch:
        """Builds a batch from lists of token ids.

        Args:
            rows: token ids of each row; none may be empty.
            supervised: for each token, whether it is a target; default: none is.

        Raises:
            ValueError: if there is no row, a row is empty, or the two arguments differ in length.
        """
        if not rows:
            raise ValueError("a TokenBatch needs at least one row, got none")
        for index, row in enumerate(rows):
            if len(row) == 0:
                raise ValueError(f"row {index} has no tokens; every row needs at least one")
            if supervised is not None and len(supervised[index]) != len(row):
                raise ValueError(
                    f"row {index} has {len(row)} tokens but {len(supervised[index])} supervision marks"
                )
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        marks = torch.zeros_like(ids, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            if supervised is not None:
                marks[index, : len(row)] = torch.tensor(supervised[index], dtype=torch.bool)
        return cls(ids=ids, lengths=lengths, supervised=marks)

    @property
    def supervised_tokens(self) -> int:
        """Targets in the batch."""
        return int(self.supervised.sum())

    def rows(self) -> list[list[int]]:
        """Token ids of each row without padding."""
        return [row[:length] for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    def select(self, index: Int[Tensor, " rows"]) -> TokenBatch:
        """The given rows, in the given order, cropped to the longest of them."""
        lengths = self.lengths[index]
        width = int(lengths.max())
        return TokenBatch(
            ids=self.ids[index, :width],
            lengths=lengths,
            supervised=self.supervised[index, :width],
            group=None if self.group is None else self.group[index],
            shared=None if self.shared is None else self.shared[index],
            fixed=None if self.fixed is None else self.fixed[index, :width],
        )


@dataclass(frozen=True)
class InsertionPlan:
    """Where each row's latents go. A rollout records its plan, and every later pass replays it.

    Attributes:
        insertions: for each row (point, `InsertionKind`) pairs: the token index before which latents go, at least 1 and
            strictly ascending, and which query bank writes them.
    """

    insertions: list[list[tuple[int, int]]]

    def __post_init__(self) -> None:
        for index, row in enumerate(self.insertions):
            points = [point for point, _ in row]
            if any(point < 1 for point in points) or any(a >= b for a, b in pairwise(points)):
                raise ValueError(
                    f"row {index}: insertion points must be at least 1 and strictly ascending, got {points}"
                )

    @classmethod
    def from_rows(cls, points: Sequence[Sequence[int]], kinds: Sequence[Sequence[int]]) -> InsertionPlan:
        """Builds a plan from separate lists.

        Args:
            points: token indices of each row, strictly ascending, each at least 1.
            kinds: an `InsertionKind` for each of them.

        Raises:
            ValueError: if the lists differ in length, a point is below 1, or points do not ascend.
        """
        if len(points) != len(kinds):
            raise ValueError(f"{len(points)} rows of points but {len(kinds)} rows of kinds")
        for index, (row, row_kinds) in enumerate(zip(points, kinds, strict=True)):
            if len(row) != len(row_kinds):
                raise ValueError(f"row {index} has {len(row)} points but {len(row_kinds)} kinds")
        return cls(
            [list(zip(row, row_kinds, strict=True)) for row, row_kinds in zip(points, kinds, strict=True)]
        )

    @classmethod
    def empty(cls, rows: int) -> InsertionPlan:
        """A plan that inserts nothing."""
        return cls([[] for _ in range(rows)])

    @property
    def counts(self) -> list[int]:
        """Insertions of each row."""
        return [len(row) for row in self.insertions]

    def rows(self) -> list[list[tuple[int, int]]]:
        """(point, kind) pairs of each row."""
        return self.insertions

    def select(self, index: Iterable[int]) -> InsertionPlan:
        """The plan of the given rows, in the given order."""
        return InsertionPlan([self.insertions[row] for row in index])


@dataclass(frozen=True)
class WorkCount:
    """Exact work of a call: what was fed to each part, in positions (padding is never fed).

    Attributes:
        reasoner_forwards: passes through the reasoner.
        reasoner_positions: tokens and latents read by the reasoner.
        weaver_forwards: passes through the weaver.
        weaver_positions: tokens, latents and queries read by the weaver.
        trigger_forwards: passes through a trigger that has its own pass over the text.
        trigger_positions: tokens read by it.
    """

    reasoner_forwards: int = 0
    reasoner_positions: int = 0
    weaver_forwards: int = 0
    weaver_positions: int = 0
    trigger_forwards: int = 0
    trigger_positions: int = 0


@dataclass(frozen=True)
class RowWork:
    """One answer's share of the work, in positions: what was read once for G answers counts 1/G for each of them.

    Attributes:
        reasoner: tokens and latents read by the reasoner.
        weaver: tokens, latents and queries read by the weaver.
        trigger: tokens read by a trigger that has its own pass over the text.
    """

    reasoner: float = 0.0
    weaver: float = 0.0
    trigger: float = 0.0

    def __add__(self, other: RowWork) -> RowWork:
        return RowWork(
            self.reasoner + other.reasoner, self.weaver + other.weaver, self.trigger + other.trigger
        )


@dataclass(frozen=True)
class AgentTurn:
    """One turn of an agent: what it read, what it wrote, and how, token for token. Nothing is tokenised again.

    Attributes:
        context: token ids before the turn, as the reasoner read them: the prompt, earlier turns and observations.
        tokens: token ids that it wrote, the end token included.
        logprobs: log-probability of each at its temperature, before top-p and top-k (under the model's own
            distribution if decoding was greedy). A later pass computes the same distribution, and what top-p and top-k
            remove is the same factor in both.
        decisions: a `Decision` taken before each.
        invoke_probs: the trigger's probability of INVOKE where it was asked, else 0.
        insertions: (index in context + tokens, `InsertionKind`) of this turn's latents, ascending.
        finished: True if it ended with an end token or a stop text, False if it was truncated at its limit.
        text: the tokens as text, special tokens removed: what the environment was given.
        observation: the text that the agent read between its previous turn and this one, truncated as it was read.
            Empty for the first turn, which reads `Trajectory.prompt`.
        work: the turn's share of the work.
        ruled_out: boundaries at which the trigger was not asked although the cap left room, by the reason: each kind of
            `boundaries.skip_inside`, and `cooldown`, if they are set. A boundary that several reasons rule out counts for
            the first.
    """

    context: list[int]
    tokens: list[int]
    logprobs: list[float]
    decisions: list[int]
    invoke_probs: list[float]
    insertions: list[tuple[int, int]]
    finished: bool
    text: str = ""
    observation: str = ""
    work: RowWork = field(default_factory=RowWork)
    ruled_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def insertion_points(self) -> list[int]:
        """For each insertion, the index in `tokens` before which it lies; 0: at the end of the prompt."""
        return [point - len(self.context) for point, _ in self.insertions]

    @property
    def offered(self) -> int:
        """Boundaries at which the trigger was asked."""
        return sum(decision != Decision.NOT_ASKED for decision in self.decisions)

    @property
    def invocations(self) -> int:
        """Boundaries at which it invoked."""
        return sum(decision == Decision.INVOKE for decision in self.decisions)


@dataclass(frozen=True)
class Generation:
    """Answers to a batch of prompts, with what is needed to replay them.

    Attributes:
        turns: one for each answer, `group_size` of each prompt, those of a prompt next to each other. They have no text.
        work: exact work counts.
        latents: inserted latents of each answer in order of insertion, each (K, H), if they were asked for.
    """

    turns: list[AgentTurn]
    work: WorkCount
    latents: list[list[Tensor]] | None = None

    @property
    def plan(self) -> InsertionPlan:
        """Where latents were inserted, in token indices of prompt + answer."""
        return InsertionPlan([turn.insertions for turn in self.turns])

    @property
    def lengths(self) -> list[int]:
        """New tokens of each answer, the end token included."""
        return [len(turn.tokens) for turn in self.turns]

    def answers(self) -> list[list[int]]:
        """New token ids of each answer, the end token included."""
        return [turn.tokens for turn in self.turns]

    def as_batch(self) -> TokenBatch:
        """Prompt + answer as one batch whose answer tokens are supervised: what a later pass replays with `plan`."""
        rows = [turn.context + turn.tokens for turn in self.turns]
        marks = [[False] * len(turn.context) + [True] * len(turn.tokens) for turn in self.turns]
        return TokenBatch.from_rows(rows, marks)


@dataclass(frozen=True)
class Trajectory:
    """One episode; a single-turn task's answer is an episode of one turn.

    Attributes:
        example: the item's id.
        turns: the agent's turns, in order. Empty only if the environment failed before the first.
        reward: total reward.
        parts: what it is made of, by name.
        truncated: whether a turn was truncated at its limit, or the episode before its end.
        fault: the environment error that ended the episode, or None. Such an episode is neither scored nor trained on.
        prompt: the chat messages (role, content) that the agent read before its first turn.
    """

    example: str
    turns: tuple[AgentTurn, ...]
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False
    fault: str | None = None
    prompt: tuple[Mapping[str, Any], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the agent wrote."""
        return sum(len(turn.tokens) for turn in self.turns)

    @property
    def work(self) -> RowWork:
        """The episode's share of the work, all its turns together."""
        return sum((turn.work for turn in self.turns), RowWork())

    @property
    def offered(self) -> int:
        """Boundaries at which the trigger was asked."""
        return sum(turn.offered for turn in self.turns)

    @property
    def invocations(self) -> int:
        """Boundaries at which it invoked."""
        return sum(turn.invocations for turn in self.turns)

    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation as chat messages: the prompt, the agent's turns, and what it observed between them."""
        messages = [dict(message) for message in self.prompt]
        for number, turn in enumerate(self.turns):
            if number:
                messages.append({"role": "user", "content": turn.observation})
            messages.append({"role": "assistant", "content": turn.text})
        return messages
