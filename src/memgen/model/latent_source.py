"""What writes latents: the protocol that the weaver fulfils, and so does whatever is to stand in its place.

A source is asked for K vectors at each insertion. Everything around it is the same for all: where latents go, how they
lie in the stream, decoding, replay, the stages that train it, and its checkpoint. `WeaverConfig.kind` names it. The
comparators of the weaver are in `memgen.model.sources`, one file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone, BackboneConfig
from memgen.model.cache import KVCache
from memgen.model.external import BankSettings, RetrievalSettings
from memgen.types import InsertionKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS: Mapping[str, str] = {
    "weaver": "memgen.model.weaver.Weaver",
    "pause": "memgen.model.sources.pause.Pause",
    "softcot": "memgen.model.sources.softcot.SoftCoT",
    "lora": "memgen.model.sources.lora.ReasonerLora",
}
"""Import path of each source of ours."""


@dataclass(frozen=True)
class WeaverConfig:
    """How latents are made."""

    kind: str = "weaver"
    """`weaver`: MemGen's. Its comparators (docs/comparators.md): `pause` are constants that read nothing; `softcot` projects
    a frozen assistant's states, `lora` writes no latents and fine-tunes the reasoner. Or the import path of a `LatentSource` of
    your own, as `my_package.MySource`."""
    backbone: BackboneConfig | None = None
    """A base of its own; None shares the reasoner's (one copy of the weights)."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter that is trained."""
    prompt_latents: int = 8
    """K at the end of a prompt; 0 switches that insertion off."""
    inference_latents: int = 8
    """K after a delimiter; 0 switches those insertions off."""
    reads: Literal["embeddings", "hidden_states"] = "embeddings"
    """What it reads of the reasoner: input embeddings (released code) or last hidden states (paper, Eq. 5)."""
    query_scale: float | None = None
    """Initial scale of the normalised queries; None takes the standard deviation of its base's embeddings."""
    map_init: Literal["random", "identity"] = "random"
    """Start of the two linear maps. `random`: `nn.Linear`'s own (released code). `identity`: the weaver's base reads the
    reasoner's embeddings unchanged, as the text that it was pretrained on, and its last hidden states become latents with
    about the norm of token embeddings. Needs a base of the reasoner's width."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of another kind than `weaver`."""
    retrieval: RetrievalSettings | None = None
    """Passages of a text memory that the weaver reads besides the stream (paper, Eq. 17-19); null: none."""
    bank: BankSettings | None = None
    """Woven blocks of earlier episodes that are used again; null: none."""

    def latents(self, kind: InsertionKind) -> int:
        """K of a kind of insertion; 0 if it is switched off."""
        return self.prompt_latents if kind == InsertionKind.PROMPT else self.inference_latents

    def __post_init__(self) -> None:
        for name in ("prompt_latents", "inference_latents"):
            if getattr(self, name) < 0:
                raise ValueError(f"weaver.{name} must be 0 or more, got {getattr(self, name)}")
        if self.kind not in KINDS and "." not in self.kind:
            raise ValueError(
                f"weaver.kind must be one of {', '.join(KINDS)}, or the import path of a class, got {self.kind!r}"
            )
        if self.arguments and self.kind == "weaver":
            raise ValueError(
                "weaver.arguments are those of another kind of latent source, but weaver.kind is 'weaver'"
            )
        if self.external and self.kind != "weaver":
            raise ValueError(
                f"weaver.{next(iter(self.external))} is read by the weaver alone, but weaver.kind is {self.kind!r}; set it "
                "to null"
            )

    @property
    def external(self) -> dict[str, RetrievalSettings | BankSettings]:
        """What the weaver reads besides the stream: the settings that are set, by name."""
        given = {"retrieval": self.retrieval, "bank": self.bank}
        return {name: settings for name, settings in given.items() if settings is not None}


@dataclass(frozen=True)
class Surroundings:
    """What a latent source is built on."""

    reasoner: Backbone
    """The reasoner's base: latents are vectors of its embedding space."""
    base: Backbone
    """The source's own, if `WeaverConfig.backbone` names one, else the reasoner's."""
    tokenizer: PreTrainedTokenizerBase
    """The reasoner's."""
    base_tokenizer: PreTrainedTokenizerBase
    """That of the base, for a source that reads text."""


class LatentSource(nn.Module, ABC):
    """Writes the latents of insertions.

    Decoding calls `weave` without gradient, training with it: both must get the same latents for the same row. A source
    sees what lies in front of an insertion and nothing behind it.

    Args:
        config: K of each kind of insertion, and what else the source makes use of.
    """

    reads_states: bool = False
    """Whether `weave` is given the reasoner's last hidden states instead of its input embeddings."""
    reads_text: bool = False
    """Whether `weave` is given the token ids too; and whether its base's tokenizer is looked at, if that is another."""
    reasoner_adapter: str | None = None
    """Adapter of the reasoner's base that every pass of the reasoner applies; only of a comparator that writes no latents."""
    settings: tuple[str, ...] = ("arguments", "prompt_latents", "inference_latents")
    """Settings below `model.memgen.weaver` that give its tensors their meaning, besides `kind`."""

    def __init__(self, config: WeaverConfig) -> None:
        super().__init__()
        self.config = config
        self.trained_kinds: set[InsertionKind] = set()
        """Kinds of insertion whose latents training has written, here or before the checkpoint that was loaded."""

    @classmethod
    @abstractmethod
    def build(cls, config: WeaverConfig, around: Surroundings) -> LatentSource:
        """A new source.

        Args:
            config: K of each kind of insertion; `config.arguments` are its own settings.
            around: what it is built on.

        Raises:
            ValueError: if the settings fit neither it nor each other.
        """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of its latents: float32, unless the whole model was converted."""

    @abstractmethod
    def weave(
        self,
        states: Float[Tensor, "time hidden"],
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        rows: Sequence[int],
        cache: KVCache,
        texts: Sequence[Sequence[int]] | None = None,
    ) -> Float[Tensor, "latents hidden"]:
        """Writes the latents of one insertion per row.

        Args:
            states: the reasoner's embeddings (or hidden states) of the stream positions that are new since a row's last
                insertion, packed row by row: tokens, and earlier latents.
            counts: new positions of each row; may be 0 only if there was an insertion before.
            kinds: of the insertions.
            rows: each row's row in the cache.
            cache: for what the source's base reads; it keeps what the source wants kept.
            texts: token ids in front of each row's insertion, from the row's beginning; only if it `reads_text`.

        Returns:
            Latents in the reasoner's embedding space, packed row by row: K of its kind for each row.
        """

    def positions(
        self,
        counts: Sequence[int],
        kinds: Sequence[InsertionKind],
        texts: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        """How many positions `weave` of these arguments feeds to a model for each row: they are counted as work."""
        return [0] * len(counts)

    @property
    def forgotten(self) -> int:
        """Most positions of a row that one insertion feeds to the base and does not keep in the cache."""
        return 0

    def bases(self) -> dict[str, Backbone]:
        """The frozen bases that it reads, by the name under which a checkpoint keeps their fingerprint."""
        return {}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that training moves, by its name in this module: all parameters but those of its bases."""
        frozen = {id(p) for base in self.bases().values() for p in base.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) not in frozen}

    def chosen(self) -> dict[str, int]:
        """What it chose itself where its settings leave it open, by name: a run records it beside them."""
        return {}

    def is_untrained(self) -> bool:
        """Whether it is as it was made, so that its latents say nothing."""
        return not self.trained_kinds


def build_source(config: WeaverConfig, around: Surroundings) -> LatentSource:
    """The latent source that the configuration names, new.

    Raises:
        ValueError: if the kind cannot be imported or is no `LatentSource`, or its arguments do not fit.
    """
    try:
        return source_class(config).build(config, around)
    except TypeError as error:
        raise ValueError(
            f"model.memgen.weaver.arguments {config.arguments} do not fit weaver.kind {config.kind}: {error}"
        ) from error


def source_class(config: WeaverConfig) -> type[LatentSource]:
    """The class that the configuration names.

    Raises:
        ValueError: if it cannot be imported or is no `LatentSource`.
    """
    module, _, name = KINDS.get(config.kind, config.kind).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.memgen.weaver.kind {config.kind!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, LatentSource)):
        raise ValueError(  # noqa: TRY004 - the setting is wrong, not a type
            f"model.memgen.weaver.kind {config.kind!r} is no memgen.model.latent_source.LatentSource"
        )
    return found


@torch.no_grad()
def start_as_identity(map_: nn.Linear, reasoner_hidden: int, scale: float = 1.0) -> None:
    """Makes a map to or from the reasoner's space begin as a multiple of the identity (`WeaverConfig.map_init`).

    Raises:
        ValueError: if the two spaces are of unequal width.
    """
    if map_.in_features != map_.out_features:
        other = map_.out_features if map_.in_features == reasoner_hidden else map_.in_features
        raise ValueError(
            f"weaver.map_init=identity needs equal widths, but the reasoner's is {reasoner_hidden} and that of the "
            f"weaver's base {other}; set weaver.map_init=random, or use the reasoner's base"
        )
    nn.init.eye_(map_.weight).mul_(scale)
    nn.init.zeros_(map_.bias)
