"""Starts a script on several ranks and collects what each wrote."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch


def launch(
    worker: Path, ranks: int, base: Path, out: Path, *arguments: str, seconds: float = 120
) -> list[dict]:
    """What each rank wrote."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(worker.parents[1]), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # Started under a launcher, Lightning would not launch the second process itself; and a seed that another test
    # left behind would be set again in every rank of a launch, but not in a single process.
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
        environment.pop(name, None)
    command = [sys.executable, str(worker), str(ranks), str(base), str(out), *arguments]
    log = out.with_suffix(".log")
    with log.open("w") as file:
        # A session of its own, so that a rank that waits for the other in vain can be ended with it.
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "none: the ranks wait for each other"
    assert code == 0, f"exit code {code}\n{log.read_text()[-4000:]}"
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(ranks)]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
