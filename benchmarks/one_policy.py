"""How far rollout, old and update log-probabilities of the same tokens are apart, the weights being the same.

    python benchmarks/one_policy.py MODEL_FOLDER [--dtype bfloat16] [--strategies single zero3] [--out FILE]

Samples answers with latents, scores them without gradient (what is called old) and with it (the update), in one
training step of a Trainer and before anything is updated. Old and update must be equal, bit for bit: a ratio of 1 and a
k3 of 0. The rollout reads token by token what the update reads at once, so that matrix products and attention are
blocked differently; what this leaves is measured. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

from memgen.distributed.zero import ZeroStrategy, whole_weights
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.weaver import WeaverConfig

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Tom has 3 apples and buys 5 more. He gives 2 away. How many are left?",
    "Name three colours, and say where each is found in nature.",
    "Why is the sky blue? Explain it to a child.",
)


def build(folder: Path, dtype: Any) -> tuple[MemGenModel, list[list[int]]]:
    """The model, with an adapter that is not 0, and its prompts."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = MemGenConfig(
        backbone=BackboneConfig(name=str(folder), dtype=dtype),
        weaver=WeaverConfig(lora=LoraSettings(r=16, alpha=32, dropout=0.0)),
        boundaries=BoundaryConfig(max_inference_insertions=2),
    )
    model = MemGenModel.build(config, tokenizer, str)
    with torch.no_grad():
        for name, parameter in model.weaver.own_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    model.train_only(model.weaver)
    texts = QUESTIONS
    if tokenizer.chat_template:
        texts = tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in QUESTIONS
        )
    return model.eval(), [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def apart(new: Tensor, old: Tensor) -> dict[str, float]:
    """How far two log-probabilities of the same tokens are apart."""
    difference = new.double() - old.double()
    return {
        "ratio_min": float(difference.exp().min()),
        "ratio_max": float(difference.exp().max()),
        "k3": float((torch.exp(-difference) - 1 + difference).mean()),
        "mean_difference": float(difference.abs().mean()),
        "max_difference": float(difference.abs().max()),
    }


class Measured(LightningModule):
    """One training step that measures and moves nothing."""

    def __init__(self, model: MemGenModel, prompts: list[list[int]], options: argparse.Namespace) -> None:
        super().__init__()
        self.memgen = model
        self.prompts = prompts
        self.options = options
        self.found: dict[str, Any] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer that moves nothing."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples, scores and compares at each temperature."""
        self.memgen.eval()
        total = torch.zeros((), device=self.device)
        for temperature in self.options.temperatures:
            settings = GenerationSettings(
                max_new_tokens=self.options.tokens, temperature=temperature, group_size=2, seed=1
            )
            with whole_weights(self.trainer):
                generation = generate(self.memgen, self.prompts, settings)
                rows = generation.as_batch()
                with torch.no_grad():
                    old = self.memgen.label_scores(rows, generation.plan, temperature=temperature)
            update = self.memgen.label_scores(rows, generation.plan, temperature=temperature)
            rollout = torch.tensor([p for turn in generation.turns for p in turn.logprobs])
            new = update.logprobs.detach().cpu()
            self.found[f"temperature {temperature}"] = {
                "tokens": len(new),
                "insertions": sum(map(len, generation.plan.rows())),
                "update against old": apart(new, old.logprobs.cpu()),
                "update against rollout": apart(new, rollout),
            }
            total = total + update.logprobs.sum()
        return total


def measure(strategy: str, options: argparse.Namespace) -> dict[str, Any]:
    """All temperatures under one strategy."""
    model, prompts = build(options.model, options.dtype)
    stage = Measured(model, prompts, options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy="auto" if strategy == "single" else ZeroStrategy(int(strategy.removeprefix("zero"))),
            devices=1,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(stage, DataLoader(TensorDataset(torch.zeros(1, 1))))
    return stage.found


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--strategies", nargs="+", default=["single", "zero3"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.7, 1.0, 1.3])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each answer")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    found = {
        "model": options.model.name,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "strategies": {strategy: measure(strategy, options) for strategy in options.strategies},
    }
    text = json.dumps(found, indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
