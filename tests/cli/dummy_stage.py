"""The smallest stage and data module that have the shape of the real ones."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from memgen.run_context import no_assets, run_context


@dataclass(frozen=True)
class Backbone:
    name: str = "lab:reasoner"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Weaver:
    backbone: Backbone | None = None
    inference_latents: int = 8
    delimiters: tuple[str, ...] = (",",)

    def __post_init__(self) -> None:
        if self.inference_latents < 0:
            raise ValueError(f"inference_latents must be at least 0, got {self.inference_latents}")


@dataclass(frozen=True)
class Memgen:
    backbone: Backbone = field(default_factory=Backbone)
    weaver: Weaver = field(default_factory=Weaver)


class Task:
    def __init__(self, path: str | None = None, size: int = 8):
        self.path, self.size = path, size


class Maths(Task):
    pass


class Stage(LightningModule):
    def __init__(
        self, memgen: Memgen, learning_rate: float = 0.1, init_from: str | None = None, seconds: float = 0.0
    ):
        super().__init__()
        self.memgen, self.learning_rate, self.init_from, self.seconds = (
            memgen,
            learning_rate,
            init_from,
            seconds,
        )
        self.linear = torch.nn.Linear(2, 1)

    def setup(self, stage):
        resolve = run_context(self.trainer).resolve_asset
        assert resolve is not no_assets, "the command line passes its own"
        assert resolve("directory") == "directory"

    def training_step(self, batch, batch_idx):
        sys.stdout.write("step\n")
        sys.stdout.flush()
        time.sleep(self.seconds)
        loss = self.linear(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.linear(batch).square().mean())

    def predict_step(self, batch, batch_idx):
        return [{"batch": batch_idx, "text": "é"} for _ in batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


class Data(LightningDataModule):
    def __init__(self, environment: Task | None = None, path: str | None = None, batch_size: int = 2):
        super().__init__()
        self.environment, self.path, self.batch_size = environment, path, batch_size

    def train_dataloader(self):
        return DataLoader(torch.randn(8, 2), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = train_dataloader
