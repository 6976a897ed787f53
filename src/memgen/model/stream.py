"""A row's interleaved tokens and latents, as indices.

A stream is what the reasoner reads: the row's tokens with K latents in front of each insertion point. Everything
here is host-side integer arithmetic; the tensors are made by `kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Insertion:
    """One block of latents in a stream."""

    begin: int
    """Stream position of its first latent: what lies before it is what the weaver reads."""
    kind: int
    """An `InsertionKind`."""
    latents: Ints
    """Index of each of its latents in the flat list of the whole batch's, (K,)."""


@final
class Stream:
    """One row.

    Args:
        tokens: token ids, (L,).
        points: (token index, kind) of each insertion, ascending; latents go before that token. A point equal to L
            puts latents behind the last token.
        latents: for each insertion, the flat indices of its latents.
    """

    def __init__(self, tokens: Ints, points: Sequence[tuple[int, int]], latents: Sequence[Ints]) -> None:
        sizes = np.asarray([len(block) for block in latents], dtype=np.int64)
        where = np.asarray([point for point, _ in points], dtype=np.int64)
        # Latents in front of token i: those of all insertions at or before i.
        shift = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(shift, where, sizes)
        shift = np.cumsum(shift)
        self.token_positions: Ints = np.arange(len(tokens)) + shift[:-1]
        self.length = len(tokens) + int(sizes.sum())
        self._next = np.arange(len(tokens)) + shift[1:]  # the last position before token i + 1
        self.ids = np.zeros(self.length, dtype=np.int64)
        self.ids[self.token_positions] = tokens
        self.sources = np.full(self.length, -1, dtype=np.int64)
        self.insertions: list[Insertion] = []
        before = 0
        for (point, kind), block in zip(points, latents, strict=True):
            begin = point + before
            self.sources[begin : begin + len(block)] = block
            self.insertions.append(Insertion(begin=begin, kind=kind, latents=block))
            before += len(block)

    def predictors(self, tokens: Ints) -> Ints:
        """Stream positions whose state predicts the token behind each given one: the last latent, if any lies between."""
        return self._next[tokens]

    def text(self, end: int) -> list[int]:
        """Token ids in front of a stream position; no latents."""
        tokens: list[int] = self.ids[:end][self.sources[:end] < 0].tolist()
        return tokens
