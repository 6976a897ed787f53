"""What the three training stages share: set-up, optimizer, evaluation, and Lightning's checkpoint."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from memgen.chat import end_of_turn_id, load_tokenizer, template_text
from memgen.data import EnvironmentData, EvalBatch
from memgen.data.items import MAX_LENGTH
from memgen.distributed.zero import require_whole
from memgen.environments.base import Split
from memgen.generation.rollout import Actor, EpisodeSettings
from memgen.generation.sampling import GenerationSettings
from memgen.model.latent_source import LatentSource
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import Trigger
from memgen.training.checkpoint import (
    CheckpointError,
    TextSettings,
    compare,
    describe,
    keep_trained,
    load_checkpoint,
    require_trained,
    trained_kinds,
)
from memgen.training.evaluation import Evaluation
from memgen.training.finite import FiniteNumbers
from memgen.training.optimizer import OptimizerSettings
from memgen.training.threads import choose_threads
from memgen.types import InsertionKind

logger = logging.getLogger(__name__)


class Stage(LightningModule, ABC):
    """A training stage: trains one component of a MemGenModel and leaves the rest frozen.

    Args:
        memgen: the model.
        optimizer: AdamW, warm-up and cosine.
        generation: how answers are sampled in validation and test.
        episodes: limits of episodes of several turns.
        init_from: a checkpoint directory to start from (test, validate and predict: to score).
        checkpointing: recompute activations in the backward pass: less memory, more time.
    """

    learns_from: ClassVar[Literal["answers", "rollouts"]]
    """The `data.learn_from` that training needs."""

    def __init__(
        self,
        memgen: MemGenConfig,
        optimizer: OptimizerSettings,
        generation: GenerationSettings,
        episodes: EpisodeSettings,
        init_from: str | None,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.config = memgen
        self.optimizer_settings = optimizer
        self.generation = generation
        self.episodes = episodes
        self.init_from = init_from
        self.recompute = checkpointing
        # A .ckpt holds only trained tensors; the frozen base is loaded from its own files.
        self.strict_loading = False
        self.memgen: MemGenModel
        self.evaluation = Evaluation(memgen.weaver)

    # The component that is trained

    @property
    @abstractmethod
    def component(self) -> LatentSource | Trigger:
        """The component of the model that this stage trains."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained tensors, by name."""
        return self.component.own_parameters()

    def to_train(self) -> frozenset[InsertionKind]:
        """The kinds of insertion whose latents training is about to teach from nothing."""
        return frozenset()

    # Set-up

    @override
    def setup(self, stage: str) -> None:
        require_precision(self.trainer)
        if not hasattr(self, "memgen"):
            data = stage_data(self, self.learns_from if stage == "fit" else None)
            to_train = self.to_train() if stage == "fit" else frozenset()
            self.memgen = build_model(self.config, data, data.resolve_asset, self.init_from, to_train)
            if stage == "fit":
                self.check_start()
            self.check_context(stage)
        self.memgen.train_only(self.component)
        self.memgen.use_checkpointing(self.recompute)
        if stage == "fit":
            self._record_size()

    def _record_size(self) -> None:
        """Writes how much is trained, and what the component chose itself, among the run's parameters."""
        found = {"trained_parameters": sum(parameter.numel() for parameter in self.trained().values())}
        if isinstance(self.component, LatentSource):
            found |= self.component.chosen()
        for recorder in self.trainer.loggers:
            recorder.log_hyperparams(found)

    def check_context(self, stage: str) -> None:
        """Refuses items and answers that cannot fit into the reasoner's context.

        Args:
            stage: as in `setup`.

        Raises:
            ValueError: naming the setting to change.
        """
        if stage == "fit":
            require_context(self.memgen, self.data, "train", None)
            if self.trainer.limit_val_batches:
                require_context(self.memgen, self.data, "val", self.generation.max_new_tokens)
        else:
            split: Split = "val" if stage == "validate" else "test"
            require_context(self.memgen, self.data, split, self.generation.max_new_tokens)

    @override
    def configure_callbacks(self) -> list[Callback]:
        return [FiniteNumbers(self.optimizer_settings.not_finite)]

    def check_start(self) -> None:
        """Called once before training, with the model built and its checkpoint loaded; may refuse to train."""

    @property
    def data(self) -> EnvironmentData:
        """The Trainer's data module."""
        return stage_data(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reasoner's tokenizer."""
        return self.data.tokenizer_object

    def actor_with(self, settings: GenerationSettings) -> Actor:
        """The model as it plays episodes with the given settings."""
        data = self.data
        return Actor(self.memgen, self.tokenizer, data.environment, settings, self.episodes, data.template)

    @override
    def configure_optimizers(self) -> Any:
        return self.optimizer_settings.build(list(self.trained().values()), self.data.optimizer_steps())

    # Evaluation

    @override
    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluation.update(self.actor_with(self.generation), batch)

    @override
    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        self.evaluation.update(self.actor_with(self.generation), batch)

    @override
    def predict_step(self, batch: EvalBatch, batch_idx: int) -> list[dict[str, Any]]:
        return self.evaluation.records(self.actor_with(self.generation), batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.finish_validation()

    def finish_validation(self) -> dict[str, Any]:
        """Logs validation's means and page.

        Returns:
            The means by their names.
        """
        means = self.evaluation.finish(self, "val", f"step_{self.global_step:06d}")
        self._warn_if_silent(means)
        return means

    @override
    def on_test_epoch_end(self) -> None:
        self._warn_if_silent(self.evaluation.finish(self, "test", "test"))

    def _warn_if_silent(self, means: Mapping[str, Any]) -> None:
        """Says when a trained weaver was scored and never wove: the score is the bare reasoner's."""
        trained = self.init_from is not None or self.trainer.ckpt_path is not None
        scores = trained and self.trainer.state.fn in ("validate", "test")
        if not scores or not self.trainer.is_global_zero or self.memgen.trigger.probability == 0.0:
            return
        if self.memgen.reasoner.adapter is not None:
            return  # Nothing is meant to be inserted.
        weaver, boundaries = self.config.weaver, self.config.boundaries
        if means.get("insertions_per_answer") == 0:
            why = (
                "the trigger never invoked"
                if self.memgen.trigger.probability is None
                else f"model.memgen.weaver.prompt_latents is {weaver.prompt_latents}, inference_latents "
                f"{weaver.inference_latents}; boundaries.delimiters are {list(boundaries.delimiters)}, "
                f"max_inference_insertions {boundaries.max_inference_insertions}"
            )
            logger.warning(
                "the trained weaver never wove: no answer had an insertion, so this is the bare reasoner's score (%s)",
                why,
            )

    # Lightning's own checkpoint

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_trained(self, checkpoint)
        checkpoint["stage"] = type(self).__name__
        checkpoint["memgen"] = describe(self.memgen, self.config, text_settings(self.memgen, self.data))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        written_by = checkpoint.get("stage", type(self).__name__)
        if self.trainer.state.fn == "fit" and written_by != type(self).__name__:
            raise CheckpointError(
                f"the .ckpt was written by {written_by}, which {type(self).__name__} cannot resume; start from its "
                "weights instead: --checkpoint RUN/last"
            )
        recorded = checkpoint.get("memgen")
        if recorded is not None:
            trigger = self.component is self.memgen.trigger
            compare(
                self.memgen,
                recorded,
                "the .ckpt",
                with_trigger=trigger,
                text=text_settings(self.memgen, self.data),
                to_train=self.to_train() if self.trainer.state.fn == "fit" else frozenset(),
            )
            self.memgen.weaver.trained_kinds = trained_kinds(recorded) or set()
        require_trained(self, checkpoint)


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def require_precision(trainer: Trainer) -> None:
    """Refuses a precision that would convert what is trained.

    Raises:
        ValueError: which says what to set instead.
    """
    if trainer.precision in PRECISIONS:
        return
    dtype = {"bf16-true": "bfloat16", "16-true": "float16"}.get(str(trainer.precision))
    hint = "" if dtype is None else f" and model.memgen.backbone.dtype to {dtype}"
    raise ValueError(
        f"trainer.precision {trainer.precision} would convert what is trained, which stays float32; set it to one of "
        f"{', '.join(PRECISIONS)}{hint} (the type of the frozen weights)"
    )


def stage_data(stage: LightningModule, learn_from: str | None = None) -> EnvironmentData:
    """The Trainer's data module.

    Args:
        stage: whose Trainer.
        learn_from: the `data.learn_from` that the stage's training needs; None: it does not train.

    Raises:
        TypeError: if it is not an EnvironmentData.
        ValueError: if its `learn_from` is another.
    """
    module = stage.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, EnvironmentData):
        raise TypeError(f"a stage needs a memgen.data.EnvironmentData, got {type(module).__name__}")
    if learn_from is not None and module.learn_from != learn_from:
        raise ValueError(
            f"{type(stage).__name__} learns from {learn_from}, but data.learn_from is {module.learn_from}; "
            f"set data.learn_from to {learn_from}"
        )
    return module


def require_context(
    model: MemGenModel,
    data: EnvironmentData,
    split: Split,
    new_tokens: int | None,
    setting: str = "generation",
    passages: int = 0,
) -> None:
    """Refuses a split whose conversations, or prompts with their answers, cannot fit into the reasoner's context.

    Args:
        model: the model.
        data: set up for the split.
        split: the split.
        new_tokens: an answer's `max_new_tokens`; None: nothing is sampled.
        setting: the section of that number, for the message.
        passages: tokens that a text memory may put into a prompt.

    Raises:
        ValueError: naming the setting to change.
    """
    context = model.reasoner.backbone.context_length
    if context is None:
        return
    # The default may be beyond a small model's context; its items decide then.
    if data.item_settings.max_length > max(context, MAX_LENGTH):
        raise ValueError(
            f"data.max_length is {data.item_settings.max_length}, but the reasoner's context is {context}; lower it"
        )
    weaver, cap = model.weaver.config, model.boundaries.config.max_inference_insertions
    items = [*data.items.get(split, []), *(data.replayed if split == "train" else [])]
    longest = max((len(i.conversation.ids) for i in items if i.conversation is not None), default=0)
    latents = weaver.prompt_latents + min(cap, longest) * weaver.inference_latents
    if longest + latents > context:
        raise ValueError(
            f"a {split} item of {longest} tokens with up to {latents} latents is longer than the reasoner's context of "
            f"{context}; set data.max_length to {context - latents}"
        )
    if new_tokens is None:
        return
    prompt = max((item.prompt_tokens for item in items), default=0)
    latents = weaver.prompt_latents + min(cap, new_tokens) * weaver.inference_latents
    if max(1, prompt) + passages + latents + new_tokens > context:
        shown = f"a {split} prompt of {prompt} tokens" if prompt else f"a {split} prompt"
        shown += f" and {passages} of a memory" if passages else ""
        raise ValueError(
            f"{shown} with up to {latents} latents leaves no room for {setting}.max_new_tokens {new_tokens}: the reasoner's "
            f"context is {context}; lower max_new_tokens or data.max_prompt_length"
        )


def build_model(
    config: MemGenConfig,
    data: EnvironmentData,
    resolve_asset: Callable[[str], str],
    init_from: str | None,
    to_train: Collection[InsertionKind] = (),
) -> MemGenModel:
    """Builds the model and loads a checkpoint into it.

    Args:
        config: of the whole model.
        data: its tokenizer and template say which token ends an answer.
        resolve_asset: turns an asset's name into a directory.
        init_from: a checkpoint directory or an asset's name; None: a new weaver.
        to_train: kinds of insertion that will be trained, whatever the checkpoint was trained for.
    """
    model = MemGenModel.build(config, data.tokenizer_object, resolve_asset, load_tokenizer=load_tokenizer)
    require_whole(model)
    choose_threads(model)
    model.reasoner.end_at(end_of_turn_id(data.tokenizer_object, data.template))
    if init_from is not None:
        found = Path(resolve_asset(init_from))
        report = load_checkpoint(model, found, text_settings(model, data), to_train)
        logger.info("%s: %d tensors loaded", init_from, len(report.matched))
    return model


def text_settings(model: MemGenModel, data: EnvironmentData) -> TextSettings:
    """How text becomes tokens around a stage's model."""
    return TextSettings(
        chat_template=template_text(data.tokenizer_object, data.template),
        end_ids=model.reasoner.end_ids,
        template_arguments=dict(data.template.arguments),
    )


def zero_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Zero loss term that touches every parameter: ranks that average gradients (DDP, ZeRO) wait for each one's.

    Make it before the forward pass and add it to the loss. The backward pass then reaches it last, so that gradients
    are complete in one order on every rank, whatever passes each has made: DeepSpeed reduces them as they come.

    Args:
        parameters: the trained ones.

    Returns:
        A scalar.
    """
    return 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum()
