"""Episodes that an untrained model can end: a turn stops at the first letter, and what letter it is earns the reward."""

from __future__ import annotations

import string
import time
from typing import Any

from memgen.environments.base import Episode, Example, InteractiveEnvironment, Observation, Reward, Step


class _LetterEpisode(Episode):
    def reset(self, example):
        self.example, self.actions = example, []
        return Observation(f"letter {example.meta['number']}")

    def step(self, action):
        self.actions.append(action)
        if self.example.meta["fails"]:
            return Step("", done=True, fault="it broke")
        return Step(f"seen {len(self.actions)}", done=len(self.actions) == 2)

    def reward(self):
        upper = sum(action[-1:].isupper() for action in self.actions)
        return Reward(upper / 2, {"upper": float(upper)})


class LetterGame(InteractiveEnvironment):
    """Two turns; half of the reward for each that ends in a capital letter.

    Args:
        items: of the training split; validation and test have 6.
        seconds: that every step takes.
        fails: numbers of items that fail.
    """

    name = "letter_game"
    max_turns = 2
    stop_texts = tuple(string.ascii_letters)

    def __init__(self, items: int = 12, seconds: float = 0.0, fails: tuple[int, ...] = ()) -> None:
        self.items, self.seconds, self.fails = items, seconds, fails

    def examples(self, split):
        count = self.items if split == "train" else 6
        return [
            Example(f"{split}-{i}", f"letter {i}", "A", "A", meta={"number": i, "fails": i in self.fails})
            for i in range(count)
        ]

    def messages(self, example):
        return [{"role": "system", "content": "write a letter"}]

    def conversation(self, example):
        return [
            *self.messages(example),
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": example.target},
        ]

    def episode(self):
        return _LetterEpisode()

    def step_all(self, episodes: Any, actions: Any):
        time.sleep(self.seconds)
        return super().step_all(episodes, actions)
