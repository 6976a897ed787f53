"""What a run of continual learning does: `conf/continual.yaml` as a typed record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memgen.parsing import parse

METHODS = {
    "memgen": "MemGen, weaver SFT",
    "memgen_trigger": "MemGen, weaver SFT and trigger RL",
    "lora": "LoRA-SFT",
    "lora_replay": "LoRA-SFT with replay",
}
"""Ways of learning, for people. The first two share their weavers."""
LORA = "lora_sft"
"""Weaver SFT of the reasoner's adapter, in the weaver's place."""
STAGE_OF = {"memgen": "weaver_sft", "memgen_trigger": "trigger_rl", "lora": LORA, "lora_replay": LORA}
"""The stage whose agent a method tests: the stage files in `conf/`, without ending, and `LORA`."""


@dataclass(frozen=True)
class StageSettings:
    """What is set on top of the stage files, of one task or of all."""

    overlays: tuple[str, ...] = ()
    """Configuration files for every stage, as paths or below `conf/`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values for every stage, on top of the files."""
    weaver_sft: dict[str, Any] = field(default_factory=dict)
    """Values for weaver SFT. LoRA-SFT has its adapter, optimizer, steps and batches."""
    trigger_rl: dict[str, Any] = field(default_factory=dict)
    """Values for trigger RL."""

    def of(self, stage: str) -> dict[str, Any]:
        """The values of a stage alone."""
        values: dict[str, Any] = getattr(self, stage)
        return values


@dataclass(frozen=True)
class ReplaySettings:
    """Experience replay of `lora_replay`."""

    share: float = 0.5
    """Share of every batch that is taken from the earlier tasks of the chain."""
    items: int = 256
    """First training items of each earlier task that are kept for it."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"replay.share must be above 0 and below 1, got {self.share}")
        if self.items < 1:
            raise ValueError(f"replay.items must be at least 1, got {self.items}")


@dataclass(frozen=True)
class ContinualSettings:
    """A chain of tasks, and the ways in which it is learnt."""

    chain: tuple[str, ...]
    """Tasks in the order in which they are learnt. One task: what it changes on all others."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Some of `METHODS`."""
    seed: int = 0
    """Of initial weights, data order and sampling of every training."""
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    """See there."""
    lora_lr: float | None = None
    """Peak learning rate of LoRA-SFT. None: the weaver's."""
    all: StageSettings = field(default_factory=StageSettings)
    """What is set for every task."""
    tasks: dict[str, StageSettings] = field(default_factory=dict)
    """The tasks that are tested, by name, with what is set for each: its items, at least."""

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise ValueError(
                f"continual learning needs at least two tasks, got {', '.join(self.tasks) or 'none'}; add one below tasks"
            )
        unsuitable = [name for name in self.tasks if not re.fullmatch(r"\w[\w.-]*", name)]
        if unsuitable:
            raise ValueError(
                f"tasks.{unsuitable[0]}: a task's name is a folder's: letters, digits, '_', '.' and '-'; name it so"
            )
        if not self.chain:
            raise ValueError(f"chain names no task; name some of {', '.join(self.tasks)}")
        _require_known("chain", self.chain, self.tasks)
        _require_known("methods", self.methods, METHODS)
        if not self.methods:
            raise ValueError(f"methods names no method; name some of {', '.join(METHODS)}")


def _require_known(key: str, names: tuple[str, ...], known: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{key} names {unknown[0]!r}, which is none of {', '.join(known)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{key} names {twice[0]!r} twice; name it once")


def read_settings(document: Mapping[str, Any]) -> ContinualSettings:
    """Reads a resolved configuration.

    Args:
        document: what `conf/continual.yaml` and its overlays say.

    Raises:
        ValueError: naming the first key that cannot be used.
    """
    if document.get("chain") is None:
        raise ValueError("chain is not set; name the tasks in the order in which they are to be learnt")
    for key in ("chain", "methods"):
        if isinstance(document.get(key), str):  # On a command line: `--methods memgen,lora`.
            document = {**document, key: [name.strip() for name in document[key].split(",")]}
    tasks = document.get("tasks")
    if isinstance(tasks, Mapping):
        # An overlay takes a task of the file below it away by setting it to null.
        document = {**document, "tasks": {name: given for name, given in tasks.items() if given is not None}}
    return parse(ContinualSettings, document)
