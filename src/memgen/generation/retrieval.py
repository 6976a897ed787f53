"""Passages of a text memory that the weaver reads behind the stream (paper, Eq. 17-19; Eq. 21-23 of the revision).

    query = decode(text in front of the insertion)
    passages = memory.look(query)
    latents = weaver([stream; encode(passages); queries])[-K:]

The paper leaves open how many passages there are, how long they are, what finds and what encodes them, and whether each
insertion searches: `RetrievalSettings`. Its query is the text that was decoded so far, which is nothing at a prompt's end;
ours begins with the beginning of the prompt. The memory is never written: a recall leaves no trace in it, so that decoding
and replay find the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from memgen.chat import text_ids
from memgen.memories.base import ReadState, TextMemory
from memgen.model.backbone import Backbone
from memgen.model.cache import upload
from memgen.model.external import External, RetrievalSettings, asked_at, states_of
from memgen.model.latent_source import Surroundings, WeaverConfig
from memgen.types import InsertionKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECTION = "model.memgen.weaver.retrieval"
_REMEMBERED = 4096
"""Queries whose passages are not searched for again."""


@final
class TextRetrieval(External):
    """Finds passages for the text in front of an insertion.

    Args:
        settings: what is searched for, and how much of it is read.
        memory: the text memory; it is never written here.
        tokenizer: the reasoner's.
        reasoner: its embeddings (or hidden states) of the passages are what the weaver reads.
        states: whether the weaver reads hidden states.
        section: of the settings, for messages.
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        memory: TextMemory[Any],
        tokenizer: PreTrainedTokenizerBase,
        reasoner: Backbone,
        *,
        states: bool = False,
        section: str = SECTION,
    ) -> None:
        self.settings = settings
        self.memory = memory
        self.parametric = settings.parametric
        self._state = ReadState(k=settings.passages, budget=settings.budget)
        self._tokenizer = tokenizer
        self._reasoner = reasoner
        self._reads_states = states
        self._section = section
        try:
            self._separator = text_ids(tokenizer, settings.separator) if settings.passages > 1 else []
        except ValueError as error:
            raise ValueError(f"{section}.separator {settings.separator!r}: {error}") from error
        self._found = lru_cache(_REMEMBERED)(self._search)

    @classmethod
    @override
    def build(
        cls,
        settings: RetrievalSettings,
        config: WeaverConfig,
        around: Surroundings,
        section: str = SECTION,
    ) -> TextRetrieval:
        memory = _opened(settings, around.tokenizer, section)
        states = config.reads == "hidden_states"
        return cls(settings, memory, around.tokenizer, around.reasoner, states=states, section=section)

    @property
    @override
    def most(self) -> int:
        return self.settings.budget + (self.settings.passages - 1) * len(self._separator)

    def retrieved(self, text: Sequence[int]) -> list[int]:
        """Token ids of the passages that fit a text, best first; empty if there are none.

        Raises:
            ValueError: if a passage has words that the tokenizer does not know.
        """
        head, tail = self.settings.query_head, self.settings.query_tail
        gap = max(head, len(text) - tail)
        return self._found(tuple(text[:head]), tuple(text[gap:]), gap == head, self.memory.store.tick)

    def _search(self, head: tuple[int, ...], tail: tuple[int, ...], joined: bool, tick: int) -> list[int]:
        parts = [[*head, *tail]] if joined else [list(head), list(tail)]
        query = " ".join(
            str(self._tokenizer.decode(part, skip_special_tokens=True)) for part in parts if part
        )
        try:
            passages = [text_ids(self._tokenizer, p.text) for p in self.memory.look(query, self._state)]
        except ValueError as error:  # words that a small vocabulary does not have
            raise ValueError(
                f"a passage of {self.memory.store.path} ({self._section}.memory): {error}"
            ) from error
        ids: list[int] = []
        for passage in passages:
            ids += [*self._separator, *passage] if ids else passage
        return ids

    def _ids(self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]) -> list[list[int]]:
        asked = self.settings.insertions
        return [
            self.retrieved(text) if asked_at(asked, kind) else []
            for text, kind in zip(texts, kinds, strict=True)
        ]

    @override
    def read(
        self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]
    ) -> list[Float[Tensor, "_ hidden"]]:
        with torch.no_grad():
            device = self._reasoner.device
            embedded = [
                self._reasoner.embed(upload(ids, device))
                if ids
                else self._reasoner.embedding.new_zeros(0, self._reasoner.hidden_size)
                for ids in self._ids(texts, kinds)
            ]
        return states_of(self._reasoner, embedded) if self._reads_states else embedded

    @override
    def positions(self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]) -> list[int]:
        """The passages' tokens; twice those, if the reasoner has to read them first."""
        times = 2 if self._reads_states else 1
        return [times * len(ids) for ids in self._ids(texts, kinds)]

    @override
    def content(self) -> dict[str, Any]:
        return {"memory": self.memory.method, "writes": self.memory.store.tick}


def _opened(settings: RetrievalSettings, tokenizer: PreTrainedTokenizerBase, section: str) -> TextMemory[Any]:
    """The memory that the settings name. Its file must be there: an empty one would never be noticed.

    Raises:
        ValueError: if it is not named, is of another method, or method or embedder cannot be imported.
        OSError: if there is no such file.
    """
    if not settings.memory:
        raise ValueError(
            f"there is no memory to read: set {section}.memory to the file of a text memory (docs/comparators.md says how to "
            "write one)"
        )
    file = Path(settings.memory).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file} ({section}.memory); docs/comparators.md says how to write one"
        )
    method: type[TextMemory[Any]] = _imported(settings.method, TextMemory, f"{section}.method")
    embedder = None
    if settings.embedder is not None:
        embedder = _imported(settings.embedder, object, f"{section}.embedder")()
    try:
        constants = method.constants(**settings.constants)
    except TypeError as error:
        raise ValueError(
            f"{section}.constants {settings.constants} do not fit {settings.method}: {error}"
        ) from error
    return method(
        file,
        constants,
        embedder=embedder,
        seed=settings.seed,
        count_tokens=lambda text: len(text_ids(tokenizer, text)),
    )


def _imported(path: str, kind: type, key: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key} {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(  # noqa: TRY004 - the setting is wrong, not a type
            f"{key} {path!r} is no {kind.__module__}.{kind.__qualname__}"
        )
    return found
