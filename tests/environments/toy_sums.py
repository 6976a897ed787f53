"""A taskset of verifiers, as people publish them: sums of two digits."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["ToySums"]


class Config(vf.TasksetConfig):
    largest: int = 9
    broken: str = ""


class Data(vf.TaskData):
    total: int


class Sum(vf.Task[Data]):
    @vf.reward
    async def right(self, task: Data, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(task.total))

    @vf.reward(weight=0.5)
    async def digits(self, trace: vf.Trace) -> float:
        if trace.last_reply == "crash":
            raise RuntimeError("no such answer")
        return float(trace.last_reply.isdigit())

    @vf.metric
    async def length(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


class Boxed(Sum):
    NEEDS_CONTAINER = True


class Prepared(Sum):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        return None


class Tested(Sum):
    @vf.reward
    async def passes(self, runtime: vf.Runtime) -> float:
        return 1.0


class ToySums(vf.Taskset[Sum, Config]):
    def load(self):
        kind = {"container": Boxed, "setup": Prepared, "runtime": Tested}.get(self.config.broken, Sum)
        for first in range(self.config.largest + 1):
            for second in range(self.config.largest + 1):
                prompt = None if self.config.broken == "prompt" else f"{first} + {second} ="
                data = Data(prompt=prompt, system_prompt="Reply with a number.", total=first + second)
                yield kind(data, self.config.task)
