"""What memory is worth on the lab: one table of a trained weaver against its controls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from memgen.analysis.controls import (
    Outcome,
    Task,
    always_invoking,
    score,
    score_with_swapped_latents,
    without_memory,
)
from memgen.chat import load_tokenizer, prompt_ids
from memgen.environments.base import Split
from memgen.generation.sampling import GenerationSettings
from memgen.lab.assets import resolve_asset
from memgen.lab.environment import ConstantAnswer, Lab
from memgen.model.backbone import Backbone
from memgen.model.memgen import MemGenModel
from memgen.training.checkpoint import load_checkpoint, read_config

MAX_NEW_TOKENS = 24
"""Twice the longest reference answer."""


@dataclass(frozen=True)
class LabReport:
    """Scores of one trained weaver on the lab's held-out items.

    Attributes:
        split: which items.
        items: how many.
        constant: the best constant answer of the split.
        outcomes: the conditions, in the order of the table.
        base_hash: SHA-256 of all frozen tensors after everything.
    """

    split: Split
    items: int
    constant: ConstantAnswer
    outcomes: tuple[Outcome, ...]
    base_hash: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "split": self.split,
            "items": self.items,
            "constant_completion": {"text": self.constant.completion, "exact": self.constant.total},
            "constant_answer": {"text": self.constant.answer, "answer": self.constant.answer_accuracy},
            "conditions": {
                outcome.name: {
                    "exact": outcome.mean,
                    "interval_95": outcome.interval(),
                    **{f"part_{name}": value for name, value in outcome.parts.items()},
                    "insertions_per_answer": outcome.insertions,
                    "cpu_seconds": outcome.cpu_seconds,
                }
                for outcome in self.outcomes
            },
            "base_hash": self.base_hash,
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table(
            title=f"Closed-book shop, {self.items} held-out items ({self.split} split), greedy, per cent",
            box=SIMPLE_HEAD,
        )
        # Fits into 80 columns; CPU seconds are in the JSON.
        table.add_column("", no_wrap=True)
        for column in ("exact", "95 % interval", "sum only", "woven"):
            table.add_column(column, justify="right", no_wrap=True)
        constant = self.constant
        table.add_row(
            "best constant answer", _percent(constant.total), "", _percent(constant.answer_accuracy), ""
        )
        for outcome in self.outcomes:
            low, high = outcome.interval()
            table.add_row(
                outcome.name,
                _percent(outcome.mean),
                f"{100 * low:.1f} to {100 * high:.1f}",
                _percent(outcome.parts.get("answer", outcome.mean)),
                f"{outcome.insertions:.1f}",
            )
        return table


def report_on_weaver(
    checkpoint: Path, environment: Lab, split: Split, progress: Callable[[str], None] = lambda name: None
) -> LabReport:
    """Scores a weaver checkpoint and its controls.

    Args:
        checkpoint: a checkpoint directory of a weaver that was trained on the lab.
        environment: the lab, with the world that it was trained on.
        split: which items to answer: val to choose settings, test to report.
        progress: told of each condition before it is scored.
    """
    config = read_config(checkpoint)
    tokenizer = load_tokenizer(resolve_asset(config.backbone.name))
    examples = environment.examples(split)
    task = Task(
        environment=environment,
        examples=examples,
        prompts=[prompt_ids(tokenizer, environment.messages(example)) for example in examples],
        tokenizer=tokenizer,
        settings=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
    )
    torch.manual_seed(0)  # of the untrained weaver
    model = MemGenModel.build(config, tokenizer, resolve_asset).eval()

    outcomes = []
    for name, run in (
        ("reasoner alone", lambda name: score(name, without_memory(model), task)),
        ("untrained latents", lambda name: score(name, always_invoking(model), task)),
        ("trained, all boundaries", lambda name: score(name, _loaded(model, checkpoint), task)),
        ("trained, prompt end only", lambda name: score(name, always_invoking(model, 0), task)),
        (
            "trained, latents of another item",
            lambda name: score_with_swapped_latents(name, always_invoking(model), task),
        ),
    ):
        progress(name)
        outcomes.append(run(name))
    return LabReport(
        split=split,
        items=len(examples),
        constant=environment.constant_answer_baseline(split),
        outcomes=tuple(outcomes),
        base_hash=base_hash(model.reasoner.backbone),
    )


def _loaded(model: MemGenModel, checkpoint: Path) -> MemGenModel:
    load_checkpoint(model, checkpoint)
    return always_invoking(model)


def base_hash(backbone: Backbone) -> str:
    """SHA-256 over the frozen tensors of a base, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.model.state_dict().items()):
        if ".lora_" not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
