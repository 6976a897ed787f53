"""A stage file whose environment a tiny untrained model can play, and processes that play it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from memgen.chat import load_tokenizer
from memgen.lab.saving import save_backbone
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.weaver import WeaverConfig
from memgen.training.checkpoint import save_checkpoint
from tiny import byte_tokenizer, tiny_causal_lm

TESTS = Path(__file__).resolve().parents[1]
STAGE = """\
seed_everything: 0
model:
  class_path: memgen.training.weaver_sft.WeaverSFT
  memgen:
    backbone: {name: base, dtype: float32}
    weaver: {prompt_latents: 3, inference_latents: 2, lora: {r: 4, alpha: 8, dropout: 0.0}}
    boundaries: {delimiters: [a, e, i], max_inference_insertions: 2}
  generation: {max_new_tokens: 40, temperature: 1.0}
data:
  class_path: memgen.data.EnvironmentData
  tokenizer: base
  chat_template: chatml
  val_batch_size: 2
  environment:
    class_path: letters_env.LetterGame
    items: 12
    seconds: 0.0
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  use_distributed_sampler: false
  enable_model_summary: false
  enable_progress_bar: false
"""
CONFIG = ("--config", "stage.yaml")
NAMED = ("--model.memgen.backbone.name", "lab:base", "--data.tokenizer", "lab:base")
"""The base by the name of an asset, which `named_base` resolves."""
SLOW = ("--data.environment.seconds", "0.1")


def prepare(folder: Path) -> None:
    (folder / "stage.yaml").write_text(STAGE)
    (folder / "base").mkdir()
    save_backbone(tiny_causal_lm(max_position_embeddings=2048), byte_tokenizer(), folder / "base")


def named_base(name: str) -> str:
    """As `memgen.lab.assets.resolve_asset`, for a base that is called lab:base."""
    return "base" if name == "lab:base" else name


def prepare_trained(folder: Path) -> None:
    """As `prepare`, which the working directory has to be, with a checkpoint `trained`."""
    prepare(folder)
    config = MemGenConfig(
        backbone=BackboneConfig(name="base", dtype="float32"),
        weaver=WeaverConfig(
            lora=LoraSettings(r=4, alpha=8, dropout=0.0), prompt_latents=3, inference_latents=2
        ),
        boundaries=BoundaryConfig(delimiters=("a", "e", "i"), max_inference_insertions=2),
    )
    model = MemGenModel.build(config, load_tokenizer("base"), lambda name: name)
    save_checkpoint(model, config, folder / "trained", with_trigger=False)


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """A command as a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "memgen.cli.main", *argv],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Until a file has so many lines, or the process has ended."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        if process.poll() is not None:
            raise AssertionError(f"it ended before: {process.communicate()[1]}")
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"{path} never had {lines} lines")
