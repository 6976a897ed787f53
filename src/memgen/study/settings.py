"""What a study compares: `conf/study/*.yaml` as a typed record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from memgen.memories.scribe import OnFailure
from memgen.parsing import parse

Protocol = Literal["online", "frozen"]
"""`online`: a memory is empty at first and learns from the test items, each behind its answer. `frozen`: it learns from
training items and is read only on the test items."""
Control = Literal["empty", "random", "shuffled", "oracle", "swapped", "pause"]
MEMORIES: Mapping[str, str] = {
    "exp_recent": "memgen.memories.exp_recent.ExpRecent",
    "exp_rag": "memgen.memories.exp_rag.ExpRAG",
    "remem": "memgen.memories.remem.ReMem",
    "memory_bank": "memgen.memories.memory_bank.MemoryBank",
    "expel": "memgen.memories.expel.ExpeL",
    "generative_agents": "memgen.memories.generative_agents.GenerativeAgents",
    "awm_rule": "memgen.memories.awm.AWMRule",
    "awm": "memgen.memories.awm.AWM",
    "a_mem": "memgen.memories.a_mem.AMem",
    "macla": "memgen.memories.macla.MACLA",
    "reasoning_bank": "memgen.memories.reasoning_bank.ReasoningBank",
    "raw_trajectories": "memgen.memories.raw_trajectories.RawTrajectories",
}
"""Import path of each text memory of ours, by its name."""
SEED, TASK, MEMORY, FOLDER = "{seed}", "{task}", "{memory}", "{folder}"
"""What stands for the seed, the task, the memory's file and the cell's folder in the texts of a method."""


@dataclass(frozen=True)
class MemorySettings:
    """A text memory (docs/memories.md)."""

    method: str
    """Its name, or the import path of a `TextMemory`."""
    constants: dict[str, Any] = field(default_factory=dict)
    """The method's constants; those not given are its paper's."""
    into: Literal["prompt", "weaver"] = "prompt"
    """Who reads it: `prompt`: its passages stand in the prompt; `weaver`: the latent source of the checkpoint opens its file
    itself, whose path stands for `{memory}` in `settings`."""

    def __post_init__(self) -> None:
        if self.method not in MEMORIES and "." not in self.method:
            raise ValueError(
                f"memory.method must be one of {', '.join(MEMORIES)}, or the import path of a class, got {self.method!r}"
            )


@dataclass(frozen=True)
class MethodSettings:
    """Who answers. Nothing set: the reasoner alone."""

    checkpoint: str | None = None
    """A checkpoint directory or an asset's name. `{task}` and `{seed}` in it stand for the cell's."""
    examples: int = 0
    """Worked examples from the training split, in the prompt: few-shot."""
    memory: MemorySettings | None = None
    """A text memory."""
    control: Control | None = None
    """`empty`: the memory is read and never written; `random`: each passage is one of the memory's at random, of the same
    length; `shuffled`: what is written has the reward of an earlier item; `oracle`: the prompt holds the item's own solution;
    `swapped`: latents of another item; `pause`: new pause tokens in place of latents, as many."""
    overlays: tuple[str, ...] = ()
    """Configuration files for this method, as paths or below `conf/`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values on top of them. Texts may have `{task}`, `{seed}`, `{memory}` and `{folder}`."""
    learns: bool = False
    """Whether its latent source keeps something of the items that it answers, in a file in `{folder}` (a latent bank): it is
    then played item by item in each seed's order, online."""
    tasks: tuple[str, ...] = ()
    """The tasks that it plays; empty: all."""

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ValueError(f"examples must be 0 or more, got {self.examples}")
        if self.learns and (self.checkpoint is None or self.memory is not None or self.control is not None):
            raise ValueError(
                "learns is of a checkpoint's latent source, without a text memory and without a control"
            )
        if self.examples and self.memory is not None:
            raise ValueError("a method has worked examples or a memory, not both")
        prompt = self.memory is not None and self.memory.into == "prompt"
        if self.control in ("empty", "random") and not prompt:
            raise ValueError(f"control {self.control} is of a memory in the prompt; give the method one")
        if self.control == "shuffled" and self.memory is None:
            raise ValueError("control shuffled is of a memory; give the method one")
        if self.control == "oracle" and (self.memory is not None or self.examples):
            raise ValueError(
                "control oracle puts the solution in place of a memory; leave memory and examples out"
            )
        if self.control == "swapped" and (self.checkpoint is None or self.memory is not None):
            raise ValueError("control swapped is of a checkpoint without a text memory")
        if self.control == "pause" and self.checkpoint is not None:
            raise ValueError(
                "control pause is new pause tokens, without a checkpoint; learned ones are the checkpoint of a method with "
                "the overlay baselines/pause.yaml"
            )
        if self.memory is not None and self.memory.into == "weaver" and self.checkpoint is None:
            raise ValueError("a memory into the weaver needs a checkpoint of a latent source that reads one")

    @property
    def weaves(self) -> bool:
        """Whether latents can be inserted."""
        return self.checkpoint is not None or self.control == "pause"

    def uses(self, mark: str) -> bool:
        """Whether a text of it has `{seed}`, `{task}` or `{memory}`."""
        return any(mark in text for text in _texts([self.checkpoint, *self.overlays, self.settings]))


@dataclass(frozen=True)
class TaskSettings:
    """What is set for a task, or for all."""

    overlays: tuple[str, ...] = ()
    """Configuration files, as paths or below `conf/`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values on top of them."""


@dataclass(frozen=True)
class ScribeSettings:
    """The language model that writes memories, the same for all methods."""

    kind: Literal["none", "reasoner", "http"] = "none"
    """`none`: every method's deterministic fallback (`/df`); `reasoner`: the reasoner alone; `http`: an endpoint of OpenAI's
    chat completions protocol."""
    url: str | None = None
    """Of the API, http://127.0.0.1:8000/v1 for instance."""
    model: str | None = None
    """The model's name there."""
    key_variable: str | None = None
    """Environment variable with the API key; null: no key is sent."""
    temperature: float = 0.0
    """Of its answers."""
    timeout_s: float = 60.0
    """Seconds that a request may take."""
    on_failure: OnFailure = "fallback"
    """Where it is gone or answers nonsense: the method's fallback answers, or the study stops."""

    def __post_init__(self) -> None:
        if self.kind == "http" and (self.url is None or self.model is None):
            raise ValueError("scribe.kind http needs scribe.url and scribe.model")
        if self.kind != "http" and (self.url is not None or self.model is not None):
            raise ValueError(f"scribe.url and scribe.model are for scribe.kind http, but it is {self.kind}")


@dataclass(frozen=True)
class StudySettings:
    """Methods x tasks x seeds, and what is the same for all of them."""

    methods: dict[str, MethodSettings]
    """By the name of their line. The others are compared with the first."""
    tasks: dict[str, TaskSettings]
    """By name: the items, at least."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is an order of the items, a choice of worked examples and of what a memory learns from, and the seed of sampling."""
    protocols: tuple[Protocol, ...] = ("online", "frozen")
    """How methods with a memory learn: a table for each."""
    experiences: int = 100
    """Training items that a memory learns from in the frozen protocol."""
    learn_from: Literal["attempts", "answers"] = "attempts"
    """What it learns from them: the agent's own attempts and their rewards, each with what the memory holds by then; or the
    reference solutions, as supervised training does."""
    stage: str = "weaver_sft.yaml"
    """The stage file that everything is on top of, as a path or below `conf/`."""
    all: TaskSettings = field(default_factory=TaskSettings)
    """What is set for every task."""
    budget: int = 256
    """Tokens of all passages in a prompt, at most; whole passages. Worked examples and the oracle have it too."""
    k: int | None = None
    """Items that a memory reads, the same for all methods; null: each method's own number."""
    embedder: Literal["bm25", "minilm"] = "bm25"
    """What memories are searched by."""
    known_words_only: bool = False
    """For a tokenizer of few words, as the lab's: words of passages that it does not have are left out, and no headings of
    ours stand above them."""
    scribe: ScribeSettings = field(default_factory=ScribeSettings)
    """See there."""

    def __post_init__(self) -> None:
        for key, names in (("tasks", self.tasks), ("methods", self.methods)):
            if not names:
                raise ValueError(f"{key} is empty; name one at least")
            for name in names:
                if not re.fullmatch(r"\w[\w.+-]*", name):
                    raise ValueError(
                        f"{key}.{name}: a name is a folder's: letters, digits, '_', '.', '+' and '-'; name it so"
                    )
        for name, method in self.methods.items():
            for task in method.tasks:
                if task not in self.tasks:
                    raise ValueError(
                        f"methods.{name}.tasks names {task!r}, which is none of {', '.join(self.tasks)}"
                    )
        for key in ("seeds", "protocols"):
            given = getattr(self, key)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"{key} must be different ones, at least one, got {list(given)}")
        for key in ("experiences", "budget", "k"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        first = next(iter(self.methods))
        if self.methods[first].tasks:
            raise ValueError(
                f"methods.{first} is what all others are compared with, so it plays every task; leave its tasks out"
            )


@dataclass(frozen=True)
class Cell:
    """A method on a task, with a seed, under a protocol."""

    method: str
    """Its name."""
    task: str
    """The task's name."""
    seed: int
    """One of the seeds."""
    protocol: Protocol | None
    """None: the method keeps nothing, so that the protocols are the same for it."""

    @property
    def name(self) -> str:
        """Its folder below the cells."""
        return f"{self.task}/{self.method}/{f'{self.protocol}-' if self.protocol else ''}{self.seed}"


def cells(settings: StudySettings, *, sampled: bool) -> list[Cell]:
    """What is played, task by task.

    Args:
        settings: of the study.
        sampled: whether answers depend on their seed. Where they do not, what is the same under all seeds is played once.
    """
    found: dict[Cell, None] = {}
    for task in settings.tasks:
        for name, method in settings.methods.items():
            if task in (method.tasks or settings.tasks):
                for seed in settings.seeds:
                    for protocol in settings.protocols:
                        if method.learns and protocol == "frozen":
                            continue
                        found[cell_of(settings, name, task, seed, protocol, sampled=sampled)] = None
    return list(found)


def cell_of(
    settings: StudySettings, name: str, task: str, seed: int, protocol: Protocol, *, sampled: bool
) -> Cell:
    """The cell whose answers are those of a method under a seed and a protocol."""
    method = settings.methods[name]
    if method.memory is not None or method.learns:
        return Cell(name, task, seed, protocol)
    seeded = sampled or method.examples > 0 or method.control == "pause" or method.uses(SEED)
    return Cell(name, task, seed if seeded else settings.seeds[0], None)


def read_settings(document: Mapping[str, Any]) -> StudySettings:
    """Reads a resolved configuration.

    Raises:
        ValueError: naming the first key that cannot be used.
    """
    document = dict(document)
    for key in ("tasks", "methods"):
        given = document.get(key)
        if not isinstance(given, Mapping):
            raise ValueError(  # noqa: TRY004 - a value of the document
                f"{key} is not set; name them, each with its settings"
            )
        # An overlay takes one of the file below it away by setting it to null.
        document[key] = {name: values for name, values in given.items() if values is not None}
    return parse(StudySettings, document)


def filled(values: Any, marks: Mapping[str, str]) -> Any:
    """A document with something in the place of `{seed}`, `{task}`, `{memory}` and `{folder}`."""
    if isinstance(values, Mapping):
        return {key: filled(value, marks) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [filled(value, marks) for value in values]
    if isinstance(values, str):
        for mark, text in marks.items():
            values = values.replace(mark, text)
    return values


def _texts(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)
