"""A latent bank as the weaver reads it, and how episodes that succeeded are kept in it.

    key = mean(reasoner's states of the last tokens in front of the insertion)
    block = nearest(bank, key)
    latents = block, or weaver([stream; block; queries])[-K:]
    ...                                     # act, and get a reward
    remember(episode)                       # if it was good

The key's tokens are read by themselves, without what lies in front of them and without latents, so that the same text has
the same key whatever was inserted; each text in a pass of its own, so that decoding and replay have the same key to the bit.
The file is `memgen.memories.latent_bank`, which has the scores and says how this differs from its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from memgen.generation.rollout import Rollouts
from memgen.memories.latent_bank import BankIdentity, Kept, LatentBank, NewBlock
from memgen.model.backbone import Backbone
from memgen.model.cache import upload
from memgen.model.external import BankSettings, External, asked_at, states_of
from memgen.model.latent_source import Surroundings, WeaverConfig
from memgen.model.memgen import MemGenModel
from memgen.types import InsertionKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 4096
"""Texts whose keys and blocks are not looked for again."""


@final
class BankReader(External):
    """Finds blocks for the text in front of an insertion, and keeps those of good episodes.

    Args:
        settings: what is found, what happens to it, and what is kept.
        bank: the file.
        config: K of each kind of insertion, and what the weaver reads. A block of another K is not found.
        tokenizer: the reasoner's.
        reasoner: its states are the keys.
    """

    def __init__(
        self,
        settings: BankSettings,
        bank: LatentBank,
        config: WeaverConfig,
        tokenizer: PreTrainedTokenizerBase,
        reasoner: Backbone,
    ) -> None:
        self.settings = settings
        self.bank = bank
        self._config = config
        self._tokenizer = tokenizer
        self._reasoner = reasoner
        self._reads_states = config.reads == "hidden_states"
        self._key = lru_cache(_REMEMBERED)(self._mean_state)
        self._found = lru_cache(_REMEMBERED)(self._search)

    @classmethod
    @override
    def build(cls, settings: BankSettings, config: WeaverConfig, around: Surroundings) -> BankReader:
        if not settings.path:
            raise ValueError(
                "there is no latent bank to read: set model.memgen.weaver.bank.path to its file; one that does not exist is "
                "begun"
            )
        path, reasoner = Path(settings.path).expanduser(), around.reasoner
        if not settings.write and not path.is_file():
            raise FileNotFoundError(
                f"there is no latent bank {path} (model.memgen.weaver.bank.path), and with bank.write false none is begun"
            )
        identity = BankIdentity(
            reasoner.name, reasoner.fingerprint, reasoner.hidden_size, settings.key_tokens
        )
        bank = LatentBank(path, identity, begin=settings.write)
        return cls(settings, bank, config, around.tokenizer, reasoner)

    @property
    @override
    def most(self) -> int:
        if self.settings.use == "insert":
            return 0
        return self.settings.blocks * max(self._config.prompt_latents, self._config.inference_latents)

    # Reading

    def key(self, text: Sequence[int]) -> np.ndarray:
        """The key of a text: the mean of the reasoner's states of its last tokens, float32 (hidden,)."""
        return self._key(tuple(text[-self.settings.key_tokens :]))

    @torch.no_grad()
    def _mean_state(self, tail: tuple[int, ...]) -> np.ndarray:
        (states,) = states_of(self._reasoner, [self._reasoner.embed(upload(tail, self._reasoner.device))])
        mean: np.ndarray = states.float().mean(dim=0).cpu().numpy()
        return mean

    def found(self, text: Sequence[int], kind: InsertionKind) -> list[Float[Tensor, "latents hidden"]]:
        """The blocks that fit a text, best first; none if the bank is not asked at this kind of insertion."""
        if not asked_at(self.settings.insertions, kind):
            return []
        return self._found(tuple(text[-self.settings.key_tokens :]), kind, self.bank.tick)

    def _search(self, tail: tuple[int, ...], kind: InsertionKind, tick: int) -> list[Tensor]:
        settings = self.settings
        hits = self.bank.search(
            self._key(tail), kind.name.lower(), self._config.latents(kind),
            count=settings.blocks, least=settings.least, decay=settings.decay, centred=settings.centred,
        )  # fmt: skip
        blocks = [self.bank.latents(hit.number) for hit in hits]
        return [
            torch.from_numpy(block.copy()).to(self._reasoner.device) for block in blocks if block is not None
        ]

    @override
    def read(
        self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]
    ) -> list[Float[Tensor, "_ hidden"]]:
        nothing = self._reasoner.embedding.new_zeros(0, self._reasoner.hidden_size)
        found = [
            [] if self.settings.use == "insert" else self.found(*asked)
            for asked in zip(texts, kinds, strict=True)
        ]
        pieces = [torch.cat(blocks).to(nothing) if blocks else nothing for blocks in found]
        return states_of(self._reasoner, pieces) if self._reads_states else pieces

    @override
    def positions(self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]) -> list[int]:
        """The key's tokens, and the blocks' vectors if the weaver reads them; twice those, if the reasoner has to first."""
        times = 0 if self.settings.use == "insert" else 2 if self._reads_states else 1
        return [
            min(len(text), self.settings.key_tokens) + times * sum(map(len, self.found(text, kind)))
            if asked_at(self.settings.insertions, kind)
            else 0
            for text, kind in zip(texts, kinds, strict=True)
        ]

    @override
    def stored(self, texts: Sequence[Sequence[int]], kinds: Sequence[InsertionKind]) -> list[Tensor | None]:
        if self.settings.use == "weaver":
            return super().stored(texts, kinds)
        return [next(iter(self.found(*asked)), None) for asked in zip(texts, kinds, strict=True)]

    @override
    def content(self) -> Mapping[str, Any]:
        return {} if self.settings.write else {"bank": self.bank.tick, "blocks": len(self.bank.blocks())}

    # Writing

    def remember(
        self,
        episode: str,
        reward: float,
        rows: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]],
        latents: Sequence[Tensor],
    ) -> Kept | None:
        """Keeps the blocks of an episode, if its reward is high enough.

        Args:
            episode: names the task; another attempt at it has the same name.
            reward: its total reward.
            rows: of each turn the token ids that were read and written, and its insertions (index, kind).
            latents: the blocks of all turns, in the order of their insertion, (K, hidden) each.

        Returns:
            What was kept; None if nothing was inserted, or the episode was no success.

        Raises:
            OSError: if the file cannot be written; it is then as it was.
        """
        if reward < self.settings.min_reward or not latents:
            return None
        places = [(ids[:point], InsertionKind(kind)) for ids, points in rows for point, kind in points]
        blocks = []
        for (text, kind), block in zip(places, latents, strict=True):
            shown = str(self._tokenizer.decode(list(text[-self.settings.key_tokens :])))
            values = block.detach().float().cpu().numpy()
            blocks.append(NewBlock(kind.name.lower(), self.key(text), values, shown))
        return self.bank.keep(episode, reward, blocks, self.settings.capacity)


def bank_of(model: MemGenModel) -> BankReader | None:
    """The latent bank that a model's weaver reads; None if it reads none."""
    memories: Sequence[External] = getattr(model.weaver, "external", ())
    return next((memory for memory in memories if isinstance(memory, BankReader)), None)


def bank_to_write(model: MemGenModel) -> BankReader | None:
    """The latent bank that is to keep a model's good episodes; None if there is none."""
    found = bank_of(model)
    return found if found is not None and found.settings.write else None


def remember_episodes(bank: BankReader, environment: str, rollouts: Rollouts) -> None:
    """Keeps the blocks of the good ones among episodes. An environment error is no success.

    Args:
        bank: keeps them.
        environment: its name is part of an episode's.
        rollouts: the episodes, with their latents.
    """
    assert rollouts.latents is not None, "a rollout for a bank keeps its latents"
    for trajectory, blocks in zip(rollouts.trajectories, rollouts.latents, strict=True):
        if trajectory.fault is None:
            rows = [([*turn.context, *turn.tokens], turn.insertions) for turn in trajectory.turns]
            bank.remember(f"{environment}/{trajectory.example}", trajectory.reward, rows, blocks)
