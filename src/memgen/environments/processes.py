"""Worker processes that answer questions in JSON; one that takes too long over a question is killed.

A worker is a program of its own, never a fork and never a second import of the caller's main script: questions may be
asked from notebooks, from threads and under a running CUDA context. (The process pools of multiprocessing and of pebble
import the main script again in every worker: without a main guard they fail, and under `memgen` each worker would load
what the command line loads.)

What a worker does: its last argument is a file descriptor, on which `multiprocessing.connection.Connection` sends `READY`,
then reads a question as JSON and sends its answer as JSON, until the connection ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, final

READY = b"ready"
_START_LIMIT_S = 120.0
"""Importing a library on a busy machine; not the time of an answer."""


@dataclass(frozen=True)
class Launch:
    """How to start a process that runs or judges answers.

    Attributes:
        command: starts the program, or the sandbox that contains it.
        environment: all environment variables of the process.
        folder: its working directory.
        uid: user id that the program switches to, or None.
        processes: value of RLIMIT_NPROC, or None for no such limit.
        inherited: file descriptors that the command inherits.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    uid: int | None = None
    processes: int | None = None
    inherited: tuple[int, ...] = ()


class WorkerLostError(Exception):
    """A worker was killed for its time (`timed_out`) or died before it had answered."""

    def __init__(self, timed_out: bool) -> None:
        super().__init__("the worker took too long" if timed_out else "the worker died")
        self.timed_out = timed_out


@final
class WorkerPool:
    """Persistent workers of one kind. Any thread may ask; as many questions are answered at once as there are workers.

    Workers start with the questions that need them and end with the pool or the interpreter.
    """

    def __init__(
        self, launch: Callable[[int], AbstractContextManager[Launch]], workers: int, trouble: str
    ) -> None:
        """Starts nothing yet.

        Args:
            launch: how to start a worker, by its number below `workers`; the context is left when the worker has ended.
            workers: processes.
            trouble: the beginning of the error if one cannot be started.

        Raises:
            ValueError: if `workers` is not positive.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers
        self._launch = launch
        self._trouble = trouble
        self._open()

    def _open(self) -> None:
        self._owner = os.getpid()
        self._all = [_Worker(self._launch, number, self._trouble) for number in range(self.workers)]
        # Last in, first out: a second worker starts only when the first one is busy.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._all:
            self._free.put(worker)
        self._finalizer = weakref.finalize(self, _kill_all, self._all, self._owner)

    def ask(self, question: Any, timeout_s: float) -> Any:
        """A worker's answer. Question and answer are JSON values.

        Args:
            question: what the worker is sent.
            timeout_s: seconds the answer may take, the start of a worker not counted.

        Raises:
            WorkerLostError: if the worker was killed or died over it.
            RuntimeError: if a worker cannot be started.
        """
        if os.getpid() != self._owner:  # A forked child must not write into its parent's pipes.
            self._open()
        free = self._free
        worker = free.get()
        try:
            return worker.ask(question, timeout_s)
        finally:
            free.put(worker)

    def map(self, ask: Callable[[Any], Any], questions: Sequence[Any]) -> list[Any]:
        """`ask` of every question, in their order, as many at once as there are workers."""
        if self.workers == 1 or len(questions) <= 1:
            return [ask(question) for question in questions]
        with ThreadPoolExecutor(min(self.workers, len(questions)), thread_name_prefix="ask") as threads:
            return list(threads.map(ask, questions))

    def close(self) -> None:
        """Ends the workers. A later question starts new ones."""
        self._finalizer()
        self._open()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return tuple(sorted(worker.pid for worker in self._all if worker.pid is not None))


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in workers:
            worker.kill()


@final
class _Worker:
    """One worker process, started by the first question and again after it was killed or has died."""

    def __init__(
        self, launch: Callable[[int], AbstractContextManager[Launch]], number: int, trouble: str
    ) -> None:
        self._launch = launch
        self._number = number
        self._trouble = trouble
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._holder: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def ask(self, question: Any, timeout_s: float) -> Any:
        """As `WorkerPool.ask`."""
        if self._process is None or self._process.poll() is not None:
            self.kill()  # Closes what a dead worker leaves.
            self._start()
        connection = self._connection
        assert connection is not None, "a started worker has a connection"
        timed_out = False
        try:
            connection.send_bytes(json.dumps(question).encode())
            if connection.poll(timeout_s):
                return json.loads(connection.recv_bytes())
            timed_out = True
        except (OSError, EOFError):  # The worker died, or the pool was closed meanwhile.
            pass
        except BaseException:
            self.kill()  # An answer that is still to come must not be taken for that of a later question.
            raise
        self.kill()
        raise WorkerLostError(timed_out)

    def kill(self) -> None:
        process, connection, holder = self._process, self._connection, self._holder
        self._process = self._connection = self._holder = None
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            connection.close()
        if holder is not None and holder is not threading.current_thread():  # A garbage collection's, maybe.
            holder.join()

    def _start(self) -> None:
        connection, theirs = Pipe()
        with theirs, tempfile.TemporaryFile() as errors:
            started: queue.SimpleQueue[subprocess.Popen[bytes] | BaseException] = queue.SimpleQueue()
            holder = threading.Thread(
                target=_hold,
                args=(self._launch(self._number), theirs.fileno(), errors.fileno(), started),
                daemon=True,
                name="worker process",
            )
            holder.start()
            process = started.get()
            if isinstance(process, BaseException):
                connection.close()
                raise process
            self._process, self._connection, self._holder = process, connection, holder
            theirs.close()  # So that its end is the end of the worker.
            try:
                ready = connection.poll(_START_LIMIT_S) and connection.recv_bytes() == READY
            except (OSError, EOFError):
                ready = False
            except BaseException:
                self.kill()
                raise
            if ready:
                return
            self.kill()
            errors.seek(0)
            said = " | ".join(errors.read().decode(errors="replace").strip().splitlines()[-3:])
        raise RuntimeError(f"{self._trouble} It said: {said or 'nothing'}")


def _hold(
    launch: AbstractContextManager[Launch],
    descriptor: int,
    output: int,
    started: queue.SimpleQueue[subprocess.Popen[bytes] | BaseException],
) -> None:
    """Starts a process and waits for its end: the kernel kills a bubblewrap whose starting thread ends."""
    with contextlib.ExitStack() as stack:
        try:
            chosen = stack.enter_context(launch)
            process = subprocess.Popen(
                [*chosen.command, str(descriptor)],
                pass_fds=[descriptor, *chosen.inherited],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(chosen.environment),
                cwd=chosen.folder,
            )
        except BaseException as error:  # noqa: BLE001 - raised where the question was asked
            started.put(error)
            return
        started.put(process)
        process.wait()
