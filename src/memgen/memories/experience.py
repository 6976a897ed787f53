"""A finished task as a memory sees it: text, reward, and the agent's steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from memgen.environments.base import Message

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?![\w])")
_QUOTED = re.compile(r"\"[^\"\n]+\"|(?<!\w)'[^'\n]+'(?!\w)")


@dataclass(frozen=True)
class Experience:
    """One finished episode."""

    id: str
    """Of the task; another attempt at the same task has the same."""
    task: str
    """The task as the agent read it."""
    group: str
    """Where tasks of one kind belong together: a website, a house, a data set."""
    messages: Sequence[Message]
    """The conversation. The assistant's messages are the agent's actions; examples of the prompt are left out."""
    reward: float
    """Total reward of the episode."""
    success: bool | None
    """Whether the task was solved; None: the reward says so."""

    def __post_init__(self) -> None:
        if not self.id or not self.task.strip():
            raise ValueError(f"an experience needs an id and a task, got {self.id!r} and {self.task!r:.40}")
        if not math.isfinite(self.reward):
            raise ValueError(f"experience {self.id}: a reward must be a finite number, got {self.reward!r}")

    @property
    def succeeded(self) -> bool:
        """`success`; where that is None, a reward of at least 1."""
        return self.reward >= 1 if self.success is None else self.success

    @property
    def output(self) -> str:
        """The agent's actions, one behind the other."""
        return "\n".join(step.action for step in steps(self))

    @property
    def feedback(self) -> str:
        """How it ended, in words."""
        outcome = "success" if self.succeeded else "failure"
        last = steps(self)[-1].result if steps(self) else ""
        return f"{outcome} (reward {self.reward:g})" + (f"; {last}" if last else "")


@dataclass(frozen=True)
class Step:
    """One action of the agent."""

    state: str
    """What it had observed since its last action."""
    action: str
    """What it wrote."""
    result: str
    """What it observed next; empty behind the last action."""


def steps(experience: Experience) -> list[Step]:
    """The agent's actions with what it observed around them."""
    taken: list[Step] = []
    seen: list[str] = []
    for message in experience.messages:
        text = message["content"].strip()
        if message["role"] == "assistant":
            taken.append(Step("\n".join(seen), text, ""))
            seen = []
        elif message["role"] != "system":
            seen.append(text)
            if taken and not taken[-1].result:
                taken[-1] = Step(taken[-1].state, taken[-1].action, text)
    return taken


def transcript(experience: Experience) -> str:
    """The episode as text: the task, the agent's steps, the outcome."""
    lines = [f"Task: {experience.task.strip()}"]
    for step in steps(experience):
        lines.append(f"Agent: {step.action}")
        if step.result:
            lines.append(f"Observation: {step.result}")
    return "\n".join([*lines, f"Outcome: {'success' if experience.succeeded else 'failure'}"])


def template(text: str) -> str:
    """The text with a slot in place of each value: numbers and quoted texts. Tasks of one template have the same."""
    return _NUMBER.sub("{number}", _QUOTED.sub("{text}", " ".join(text.split())))


def record(experience: Experience) -> str:
    """The episode as Evo-Memory's template keeps it (arXiv 2511.20857): task, output, feedback."""
    return f"Task: {experience.task.strip()}\nOutput: {experience.output}\nFeedback: {experience.feedback}"
