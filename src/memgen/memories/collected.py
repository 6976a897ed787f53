"""Collected trajectories (`memgen collect`) as experiences that a text memory can be written from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from memgen.environments.base import Example, Message
from memgen.environments.trajectories import Trajectories
from memgen.memories.experience import Experience


def read_experiences(path: str | Path) -> Iterator[Experience]:
    """The conversations of a file as experiences, in its order.

    The task is the last message before the agent's first, the group the environment. Worked examples of the prompt are left
    out. Whether the task was solved, the reward says.

    Args:
        path: JSON lines of `memgen collect`, packed with gzip or not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, a line is broken, or has no reward.
    """
    recorded = Trajectories(str(path))
    for example in recorded.examples("train"):
        yield _experience(example, recorded.messages(example), recorded.conversation(example))


def _experience(example: Example, prompt: list[Message], conversation: list[Message]) -> Experience:
    reward = example.meta["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ValueError(f"trajectory {example.id} has no reward, but {reward!r}; memgen collect writes one")
    system = [message for message in prompt if message["role"] == "system"]
    asked = [message for message in prompt[-1:] if message["role"] != "system"]
    return Experience(
        id=example.meta["item"],
        task=example.question,
        group=str(example.meta["environment"] or ""),
        messages=(*system, *asked, *conversation[len(prompt) :]),
        reward=float(reward),
        success=None,
    )
