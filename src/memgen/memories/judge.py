"""Success as the scribe sees it: the judge of AWM and ReasoningBank where the environment is not to be asked."""

from __future__ import annotations

import re
from typing import Any

from memgen.memories.base import TextMemory
from memgen.memories.experience import Experience, steps
from memgen.memories.scribe import Nonsense

_JUDGE = (
    "Here is a task and what an agent did. Was the task solved? Answer with one word, yes or no.\n\nTask: {task}\n\n{steps}\n\n"
    "Solved (yes or no):"
)


def judged(memory: TextMemory[Any], experience: Experience) -> bool:
    """Whether the scribe takes an episode for a success; without its answer, what the environment says."""
    shown = "\n".join(
        f"Agent: {step.action}" + (f"\nObservation: {step.result}" if step.result else "")
        for step in steps(experience)
    )
    verdict = memory.ask("a verdict", _JUDGE.format(task=experience.task, steps=shown), 8, _verdict)
    return experience.succeeded if verdict is None else verdict


def _verdict(answer: str) -> bool:
    found = re.search(r"\b(yes|no)\b", answer.lower())
    if found is None:
        raise Nonsense(f"neither yes nor no: {answer!r:.80}")
    return found[1] == "yes"
