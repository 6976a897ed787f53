"""What a weaver reads besides the stream: E of M = W([H; E]) (paper, Eq. 17-19; Eq. 21-23 of the revision).

At each insertion a source of E is asked with the text in front of it. Two are ours: passages of a text memory
(`memgen.generation.retrieval`) and blocks of a latent bank (`memgen.generation.latent_bank`). What it gives is read behind
the stream and in front of the queries, and forgotten with them; no gradient goes into it.

The paper does not say how the retrieved text is encoded. Here it is what the weaver reads of the reasoner anyhow
(`weaver.reads`): input embeddings, or the last hidden states of the reasoner that reads each piece by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from memgen.model.backbone import Backbone
from memgen.model.cache import PackedKVCache, PassSegment
from memgen.types import InsertionKind

if TYPE_CHECKING:
    from memgen.model.latent_source import Surroundings, WeaverConfig

SOURCES: Mapping[str, str] = {
    "retrieval": "memgen.generation.retrieval.TextRetrieval",
    "bank": "memgen.generation.latent_bank.BankReader",
}
"""Import path of the source that each setting of `WeaverConfig` makes."""

Insertions = Literal["all", "prompt", "inference"]
"""The insertions at which a source is asked: every INVOKE, or those of one kind."""


@dataclass(frozen=True)
class RetrievalSettings:
    """Passages of a text memory that the weaver reads behind the stream. What the paper leaves open is a setting."""

    memory: str | None = None
    """File of the text memory (docs/memories.md), which is read and never written. It must be set."""
    method: str = "memgen.memories.raw_trajectories.RawTrajectories"
    """Import path of the memory's method; it reads as it does without a scribe."""
    constants: dict[str, Any] = field(default_factory=dict)
    """The method's constants that the file was written with, where they are not its defaults."""
    embedder: str | None = None
    """Import path of the embedder's class that the file was written with; null: BM25."""
    seed: int = 0
    """Seed that the file was written with."""
    passages: int = 3
    """P: passages at most."""
    budget: int = 256
    """L_c: tokens of all passages together, at most. A passage is read whole or not at all."""
    separator: str = "\n"
    """Text between two passages; not counted in `budget`."""
    query_head: int = 192
    """Tokens of the text's beginning in the query, where the task stands; what is left out lies in the middle."""
    query_tail: int = 64
    """Tokens of its end in the query, those in front of the insertion."""
    insertions: Insertions = "all"
    """At which insertions the memory is searched: `all` (every INVOKE), `prompt` or `inference`."""
    parametric: bool = True
    """Whether the weaver reads the stream too. false: only what was found (the paper's "w/o parametric memory")."""

    def __post_init__(self) -> None:
        for name in ("passages", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"weaver.retrieval.{name} must be at least 1, got {getattr(self, name)}")
        if min(self.query_head, self.query_tail) < 0 or self.query_head + self.query_tail < 1:
            raise ValueError(
                "weaver.retrieval.query_head and query_tail must be 0 or more, and not both 0, got "
                f"{self.query_head} and {self.query_tail}"
            )


@dataclass(frozen=True)
class BankSettings:
    """Woven blocks of successful episodes that are used again. The numbers are those of its source (docs/comparators.md)."""

    path: str | None = None
    """File of the bank. It must be set; one that does not exist is begun, unless `write` is false."""
    use: Literal["weaver", "insert"] = "weaver"
    """What happens to a block that was found: the `weaver` reads it behind the stream, or it is inserted as it is in the
    place of the woven one (`insert`), which is woven all the same so that the weaver's KV cache stays whole."""
    write: bool = True
    """Whether `memgen test` and `memgen collect` keep the blocks of successful episodes. false: the bank is only read."""
    min_reward: float = 1.0
    """Lowest reward of a successful episode."""
    blocks: int = 1
    """Blocks that are found at most; 1 if they are inserted as they are."""
    least: float = 0.7
    """Lowest score of a block that is found: cosine * exp(-decay * age)."""
    decay: float = 0.05
    """How fast a block's score falls with its age, in episodes written since."""
    capacity: int = 8
    """Blocks that the file holds; the oldest are dropped."""
    centred: bool = False
    """Whether the mean key of the bank is taken off before the cosine: means of hidden states share most of their
    direction. The first block of a kind is then not found, for it is the mean."""
    key_tokens: int = 64
    """The key is the mean of the reasoner's last hidden states of so many tokens in front of the insertion."""
    insertions: Insertions = "all"
    """At which insertions the bank is searched: `all` (every INVOKE), `prompt` or `inference`."""

    def __post_init__(self) -> None:
        for name in ("blocks", "capacity", "key_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"weaver.bank.{name} must be at least 1, got {getattr(self, name)}")
        if self.decay < 0:
            raise ValueError(f"weaver.bank.decay must be 0 or more, got {self.decay}")
        if self.use == "insert" and self.blocks > 1:
            raise ValueError(
                f"weaver.bank.use insert takes one block, but weaver.bank.blocks is {self.blocks}"
            )


class External(ABC):
    """A source of what a weaver reads besides the stream. The same text gets the same answer until it is written to."""

    parametric: bool = True
    """Whether the weaver reads the stream beside it."""

    @classmethod
    @abstractmethod
    def build(cls, settings: Any, config: WeaverConfig, around: Surroundings) -> External:
        """Opens the memory that the settings name.

        Args:
            settings: its section of the configuration.
            config: of the weaver.
            around: what the weaver is built on.

        Raises:
            ValueError: if the settings name no memory that fits.
            OSError: if there is no such file.
        """

    @property
    @abstractmethod
    def most(self) -> int:
        """Most vectors that the weaver reads of it at one insertion."""

    @abstractmethod
    def read(
        self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]
    ) -> list[Float[Tensor, "_ hidden"]]:
        """What the weaver reads at each insertion, in the reasoner's width; a row's may be empty.

        Args:
            texts: token ids in front of each insertion.
            kinds: of the insertions.
        """

    @abstractmethod
    def positions(self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]) -> list[int]:
        """Positions that are read for each insertion, by the weaver and to find and encode what it reads."""

    def stored(self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]) -> list[Tensor | None]:
        """Blocks that are inserted in the place of the woven ones, (K, hidden); None: what was woven."""
        return [None] * len(texts)

    @abstractmethod
    def content(self) -> Mapping[str, Any]:
        """What of its content decides an answer, for a record of answers; empty if answers write to it."""


def external_memories(config: WeaverConfig, around: Surroundings) -> tuple[External, ...]:
    """The sources that a weaver's settings name, opened."""
    found = []
    for name, settings in config.external.items():
        module, _, cls = SOURCES[name].rpartition(".")
        kind: type[External] = getattr(import_module(module), cls)
        found.append(kind.build(settings, config, around))
    return tuple(found)


def asked_at(insertions: Insertions, kind: InsertionKind) -> bool:
    """Whether a source is asked at an insertion of a kind."""
    return insertions == "all" or InsertionKind[insertions.upper()] == kind


@torch.no_grad()
def states_of(
    reasoner: Backbone, pieces: Sequence[Float[Tensor, "_ hidden"]]
) -> list[Float[Tensor, "_ hidden"]]:
    """The reasoner's last hidden states of each piece, which it reads by itself; an empty piece has none."""
    filled = [place for place, piece in enumerate(pieces) if len(piece)]
    states = list(pieces)
    if not filled:
        return states
    counts = [len(pieces[place]) for place in filled]
    view = PackedKVCache(len(filled), reasoner.device).open([PassSegment(range(len(filled)), counts)])
    hidden = reasoner(torch.cat([pieces[place] for place in filled]), view)
    for place, found in zip(filled, hidden.split(counts), strict=True):
        states[place] = found
    return states
