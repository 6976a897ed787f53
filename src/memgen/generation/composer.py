"""LatentMem's composer: a weaver that also reads trajectories of similar tasks (arXiv 2602.03036).

    trajectory = nearest(memory, task)
    latents = composer(stream, trajectory, queries)[-K:]

It is the weaver, adapter and queries and maps, and reads what a text memory finds behind the stream: `[new positions,
trajectory, queries]`, of which its KV cache keeps the new positions. Without a hit it is the plain weaver, bit for bit. No
gradient goes into what was retrieved.

Differs from the paper: (1) it reads the whole stream behind which latents go, not the task alone; (2) any text memory serves,
by default `RawTrajectories` with BM25; (3) passages are whole or left out, where the published code cuts them from the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.chat import text_ids
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache, upload
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig
from memgen.model.weaver import Weaver
from memgen.types import InsertionKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 4096
"""Queries whose passages are not searched for again."""


@final
class Composer(LatentSource):
    """A weaver and the memory that it reads.

    Args:
        composer: the weaver.
        memory: searched at each insertion with the end of the text; it is never written.
        tokenizer: the reasoner's.
        embed: the reasoner's embeddings of token ids.
        passages: that are read at most.
        budget: tokens of all of them together, at most.
        query_tokens: of the text's end that make the query.

    Raises:
        ValueError: if a number is too small, or the weaver reads hidden states, which retrieved text has none of.
    """

    reads_text = True
    settings = Weaver.settings

    def __init__(
        self,
        composer: Weaver,
        memory: TextMemory[Any],
        tokenizer: PreTrainedTokenizerBase,
        embed: Callable[[Tensor], Tensor],
        *,
        passages: int = 1,
        budget: int = 256,
        query_tokens: int = 256,
    ) -> None:
        super().__init__(composer.config)
        for name, value in (("passages", passages), ("budget", budget), ("query_tokens", query_tokens)):
            if value < 1:
                raise ValueError(f"weaver.arguments.{name} must be at least 1, got {value}")
        if composer.reads_states:
            raise ValueError(
                "the composer reads retrieved text as embeddings; set model.memgen.weaver.reads to embeddings"
            )
        self.composer = composer
        self.memory = memory
        self.state = ReadState(k=passages, budget=budget)
        self._tokenizer = tokenizer
        self._embed = embed
        self._budget = budget
        self._query_tokens = query_tokens
        self._found = lru_cache(_REMEMBERED)(self._search)

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> Composer:
        arguments = dict(config.arguments)
        path, method = arguments.pop("memory", None), arguments.pop("method", None)
        memory = _opened(path, method, arguments.pop("constants", None) or {}, around.tokenizer)
        composer = Weaver(around.base, config, around.reasoner.hidden_size)
        return cls(composer, memory, around.tokenizer, around.reasoner.embed, **arguments)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.composer.dtype

    @override
    def bases(self) -> dict[str, Backbone]:
        return self.composer.bases()

    @override
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the weaver."""
        return {f"composer.{name}": p for name, p in self.composer.own_parameters().items()}

    @override
    def is_untrained(self) -> bool:
        return self.composer.is_untrained()

    @property
    @override
    def forgotten(self) -> int:
        return self.composer.forgotten + self._budget

    @override
    def positions(
        self,
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        texts: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        assert texts is not None, "this source reads text"
        plain = self.composer.positions(counts, kinds)
        return [count + len(self.retrieved(text)) for count, text in zip(plain, texts, strict=True)]

    def retrieved(self, text: Sequence[int]) -> list[int]:
        """Token ids of the passages that fit a text; empty if there are none."""
        return self._found(tuple(text[-self._query_tokens :]), self.memory.store.tick)

    def _search(self, end: tuple[int, ...], tick: int) -> list[int]:
        query = str(self._tokenizer.decode(list(end), skip_special_tokens=True))
        passages = self.memory.read(query, self.state)
        return [token for passage in passages for token in text_ids(self._tokenizer, passage.text)]

    @override
    def weave(
        self,
        states: Float[Tensor, "time hidden"],
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        rows: Sequence[int],
        cache: KVCache,
        texts: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "latents hidden"]:
        """The weaver's latents, what the memory finds for each row's text having been read.

        Raises:
            ValueError: if a row with what was retrieved for it is longer than the weaver's base can read.
        """
        assert texts is not None, "this source reads text"
        found = [self.retrieved(text) for text in texts]
        with torch.no_grad():
            snippets = [self._embed(upload(ids, states.device)) if ids else states[:0] for ids in found]
        return self.composer.weave(states, counts, kinds, rows, cache, snippets=snippets)


def _opened(
    path: str | None, method: str | None, constants: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> TextMemory[Any]:
    """The memory that the arguments name. Its file must be there: an empty one would never be noticed.

    Raises:
        ValueError: if it is not named, is of another method, or the method cannot be imported.
        OSError: if there is no such file.
    """
    if path is None:
        raise ValueError(
            "the composer needs a memory to read: set model.memgen.weaver.arguments.memory to the file of a text memory "
            "(docs/comparators.md says how to write one)"
        )
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file} (model.memgen.weaver.arguments.memory); docs/comparators.md says how to write one"
        )
    kind = RawTrajectories if method is None else _method(method)
    return kind(file, kind.constants(**constants), count_tokens=lambda text: len(text_ids(tokenizer, text)))


def _method(path: str) -> type[TextMemory[Any]]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model.memgen.weaver.arguments.method {path!r} cannot be imported: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, TextMemory)):
        raise ValueError(  # noqa: TRY004 - the setting is wrong, not a type
            f"model.memgen.weaver.arguments.method {path!r} is no memgen.memories.base.TextMemory"
        )
    return found
