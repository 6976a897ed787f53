"""Stage 1a: the weaver learns from reference answers through the frozen reasoner (paper, Eq. 11-13).

Differs from the released code: (1) latents lie in training exactly where decoding puts them; (2) the loss is divided
by the tokens of the whole optimizer step over all micro-batches and ranks; (3) the insertion curriculum is a setting;
(4) validation decodes answers and rewards them.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from memgen.data import EvalBatch, SFTBatch
from memgen.distributed.collectives import over_ranks
from memgen.generation.rollout import EpisodeSettings
from memgen.generation.sampling import GenerationSettings
from memgen.model.latent_source import LatentSource, source_class
from memgen.model.memgen import MemGenConfig, MemGenModel, Woven
from memgen.objectives.ahead import AheadBatch, AheadSettings, rows_ahead
from memgen.objectives.sft import Curriculum, choose_points, token_loss
from memgen.seeds import seed_of
from memgen.training.checkpoint import inserted_kinds
from memgen.training.optimizer import OptimizerSettings
from memgen.training.stage import Stage, zero_loss
from memgen.types import InsertionKind, InsertionPlan, TokenBatch

logger = logging.getLogger(__name__)


@final
class WeaverSFT(Stage):
    """Trains a weaver, or another latent source in its place, on reference answers.

    Args:
        memgen: the model.
        optimizer: AdamW, warm-up and cosine.
        curriculum: where latents are inserted while the weaver learns.
        generation: how answers are sampled in validation and test.
        episodes: limits of episodes of several turns in validation and test.
        init_from: a checkpoint directory to start from (test, validate and predict: to score).
        checkpointing: recompute activations in the backward pass: less memory, more time.
        seed: of the insertion curriculum; the Trainer's own seed is `seed_everything`.
        ahead: trains latents on the tokens ahead of random positions, in the curriculum's place (differentiable cache
            augmentation). None: on whole answers.
    """

    learns_from = "answers"

    def __init__(
        self,
        memgen: MemGenConfig,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 - a frozen record
        curriculum: Curriculum = Curriculum(),  # noqa: B008 - a frozen record
        generation: GenerationSettings = GenerationSettings(),  # noqa: B008 - a frozen record
        episodes: EpisodeSettings = EpisodeSettings(),  # noqa: B008 - a frozen record
        init_from: str | None = None,
        checkpointing: bool = False,
        seed: int = 0,
        ahead: AheadSettings | None = None,
    ) -> None:
        super().__init__(memgen, optimizer, generation, episodes, init_from, checkpointing)
        self.curriculum = curriculum
        self.ahead_settings = ahead
        self.seed = seed
        # A NaN stays one in the mean, which otherwise leaves it out ("disable" would ignore the weights).
        self.val_loss, self.val_accuracy = MeanMetric(nan_strategy=math.nan), MeanMetric()
        self._clock = 0.0

    @property
    @override
    def component(self) -> LatentSource:
        return self.memgen.weaver

    @override
    def to_train(self) -> frozenset[InsertionKind]:
        if self.ahead_settings is not None:
            return frozenset({InsertionKind.PROMPT})
        inside = self.curriculum.inserts_inside(self.config.boundaries.max_inference_insertions)
        return frozenset(InsertionKind) if inside else frozenset({InsertionKind.PROMPT})

    @override
    def check_start(self) -> None:
        """Says which latents decoding will insert though the curriculum leaves them untrained.

        Of a checkpoint's weaver, loading it says so.
        """
        if (
            self.init_from is not None
            or self.trainer.ckpt_path is not None
            or not self.trainer.is_global_zero
        ):
            return
        for kind, key in inserted_kinds(self.memgen).items():
            if kind not in self.to_train():
                logger.warning(
                    "the curriculum never trains %s latents, but validation and every later use insert them: set "
                    "model.memgen.%s to 0, or give model.curriculum.first, all or random a share (without model.ahead)",
                    kind.name.lower(),
                    key,
                )

    @override
    def setup(self, stage: str) -> None:
        weaver, cap = self.config.weaver, self.config.boundaries.max_inference_insertions
        writes = source_class(weaver).reasoner_adapter is None
        if stage == "fit" and writes and not weaver.prompt_latents and not (weaver.inference_latents and cap):
            raise ValueError(
                f"no latents would ever be inserted, so there is nothing to train: weaver.prompt_latents is 0, "
                f"weaver.inference_latents {weaver.inference_latents}, boundaries.max_inference_insertions {cap}"
            )
        if stage == "fit" and self.ahead_settings is not None and not weaver.prompt_latents:
            raise ValueError(
                "model.ahead trains the latents of a prompt's end, but weaver.prompt_latents is 0; set it above 0, or "
                "model.ahead to null"
            )
        super().setup(stage)

    # Training

    @override
    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        # A batch may use only one bank of queries, and an optimizer step must not depend on how a batch is split.
        zero = zero_loss(self.trained().values())
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if self.ahead_settings is None:
            tokens = batch.tokens
            logprobs, woven = self.memgen.label_logprobs(tokens, self.plan(batch))
            loss = token_loss(logprobs, batch.window_tokens, micro_batches)
        else:
            rows = self.ahead_of(batch, self.ahead_settings)
            tokens = rows.tokens
            logprobs, woven = self.memgen.label_logprobs(tokens, rows.plan)
            weighted = logprobs * rows.weights.to(logprobs.device)
            loss = token_loss(weighted, batch.window_tokens, micro_batches)
        self._log_step(tokens, logprobs.detach(), woven)
        return loss + zero

    def plan(self, batch: SFTBatch) -> InsertionPlan:
        """Insertion plan of a batch: sampled per item, epoch and seed, so that batching does not change it."""
        rows = self._items(batch)
        cap = self.config.boundaries.max_inference_insertions

        def choose(row: int, points: tuple[int, ...]) -> list[int]:
            # Points are part of the key: turns of one item are sampled independently.
            seed = seed_of(self.seed, batch.epoch, rows[row], points)
            generator = torch.Generator().manual_seed(seed)
            return choose_points(points, cap, self.curriculum, generator)

        return self.memgen.boundaries.plan(batch.tokens, choose)

    def ahead_of(self, batch: SFTBatch, settings: AheadSettings) -> AheadBatch:
        """Rows of the loss on tokens ahead: positions are sampled per item, epoch and seed, as in `plan`."""
        items, lengths = self._items(batch), batch.tokens.lengths.tolist()

        def generator(row: int) -> torch.Generator:
            # The length is part of the key: turns of one item are sampled independently.
            seed = seed_of("ahead", self.seed, batch.epoch, items[row], lengths[row])
            return torch.Generator().manual_seed(seed)

        return rows_ahead(batch.tokens, settings, generator)

    def _items(self, batch: SFTBatch) -> list[int]:
        """The item of each row."""
        group = batch.tokens.group
        numbers = range(len(batch.examples)) if group is None else group.tolist()
        return [batch.examples[number] for number in numbers]

    def _log_step(self, tokens: TokenBatch, logprobs: Tensor, woven: Woven) -> None:
        self.log("train/loss", _mean_over_ranks(-logprobs), prog_bar=True)
        now = time.perf_counter()
        if self._clock:
            rate = int(tokens.lengths.sum()) * self.trainer.world_size / (now - self._clock)
            self.log("perf/tokens_per_second", rate, prog_bar=True)
        self._clock = now
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            targets = tokens.ids[:, 1:][tokens.supervised[:, 1:]]
            hits = self.memgen.reasoner.predictions(woven.hidden.detach()) == targets.to(self.device)
            self.log("train/token_accuracy", _mean_over_ranks(hits), prog_bar=True)
            self.log_dict(_latent_metrics(self.memgen, woven))

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._clock = 0.0

    # Evaluation

    @override
    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        if batch.sft is not None:
            self._score_references(batch.sft)
        self.log("val/loss", self.val_loss, prog_bar=True, on_epoch=True)
        self.log("val/token_accuracy", self.val_accuracy, on_epoch=True)
        self.evaluation.update(self.actor_with(self.generation), batch)

    def _score_references(self, batch: SFTBatch) -> None:
        tokens = batch.tokens
        logprobs, woven = self.memgen.label_logprobs(tokens, self.memgen.boundaries.plan(tokens))
        targets = tokens.ids[:, 1:][tokens.supervised[:, 1:]]
        hits = (self.memgen.reasoner.predictions(woven.hidden) == targets.to(self.device)).float()
        self.val_loss.update(-logprobs.mean(), weight=len(targets))
        self.val_accuracy.update(hits.mean(), weight=len(targets))

    @override
    def on_test_start(self) -> None:
        self._warn_if_untrained()

    @override
    def on_predict_start(self) -> None:
        self._warn_if_untrained()

    def _warn_if_untrained(self) -> None:
        if self.memgen.bare:
            return  # It scores the bare reasoner.
        if self.init_from is None and self.trainer.ckpt_path is None:
            logger.warning("no checkpoint was given: this scores an untrained weaver (--checkpoint DIR)")

    @override
    def on_validation_epoch_end(self) -> None:
        self.finish_validation()
        self._clock = 0.0


def _mean_over_ranks(values: Tensor) -> float:
    """The mean over the tokens of all ranks. All ranks must call it."""
    own = torch.stack([values.double().sum().cpu(), torch.tensor(float(len(values)), dtype=torch.float64)])
    total, count = over_ranks(own, "sum").tolist()
    return float(total / max(1.0, count))


@torch.no_grad()
def _latent_metrics(memgen: MemGenModel, woven: Woven) -> dict[str, Tensor]:
    """Norm of the latents, absolute and relative to token embeddings: a growing one is the first sign of trouble."""
    if woven.latents.shape[0] == 0:
        return {}
    table = memgen.reasoner.backbone.embedding
    sample = table[:: max(1, table.shape[0] // 1024)].float()
    norm = woven.latents.detach().float().norm(dim=-1).mean()
    return {"latents/norm": norm, "latents/norm_over_embedding": norm / sample.norm(dim=-1).mean()}
