"""MemGenModel: reasoner, weaver and trigger, and the teacher-forced forward over tokens and latents.

Differs from the released code: (1) the batch runs at once, each row with its own plan; (2) the weaver reads only what
is new since its last insertion, with gradient through its KV cache; (3) what lies before a row's first latent runs
through the reasoner without activations being kept, once for all rows that share it; (4) hidden states come back
only for the places whose states are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AutoTokenizer

from memgen.kernels import interleave
from memgen.model.backbone import Backbone, BackboneConfig, load_backbone
from memgen.model.boundary import Boundaries, BoundaryConfig
from memgen.model.cache import PackedKVCache, PassSegment, leaders_of, upload
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig, build_source, source_class
from memgen.model.reasoner import Reasoner
from memgen.model.stream import Stream
from memgen.model.trigger import Trigger, TriggerConfig, build_trigger
from memgen.model.vocabulary import tokenizer_fingerprint, translation
from memgen.types import InsertionKind, InsertionPlan, TokenBatch, WorkCount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# B rows, L token positions, T packed stream positions, H hidden size, N places read


@dataclass(frozen=True)
class MemGenConfig:
    """The whole model."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The reasoner's base; weaver and trigger share it unless they name their own."""
    weaver: WeaverConfig = field(default_factory=WeaverConfig)
    """How latents are made."""
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    """What decides where they go."""
    boundaries: BoundaryConfig = field(default_factory=BoundaryConfig)
    """Where they may go."""


@dataclass(frozen=True)
class Woven:
    """Result of a teacher-forced forward.

    Attributes:
        hidden: hidden states at the places asked for, row by row, (N, H), in the base's dtype.
        latents: all latents that the weaver wrote, float32, (M, H of the reasoner), insertion round by insertion round.
        work: exact work counts.
    """

    hidden: Float[Tensor, "places hidden"]
    latents: Float[Tensor, "latents hidden"]
    work: WorkCount


@dataclass(frozen=True)
class LabelScores:
    """The reasoner's scores of the supervised tokens of a batch, row by row.

    Attributes:
        logprobs: log-probability of each, float32, (N,).
        entropy: of the distribution that each was scored under, in nats, float32, (N,); None if not asked for.
        woven: the forward that gave them.
    """

    logprobs: Float[Tensor, " labels"]
    entropy: Float[Tensor, " labels"] | None
    woven: Woven


@final
class MemGenModel(nn.Module):
    """A frozen reasoner, the weaver that writes its latent memory, and the trigger that decides where.

    Args:
        reasoner: the frozen language model.
        weaver: writes latents: MemGen's weaver, or another source in its place.
        trigger: decides at boundaries.
        boundaries: where it is asked.
    """

    config: MemGenConfig | None = None
    """What `assemble` built it from; None if it was put together by hand."""
    tokenizer: str | None = None
    """Fingerprint of the reasoner's tokenizer (`memgen.model.vocabulary`), likewise."""

    def __init__(
        self, reasoner: Reasoner, weaver: LatentSource, trigger: Trigger, boundaries: Boundaries
    ) -> None:
        super().__init__()
        self.reasoner = reasoner
        self.weaver = weaver
        self.trigger = trigger
        self.boundaries = boundaries

    @classmethod
    def build(
        cls,
        config: MemGenConfig,
        tokenizer: PreTrainedTokenizerBase,
        resolve_asset: Callable[[str], str],
        trigger_translate: Callable[[Sequence[int]], list[int]] | None = None,
        load_tokenizer: Callable[[str], PreTrainedTokenizerBase] = AutoTokenizer.from_pretrained,
    ) -> MemGenModel:
        """Loads the bases and adds new adapters, queries and heads.

        Args:
            config: the whole model.
            tokenizer: the reasoner's.
            resolve_asset: turns an asset name into a directory; other names pass through.
            trigger_translate: from the reasoner's token ids to those of the trigger's own base. None: by their text, if
                the base has another tokenizer.
            load_tokenizer: loads the tokenizer of the trigger's or the latent source's own base, to see whether it is
                another.
        """
        base = load_backbone(config.backbone, resolve_asset)
        own_weaver, own_trigger = config.weaver.backbone, config.trigger.backbone
        weaver_base = None if own_weaver is None else load_backbone(own_weaver, resolve_asset)
        trigger_base = None if own_trigger is None else load_backbone(own_trigger, resolve_asset)
        if own_trigger is not None and config.trigger.kind == "tokens" and trigger_translate is None:
            trigger_translate = translation(tokenizer, load_tokenizer(resolve_asset(own_trigger.name)))
        weaver_tokenizer = None
        if own_weaver is not None and source_class(config.weaver).reads_text:
            weaver_tokenizer = load_tokenizer(resolve_asset(own_weaver.name))
        return cls.assemble(
            config, base, tokenizer, weaver_base, trigger_base, trigger_translate, weaver_tokenizer
        )

    @classmethod
    def assemble(
        cls,
        config: MemGenConfig,
        base: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        weaver_base: Backbone | None = None,
        trigger_base: Backbone | None = None,
        trigger_translate: Callable[[Sequence[int]], list[int]] | None = None,
        weaver_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> MemGenModel:
        """As `build`, on bases that are already loaded. None shares the reasoner's."""
        around = Surroundings(base, weaver_base or base, tokenizer, weaver_tokenizer or tokenizer)
        weaver = build_source(config.weaver, around)
        trigger = build_trigger(config.trigger, trigger_base or base, base.hidden_size, trigger_translate)
        boundaries = Boundaries.from_tokenizer(
            config.boundaries,
            tokenizer,
            base.embedding.shape[0],
            at_prompt_end=config.weaver.prompt_latents > 0,
        )
        reasoner = Reasoner(base, end_ids(base, tokenizer), weaver.reasoner_adapter)
        model = cls(reasoner, weaver, trigger, boundaries)
        model.config, model.tokenizer = config, tokenizer_fingerprint(tokenizer)
        return model

    @property
    def device(self) -> torch.device:
        """Where the reasoner lies."""
        return self.reasoner.backbone.device

    @property
    def bare(self) -> bool:
        """Whether it answers as its frozen base alone: nothing is ever inserted, and the reasoner has no adapter."""
        return self.trigger.probability == 0.0 and self.reasoner.adapter is None

    def bases(self) -> list[Backbone]:
        """The distinct frozen bases."""
        found = {id(b): b for b in self.modules() if isinstance(b, Backbone)}
        return list(found.values())

    def use_checkpointing(self, enabled: bool) -> None:
        """Activation checkpointing in every base."""
        for base in self.bases():
            base.use_checkpointing(enabled)

    def train_only(self, *parts: nn.Module) -> None:
        """Makes exactly the given parts (weaver, trigger) trainable. Set once, before an optimizer is made."""
        self.requires_grad_(False)
        for part in parts:
            assert isinstance(part, LatentSource | Trigger), "the base is never trained"
            for parameter in part.own_parameters().values():
                parameter.requires_grad_(True)

    def forward(self, batch: TokenBatch, plan: InsertionPlan, read: Bool[Tensor, "batch length"]) -> Woven:
        """Reads rows with latents inserted according to a plan.

        Args:
            batch: rows of tokens.
            plan: where latents go. Kinds that the configuration switches off (K = 0) are left out.
            read: True at token i of a row where the state that predicts token i + 1 is needed: the state of the last
                latent between the two, if any, else of token i.

        Raises:
            ValueError: if a point lies outside its row, or rows of a group do not share what they claim to.
        """
        return _Forward(self, batch, plan, read).run()

    def decision_logits(
        self, batch: TokenBatch, plan: InsertionPlan, at: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "places 2"]:
        """SKIP and INVOKE logits of a learned trigger, float32, row by row.

        Args:
            batch: rows of tokens.
            plan: where latents go. Only a trigger that reads hidden states sees those in front of a place.
            at: True at the boundary tokens: the decision about token i + 1 is made behind token i.

        Raises:
            ValueError: if the trigger has nothing to learn, or reads token ids of another vocabulary.
        """
        states = None
        if self.trigger.needs_states:
            with torch.no_grad():  # The reasoner and what it reads are frozen.
                states = _Forward(self, batch, plan, at, before_latents=True).run().hidden
        return self.trigger.logits(batch, at, states)

    def label_logprobs(
        self, batch: TokenBatch, plan: InsertionPlan
    ) -> tuple[Float[Tensor, " labels"], Woven]:
        """Log-probability of every supervised token, float32, row by row, and the forward that gave them."""
        scores = self.label_scores(batch, plan)
        return scores.logprobs, scores.woven

    def label_scores(
        self, batch: TokenBatch, plan: InsertionPlan, *, temperature: float = 1.0, entropy: bool = False
    ) -> LabelScores:
        """Scores every supervised token.

        Args:
            batch: rows of tokens.
            plan: where latents go.
            temperature: divides the logits, as when the tokens were sampled.
            entropy: whether to return it.
        """
        read = torch.zeros_like(batch.supervised)
        read[:, :-1] = batch.supervised[:, 1:]
        woven = self(batch, plan, read)
        targets = batch.ids[:, 1:][batch.supervised[:, 1:]].to(woven.hidden.device)
        logprobs, found = self.reasoner.logprobs(
            woven.hidden, targets, temperature=temperature, entropy=entropy
        )
        return LabelScores(logprobs, found, woven)


def end_ids(base: Backbone, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end an answer: the generation configuration's and the tokenizer's."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    found = {int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise ValueError(
            f"{base.name} has no end-of-sequence token in its tokenizer or generation configuration"
        )
    return tuple(sorted(found))


class _Forward:
    """One teacher-forced pass. Rows without a needed state are left out, and so is what lies behind a row's last one."""

    def __init__(
        self,
        model: MemGenModel,
        batch: TokenBatch,
        plan: InsertionPlan,
        read: Bool[Tensor, "batch length"],
        *,
        before_latents: bool = False,
    ) -> None:
        self.model = model
        self.device = model.device
        self.work = dict.fromkeys(WorkCount.__dataclass_fields__, 0)
        ids = batch.ids.cpu().numpy()
        lengths = batch.lengths.tolist()
        reads = [np.flatnonzero(row[:n]) for row, n in zip(read.cpu().numpy(), lengths, strict=True)]
        self.streams = self._streams(ids, lengths, plan)
        self.reads = [
            stream.token_positions[places] if before_latents else stream.predictors(places)
            for stream, places in zip(self.streams, reads, strict=True)
        ]
        self.ends = [int(places[-1]) + 1 if len(places) else 0 for places in self.reads]
        self.insertions = [
            [i for i in stream.insertions if i.begin < end]
            for stream, end in zip(self.streams, self.ends, strict=True)
        ]
        self.shared, self.group = self._sharing(batch, ids)

    def _streams(self, ids: np.ndarray, lengths: list[int], plan: InsertionPlan) -> list[Stream]:
        """Streams of all rows. Latents are numbered by insertion round: first insertions of all rows, then second ones."""
        weaver = self.model.weaver
        rows = []
        for index, (points, length) in enumerate(zip(plan.rows(), lengths, strict=True)):
            for point, _ in points:
                if point > length:
                    raise ValueError(
                        f"row {index} has {length} tokens but its plan inserts before token {point}"
                    )
            rows.append([(p, k) for p, k in points if weaver.config.latents(InsertionKind(k))])
        blocks: list[list[np.ndarray]] = [[] for _ in rows]
        total = 0
        for number in range(max((len(points) for points in rows), default=0)):
            for points, block in zip(rows, blocks, strict=True):
                if number < len(points):
                    size = weaver.config.latents(InsertionKind(points[number][1]))
                    block.append(np.arange(total, total + size))
                    total += size
        self.latents = torch.zeros(
            total,
            self.model.reasoner.backbone.hidden_size,
            device=self.device,
            dtype=weaver.dtype,
        )
        return [
            Stream(tokens[:length], points, block)
            for tokens, length, points, block in zip(ids, lengths, rows, blocks, strict=True)
        ]

    def _sharing(self, batch: TokenBatch, ids: np.ndarray) -> tuple[list[int], list[int]]:
        """For each row, how many leading positions it may take from another row of its group, and the group."""
        count = len(self.streams)
        if batch.group is None or batch.shared is None:
            return [0] * count, list(range(count))
        group = batch.group.tolist()
        shared = []
        for row, limit in enumerate(batch.shared.tolist()):
            first = self.insertions[row][0].begin if self.insertions[row] else self.ends[row]
            shared.append(min(limit, first, self.ends[row]))
        longest = leaders_of(range(count), shared, group)
        for row, number in enumerate(group):
            if not np.array_equal(ids[row, : shared[row]], ids[longest[number], : shared[row]]):
                raise ValueError(
                    f"rows {longest[number]} and {row} are of one group but do not begin with the same tokens"
                )
        return shared, group

    def run(self) -> Woven:
        model = self.model
        rows = [row for row, end in enumerate(self.ends) if end]
        self.reasoner_cache = PackedKVCache(len(self.streams), self.device)
        self.weaver_cache = PackedKVCache(len(self.streams), self.device)
        self.states: list[Tensor] = []
        # Where the states of each row's stream positions lie among those that all reasoner passes returned.
        self.state_index = [np.full(end, -1, dtype=np.int64) for end in self.ends]
        self.state_count = 0
        self._read_prefixes(rows)
        weaver_done = self._share_for_weaver(rows)
        for number in range(max((len(self.insertions[row]) for row in rows), default=0)):
            active = [row for row in self.weaver_order if len(self.insertions[row]) > number]
            if model.weaver.reads_states:
                self._read({row: self.insertions[row][number].begin for row in active})
            self._weave(active, number, weaver_done)
        self._read({row: self.ends[row] for row in rows})
        states = self._all_states()
        needed = np.concatenate(
            [self.state_index[row][self.reads[row]] for row in rows] or [np.zeros(0, int)]
        )
        assert bool((needed >= 0).all()), "every state that is read was computed"
        return Woven(
            hidden=states[upload(needed, self.device)],
            latents=self.latents,
            work=WorkCount(**self.work),
        )

    def _all_states(self) -> Tensor:
        if not self.states:
            return self.latents.new_zeros(0, self.latents.shape[1])
        return self.states[0] if len(self.states) == 1 else torch.cat(self.states)

    def _embeddings(self, spans: list[tuple[int, int, int]]) -> Tensor:
        """Reasoner-space embeddings of stream spans (row, begin, end), packed."""
        ids = np.concatenate([self.streams[row].ids[begin:end] for row, begin, end in spans])
        sources = np.concatenate([self.streams[row].sources[begin:end] for row, begin, end in spans])
        return interleave(
            self.model.reasoner.backbone.embedding,
            upload(ids, self.device),
            self.latents,
            upload(sources, self.device),
        )

    def _read_prefixes(self, rows: list[int]) -> None:
        """What lies before a row's first latent is read once per group, without gradient by a frozen reasoner (causal)."""
        graph = torch.is_grad_enabled() and self.model.reasoner.adapter is not None
        prefix = {
            row: self.insertions[row][0].begin if self.insertions[row] else self.ends[row] for row in rows
        }
        leaders = leaders_of(rows, self.shared, self.group)
        # A leader's states serve its whole group.
        first = {self.group[row]: len(self.streams[row].ids) for row in rows}
        for row in rows:
            first[self.group[row]] = min(first[self.group[row]], int(self.reads[row][0]))
        with torch.set_grad_enabled(graph):
            self._read({row: prefix[row] for row in leaders.values()}, first)
        for row in rows:
            leader = leaders[self.group[row]]
            if row != leader and self.shared[row]:
                self.reasoner_cache.share(row, leader, self.shared[row])
                self.state_index[row][: self.shared[row]] = self.state_index[leader][: self.shared[row]]
        with torch.set_grad_enabled(graph):
            self._read({row: prefix[row] for row in rows if row not in leaders.values()})

    def _share_for_weaver(self, rows: list[int]) -> dict[int, int]:
        """Lets rows of a group share the weaver's reading too; returns how much of each row is read that way.

        Leaders come first in `weaver_order`, so that one pass may serve a leader and the rows that share with it.
        """
        leaders = leaders_of([row for row in rows if self.insertions[row]], self.shared, self.group)
        done = dict.fromkeys(rows, 0)
        for row in rows:
            leader = leaders.get(self.group[row])
            if self.insertions[row] and leader is not None and row != leader and self.shared[row]:
                self.weaver_cache.share(row, leader, self.shared[row])
                done[row] = self.shared[row]
        first = set(leaders.values())
        self.weaver_order = [row for row in rows if row in first] + [row for row in rows if row not in first]
        return done

    def _read(self, until: dict[int, int], first: dict[int, int] | None = None) -> None:
        """Reads rows through the reasoner up to a stream position each.

        Args:
            until: row -> position.
            first: group -> the first position whose state is needed. Default: for each row, its own.
        """
        spans, needed = [], []
        for row, end in until.items():
            begin = self.reasoner_cache.length(row)
            if begin < end:
                spans.append((row, begin, end))
                from_ = int(self.reads[row][0]) if first is None else first[self.group[row]]
                if self.model.weaver.reads_states:
                    from_ = begin
                from_ = min(max(from_, begin), end)
                count = end - from_
                self.state_index[row][from_:end] = np.arange(self.state_count, self.state_count + count)
                self.state_count += count
                needed.append(count)
        if not spans:
            return
        counts = [end - begin for _, begin, end in spans]
        view = self.reasoner_cache.open([PassSegment([row for row, _, _ in spans], counts, read=needed)])
        self.states.append(self.model.reasoner.read(self._embeddings(spans), view))
        self.work["reasoner_forwards"] += 1
        self.work["reasoner_positions"] += sum(end - begin for _, begin, end in spans)

    def _weave(self, rows: list[int], number: int, done: dict[int, int]) -> None:
        """One insertion round: writes the latents of each row's insertion of this number.

        Args:
            rows: those that have one.
            number: of the round, from 0.
            done: how many stream positions of each row the weaver has read; updated.
        """
        weaver = self.model.weaver
        insertions = [self.insertions[row][number] for row in rows]
        spans = [(row, done[row], insertion.begin) for row, insertion in zip(rows, insertions, strict=True)]
        fed = [span for span in spans if span[1] < span[2]]
        if not fed:
            hidden = self.latents.new_zeros(0, self.latents.shape[1])
        elif weaver.reads_states:
            index = np.concatenate([self.state_index[row][begin:end] for row, begin, end in fed])
            hidden = self._all_states()[upload(index, self.device)]
        else:
            hidden = self._embeddings(fed)
        kinds = [InsertionKind(insertion.kind) for insertion in insertions]
        counts = [end - begin for _, begin, end in spans]
        texts = None
        if weaver.reads_text:
            texts = [
                self.streams[row].text(insertion.begin)
                for row, insertion in zip(rows, insertions, strict=True)
            ]
        latents = weaver.weave(hidden, counts, kinds, rows, self.weaver_cache, texts)
        if latents.requires_grad:
            weaver.trained_kinds.update(kinds)
        places = np.concatenate([insertion.latents for insertion in insertions])
        # Latents of other rows in this round are numbered too, even where no state is needed: scatter, not cat.
        self.latents = self.latents.index_copy(0, upload(places, self.device), latents.to(self.latents.dtype))
        fed_positions = sum(weaver.positions(counts, kinds, texts))
        self.work["weaver_forwards"] += int(fed_positions > 0)
        self.work["weaver_positions"] += fed_positions
        for row, insertion in zip(rows, insertions, strict=True):
            done[row] = insertion.begin
