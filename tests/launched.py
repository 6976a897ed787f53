"""Starts a script on several ranks and collects what each wrote.

A rank is a fork of one warm process (`warm.py`) that has made the imports of all scripts so far: they take seven seconds of
a processor, which every rank of every launch would pay otherwise.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

WARM = Path(__file__).with_name("warm.py")


class Warm:
    """The warm process."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(WARM.parent), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        # Started under a launcher, Lightning would take its numbers; and a seed that another test left behind would be
        # set again in every rank of a launch, but not in a single process.
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
            environment.pop(name, None)
        # A session of its own, so that a rank that waits for the other in vain can be ended with it.
        self.process = subprocess.Popen(
            [sys.executable, str(WARM)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        atexit.register(self.end)

    def run(self, worker: Path, ranks: int, arguments: list[str], log: Path, seconds: float) -> list[int]:
        """The exit status of each rank, negative for a signal; none if they have not ended in time, or this process has."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"worker": str(worker), "ranks": ranks, "arguments": arguments, "log": str(log)}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return []
        return json.loads(self.process.stdout.readline() or "[]")

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@cache
def _warm() -> Warm:
    return Warm()


def statuses(worker: Path, ranks: int, arguments: list[str], log: Path, seconds: float = 400) -> list[int]:
    """Runs a script on each rank; the exit status of each, negative for a signal."""
    found = _warm().run(worker, ranks, arguments, log, seconds)
    if not found:
        _warm().end()
        _warm.cache_clear()
        raise AssertionError(
            f"no exit status after {seconds} s\n{log.read_text()[-4000:] if log.exists() else ''}"
        )
    return found


def launch(
    worker: Path, ranks: int, base: Path, out: Path, *arguments: str, seconds: float = 400
) -> list[dict]:
    """What each rank wrote."""
    log = out.with_suffix(".log")
    found = statuses(worker, ranks, [str(ranks), str(base), str(out), *arguments], log, seconds)
    assert not any(found), f"exit status {found}\n{log.read_text()[-4000:]}"
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(ranks)]
