"""Experiences, embedders and scribes for the tests of text memories."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from memgen.memories.experience import Experience
from memgen.memories.scribe import Completion, Scribe, ScribeError


def experience(
    task: str,
    actions: Sequence[str] = ("do it",),
    *,
    id: str = "",
    group: str = "",
    reward: float = 1.0,
    observations: Sequence[str] = (),
) -> Experience:
    """An episode; solved if its reward is 1."""
    messages = [{"role": "user", "content": task}]
    for number, action in enumerate(actions):
        messages.append({"role": "assistant", "content": action})
        if number < len(observations):
            messages.append({"role": "user", "content": observations[number]})
    return Experience(id or task, task, group, messages, reward, None)


class WordEmbedder:
    """A text is the sum of its words' directions, so that cosines are shares of common words."""

    id = "words"
    dim = 256

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") % self.dim] += 1
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows


class TableEmbedder:
    """Texts whose cosines with `query` are given; any other text is at a right angle to all."""

    id = "table"
    dim = 3

    def __init__(self, cosines: dict[str, float]) -> None:
        self.cosines = cosines

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            cosine = 1.0 if text == "query" else self.cosines.get(text)
            row[:] = (0, 0, 1) if cosine is None else (cosine, np.sqrt(1 - cosine**2), 0)
        return rows


class ScriptedScribe(Scribe):
    """Answers from a function of the prompt; None: it is gone."""

    id = "script"

    def __init__(self, answer: Callable[[str], str | None] | Sequence[str | None]) -> None:
        super().__init__()
        self.prompts: list[str] = []
        self._answer = answer

    def complete(self, prompt: str, max_tokens: int) -> Completion:
        self.prompts.append(prompt)
        text = self._answer(prompt) if callable(self._answer) else self._answer[len(self.prompts) - 1]
        if text is None:
            raise ScribeError("it is gone")
        return Completion(text, len(prompt.split()), len(text.split()))
