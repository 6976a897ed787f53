"""What every stage does to begin: find its data, build its model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from memgen.chat import end_of_turn_id
from memgen.data import EnvironmentData
from memgen.distributed.zero import require_whole
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.training.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)


def stage_data(stage: LightningModule, learn_from: str | None = None) -> EnvironmentData:
    """The Trainer's data module.

    Args:
        stage: whose Trainer.
        learn_from: what the stage's training needs `data.learn_from` to be; None: it does not train.

    Raises:
        TypeError: if it is none of ours.
        ValueError: if it yields something else to learn from.
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


def build_model(
    config: MemGenConfig, data: EnvironmentData, resolve_asset: Callable[[str], str], init_from: str | None
) -> MemGenModel:
    """Builds the model and loads what was trained before.

    Args:
        config: the whole model.
        data: whose tokenizer and template say where an answer ends.
        resolve_asset: turns an asset's name into a directory.
        init_from: a checkpoint directory or an asset's name; None: a new weaver.
    """
    model = MemGenModel.build(config, data.tokenizer_object, resolve_asset)
    require_whole(model)
    model.reasoner.end_at(end_of_turn_id(data.tokenizer_object, data.template))
    if init_from is not None:
        report = load_checkpoint(model, Path(resolve_asset(init_from)))
        logger.info("%s: %d tensors loaded", init_from, len(report.matched))
    return model


def tied_to_all(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0, through which every weight gets a gradient, if only 0: ranks that average gradients wait for each other's.

    Make it before the forward pass and add it to the loss. The backward pass then reaches it last, so that gradients
    are complete in one order on every rank, whatever passes each has made: DeepSpeed reduces them as they come.

    Args:
        parameters: what is trained.
    """
    return 0.0 * torch.stack([parameter.sum() for parameter in parameters]).sum()
