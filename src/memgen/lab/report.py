"""The table of `memgen demo`: accuracy of every stage on the lab's tasks, against its controls."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from memgen.chat import load_tokenizer, prompt_ids
from memgen.environments.base import Environment, Message, Split
from memgen.files import write_whole
from memgen.generation.sampling import GenerationSettings
from memgen.lab.assets import resolve_asset
from memgen.lab.english import EnglishLab
from memgen.lab.environment import ConstantAnswer, Lab, LabEnvironment
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
ENGLISH_OTHERS = ("open", "copy")
"""Those of the English lab."""
ENGLISH_NEW_TOKENS = 32
"""Limit of an answer in English, of at most 23 tokens in SmolLM2's vocabulary."""
SHOTS = 3
"""Worked examples of a few-shot prompt."""


@dataclass(frozen=True)
class Questions:
    """What a report asks.

    Attributes:
        target: the closed-book task.
        others: tasks that need no memory.
        max_new_tokens: limit of an answer.
        shots: worked examples of the few-shot prompt; 0: the report is without one.
        batch_size: rows that are decoded together.
    """

    target: LabEnvironment
    others: LabEnvironment
    max_new_tokens: int
    shots: int = 0
    batch_size: int = 64

    @classmethod
    def lab(cls, items: int = 600) -> Questions:
        """The lab's shop, and as many items of its other tasks together."""
        return cls(
            target=Lab(val_size=items, test_size=items),
            others=Lab(OTHERS, val_size=items, test_size=items),
            max_new_tokens=MAX_NEW_TOKENS,
        )

    @classmethod
    def english(cls, items: int = 300, others: int = 100) -> Questions:
        """The shop in plain English, and items of the other English tasks."""
        return cls(
            target=EnglishLab(val_size=items, test_size=items),
            others=EnglishLab(ENGLISH_OTHERS, val_size=others, test_size=others),
            max_new_tokens=ENGLISH_NEW_TOKENS,
            shots=SHOTS,
            batch_size=25,
        )


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
        others: names of the tasks without need of memory.
    """

    split: Split
    items: int
    constant: ConstantAnswer
    conditions: tuple[Condition, ...]
    base_hash: str
    others: tuple[str, ...] = OTHERS

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
            f"sum: right, whatever the list; others: mean over {', '.join(self.others[:-1])} and {self.others[-1]}, without "
            "need of memory"
        )
        return table


def held_out(
    environment: Environment,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int = 64,
    shots: int = 0,
) -> Task:
    """The items of a split, answered greedily.

    Args:
        environment: the tasks.
        split: which items.
        tokenizer: the reasoner's.
        max_new_tokens: limit of an answer.
        batch_size: rows that are decoded together.
        shots: so many training items and their reference answers stand before each question, as earlier turns.
    """
    examples = environment.examples(split)
    before: list[Message] = []
    if shots:
        for example in environment.examples("train")[:shots]:
            before += environment.conversation(example)
    return Task(
        environment=environment,
        examples=examples,
        prompts=[prompt_ids(tokenizer, [*before, *environment.messages(example)]) for example in examples],
        tokenizer=tokenizer,
        settings=GenerationSettings(max_new_tokens=max_new_tokens),
        batch_size=batch_size,
    )


def report_on_stages(
    checkpoints: Checkpoints,
    split: Split = "test",
    questions: Questions | None = None,
    progress: Callable[[str], None] = lambda name: None,
    keep: Path | None = None,
) -> LabReport:
    """Scores the stages' checkpoints, and the controls.

    Args:
        checkpoints: of all stages, of one reasoner, trained on the target of the default world.
        split: which items to answer: val to choose settings, test to report.
        questions: what is asked; None: the lab's shop and other tasks.
        progress: called with the name of each condition before it is scored.
        keep: folder in which each condition's scores are kept as they are there, so that an interrupted report goes on;
            one folder for one set of checkpoints and questions. None: nowhere.
    """
    questions = Questions.lab() if questions is None else questions
    config = read_config(checkpoints.weaver)
    tokenizer = load_tokenizer(resolve_asset(config.backbone.name))
    settings = (split, tokenizer, questions.max_new_tokens, questions.batch_size)
    target, others = held_out(questions.target, *settings), held_out(questions.others, *settings)
    torch.manual_seed(0)  # of the untrained weaver
    model = MemGenModel.build(config, tokenizer, resolve_asset).eval()

    def opened(checkpoint: Path) -> MemGenModel:
        return open_checkpoint(checkpoint, load_tokenizer, resolve_asset)[0].eval()

    def trained(insertions: int | None = None) -> MemGenModel:
        load_checkpoint(model, checkpoints.weaver)
        return always_invoking(model, insertions)

    # A weaver for the end of the prompt alone has no other boundaries.
    inside = config.boundaries.max_inference_insertions > 0
    runs: list[tuple[str, Callable[[], MemGenModel], bool]] = [
        ("reasoner alone", lambda: without_memory(model), True),
        *(
            [(f"  {questions.shots} worked examples", lambda: without_memory(model), False)]
            if questions.shots
            else []
        ),
        ("untrained latents", lambda: always_invoking(model), False),
        ("weaver SFT, all boundaries" if inside else "weaver SFT", trained, True),
        *([("  prompt end only", lambda: trained(0), False)] if inside else []),
        ("  latents of another item", trained, False),
        ("half-trained weaver", lambda: always_invoking(opened(checkpoints.half)), False),
        ("  and then weaver GRPO", lambda: always_invoking(opened(checkpoints.grpo)), False),
        ("weaver SFT and trigger RL", lambda: opened(checkpoints.trigger), True),
    ]
    conditions = []
    for name, build, harm in runs:
        progress(name.strip())

        def answer(
            name: str = name, build: Callable[[], MemGenModel] = build, harm: bool = harm
        ) -> Condition:
            ready = build()
            asked = held_out(questions.target, *settings, questions.shots) if "worked" in name else target
            scored = score_with_swapped_latents if "another" in name else score
            return Condition(scored(name, ready, asked), score(name, ready, others) if harm else None)

        conditions.append(answer() if keep is None else _kept(keep / f"{name.strip()}.json", answer))
    return LabReport(
        split=split,
        items=len(target.examples),
        constant=questions.target.constant_answer_baseline(split),
        conditions=tuple(conditions),
        base_hash=base_hash(model.reasoner.backbone),
        others=tuple(dict.fromkeys(questions.others.tasks)),
    )


def _kept(path: Path, make: Callable[[], Condition]) -> Condition:
    """A condition's scores, computed unless the file has them already."""
    if not path.is_file():
        found = make()
        write_whole(path, json.dumps(dataclasses.asdict(found)))
        return found
    outcome, others = (
        None if values is None else Outcome(**{**values, "rewards": tuple(values["rewards"])})
        for values in map(json.loads(path.read_text(encoding="utf-8")).get, ("outcome", "others"))
    )
    assert outcome is not None, "only the other tasks' scores may be missing"
    return Condition(outcome, others)


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "exact": outcome.mean,
        "interval_95": outcome.interval(),
        **{f"part_{name}": value for name, value in outcome.parts.items()},
        "insertions_per_answer": outcome.insertions,
        "positions_per_answer": outcome.positions,
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
