"""Episodes in worker processes: they step side by side, and one that crashes or hangs takes no other worker along.

`WorkerEnvironment` puts any interactive environment into a pool. A worker that dies or exceeds its time is killed
with all that it started, and replaced; the episodes that it held are over, and say so in `Step.fault`. What an
environment does in an episode must not depend on other episodes; then results do not depend on the number of workers.

A worker is a fresh interpreter running this module (`python -m`), never a fork and never a second import of the
caller's main script: environments may run from notebooks, from threads and under a running CUDA context. It ends
when the pool is closed and when the process that made the pool ends, however that ends.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import itertools
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, final

from memgen.environments.base import (
    Episode,
    Example,
    InteractiveEnvironment,
    Message,
    Observation,
    Reward,
    Split,
    Step,
)
from memgen.environments.signals import stay

log = logging.getLogger(__name__)

_SETUP_ERRORS = ("ImportError", "ModuleNotFoundError", "FileNotFoundError", "ValueError")
"""Errors of a reset that are the data's or the installation's, and would come again: they stop the run."""
_OUTPUT_LIMIT_BYTES = 1 << 20
"""What a worker may have printed before its output file is emptied."""


@dataclass(frozen=True)
class _Request:
    """What a worker is asked. `key` names the episode."""

    kind: Literal["reset", "step", "conversation"]
    key: int
    argument: Any
    timeout_s: float


@dataclass(frozen=True)
class _Answer:
    """What it said, and which life of the worker said it."""

    value: Any
    reward: Reward | None
    life: int = 0


@dataclass(frozen=True)
class _Failure:
    """Why it said nothing. `error` is the name of the exception's type; None if the worker died or hung."""

    reason: str
    error: str | None = None


@final
class WorkerEpisode(Episode):
    """An episode that lives in a worker. Many are best reset and stepped by their environment, side by side."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.key = next(pool.keys)
        self.worker: _Worker | None = None
        self.life = 0
        self.fault: str | None = "it was never reset"
        self.score = Reward(total=0.0)

    def reset(self, example: Example) -> Observation:
        """Begins anew with an item. If the environment fails, the text is empty and the first step says why."""
        return self._pool.reset_all([self], [example])[0]

    def step(self, action: str) -> Step:
        """Acts."""
        return self._pool.step_all([self], [action])[0]

    def reward(self) -> Reward:
        """The score as it stands; of an episode that the environment failed, the score before that."""
        return self.score

    def close(self) -> None:
        """Lets the worker forget the episode."""
        self._pool.forget(self)


@final
class WorkerPool:
    """Worker processes, each with a copy of an environment and any number of its episodes."""

    def __init__(
        self,
        environment: InteractiveEnvironment,
        workers: int,
        step_timeout_s: float = 60.0,
        reset_timeout_s: float = 300.0,
        start_timeout_s: float = 120.0,
    ) -> None:
        """Starts nothing yet.

        Args:
            environment: is sent to each worker, so it can be pickled, and its class can be imported by name.
            workers: processes.
            step_timeout_s: seconds a step may take.
            reset_timeout_s: seconds a reset, or a reference conversation, may take.
            start_timeout_s: seconds a worker may take to start.

        Raises:
            ValueError: if `workers` or a time is not positive.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        for name, seconds in (
            ("step_timeout_s", step_timeout_s),
            ("reset_timeout_s", reset_timeout_s),
            ("start_timeout_s", start_timeout_s),
        ):
            if not (seconds > 0 and math.isfinite(seconds)):
                raise ValueError(f"{name} must be a positive number of seconds, got {seconds}")
        self.step_timeout_s = step_timeout_s
        self.reset_timeout_s = reset_timeout_s
        self.keys = itertools.count()
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._workers = [_Worker(environment, start_timeout_s) for _ in range(workers)]
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._owner)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    def reset_all(self, episodes: Sequence[WorkerEpisode], examples: Sequence[Example]) -> list[Observation]:
        """Begins episodes side by side.

        Raises:
            RuntimeError: if a worker cannot be started.
            ImportError: if a package that the environment needs is missing.
            FileNotFoundError: if data that the environment needs is missing.
            ValueError: if an item is broken.
        """
        with self._lock:
            self._check_owner()
            jobs = []
            for episode, example in zip(episodes, examples, strict=True):
                self._place(episode)
                jobs.append(
                    (self._worker_of(episode), _Request("reset", episode.key, example, self.reset_timeout_s))
                )
            observations = []
            for episode, example, result in zip(episodes, examples, self._run(jobs), strict=True):
                if isinstance(result, _Failure):
                    if result.error in _SETUP_ERRORS:
                        raise _revived(result)
                    log.warning("item %s could not begin: %s", example.id, result.reason)
                    episode.fault = result.reason
                    observations.append(Observation(""))
                    continue
                episode.fault, episode.life, episode.score = None, result.life, _scored(result)
                observations.append(result.value)
            return observations

    def step_all(self, episodes: Sequence[WorkerEpisode], actions: Sequence[str]) -> list[Step]:
        """One step of many episodes, side by side. It raises nothing that an episode does: see `Step.fault`."""
        with self._lock:
            self._check_owner()
            steps: list[Step | None] = []
            jobs, places = [], []
            for index, (episode, action) in enumerate(zip(episodes, actions, strict=True)):
                worker = episode.worker
                if episode.fault is None and (worker is None or worker.life != episode.life):
                    reason = "it was closed" if worker is None else worker.last_failure
                    episode.fault = f"the worker that held it was lost: {reason}"
                if episode.fault is not None:
                    steps.append(Step(observation="", done=True, fault=episode.fault))
                    continue
                assert worker is not None, "an episode without a fault has a worker"
                steps.append(None)
                places.append(index)
                jobs.append((worker, _Request("step", episode.key, action, self.step_timeout_s)))
            for index, result in zip(places, self._run(jobs), strict=True):
                episode = episodes[index]
                if isinstance(result, _Failure):
                    log.warning("an episode failed: %s", result.reason)
                    episode.fault = result.reason
                    steps[index] = Step(observation="", done=True, fault=result.reason)
                else:
                    episode.score = _scored(result)
                    steps[index] = result.value
            return [step for step in steps if step is not None]

    def conversations(self, examples: Sequence[Example]) -> list[list[Message] | Exception]:
        """Reference conversations of many items, side by side; where one failed, why."""
        with self._lock:
            self._check_owner()
            free = itertools.cycle(sorted(self._workers, key=lambda worker: len(worker.held)))
            jobs = [
                (next(free), _Request("conversation", -1, example, self.reset_timeout_s))
                for example in examples
            ]
            return [
                _revived(result) if isinstance(result, _Failure) else result.value
                for result in self._run(jobs)
            ]

    def forget(self, episode: WorkerEpisode) -> None:
        """Ends an episode, in its worker too."""
        with self._lock:
            if episode.worker is not None and os.getpid() == self._owner:
                episode.worker.forget(episode.key)
            episode.worker = None

    def close(self) -> None:
        """Ends all workers. The pool starts new ones if it is used again; episodes that were open are lost."""
        with self._lock:
            _kill_all(self._workers, self._owner)

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(
                "these environment workers belong to the process that started them; make the environment anew in "
                f"process {os.getpid()}"
            )

    def _place(self, episode: WorkerEpisode) -> None:
        """Gives an episode a worker, if it has none: the one that holds the fewest."""
        if episode.worker is None:
            episode.worker = min(self._workers, key=lambda worker: len(worker.held))
            # An episode that is dropped without being closed must not stay in the worker for ever.
            weakref.finalize(episode, _Worker.forget, episode.worker, episode.key)
        episode.worker.held.add(episode.key)

    @staticmethod
    def _worker_of(episode: WorkerEpisode) -> _Worker:
        assert episode.worker is not None, "_place gave it one"
        return episode.worker

    def _run(self, jobs: Sequence[tuple[_Worker, _Request]]) -> list[_Answer | _Failure]:
        """Answers in the order of the jobs. A worker does its jobs one after another, the workers side by side."""
        results: list[_Answer | _Failure | None] = [None] * len(jobs)
        waiting: dict[_Worker, deque[int]] = {}
        for index, (worker, _) in enumerate(jobs):
            waiting.setdefault(worker, deque()).append(index)
        busy: dict[_Worker, int] = {}
        try:
            while waiting or busy:
                for worker in [w for w in waiting if w not in busy]:
                    busy[worker] = waiting[worker].popleft()
                    if not waiting[worker]:
                        del waiting[worker]
                    failure = worker.submit(jobs[busy[worker]][1])
                    if failure is not None:
                        results[busy.pop(worker)] = failure
                if not busy:
                    continue
                patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
                wait([worker.connection for worker in busy], timeout=patience)
                for worker, index in list(busy.items()):
                    result = worker.poll()
                    if result is not None:
                        results[index] = result
                        del busy[worker]
        except BaseException:
            # Whatever interrupts leaves answers on their way, which must not be taken for later ones.
            for worker in busy:
                worker.kill("the run was interrupted")
            raise
        return [result for result in results if result is not None]


@final
class WorkerEnvironment(InteractiveEnvironment):
    """An interactive environment whose episodes run in worker processes, side by side."""

    def __init__(
        self,
        environment: InteractiveEnvironment,
        workers: int = 4,
        step_timeout_s: float = 60.0,
        reset_timeout_s: float = 300.0,
        start_timeout_s: float = 120.0,
    ) -> None:
        """Starts nothing yet.

        Args:
            environment: what is run. Prompts and lists of items come from this process; episodes and reference
                conversations, which may have to be played, from the workers.
            workers: processes. More episodes than that share them; an episode whose worker is lost is lost too.
            step_timeout_s: seconds a step may take; a worker that takes longer is killed.
            reset_timeout_s: seconds a reset, or a reference conversation, may take.
            start_timeout_s: seconds a worker may take to start.

        Raises:
            ValueError: if `workers` or a time is not positive.
        """
        self.environment = environment
        self.name = environment.name
        self.max_turns = environment.max_turns
        self.stop_texts = environment.stop_texts
        self.workers = workers
        self._settings = (environment, workers, step_timeout_s, reset_timeout_s, start_timeout_s)
        self._pool = WorkerPool(*self._settings)
        self._listed: dict[str, tuple[Sequence[Example], int]] = {}
        self._played: dict[str, tuple[Example, list[Message] | Exception]] = {}

    def __reduce__(self) -> tuple[type[WorkerEnvironment], tuple[Any, ...]]:
        """A copy, in this process or another, has workers of its own."""
        return WorkerEnvironment, self._settings

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return self._pool.worker_pids

    def examples(self, split: Split) -> Sequence[Example]:
        """The environment's items."""
        examples = self.environment.examples(split)
        self._listed.update({example.id: (examples, index) for index, example in enumerate(examples)})
        return examples

    def messages(self, example: Example) -> list[Message]:
        """The environment's prompt."""
        return self.environment.messages(example)

    def conversation(self, example: Example) -> list[Message]:
        """The environment's reference conversation.

        The items that follow in their split are played at the same time, one per worker, since whoever asks for one
        is likely to ask for the next.
        """
        known = self._played.pop(example.id, None)
        if known is None or known[0] != example:
            listing, index = self._listed.get(example.id, ([example], 0))
            batch = [example, *listing[index + 1 : index + self.workers]]
            self._played = {
                item.id: (item, result)
                for item, result in zip(batch, self._pool.conversations(batch), strict=True)
            }
            known = self._played.pop(example.id)
        if isinstance(known[1], Exception):
            raise known[1]
        return known[1]

    def episode(self) -> WorkerEpisode:
        """A new episode, in the worker that holds the fewest."""
        return WorkerEpisode(self._pool)

    def reset_all(self, episodes: Sequence[Episode], examples: Sequence[Example]) -> list[Observation]:
        """Begins episodes of this environment side by side. One that fails to begin says so at its first step."""
        return self._pool.reset_all(_mine(episodes), examples)

    def step_all(self, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Step]:
        """One step of many episodes of this environment, side by side."""
        return self._pool.step_all(_mine(episodes), actions)

    def reward(self, example: Example, answer: str) -> Reward:
        """The score of an episode in which `answer` is the only action.

        Raises:
            RuntimeError: if the environment fails: that is no score.
        """
        episode = self.episode()
        try:
            episode.reset(example)
            step = episode.step(answer)
            if step.fault is not None:
                raise RuntimeError(f"{self.name}, item {example.id}: {step.fault}")
            return episode.reward()
        finally:
            episode.close()

    def close(self) -> None:
        """Ends the workers. They start again if the environment is used again."""
        self._pool.close()


def _mine(episodes: Sequence[Episode]) -> list[WorkerEpisode]:
    mine = [episode for episode in episodes if isinstance(episode, WorkerEpisode)]
    assert len(mine) == len(episodes), "episodes come from this environment's episode()"
    return mine


def _scored(answer: _Answer) -> Reward:
    assert answer.reward is not None, "a worker scores what it resets and steps"
    return answer.reward


def _revived(failure: _Failure) -> Exception:
    """The exception that a worker reported, or one that says that it failed."""
    if failure.error in _SETUP_ERRORS:
        kind: type[Exception] = getattr(builtins, str(failure.error))
        return kind(failure.reason)
    return RuntimeError(failure.reason)


def _kill_all(workers: Sequence[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in workers:
            worker.kill("the workers were ended")


@final
class _Worker:
    """A worker process and its successors.

    Attributes:
        life: which of them runs; an episode of an earlier one is lost.
        held: keys of the episodes that are in it.
        deadline: when the answer awaited must be there, on the monotonic clock.
        last_failure: why the one before was lost.
    """

    def __init__(self, environment: InteractiveEnvironment, start_timeout_s: float) -> None:
        self.life = 0
        self.held: set[int] = set()
        self.deadline = math.inf
        self.last_failure = "it was never started"
        self._environment = environment
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._output: Any = None
        self._ready = False
        self._request: _Request | None = None
        self._forgotten: list[int] = []

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def connection(self) -> Connection[Any, Any]:
        assert self._connection is not None, "only a worker that was given a request is waited for"
        return self._connection

    def forget(self, key: int) -> None:
        if key in self.held:
            self.held.discard(key)
            self._forgotten.append(key)  # Told with the next request.

    def submit(self, request: _Request) -> _Failure | None:
        """Asks, or says why that is of no use: the episode to step was lost with the process.

        For anything else a process that is not there is started, and asked when it is ready.
        """
        self._request = request
        if self._process is not None and self._process.poll() is not None:
            self.kill(self._death())
        if self._process is None:
            if request.kind == "step":
                return _Failure(f"the worker that held it was lost: {self.last_failure}")
            self._start()
        if self._ready:
            self._send()
        return None

    def poll(self) -> _Answer | _Failure | None:
        """The answer, or why there will be none; None as long as there is hope.

        Raises:
            RuntimeError: if the process could not be started.
        """
        try:
            if not self.connection.poll():
                if time.monotonic() < self.deadline:
                    return None
                return self._lost(f"the worker did not answer within {self._limit_s():g} s and was killed")
            message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._lost(self._death())
        if not self._ready:
            if isinstance(message, _Failure):
                self.kill(message.reason)
                if message.error in _SETUP_ERRORS:
                    raise _revived(message)
                raise RuntimeError(f"an environment worker could not be started: {message.reason}")
            self._ready = True
            self._send()
            return None
        self.deadline = math.inf
        assert isinstance(message, _Answer | _Failure), "a worker answers with a record"
        return dataclasses.replace(message, life=self.life) if isinstance(message, _Answer) else message

    def kill(self, reason: str) -> None:
        """Ends the process and all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # It leads a group of its own.
        self._process.wait()
        self.connection.close()
        self._output.close()
        self._process = self._connection = self._output = None
        self._ready = False
        self.deadline = math.inf
        self.life += 1
        self.last_failure = reason
        self._forgotten.clear()

    def _start(self) -> None:
        pickled = pickle.dumps(self._environment)
        ours, theirs = Pipe()
        # Appended to, so that the worker can empty it.
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed in kill
        # The package may be importable only through this process's sys.path (a notebook, a checkout).
        search_path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "memgen.environments.worlds.workers",
                str(theirs.fileno()),
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                **os.environ,
                "PYTHONPATH": search_path,
            },
        )
        theirs.close()
        self._connection = ours
        self._ready = False
        self.deadline = time.monotonic() + self._start_timeout_s
        with contextlib.suppress(OSError):  # It died already; the next poll says so.
            # Pickled apart, so that a class which the worker cannot import is an answer and not a crash.
            ours.send_bytes(pickled)

    def _send(self) -> None:
        assert self._request is not None, "set by submit"
        self.deadline = time.monotonic() + self._request.timeout_s
        forgotten, self._forgotten = self._forgotten, []
        with contextlib.suppress(OSError):  # It died; the next poll says so.
            self.connection.send((self._request, forgotten))

    def _limit_s(self) -> float:
        return self._request.timeout_s if self._ready and self._request is not None else self._start_timeout_s

    def _lost(self, reason: str) -> _Failure:
        was_ready = self._ready
        self.kill(reason)
        if not was_ready:
            raise RuntimeError(f"an environment worker could not be started: {reason}")
        return _Failure(reason)

    def _death(self) -> str:
        """How the process ended, and what it printed last."""
        assert self._process is not None, "it was started"
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "the worker closed its connection"
        how = f"with exit status {code}"
        if code < 0:
            how = f"by signal {signal.Signals(-code).name}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 2000))
        said = [line for line in self._output.read().decode(errors="replace").splitlines() if line.strip()]
        return f"the worker ended {how}" + (f"; it said: {' | '.join(said[-3:])}" if said else "")


# What follows runs in the worker process.


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    _end()


def _end() -> None:
    """Ends this process and all that it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _keep_output_small() -> None:
    if os.fstat(1).st_size > _OUTPUT_LIMIT_BYTES:
        os.ftruncate(1, 0)


def _serve(connection: Connection[Any, Any]) -> None:
    """Answers requests until the connection is closed."""
    from memgen.environments.worlds import (
        workers as records,  # The names under which the parent knows the records.
    )

    try:
        environment: InteractiveEnvironment = pickle.loads(connection.recv_bytes())
    except Exception as error:  # noqa: BLE001 - the parent is told
        reason = (
            f"the environment could not be loaded there ({type(error).__name__}: {error}); its class must be "
            "importable by name, so not from a notebook's cell or from the script that is run"
        )
        connection.send(records._Failure(reason, "RuntimeError"))
        return
    connection.send("ready")
    episodes: dict[int, Episode] = {}
    while True:
        try:
            request, forgotten = connection.recv()
        except EOFError:
            return
        # The parent is the one to lose patience. Should it be gone, the kernel ends even an operation that no
        # Python thread can interrupt.
        signal.setitimer(signal.ITIMER_REAL, 2 * request.timeout_s + 5)
        answer: Any
        try:
            for old in forgotten:
                if old in episodes:
                    episodes.pop(old).close()
            value, reward = _answer(environment, episodes, request)
            answer = records._Answer(value, reward)
        except Exception as error:  # noqa: BLE001 - the parent is told
            place = traceback.extract_tb(error.__traceback__)[-1]
            known = next((n for n in _SETUP_ERRORS if isinstance(error, getattr(builtins, n))), None)
            reason = str(error)
            if request.kind == "step" or known is None:
                reason = f"the environment raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            answer = records._Failure(reason, known or type(error).__name__)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
        _keep_output_small()
        try:
            connection.send(answer)
        except OSError:  # The parent is gone.
            return


def _answer(
    environment: InteractiveEnvironment, episodes: dict[int, Episode], request: _Request
) -> tuple[Any, Reward | None]:
    key = request.key
    match request.kind:
        case "conversation":
            return environment.conversation(request.argument), None
        case "reset":
            if key not in episodes:
                episodes[key] = environment.episode()
            return episodes[key].reset(request.argument), episodes[key].reward()
        case "step":
            return episodes[key].step(request.argument), episodes[key].reward()


if __name__ == "__main__":
    _descriptor = int(sys.argv[1])
    os.set_inheritable(_descriptor, False)  # What the environment starts must not hold the connection open.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    stay()
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[2]),), daemon=True, name="parent").start()
    try:
        _serve(Connection(_descriptor))
    except OSError:  # The parent ended with something unread.
        pass
    finally:
        _end()
