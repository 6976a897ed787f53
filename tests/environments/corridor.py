"""A little interactive environment that crashes, hangs, raises or chatters when it is told to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

from memgen.environments.base import (
    Episode,
    Example,
    InteractiveEnvironment,
    Message,
    Observation,
    Reward,
    Step,
)


class Corridor(InteractiveEnvironment):
    """Walk `right` to the end of a corridor whose length the item says."""

    name = "corridor"
    max_turns = 8
    stop_texts = ("\n",)

    def __init__(self, size: int = 24, starts: str = "") -> None:
        self.size = size
        self.starts = starts

    def examples(self, split):
        return [
            Example(id=f"{split}-{i}", question="Go.", target="", answer="", meta={"length": 1 + i % 4})
            for i in range(self.size)
        ]

    def messages(self, example):
        return [{"role": "system", "content": "Walk."}]

    def conversation(self, example):
        if example.id == "train-3":
            raise ValueError("nobody knows the way")
        if example.id == "train-6":
            os.kill(os.getpid(), signal.SIGKILL)
        turns: list[Message] = [*self.messages(example), {"role": "user", "content": str(os.getpid())}]
        return [*turns, {"role": "assistant", "content": "right " * example.meta["length"]}]

    def episode(self):
        return Walk()


class Walk(Episode):
    open = 0

    def __init__(self):
        Walk.open += 1

    def close(self):
        Walk.open -= 1

    def reset(self, example):
        match example.meta.get("reset"):
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
            case "missing":
                raise FileNotFoundError("there is no corridor")
            case "broken":
                raise ZeroDivisionError("no length")
        self.length, self.place, self.random = example.meta["length"], 0, random.Random(example.id)
        return Observation(f"A corridor of {self.length}.")

    def step(self, action):
        match action:
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.stderr.write("the roof falls in\n")
                os._exit(3)
            case "hang":
                time.sleep(3600)
            case "spin":
                while True:
                    pass
            case "raise":
                raise KeyError("lamp")
            case "chatter":
                sys.stdout.write("x" * 3_000_000)
            case "sleep":
                time.sleep(0.5)
            case "child":
                return Step(str(subprocess.Popen(["sleep", "600"]).pid), False)
            case "lock":
                return Step(threading.Lock(), False)
            case "open episodes":
                return Step(str(Walk.open), False)
            case "pid":
                return Step(str(os.getpid()), False)
            case "right":
                self.place += 1
        done = self.place == self.length
        return Step(
            f"You are at {self.place}. It smells of {self.random.random():.3f}.", done, {"moves": self.place}
        )

    def reward(self):
        return Reward(total=float(self.place == self.length), parts={"place": float(self.place)})
