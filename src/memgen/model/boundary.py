r"""Boundaries: where memory may be woven in. The end of a prompt, and after a delimiter token inside an answer.

Delimiters are a table over token ids: a token counts if its own text ends in a delimiter, so fused tokens such as
".\n" count too (the released code decodes the whole prefix for this; the last token alone decides it).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from memgen.types import InsertionKind, InsertionPlan, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """One supervised turn of a row."""

    begin: int
    """Its first token: latents of the prompt end go directly before it."""
    points: tuple[int, ...]
    """Tokens of it that directly follow a delimiter of it: latents may go before each."""


@dataclass(frozen=True)
class BoundaryConfig:
    """Where the trigger is asked."""

    delimiters: tuple[str, ...] = (",", ".", "\n")
    """Texts after which it may be asked. The paper gives commas and periods as examples; these are the code's."""
    ignore_numeric: bool = False
    """Skip "." and "," that follow a digit, so that 3.14 and 1,000 are not cut. A delimiter must be judged before the
    next token is known, so a full stop right behind a number is skipped too."""
    max_inference_insertions: int = 5
    """Insertions per answer, the one at the end of the prompt not counted. 0 leaves only the end of the prompt."""
    keep_turn_latents: bool = False
    """Whether later turns of a conversation see the latents of earlier ones (paper) or not (released code)."""

    def __post_init__(self) -> None:
        if self.max_inference_insertions < 0:
            raise ValueError(
                f"boundaries.max_inference_insertions must be 0 or more, got {self.max_inference_insertions}"
            )


class Boundaries(nn.Module):
    """The delimiter table of a tokenizer.

    Args:
        config: where the trigger is asked.
        texts: text of each token id, decoded alone.

    Raises:
        ValueError: if a delimiter is empty, or no token ends in it.
    """

    is_delimiter: Bool[Tensor, " vocab"]
    is_number_mark: Bool[Tensor, " vocab"]
    ends_in_digit: Bool[Tensor, " vocab"]

    def __init__(self, config: BoundaryConfig, texts: Sequence[str]) -> None:
        super().__init__()
        for delimiter in config.delimiters:
            if not delimiter:
                raise ValueError("boundaries.delimiters holds an empty text")
            if not any(text.endswith(delimiter) for text in texts):
                raise ValueError(
                    f"no token of this tokenizer ends in the delimiter {delimiter!r}; change boundaries.delimiters"
                )
        self.config = config
        marks = [text.endswith(config.delimiters) for text in texts]
        if config.ignore_numeric:
            marks = [
                mark and not (text[-1:] in (".", ",") and text[-2:-1].isdigit())
                for mark, text in zip(marks, texts, strict=True)
            ]
        self.register_buffer("is_delimiter", torch.tensor(marks), persistent=False)
        number_marks = torch.tensor([config.ignore_numeric and text in (".", ",") for text in texts])
        self.register_buffer("is_number_mark", number_marks, persistent=False)
        digits = torch.tensor([text[-1:].isdigit() for text in texts])
        self.register_buffer("ends_in_digit", digits, persistent=False)

    @classmethod
    def from_tokenizer(
        cls, config: BoundaryConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int
    ) -> Boundaries:
        """Decodes every id alone. Ids that the model has but the tokenizer lacks have no text.

        Args:
            config: where the trigger is asked.
            tokenizer: the reasoner's.
            vocabulary: rows of the reasoner's embedding table.
        """
        known = min(len(tokenizer), vocabulary)
        texts = tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
        return cls(config, [*texts, *[""] * (vocabulary - known)])

    def capped(self, insertions: int) -> Boundaries:
        """The same table with another cap on the insertions inside an answer."""
        twin = copy.copy(self)
        twin.config = replace(self.config, max_inference_insertions=insertions)
        return twin

    def after(self, token: Tensor, previous: Tensor) -> Tensor:
        """Whether a boundary lies behind `token`, given the token before it. Any shape, element by element."""
        return self.is_delimiter[token] & ~(self.is_number_mark[token] & self.ends_in_digit[previous])

    def turns(self, batch: TokenBatch) -> list[list[Turn]]:
        """The supervised turns of each row: a run of supervised tokens each (released code's rule for the points).

        Raises:
            ValueError: if a row begins with a supervised token, so that no prompt precedes its answer.
        """
        if bool(batch.supervised[:, 0].any()):
            row = int(batch.supervised[:, 0].nonzero()[0])
            raise ValueError(
                f"row {row} begins with a supervised token; a prompt of at least one token must precede it"
            )
        ids, marks = batch.ids, batch.supervised
        previous = torch.cat([ids[:, :1], ids[:, :-1]], dim=1)
        behind_delimiter = self.after(ids, previous)[:, :-1] & marks[:, :-1] & marks[:, 1:]
        starts = marks[:, 1:] & ~marks[:, :-1]
        turns: list[list[Turn]] = []
        for row_starts, row_points in zip(starts.tolist(), behind_delimiter.tolist(), strict=True):
            begins = [i + 1 for i, mark in enumerate(row_starts) if mark]
            points = [i + 1 for i, mark in enumerate(row_points) if mark]
            turns.append(
                [
                    Turn(begin, tuple(point for point in points if begin < point < end))
                    for begin, end in zip(begins, [*begins[1:], ids.shape[1]], strict=True)
                ]
            )
        return turns

    def plan(
        self, batch: TokenBatch, choose: Callable[[int, tuple[int, ...]], Sequence[int]] | None = None
    ) -> InsertionPlan:
        """The plan that inserts at the prompt end of every supervised turn and at chosen delimiters of its answer.

        Args:
            batch: rows whose supervised tokens are the answers.
            choose: given the row and a turn's points, those to use. None: the first ones, up to the cap.
        """
        points: list[list[int]] = []
        kinds: list[list[int]] = []
        for row, turns in enumerate(self.turns(batch)):
            points.append([])
            kinds.append([])
            for turn in turns:
                inside = (
                    turn.points[: self.config.max_inference_insertions]
                    if choose is None
                    else choose(row, turn.points)
                )
                points[-1] += [turn.begin, *inside]
                kinds[-1] += [int(InsertionKind.PROMPT), *[int(InsertionKind.INFERENCE)] * len(inside)]
        return InsertionPlan.from_rows(points, kinds)
