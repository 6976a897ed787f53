r"""Boundaries: where latents may be inserted. The end of a prompt, and after a delimiter token inside an answer.

Delimiters are a table over token ids: a token counts if its own text ends in a delimiter, so fused tokens such as
".\n" count too (the released code decodes the whole prefix for this; the last token alone decides it).

Users may rule out boundaries (`skip_inside`, `cooldown`). What rules one out is known when the token before it is written,
so training and decoding decide alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from memgen.model.inside import KINDS, TextReader
from memgen.types import InsertionKind, InsertionPlan, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class SupervisedTurn:
    """One supervised turn of a row."""

    begin: int
    """Its first token: latents at the end of the prompt go directly before it."""
    points: tuple[int, ...]
    """Tokens of the turn that directly follow a delimiter of the turn: latents may go before each."""


@dataclass(frozen=True)
class BoundaryConfig:
    """Where the trigger is asked."""

    delimiters: tuple[str, ...] = (",", ".", "\n")
    """Texts after which it may be asked. The paper gives commas and periods as examples; these are the released code's."""
    ignore_numeric: bool = False
    """Skip "." and "," that follow a digit, so that latents do not split 3.14 or 1,000. A delimiter is judged before the
    next token is known, so a full stop right behind a number is skipped too."""
    max_inference_insertions: int = 5
    """Insertions per answer, the one at the end of the prompt not counted. 0 leaves only the end of the prompt."""
    keep_turn_latents: bool = False
    """Whether later turns of a conversation see the latents of earlier ones (paper) or not (released code)."""
    skip_inside: tuple[str, ...] = ()
    """What the trigger is not asked inside of, of number, currency, calculator (`<<...>>`), bracket and code_fence. The text
    of the turn so far decides (`memgen.model.inside`), so a full stop behind a number counts as inside it."""
    cooldown: int = 0
    """Fewest tokens between two insertions of a turn, the one at the end of its prompt included. 0: any."""

    def __post_init__(self) -> None:
        if self.max_inference_insertions < 0:
            raise ValueError(
                f"boundaries.max_inference_insertions must be 0 or more, got {self.max_inference_insertions}"
            )
        if self.cooldown < 0:
            raise ValueError(f"boundaries.cooldown must be 0 or more tokens, got {self.cooldown}")
        for kind in self.skip_inside:
            if kind not in KINDS:
                raise ValueError(f"boundaries.skip_inside has {kind!r}; choose from {', '.join(KINDS)}")


@final
class Boundaries:
    """The delimiter table of a tokenizer, on the host, where the token ids of rows and answers are.

    Args:
        config: where the trigger is asked.
        texts: text of each token id, decoded alone.
        at_prompt_end: whether the ends of prompts have latents: `cooldown` counts from there.

    Raises:
        ValueError: if a delimiter is empty, or no token ends in it.
    """

    def __init__(self, config: BoundaryConfig, texts: Sequence[str], *, at_prompt_end: bool = True) -> None:
        for delimiter in config.delimiters:
            if not delimiter:
                raise ValueError("boundaries.delimiters holds an empty text")
            if not any(text.endswith(delimiter) for text in texts):
                raise ValueError(
                    f"no token of this tokenizer ends in the delimiter {delimiter!r}; change boundaries.delimiters"
                )
        self.config = config
        self.at_prompt_end = at_prompt_end
        self.texts = tuple(texts) if config.skip_inside else ()
        """Text of each token id; empty if it decides nothing."""
        marks = [text.endswith(config.delimiters) for text in texts]
        if config.ignore_numeric:
            marks = [
                mark and not (text[-1:] in (".", ",") and text[-2:-1].isdigit())
                for mark, text in zip(marks, texts, strict=True)
            ]
        self.is_delimiter: Bools = np.asarray(marks)
        self.is_number_mark: Bools = np.asarray(
            [config.ignore_numeric and text in (".", ",") for text in texts]
        )
        self.ends_in_digit: Bools = np.asarray([text[-1:].isdigit() for text in texts])

    @classmethod
    def from_tokenizer(
        cls,
        config: BoundaryConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        *,
        at_prompt_end: bool = True,
    ) -> Boundaries:
        """Decodes every id alone. Ids that the model has but the tokenizer lacks have no text.

        Args:
            config: where the trigger is asked.
            tokenizer: the reasoner's.
            vocabulary: rows of the reasoner's embedding table.
            at_prompt_end: whether the ends of prompts have latents.
        """
        known = min(len(tokenizer), vocabulary)
        texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
        return cls(config, [*texts, *[""] * (vocabulary - known)], at_prompt_end=at_prompt_end)

    def capped(self, insertions: int) -> Boundaries:
        """The same table with another limit on the insertions inside an answer."""
        twin = copy.copy(self)
        twin.config = replace(self.config, max_inference_insertions=insertions)
        return twin

    def after(self, token: Ints, previous: Ints) -> Bools:
        """Whether a boundary lies behind `token`, given the token before it. Any shape, element by element."""
        found: Bools = self.is_delimiter[token] & ~(self.is_number_mark[token] & self.ends_in_digit[previous])
        return found

    def reader(self) -> TextReader | None:
        """Reads a turn for `skip_inside`, whose kinds it knows; None if nothing is to be skipped."""
        return TextReader(self.config.skip_inside) if self.config.skip_inside else None

    def rests(self, place: int, last: int | None) -> bool:
        """Whether a boundary lies in the cooldown.

        Args:
            place: index of the token that follows the boundary.
            last: likewise of the turn's last insertion; None: there was none.
        """
        return last is not None and place - last < self.config.cooldown

    def turns(self, batch: TokenBatch) -> list[list[SupervisedTurn]]:
        """The supervised turns of each row: a run of supervised tokens each (released code's rule for the points).

        What `skip_inside` rules out is left out; `cooldown` depends on what is inserted, and is `plan`'s.

        Raises:
            ValueError: if a row begins with a supervised token, so that no prompt precedes its answer.
        """
        ids, marks = batch.ids.cpu().numpy(), batch.supervised.cpu().numpy()
        if marks[:, 0].any():
            row = int(np.flatnonzero(marks[:, 0])[0])
            raise ValueError(
                f"row {row} begins with a supervised token; a prompt of at least one token must precede it"
            )
        previous = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1)
        behind_delimiter = self.after(ids, previous)[:, :-1] & marks[:, :-1] & marks[:, 1:]
        if batch.fixed is not None:
            behind_delimiter &= ~batch.fixed.cpu().numpy()[:, :-1]
        starts = marks[:, 1:] & ~marks[:, :-1]
        turns: list[list[SupervisedTurn]] = []
        for row, row_starts, row_points in zip(ids, starts, behind_delimiter, strict=True):
            begins: list[int] = (np.flatnonzero(row_starts) + 1).tolist()
            points: list[int] = (np.flatnonzero(row_points) + 1).tolist()
            found = []
            for begin, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True):
                own = [point for point in points if begin < point < end]
                found.append(SupervisedTurn(begin, tuple(self._outside(row, begin, own))))
            turns.append(found)
        return turns

    def _outside(self, row: Ints, begin: int, points: list[int]) -> list[int]:
        """The points of a turn that are inside of nothing to be skipped. Every token is read once."""
        reader = self.reader()
        if reader is None:
            return points
        kept = []
        for point in points:
            for token in row[begin:point].tolist():
                reader.read(self.texts[token])
            begin = point
            if reader.inside is None:
                kept.append(point)
        return kept

    def plan(
        self, batch: TokenBatch, choose: Callable[[int, tuple[int, ...]], Sequence[int]] | None = None
    ) -> InsertionPlan:
        """The plan that inserts at the prompt end of every supervised turn and at chosen delimiters of its answer.

        Args:
            batch: rows whose supervised tokens are the answers.
            choose: given the row and a turn's points, those to use. None: the first ones, up to the cap. With a cooldown,
                the points are those at which a trigger that always invokes is asked if there is no cap.
        """
        rows = []
        for row, turns in enumerate(self.turns(batch)):
            pairs: list[tuple[int, int]] = []
            for turn in turns:
                points = self._spaced(turn)
                inside = (
                    points[: self.config.max_inference_insertions] if choose is None else choose(row, points)
                )
                pairs.append((turn.begin, int(InsertionKind.PROMPT)))
                pairs += [(point, int(InsertionKind.INFERENCE)) for point in inside]
            rows.append(pairs)
        return InsertionPlan(rows)

    def _spaced(self, turn: SupervisedTurn) -> tuple[int, ...]:
        """The points of a turn, each the next one behind the cooldown of the one before."""
        last = turn.begin if self.at_prompt_end else None
        points = []
        for point in turn.points:
            if not self.rests(point, last):
                points.append(point)
                last = point
        return tuple(points)
