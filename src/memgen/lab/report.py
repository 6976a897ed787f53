"""The table of `memgen demo`: accuracy of every stage on the lab, against its controls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from memgen.chat import load_tokenizer, prompt_ids
from memgen.environments.base import Split
from memgen.generation.sampling import GenerationSettings
from memgen.lab.assets import resolve_asset
from memgen.lab.environment import ConstantAnswer, Lab
from memgen.model.backbone import Backbone
from memgen.model.memgen import MemGenModel
from memgen.results.controls import (
    Outcome,
    Task,
    always_invoking,
    score,
    score_with_swapped_latents,
    without_memory,
)
from memgen.training.checkpoint import load_checkpoint, open_checkpoint, read_config

MAX_NEW_TOKENS = 24
"""Twice the longest reference answer."""
OTHERS = ("open", "add", "rev", "walk")
"""Tasks that need no memory."""


@dataclass(frozen=True)
class Checkpoints:
    """The stages' checkpoints.

    Attributes:
        weaver: of weaver SFT.
        half: of weaver SFT that was stopped early, where GRPO starts.
        grpo: of weaver GRPO.
        trigger: of trigger RL, with a trained trigger.
    """

    weaver: Path
    half: Path
    grpo: Path
    trigger: Path


@dataclass(frozen=True)
class Condition:
    """One row of the table.

    Attributes:
        outcome: on the target's held-out items.
        others: on those of the tasks that need no memory; None: not scored.
    """

    outcome: Outcome
    others: Outcome | None = None


@dataclass(frozen=True)
class LabReport:
    """Scores on the lab's held-out items.

    Attributes:
        split: which items.
        items: how many of the target.
        constant: the best constant answer of the split.
        conditions: in the order of the table.
        base_hash: SHA-256 of all frozen tensors after the last condition.
    """

    split: Split
    items: int
    constant: ConstantAnswer
    conditions: tuple[Condition, ...]
    base_hash: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "split": self.split,
            "items": self.items,
            "constant_completion": {"text": self.constant.completion, "exact": self.constant.total},
            "constant_answer": {"text": self.constant.answer, "answer": self.constant.answer_accuracy},
            "conditions": {
                condition.outcome.name: {
                    **_as_dict(condition.outcome),
                    "others": None if condition.others is None else _as_dict(condition.others),
                }
                for condition in self.conditions
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
        for column in ("exact", "95 % interval", "sum", "woven", "others"):
            table.add_column(column, justify="right", no_wrap=True)
        constant = self.constant
        answer = _percent(constant.answer_accuracy)
        table.add_row("best constant answer", _percent(constant.total), "", answer, "", "")
        for condition in self.conditions:
            outcome = condition.outcome
            low, high = outcome.interval()
            table.add_row(
                outcome.name,
                _percent(outcome.mean),
                f"{100 * low:.1f} to {100 * high:.1f}",
                _percent(outcome.parts.get("answer", outcome.mean)),
                f"{outcome.insertions:.1f}",
                "" if condition.others is None else _percent(condition.others.mean),
            )
        table.caption = (
            "sum: right, whatever the list; others: mean over open, add, rev and walk, without need of memory"
        )
        return table


def held_out(
    environment: Lab,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int = 64,
) -> Task:
    """The items of a split, answered greedily.

    Args:
        environment: the lab's tasks.
        split: which items.
        tokenizer: the reasoner's.
        max_new_tokens: limit of an answer.
        batch_size: rows that are decoded together.
    """
    examples = environment.examples(split)
    return Task(
        environment=environment,
        examples=examples,
        prompts=[prompt_ids(tokenizer, environment.messages(example)) for example in examples],
        tokenizer=tokenizer,
        settings=GenerationSettings(max_new_tokens=max_new_tokens),
        batch_size=batch_size,
    )


def report_on_stages(
    checkpoints: Checkpoints,
    split: Split = "test",
    items: int = 600,
    progress: Callable[[str], None] = lambda name: None,
) -> LabReport:
    """Scores the stages' checkpoints, and the controls.

    Args:
        checkpoints: of all stages, of one reasoner, trained on the lab of the default world.
        split: which items to answer: val to choose settings, test to report.
        items: how many of the target, and of the other tasks together.
        progress: called with the name of each condition before it is scored.
    """
    environment = Lab(val_size=items, test_size=items)
    config = read_config(checkpoints.weaver)
    tokenizer = load_tokenizer(resolve_asset(config.backbone.name))

    target = held_out(environment, split, tokenizer, MAX_NEW_TOKENS)
    others = held_out(Lab(OTHERS, val_size=items, test_size=items), split, tokenizer, MAX_NEW_TOKENS)
    torch.manual_seed(0)  # of the untrained weaver
    model = MemGenModel.build(config, tokenizer, resolve_asset).eval()

    def opened(checkpoint: Path) -> MemGenModel:
        return open_checkpoint(checkpoint, load_tokenizer, resolve_asset)[0].eval()

    def trained() -> MemGenModel:
        load_checkpoint(model, checkpoints.weaver)
        return always_invoking(model)

    runs: Sequence[tuple[str, Callable[[], MemGenModel], bool]] = (
        ("reasoner alone", lambda: without_memory(model), True),
        ("untrained latents", lambda: always_invoking(model), False),
        ("weaver SFT, all boundaries", trained, True),
        ("  prompt end only", lambda: always_invoking(model, 0), False),
        ("  latents of another item", lambda: always_invoking(model), False),
        ("half-trained weaver", lambda: always_invoking(opened(checkpoints.half)), False),
        ("  and then weaver GRPO", lambda: always_invoking(opened(checkpoints.grpo)), False),
        ("weaver SFT and trigger RL", lambda: opened(checkpoints.trigger), True),
    )
    conditions = []
    for name, build, harm in runs:
        progress(name.strip())
        ready = build()
        scored = score_with_swapped_latents if "another" in name else score
        conditions.append(
            Condition(scored(name, ready, target), score(name, ready, others) if harm else None)
        )
    return LabReport(
        split=split,
        items=len(target.examples),
        constant=environment.constant_answer_baseline(split),
        conditions=tuple(conditions),
        base_hash=base_hash(model.reasoner.backbone),
    )


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "exact": outcome.mean,
        "interval_95": outcome.interval(),
        **{f"part_{name}": value for name, value in outcome.parts.items()},
        "insertions_per_answer": outcome.insertions,
        "cpu_seconds": outcome.cpu_seconds,
    }


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
