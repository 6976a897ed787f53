"""Stage 1a: the weaver learns from reference answers through the frozen reasoner (paper, Eq. 11-13).

Differs from the released code: (1) latents lie in training exactly where decoding puts them; (2) the loss is divided
by the tokens of the whole optimizer step over all micro-batches and ranks; (3) the insertion curriculum is a
setting; (4) validation decodes answers and rewards them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from memgen.data import EnvironmentData, EvalBatch, SFTBatch, no_assets
from memgen.generation.rollout import Actor, EpisodeSettings
from memgen.generation.sampling import GenerationSettings, seed_of
from memgen.model.memgen import MemGenConfig, MemGenModel, Woven
from memgen.objectives.sft import Curriculum, choose_points, token_loss
from memgen.training.checkpoint import keep_trained, require_trained
from memgen.training.evaluation import Evaluation
from memgen.training.optimizer import OptimizerSettings
from memgen.training.stage import build_model, stage_data, tied_to_all
from memgen.types import InsertionPlan

logger = logging.getLogger(__name__)


@final
class WeaverSFT(LightningModule):
    """Trains a weaver on reference answers.

    Args:
        memgen: the model.
        optimizer: AdamW, warm-up and cosine.
        curriculum: where latents go while the weaver learns.
        generation: how answers are drawn in validation and test.
        episodes: limits of episodes of several turns in validation and test.
        init_from: a checkpoint directory to start from (test, validate and predict: to score).
        checkpointing: recompute activations in the backward pass: less memory, more time.
        seed: of the insertion curriculum; the Trainer's own seed is `seed_everything`.
    """

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
    ) -> None:
        super().__init__()
        self.config = memgen
        self.optimizer_settings = optimizer
        self.curriculum = curriculum
        self.generation = generation
        self.episodes = episodes
        self.init_from = init_from
        self.recompute = checkpointing
        self.seed = seed
        self.resolve_asset: Callable[[str], str] = no_assets
        # A .ckpt holds what is trained; the frozen base is loaded from where it came.
        self.strict_loading = False
        self.memgen: MemGenModel
        self.train_loss = MeanMetric()
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()
        self.evaluation = Evaluation(memgen.weaver)
        self._clock = 0.0

    # Set-up

    @override
    def setup(self, stage: str) -> None:
        weaver, cap = self.config.weaver, self.config.boundaries.max_inference_insertions
        if stage == "fit" and not weaver.prompt_latents and not (weaver.inference_latents and cap):
            raise ValueError(
                f"no latents would ever be woven, so there is nothing to train: weaver.prompt_latents is 0, "
                f"weaver.inference_latents {weaver.inference_latents}, boundaries.max_inference_insertions {cap}"
            )
        if not hasattr(self, "memgen"):
            data = stage_data(self, "answers" if stage == "fit" else None)
            self.memgen = build_model(self.config, data, self.resolve_asset, self.init_from)
        self.memgen.train_only(self.memgen.weaver)
        self.memgen.use_checkpointing(self.recompute)

    @property
    def data(self) -> EnvironmentData:
        """The Trainer's data module."""
        return stage_data(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reasoner's."""
        return self.data.tokenizer_object

    @override
    def configure_optimizers(self) -> Any:
        parameters = list(self.memgen.weaver.own_parameters().values())
        return self.optimizer_settings.build(parameters, self.data.optimizer_steps())

    # Training

    @override
    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        # A batch may use only one bank of queries, and an optimizer step must not depend on how a batch is split.
        nothing = tied_to_all(self.memgen.weaver.own_parameters().values())
        logprobs, woven = self.memgen.label_logprobs(batch.tokens, self.plan(batch))
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        loss = token_loss(logprobs, batch.window_tokens, parts)
        self._log_step(batch, logprobs.detach(), woven)
        return loss + nothing

    def plan(self, batch: SFTBatch) -> InsertionPlan:
        """Where latents go in a batch: drawn per item, epoch and seed, so that batching does not change it."""
        group = batch.tokens.group
        items = range(len(batch.examples)) if group is None else group.tolist()
        rows = [batch.examples[item] for item in items]
        cap = self.config.boundaries.max_inference_insertions

        def choose(row: int, points: tuple[int, ...]) -> list[int]:
            # Points are part of the key: turns of one item draw for themselves.
            seed = seed_of(self.seed, batch.epoch, rows[row], points)
            generator = torch.Generator().manual_seed(seed)
            return choose_points(points, cap, self.curriculum, generator)

        return self.memgen.boundaries.plan(batch.tokens, choose)

    def _log_step(self, batch: SFTBatch, logprobs: Tensor, woven: Woven) -> None:
        count = logprobs.shape[0]
        self.train_loss(-logprobs.mean(), weight=count)
        self.log("train/loss", self.train_loss, prog_bar=True, on_step=True, on_epoch=False)
        now = time.perf_counter()
        if self._clock:
            rate = int(batch.tokens.lengths.sum()) * self.trainer.world_size / (now - self._clock)
            self.log("perf/tokens_per_second", rate, prog_bar=True)
        self._clock = now
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            targets = batch.tokens.ids[:, 1:][batch.tokens.supervised[:, 1:]]
            hits = self.memgen.reasoner.predictions(woven.hidden.detach()) == targets
            self.log("train/token_accuracy", hits.float().mean(), prog_bar=True)
            self.log_dict(_latent_metrics(self.memgen, woven))

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._clock = 0.0

    # Evaluation

    @override
    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        assert batch.sft is not None, "validation items come with their reference answers"
        tokens = batch.sft.tokens
        logprobs, woven = self.memgen.label_logprobs(tokens, self.memgen.boundaries.plan(tokens))
        targets = tokens.ids[:, 1:][tokens.supervised[:, 1:]]
        hits = (self.memgen.reasoner.predictions(woven.hidden) == targets).float()
        self.val_loss.update(-logprobs.mean(), weight=len(targets))
        self.val_accuracy.update(hits.mean(), weight=len(targets))
        self.log("val/loss", self.val_loss, prog_bar=True, on_epoch=True)
        self.log("val/token_accuracy", self.val_accuracy, on_epoch=True)
        self.evaluation.update(self.actor, batch)

    @property
    def actor(self) -> Actor:
        """Who answers in validation and test."""
        return Actor(
            self.memgen,
            self.tokenizer,
            self.data.environment,
            self.generation,
            self.episodes,
            self.data.template,
        )

    @override
    def on_test_start(self) -> None:
        self._warn_if_untrained()

    @override
    def on_predict_start(self) -> None:
        self._warn_if_untrained()

    def _warn_if_untrained(self) -> None:
        if self.init_from is None and self.trainer.ckpt_path is None:
            logger.warning("no checkpoint was given: this scores an untrained weaver (--checkpoint DIR)")

    @override
    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluation.update(self.actor, batch)

    @override
    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[dict[str, Any]]:
        return self.evaluation.records(self.actor, batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.evaluation.finish(self, "val", f"step_{self.global_step:06d}")
        self._clock = 0.0

    @override
    def on_test_epoch_end(self) -> None:
        self.evaluation.finish(self, "test", "test")

    # Lightning's own checkpoint

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(self, checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        require_trained(self, checkpoint)


@torch.no_grad()
def _latent_metrics(memgen: MemGenModel, woven: Woven) -> dict[str, Tensor]:
    """How large latents are against token embeddings: norms that run away are the first sign of trouble."""
    if woven.latents.shape[0] == 0:
        return {}
    table = memgen.reasoner.backbone.embedding
    sample = table[:: max(1, table.shape[0] // 1024)].float()
    norm = woven.latents.detach().float().norm(dim=-1).mean()
    return {"latents/norm": norm, "latents/norm_over_embedding": norm / sample.norm(dim=-1).mean()}
