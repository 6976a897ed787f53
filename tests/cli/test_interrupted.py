"""Real processes of `memgen fit` that are signalled: while they start, while they train, one rank of two."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from memgen.cli import main as front_end

TESTS = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(*argv: str) -> subprocess.Popen[str]:
    """As a job script starts a task: it ignores the signal until it listens to it."""
    command = [sys.executable, "-m", "memgen.cli.main", "fit", "--config", "stage.yaml", "--run", "run"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", "-c", 'trap "" USR1; exec "$@"', "task", *command, "--trainer.logger", "false", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def goes_on(*argv: str) -> int:
    """The exit status of the same command in this process: another one than wrote what it continues."""
    command = ["fit", "--config", "stage.yaml", "--run", "run", "--trainer.logger", "false"]
    return front_end.main([*command, *argv])


def saved_step() -> int:
    return int(torch.load("run/resume/last.ckpt", weights_only=True)["global_step"])


def first_line(process):
    """A line, byte by byte: a buffer would keep what `communicate` is to read."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, "the process ended without a line"
        line += byte
    return line.decode()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=900)
    return process.returncode, out, error


# The dummy's data begin anew.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_signal_while_the_program_starts_is_obeyed_after_the_first_step(folder, capsys):
    process = start("--trainer.max_steps", "5")
    listens = time.monotonic() + 60
    # The first thing that memgen does: long before Lightning is imported.
    while time.monotonic() < listens and "Sigblk" not in blocked(process.pid):
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    status, out, error = finish(process)
    assert status == 75, error
    assert error.splitlines()[-1] == "memgen fit: asked to stop and go on later: saved at step 1 in run"
    assert "Traceback" not in error
    assert out.count("step\n") == 1
    assert saved_step() == 1
    assert goes_on("--trainer.max_steps", "5") == 0
    assert capsys.readouterr().out.count("step\n") == 4
    assert saved_step() == 5


def blocked(pid: int) -> str:
    """ "Sigblk" once SIGUSR1 is blocked in a process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return ""
    found = re.search(r"^SigBlk:\s*([0-9a-f]+)", text, re.MULTILINE)
    return "Sigblk" if found and int(found[1], 16) >> (signal.SIGUSR1 - 1) & 1 else ""


def test_a_termination_while_it_trains_saves_and_leaves(folder):
    process = start("--trainer.max_steps", "1000", "--model.seconds", "0.1")
    assert process.stdout is not None
    assert any(line == "step\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    status, _, error = finish(process)
    assert status == 143, error
    assert re.search(r"^memgen fit: asked to stop: saved at step \d+ in run$", error, re.MULTILINE)
    assert 1 <= saved_step() < 1000


def test_a_termination_before_training_just_ends_the_program(folder):
    process = start("--trainer.max_steps", "1000", "--model.seconds", "0.1")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    status, _, error = finish(process)
    assert status == -signal.SIGTERM, error
    assert not Path("run").exists()


def test_a_signal_to_one_rank_of_two_stops_both_at_the_same_step(folder, capsys):
    both = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.seconds", "0.05")
    process = start("--trainer.max_steps", "1000", *both)
    assert first_line(process) == "step\n"
    (other,) = [
        child
        for child in psutil.Process(process.pid).children()
        if child.cmdline()[:2] == [sys.executable, "-m"]
    ] or psutil.Process(process.pid).children()
    other.send_signal(signal.SIGUSR1)
    status, out, error = finish(process)
    assert status == 75, error
    assert error.count("memgen fit: asked to stop and go on later") == 1
    steps = saved_step()
    # One line was read above; each rank writes one at each step.
    assert out.count("step\n") + 1 == 2 * steps
    status, out, error = finish(start("--trainer.max_steps", str(steps + 3), *both))
    assert status == 0, error
    assert out.count("step\n") == 2 * 3
    # Other processes than those that wrote it.
    assert goes_on("--trainer.max_steps", "1000") == 2
    assert "was written by 2 processes, this run has 1" in capsys.readouterr().err
