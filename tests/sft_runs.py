"""Weaver SFT on a tiny model with a real Trainer: what the tests of one and of two ranks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from memgen.data import EnvironmentData
from memgen.environments.base import Environment, Example, Reward
from memgen.generation.sampling import GenerationSettings
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig
from memgen.model.weaver import WeaverConfig
from memgen.objectives.sft import Curriculum
from memgen.training.optimizer import OptimizerSettings
from memgen.training.weaver_sft import WeaverSFT
from tiny import byte_tokenizer, tiny_causal_lm
from tolerance import assert_close

TARGETS = ["a, b. c", "dd", "e, f, g, h, i.", "jklmnop", "q.r", "s, t", "u", "v. w, x. y, z"]
"""Of unequal length and with unequal numbers of delimiters; some without any."""


class Letters(Environment):
    name = "letters"

    def __init__(self, targets: list[str] | None = None, val: int = 3) -> None:
        self.targets = TARGETS if targets is None else targets
        self.val = val

    def examples(self, split):
        targets = self.targets if split == "train" else self.targets[: self.val]
        return [
            Example(id=f"{split}-{i}", question=f"say {i}", target=target, answer=target)
            for i, target in enumerate(targets)
        ]

    def messages(self, example):
        return [{"role": "user", "content": example.question}]

    def reward(self, example, answer):
        same = float(answer == example.answer)
        return Reward(same, {"same": same, "letters": float(len(answer))})


def save_tiny(directory: Path, **changes: Any) -> Path:
    tiny_causal_lm(**changes).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def memgen_config(base: Path, dtype: str = "float32", dropout: float = 0.0) -> MemGenConfig:
    return MemGenConfig(
        backbone=BackboneConfig(name=str(base), dtype=dtype),
        weaver=WeaverConfig(
            lora=LoraSettings(r=4, alpha=8, dropout=dropout), prompt_latents=3, inference_latents=2
        ),
        boundaries=BoundaryConfig(delimiters=(",", "."), max_inference_insertions=2),
    )


def make_stage(base: Path, *, dtype: str = "float32", dropout: float = 0.0, **settings: Any) -> WeaverSFT:
    """A stage whose new tensors are the same in every run and in every process."""
    torch.manual_seed(0)
    settings.setdefault("optimizer", OptimizerSettings(lr=1e-2, warmup_ratio=0.0))
    settings.setdefault("generation", GenerationSettings(max_new_tokens=8))
    return WeaverSFT(memgen_config(base, dtype, dropout), **settings)


def make_data(base: Path, environment: Environment | None = None, **settings: Any) -> EnvironmentData:
    settings.setdefault("batch_size", 2)
    return EnvironmentData(
        environment or Letters(), tokenizer=str(base), chat_template="chatml", val_batch_size=2, **settings
    )


def make_trainer(root: Path, **settings: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "default_root_dir": root,
    }
    return Trainer(**{**defaults, **settings})


class Gradients(Callback):
    """Keeps the accumulated gradient of every optimizer step, and each step's window."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.plans: list[tuple[tuple[int, ...], list[list[tuple[int, int]]]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.plans.append((batch.examples, pl_module.plan(batch).rows()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append(
            {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
                for name, parameter in pl_module.memgen.weaver.own_parameters().items()
            }
        )


MIXED = Curriculum(first=0.25, all=0.25, random=0.25, none=0.25)


def assert_gradients_close(
    name: str,
    ours: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    factor: float = 1.0,
) -> None:
    """Every tensor's gradient; the scales together, since each is one sum of terms that cancel."""
    assert set(ours) == set(reference)
    scales = [key for key in sorted(reference) if reference[key].numel() == 1]
    for key in set(reference) - set(scales):
        assert_close(f"{name}: {key}", ours[key], reference[key], factor=factor)
    if not scales:
        return
    together = [torch.cat([gradients[key] for key in scales]) for gradients in (ours, reference)]
    assert_close(f"{name}: {scales}", *together, factor=20 * factor)
