"""SoftCoT: latents are projected states of a frozen assistant (arXiv 2502.12134).

It reads the text and K placeholders behind it; the projection of their last states is trained:

    states = assistant(text, placeholder x K)[-K:]
    latents = projection(states)

The assistant is the reasoner's base, without an adapter, or another model (`WeaverConfig.backbone`). It reads text alone, no
latents, so it can have another vocabulary: it then reads the translation of the whole text, in training too.

Differs from the paper: (1) soft thoughts stand wherever the trigger invokes; the paper has them at the prompt's end, which
is `inference_latents: 0`; (2) the assistant reads the reasoner's prompt instead of an instruction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from memgen.model.backbone import Backbone
from memgen.model.cache import KVCache, PackedKVCache, PassSegment, upload
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig, start_as_identity
from memgen.model.vocabulary import translation
from memgen.types import InsertionKind

# K latents, H width of the reasoner, W width of the assistant


@final
class SoftCoT(LatentSource):
    """Projected states of a frozen assistant.

    Args:
        assistant: never trained.
        config: K of each kind of insertion, and the projection's start (`map_init`).
        reasoner_hidden: width of the reasoner.
        placeholder: the assistant's token that stands at the K places.
        translate: turns the reasoner's token ids into the assistant's; None if both have one vocabulary.

    Raises:
        ValueError: if the projection cannot begin as configured, or the assistant has no such token.
    """

    reads_text = True
    settings = ("arguments",)  # The projection is the same for any K.

    def __init__(
        self,
        assistant: Backbone,
        config: WeaverConfig,
        reasoner_hidden: int,
        placeholder: int,
        translate: Callable[[Sequence[int]], list[int]] | None = None,
    ) -> None:
        super().__init__(config)
        vocabulary = assistant.embedding.shape[0]
        if not 0 <= placeholder < vocabulary:
            raise ValueError(
                f"weaver.arguments.placeholder must be a token id of the assistant's, below {vocabulary}, got {placeholder}"
            )
        self.assistant = assistant
        self.placeholder = placeholder
        self.translate = translate
        self.projection = nn.Linear(assistant.hidden_size, reasoner_hidden)
        if config.map_init == "identity":
            start_as_identity(self.projection, reasoner_hidden, assistant.embedding_scale())

    @classmethod
    @override
    def build(cls, config: WeaverConfig, around: Surroundings) -> SoftCoT:
        tokenizer = around.base_tokenizer
        known = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        default = next((token for token in known if token is not None), 0)
        translate = translation(around.tokenizer, tokenizer, "weaver")
        arguments = {"placeholder": default} | config.arguments
        return cls(around.base, config, around.reasoner.hidden_size, translate=translate, **arguments)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.projection.weight.dtype

    @override
    def bases(self) -> dict[str, Backbone]:
        return {"weaver": self.assistant}

    @override
    def positions(
        self,
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        texts: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        """Of rows with the same text, the first reads it for all."""
        assert texts is not None, "this source reads text"
        unread = self._inputs(kinds, texts)
        return [len(unread.pop((tuple(text), kind), ())) for text, kind in zip(texts, kinds, strict=True)]

    def _inputs(
        self, kinds: Sequence[InsertionKind], texts: Sequence[Sequence[int]]
    ) -> dict[tuple[tuple[int, ...], InsertionKind], list[int]]:
        """What the assistant reads for each distinct text and kind: its own token ids, placeholders behind them."""
        read = list if self.translate is None else self.translate
        distinct = dict.fromkeys((tuple(text), kind) for text, kind in zip(texts, kinds, strict=True))
        return {
            (text, kind): [*read(text), *[self.placeholder] * self.config.latents(kind)]
            for text, kind in distinct
        }

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
        """The projected states of each row's placeholders.

        Args:
            states: not read.
            counts: not read.
            kinds: how many placeholders each row has.
            rows: not read.
            cache: not read: each text is read anew, from its beginning.
            texts: what the assistant reads of each row.
        """
        assert texts is not None, "this source reads text"
        inputs = self._inputs(kinds, texts)
        sizes = [self.config.latents(kind) for _, kind in inputs]
        ids = upload([token for read in inputs.values() for token in read], self.assistant.device)
        with torch.no_grad():  # The assistant is frozen, and text has no gradient.
            fresh = PackedKVCache(len(inputs), self.assistant.device)
            segment = PassSegment(range(len(inputs)), [len(read) for read in inputs.values()], read=sizes)
            hidden = self.assistant(self.assistant.embed(ids), fresh.open([segment]))
        latents = self.projection(hidden.to(self.dtype)).split(sizes)  # (K, H) each
        of = dict(zip(inputs, latents, strict=True))
        return torch.cat([of[tuple(text), kind] for text, kind in zip(texts, kinds, strict=True)])
