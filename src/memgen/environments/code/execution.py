"""Runs untrusted code with its tests and returns the outcome of each test. The executor decides how well it is isolated.

`sandbox.Bubblewrap` isolates it: no network, no files of the host, resource limits, nothing left behind.
`LimitedProcess`, in this file, has the resource limits alone: for machines without bubblewrap, and only if
configured.

Every run is a process of its own, started without a hook between fork and exec, so any thread of a trainer may start
one. The time of a run is limited twice: CPU seconds, so that a loaded machine does not fail slow runs, and wall
seconds, for code that sleeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, final

from memgen.environments.code import harness as code_harness
from memgen.environments.processes import Launch
from memgen.environments.signals import SCHEDULER_SIGNALS

HARNESS = Path(code_harness.__file__)
Style = Literal["pytest", "unittest"]
Isolation = Literal["bubblewrap", "limits"]

BEGUN = b"begun"
_REPORT_BYTES = 4 << 20


@dataclass(frozen=True)
class RunLimits:
    """Resource limits of one run."""

    cpu_s: int = 10
    """CPU seconds of each process."""
    wall_s: float = 40.0
    """Seconds from start to end; then all its processes are killed."""
    memory_mb: int = 2048
    """Address space of each process."""
    total_memory_mb: int = 4096
    """Memory in use by all processes of the run together, looked at four times a second; a run with more is stopped."""
    processes: int = 32
    """Processes and threads at a time."""
    file_mb: int = 16
    """Size of one file."""
    folder_mb: int = 64
    """Size of all files together, which are in memory; enforced by the sandbox only."""
    open_files: int = 256
    """Files, pipes and sockets open at a time, for each process."""
    output_kb: int = 1024
    """Size of the printed output; a run that exceeds it is stopped."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def rlimits(self, processes: int | None) -> dict[str, int]:
        """Values of `resource.setrlimit`, by name."""
        limits = {
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_FSIZE": self.file_mb << 20,
            "RLIMIT_NOFILE": self.open_files,
        }
        return limits if processes is None else {**limits, "RLIMIT_NPROC": processes}


@dataclass(frozen=True)
class Program:
    """A solution and its tests.

    Attributes:
        solution: Python text.
        tests: Python text; in pytest's style it imports from `solution`, in unittest's it follows the solution in
            the same module.
        style: how the tests are written.
    """

    solution: str
    tests: str
    style: Style


@dataclass(frozen=True)
class Execution:
    """Result of running a program.

    Attributes:
        outcomes: "passed", "skipped" or "failed", by name of the test. Empty if the run gave no report.
        details: ends of tracebacks by name of the test, as the run's process wrote them.
        error: why there is no verdict although the code ran (it did not import, or exited early), or None.
        timed_out: whether it was stopped for its wall time.
        flooded: whether it was stopped because it printed too much.
        seconds: duration of the run.
    """

    outcomes: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    timed_out: bool = False
    flooded: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether at least one test passed, none failed, and the run was complete."""
        results = set(self.outcomes.values())
        return self.error is None and "passed" in results and results <= {"passed", "skipped"}

    @property
    def share_passed(self) -> float:
        """Share of the tests not skipped that passed; 0 if there were none."""
        counted = [result for result in self.outcomes.values() if result != "skipped"]
        return counted.count("passed") / len(counted) if counted else 0.0


class Executor(ABC):
    """Runs programs, several at a time."""

    def __init__(self, limits: RunLimits, workers: int) -> None:
        """Starts nothing yet.

        Args:
            limits: resource limits of each run.
            workers: number of parallel runs.

        Raises:
            ValueError: if `workers` is not positive.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.limits = limits
        self.workers = workers

    @abstractmethod
    def launch(self, number: int) -> contextlib.AbstractContextManager[Launch]:
        """Prepares one run, and cleans up after it. `number` differs between parallel runs."""

    def run(self, program: Program, number: int = 0) -> Execution:
        """Runs one program.

        Raises:
            RuntimeError: if the harness itself could not be started, for which the answer is not to blame.
        """
        with self.launch(number) as launch:
            return _supervise(launch, program, self.limits)

    def run_all(self, programs: Sequence[Program]) -> list[Execution]:
        """Runs many programs, `workers` in parallel; the results are in their order."""
        if len(programs) <= 1 or self.workers == 1:
            return [self.run(program) for program in programs]
        # The threads outlive their runs: the kernel kills a bubblewrap whose starting thread ends.
        with ThreadPoolExecutor(min(self.workers, len(programs)), thread_name_prefix="execution") as pool:
            return list(pool.map(self.run, programs, range(len(programs))))


@final
class LimitedProcess(Executor):
    """Limits of memory, CPU, file size, open files and wall time, in a temporary folder. Not a sandbox.

    The code sees the host's files and network as the user who runs this program, and a process that leaves its
    process group survives the run. The number of processes is not limited for root. For trusted answers, or
    disposable machines.
    """

    @contextlib.contextmanager
    def launch(self, number: int) -> Iterator[Launch]:
        """A temporary folder, removed after the run."""
        folder = tempfile.mkdtemp(prefix="memgen-limits-")
        processes = None if os.getuid() == 0 else _tasks_of_user(os.getuid()) + self.limits.processes
        try:
            yield Launch(
                command=[base_python(), "-s", "-P", "-B", str(HARNESS)],
                environment=run_environment(home=folder, temporary=folder, path=os.defpath, packages=None),
                folder=folder,
                uid=None,
                processes=processes,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def base_python() -> str:
    """The interpreter of this virtual environment's base: the standard library without installed packages."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def run_environment(home: str, temporary: str, path: str, packages: str | None) -> dict[str, str]:
    """The environment variables of a run: none of the host's, and the same in every run."""
    environment = {
        "HOME": home,
        "TMPDIR": temporary,
        "PATH": path,
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }
    return environment if packages is None else {**environment, "PYTHONPATH": packages}


def _tasks_of_user(uid: int) -> int:
    tasks = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # It ended meanwhile.
            if folder.name.isdigit() and folder.stat().st_uid == uid:
                tasks += len(list((folder / "task").iterdir()))
    return tasks


def _supervise(launch: Launch, program: Program, limits: RunLimits) -> Execution:
    try:
        return _attempt(launch, program, limits)
    except _SignalledError:
        # A scheduler sends its warnings to every process of a job, this one too; the answer is not to blame.
        return _attempt(launch, program, limits, last=True)


class _SignalledError(Exception):
    """The run was ended by one of `SCHEDULER_SIGNALS`."""


def _attempt(launch: Launch, program: Program, limits: RunLimits, last: bool = False) -> Execution:
    """One run.

    Raises:
        _SignalledError: if a scheduler's signal ended it; on the `last` attempt the signal counts as the program's own.
        RuntimeError: if the harness did not start.
    """
    nonce = secrets.token_hex(16)
    task = {
        "uid": launch.uid,
        "limits": limits.rlimits(launch.processes),
        "style": program.style,
        "solution": program.solution,
        "tests": program.tests,
    }
    text = json.dumps(task).encode()
    start = time.monotonic()
    # A pipe, so that nothing is left to read when it was read once and the solution runs.
    process = subprocess.Popen(
        list(launch.command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(launch.environment),
        cwd=launch.folder,
        pass_fds=launch.inherited,
        start_new_session=True,
    )
    sent = b"%16d%s%s" % (len(text), text, nonce.encode())
    try:
        watched = _watch(process, sent, start + limits.wall_s, limits)
    finally:
        _kill(process)
    seconds = time.monotonic() - start
    if watched.stopped is None and -process.returncode in SCHEDULER_SIGNALS and not last:
        raise _SignalledError
    if watched.stopped is not None and watched.report.startswith(BEGUN):
        return Execution(
            error=f"stopped for its {watched.stopped}",
            timed_out=watched.stopped == "time",
            flooded=watched.stopped == "output",
            seconds=seconds,
        )
    return _verdict(watched, nonce, process.returncode, seconds)


@dataclass(frozen=True)
class _Watched:
    report: bytes
    output: bytes
    stopped: Literal["time", "output", "memory"] | None


def _watch(process: subprocess.Popen[bytes], sent: bytes, deadline: float, limits: RunLimits) -> _Watched:
    """Sends the task and reads both pipes until the report is complete, the process has ended, or a limit is reached."""
    assert process.stdin is not None, "stdin is a pipe"
    assert process.stdout is not None, "stdout is a pipe"
    assert process.stderr is not None, "stderr is a pipe"
    output_limit = limits.output_kb << 10
    texts: dict[int, bytearray] = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    report, output = texts.values()
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
        task = process.stdin.fileno()
        selector.register(task, selectors.EVENT_WRITE)
        for pipe in (process.stdout, process.stderr):
            selector.register(pipe.fileno(), selectors.EVENT_READ)
        stopped: Literal["time", "output", "memory"] | None = None
        looked = time.monotonic()
        while stopped is None and selector.get_map() and report.count(b"\n") < 2:
            now = time.monotonic()
            left = deadline - now
            if left <= 0:
                stopped = "time"
            if now - looked > 0.25:
                looked = now
                if _memory_of(process.pid) > limits.total_memory_mb << 20:
                    stopped = "memory"
            # A process that outlives the harness may keep the pipes open, so this does not wait for end-of-file.
            ready = selector.select(timeout=max(0.0, min(left, 0.25)))
            if not ready and process.poll() is not None:
                break
            for key, _ in ready:
                if key.fd == task and not process.stdin.closed:
                    sent = _send(process.stdin, sent)
                    if not sent:
                        selector.unregister(key.fd)
                        process.stdin.close()
                    continue
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fd)
                texts[key.fd] += chunk
            if len(output) > output_limit or len(report) > _REPORT_BYTES:
                stopped = "output"
        # Output printed before the report may still be in the pipe.
        while stopped is None and len(output) <= output_limit and _more(process.stderr, output):
            pass
        if len(output) > output_limit:
            stopped = "output"
    return _Watched(bytes(report), bytes(output), stopped)


def _send(pipe: IO[bytes], data: bytes) -> bytes:
    """Writes what fits; returns the rest, none if nobody reads any more."""
    try:
        return data[os.write(pipe.fileno(), data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _memory_of(root: int) -> int:
    """Bytes of memory that a process and its descendants have in use; shared pages count for each."""
    total, pending = 0, [root]
    while pending:
        folder = Path("/proc", str(pending.pop()))
        with contextlib.suppress(OSError, ValueError):  # It ended meanwhile.
            for children in folder.glob("task/*/children"):
                pending += map(int, children.read_text().split())
            total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def _more(pipe: IO[bytes], text: bytearray) -> bool:
    try:
        chunk = os.read(pipe.fileno(), 1 << 16)
    except BlockingIOError:
        return False
    text += chunk
    return bool(chunk)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # The whole group: with `LimitedProcess` the code may have started other processes.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None, "all are pipes"
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _verdict(watched: _Watched, nonce: str, returncode: int, seconds: float) -> Execution:
    lines = watched.report.split(b"\n")
    if lines[0] != BEGUN:
        last = watched.output.decode(errors="replace").strip()[-500:]
        raise RuntimeError(f"the test harness could not be started (status {returncode}): {last}")
    try:
        report = json.loads(lines[1]) if len(lines) == 3 and not lines[2] else None
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("nonce") != nonce:
        last = watched.output.decode(errors="replace").strip()[-500:]
        return Execution(error=f"no report (status {returncode}): {last}", seconds=seconds)
    return Execution(
        outcomes=report["outcomes"], details=report["details"], error=report["error"], seconds=seconds
    )
