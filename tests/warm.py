"""Runs scripts in forks of itself, which find their imports made. An order per line, as `launched.py` writes it.

An order is JSON: the script, how many ranks, its arguments and the log. The answer is the exit status of each rank. Once one
fails, the others are killed: they may wait for it.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(order: dict, rank: int, port: int) -> None:
    """The script, on a rank."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if order["ranks"] > 1:
        # As Lightning's environment has it where another program starts the ranks.
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    sys.argv = [order["worker"], *order["arguments"]]
    status = 1
    try:
        runpy.run_path(order["worker"], run_name="__main__")
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(order: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        run(order, rank, port)
    return pid


def carry_out(order: dict) -> list[int]:
    """The exit status of each rank, negative for a signal."""
    folder = str(Path(order["worker"]).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # The script's imports; what it does comes only under the name of a program.
    runpy.run_path(order["worker"], run_name="imported")
    port = free_port()
    running = {start(order, rank, port): rank for rank in range(order["ranks"])}
    found = [0] * order["ranks"]
    while running:
        pid, status = os.wait()
        found[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return found


def main() -> None:
    # The answers; nothing else is to be printed among them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(carry_out(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
