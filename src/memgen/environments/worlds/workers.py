"""Episodes in worker processes: they run side by side, and one that crashes or hangs costs no other worker's episodes.

`WorkerEnvironment` runs any interactive environment in a fixed number of slots, each with one worker process and any
number of episodes. A process that dies or exceeds its time is killed with everything that it started; its episodes end
with an environment error (`Step.fault`), and the slot gets a new process. An episode must not depend on other episodes;
then results do not depend on the number of workers.

A worker process is a fresh interpreter that runs this module (`python -m`), neither a fork nor a second import of the
caller's main script: environments may run from notebooks, from threads and under a running CUDA context. It ends with
the environment, and with the process that made the environment, however that ends.
"""

from __future__ import annotations

import builtins
import collections
import concurrent.futures
import contextlib
import functools
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
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar, final

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
"""Errors of a reset that come from the data or the installation, and would come again: they stop the run."""
_OUTPUT_LIMIT_BYTES = 1 << 20
"""Output of a worker beyond which its output file is emptied."""

_Kind = Literal["reset", "step", "conversation"]
_T = TypeVar("_T")


@final
class WorkerEpisode(Episode):
    """An episode in a worker process. Many are best reset and stepped by their environment, side by side.

    Attributes:
        number: its name in the worker process.
        slot: where it runs; None before its first reset and after `close`.
        worker: the process that holds it; None if none does.
        fault: the environment error that ended it, or None.
        score: of the last step that was answered.
    """

    def __init__(self, environment: WorkerEnvironment, number: int) -> None:
        self.number = number
        self.slot: int | None = None
        self.worker: _Worker | None = None
        self.fault: str | None = "it was never reset"
        self.score = Reward(total=0.0)
        self._environment = environment

    def reset(self, example: Example) -> Observation:
        """Begins anew with an item. If the environment fails, the text is empty and the first step says why."""
        return self._environment.reset_all([self], [example])[0]

    def step(self, action: str) -> Step:
        """Acts."""
        return self._environment.step_all([self], [action])[0]

    def reward(self) -> Reward:
        """The score so far; after an environment error, the score before it."""
        return self.score

    def close(self) -> None:
        """Ends the episode; its worker frees it with the next request."""
        self.slot, self.worker, self.fault = None, None, "it was closed"


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
            environment: what is run; it must be picklable, and its class importable by name. Prompts and lists of items
                come from this process; episodes and reference conversations, which may have to be played, from the
                workers.
            workers: processes. More episodes than that share them; an episode whose worker dies is lost.
            step_timeout_s: seconds a step may take; a worker that takes longer is killed.
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
        self.environment = environment
        self.name = environment.name
        self.max_turns = environment.max_turns
        self.stop_texts = environment.stop_texts
        self.workers = workers
        self.step_timeout_s = step_timeout_s
        self.reset_timeout_s = reset_timeout_s
        self.start_timeout_s = start_timeout_s
        self._numbers = itertools.count()
        self._episodes: weakref.WeakSet[WorkerEpisode] = weakref.WeakSet()
        self._slots: list[_Worker | None] = [None] * workers
        self._lock = threading.RLock()
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self._owner = os.getpid()
        weakref.finalize(self, _end_all, self._slots, self._owner)

    def __reduce__(self) -> tuple[type[WorkerEnvironment], tuple[Any, ...]]:
        """A copy, in this process or another, has workers of its own."""
        settings = (self.workers, self.step_timeout_s, self.reset_timeout_s, self.start_timeout_s)
        return WorkerEnvironment, (self.environment, *settings)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return tuple(worker.pid for worker in self._slots if worker is not None and worker.ended is None)

    def examples(self, split: Split) -> Sequence[Example]:
        """The environment's items."""
        return self.environment.examples(split)

    def messages(self, example: Example) -> list[Message]:
        """The environment's prompt."""
        return self.environment.messages(example)

    def conversation(self, example: Example) -> list[Message]:
        """The environment's reference conversation, played in a worker."""
        return next(self.conversations([example]))

    def conversations(self, examples: Sequence[Example]) -> Iterator[list[Message]]:
        """Reference conversations in the order of the items, played as many at a time as there are workers."""
        for start in range(0, len(examples), self.workers):
            items = examples[start : start + self.workers]
            jobs = [(slot, functools.partial(self._play, slot, item)) for slot, item in enumerate(items)]
            for result in self._side_by_side(jobs):
                if isinstance(result, Exception):
                    raise result
                yield result

    def episode(self) -> WorkerEpisode:
        """A new episode. Its first reset puts it into the slot that has the fewest."""
        return WorkerEpisode(self, next(self._numbers))

    def reset_all(self, episodes: Sequence[Episode], examples: Sequence[Example]) -> list[Observation]:
        """Begins episodes of this environment side by side. One that fails to begin says so at its first step.

        Raises:
            RuntimeError: if a worker cannot be started.
            ImportError: if a package that the environment needs is missing.
            FileNotFoundError: if data that the environment needs is missing.
            ValueError: if an item is broken.
        """
        self._check_owner()
        with self._lock:
            used = collections.Counter(e.slot for e in self._episodes if e.slot is not None)
            jobs = []
            for episode, example in zip(_checked(episodes), examples, strict=True):
                if episode.slot is None:
                    episode.slot = min(range(self.workers), key=used.__getitem__)
                    used[episode.slot] += 1
                    self._episodes.add(episode)
                jobs.append((episode.slot, functools.partial(self._reset, episode, episode.slot, example)))
            return self._side_by_side(jobs)

    def step_all(self, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Step]:
        """One step of many episodes of this environment, side by side. Environment errors are in `Step.fault`."""
        jobs = [
            (episode.slot or 0, functools.partial(self._step, episode, action))
            for episode, action in zip(_checked(episodes), actions, strict=True)
        ]
        return self._side_by_side(jobs)

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
        """Ends the workers. They start again if the environment is used again; open episodes are lost."""
        with self._lock:
            _end_all(self._slots, self._owner)

    def _reset(self, episode: WorkerEpisode, slot: int, example: Example) -> Observation:
        episode.worker, episode.fault = None, "it was never reset"
        try:
            worker = self._worker(slot)
            observation, episode.score = self._ask(worker, slot, "reset", episode.number, example)
        except _EnvironmentFailed as failure:
            if failure.kind in _SETUP_ERRORS:
                raise failure.original() from None
            log.warning("item %s could not begin: %s", example.id, failure)
            episode.fault = str(failure)
            return Observation("")
        episode.worker, episode.fault = worker, None
        return observation

    def _step(self, episode: WorkerEpisode, action: str) -> Step:
        worker, slot = episode.worker, episode.slot
        if worker is not None and slot is not None:
            try:
                step, episode.score = self._ask(worker, slot, "step", episode.number, action)
            except _EnvironmentFailed as failure:
                log.warning("an episode failed: %s", failure)
                episode.worker, episode.fault = None, str(failure)
            else:
                return step
        return Step(observation="", done=True, fault=episode.fault)

    def _play(self, slot: int, example: Example) -> list[Message] | Exception:
        try:
            return self._ask(self._worker(slot), slot, "conversation", None, example)[0]
        except _EnvironmentFailed as failure:
            return failure.original()

    def _ask(
        self, worker: _Worker, slot: int, kind: _Kind, number: int | None, argument: Any
    ) -> tuple[Any, Any]:
        live = {episode.number for episode in self._episodes if episode.slot == slot}
        timeout_s = self.step_timeout_s if kind == "step" else self.reset_timeout_s
        return worker.ask((kind, number, argument, live, timeout_s), timeout_s)

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(
                "these environment workers belong to the process that started them; make the environment anew in "
                f"process {os.getpid()}"
            )

    def _worker(self, slot: int) -> _Worker:
        """The slot's process, started if there is none.

        Raises:
            RuntimeError: if it cannot be started.
        """
        worker = self._slots[slot]
        if worker is None or not worker.runs():
            worker = self._slots[slot] = _Worker(self.environment)
            try:
                worker.ask(None, self.start_timeout_s)
            except _EnvironmentFailed as failure:
                worker.end(str(failure))
                raise RuntimeError(f"an environment worker could not be started: {failure}") from None
        return worker

    def _side_by_side(self, jobs: Sequence[tuple[int, Callable[[], _T]]]) -> list[_T]:
        """Results of jobs, in order: those of one slot one after another, the slots in parallel.

        Raises:
            Exception: of a job; the jobs that have not begun are then left out.
        """
        self._check_owner()
        by_slot = collections.defaultdict(list)
        for index, (slot, _) in enumerate(jobs):
            by_slot[slot].append(index)
        results: dict[int, _T] = {}
        stop = threading.Event()

        def work(indices: Sequence[int]) -> None:
            for index in indices:
                if stop.is_set():
                    return
                try:
                    results[index] = jobs[index][1]()
                except BaseException:
                    stop.set()
                    raise

        with self._lock:
            futures = [self._threads.submit(work, indices) for indices in by_slot.values()]
            try:
                concurrent.futures.wait(futures)
            except BaseException:
                # An answer that is still to come must not be taken for that of a later request.
                stop.set()
                while any(not future.done() for future in futures):
                    for worker in filter(None, (self._slots[slot] for slot in by_slot)):
                        worker.kill()
                    concurrent.futures.wait(futures, timeout=0.1)
                raise
            for future in futures:
                future.result()
        return [results[index] for index in range(len(jobs))]


def _checked(episodes: Sequence[Episode]) -> list[WorkerEpisode]:
    mine = [episode for episode in episodes if isinstance(episode, WorkerEpisode)]
    assert len(mine) == len(episodes), "episodes come from this environment's episode()"
    return mine


def _end_all(slots: list[_Worker | None], owner: int) -> None:
    for worker in slots if os.getpid() == owner else ():
        if worker is not None:
            worker.end("the workers were ended")


class _EnvironmentFailed(Exception):
    """A worker raised, died or exceeded its time. `kind` is the name of the exception that it raised, if it did."""

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.kind = kind

    def original(self) -> Exception:
        """The exception that the worker raised, or a RuntimeError."""
        return (getattr(builtins, str(self.kind)) if self.kind in _SETUP_ERRORS else RuntimeError)(str(self))


@final
class _Worker:
    """One worker process, from its start to its end.

    Attributes:
        pid: its process id, which is also that of its process group.
        ended: why it is gone; None while it runs.
    """

    def __init__(self, environment: InteractiveEnvironment) -> None:
        """Starts the process and sends it the environment. The first `ask`, with None, waits until it is ready."""
        try:
            pickled = pickle.dumps(environment)
        except Exception as error:
            raise RuntimeError(
                f"the environment cannot be sent to a worker process: {type(error).__name__}: {error}; "
                "its settings must be picklable and its class importable by name"
            ) from error
        self.ended: str | None = None
        self._connection, theirs = Pipe()
        # Opened for appending, so that the worker can empty it.
        self._output = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed in `end`
        # The package may be importable only through this process's sys.path (a notebook, a checkout).
        search_path = os.pathsep.join(entry for entry in sys.path if entry)
        module = "memgen.environments.worlds.workers"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
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
        self.pid = self._process.pid
        theirs.close()
        with contextlib.suppress(OSError):  # It died already; the first `ask` says so.
            # Pickled apart, so that a class which the worker cannot import is an answer and not a crash.
            self._connection.send_bytes(pickled)

    def ask(self, request: Any, timeout_s: float) -> Any:
        """The answer to a request; None only waits for the next answer.

        Raises:
            _EnvironmentFailed: if the worker raised, died, or did not answer in time; it was then killed.
        """
        if self.ended is not None:
            raise _EnvironmentFailed(f"the worker that held it was lost: {self.ended}")
        try:
            if request is not None:
                self._connection.send(request)
            if not self._connection.poll(timeout_s):
                self.end(f"the worker did not answer within {timeout_s:g} s and was killed")
                raise _EnvironmentFailed(str(self.ended))
            answered, *answer = self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self.end(self._cause_of_death())
            raise _EnvironmentFailed(str(self.ended)) from None
        if not answered:
            raise _EnvironmentFailed(*answer)
        return answer

    def runs(self) -> bool:
        """Whether the process still runs."""
        if self.ended is None and self._process.poll() is not None:
            self.end(self._cause_of_death())
        return self.ended is None

    def kill(self) -> None:
        """Kills the process and everything that it started."""
        if self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, reason: str) -> None:
        """Kills the process, if it runs, and frees what belongs to it."""
        if self.ended is None:
            self.kill()
            self.ended = reason
            self._process.wait()
            self._connection.close()
            self._output.close()

    def _cause_of_death(self) -> str:
        """How the process ended, and the last lines of its output."""
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "the worker closed its connection"
        how = f"with exit status {code}" if code >= 0 else f"by signal {signal.Signals(-code).name}"
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 2000))
        said = [line for line in self._output.read().decode(errors="replace").splitlines() if line.strip()]
        return f"the worker ended {how}" + (f"; it said: {' | '.join(said[-3:])}" if said else "")


# What follows runs in the worker process.


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    _end_group()


def _end_group() -> None:
    """Ends this process and everything that it started."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _keep_output_small() -> None:
    sys.stdout.flush()
    if os.fstat(1).st_size > _OUTPUT_LIMIT_BYTES:
        os.ftruncate(1, 0)


def _failed(error: Exception, told: bool) -> tuple[bool, str, str]:
    """An answer that says what the environment raised: for setup errors if `told`, in its own words."""
    kind = next((n for n in _SETUP_ERRORS if isinstance(error, getattr(builtins, n))), None)
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = str(error)
    if not told or kind is None:
        reason = f"the environment raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return False, reason, kind or type(error).__name__


def _serve(connection: Connection[Any, Any]) -> None:
    """Answers requests until the connection is closed. An answer is (True, value, score) or (False, reason, kind)."""
    try:
        environment: InteractiveEnvironment = pickle.loads(connection.recv_bytes())
    except Exception as error:  # noqa: BLE001 - the parent is told
        reason = (
            f"the environment could not be loaded there ({type(error).__name__}: {error}); its class must be "
            "importable by name, so not from a notebook's cell or from the script that is run"
        )
        connection.send((False, reason))
        return
    connection.send((True,))
    episodes: dict[int, Episode] = {}
    while True:
        try:
            kind, number, argument, live, timeout_s = connection.recv()
        except EOFError:
            return
        # The parent kills a worker that takes too long. If the parent is gone too, this timer ends even an operation
        # that no Python thread can interrupt.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
        answer: tuple[Any, ...]
        try:
            for old in episodes.keys() - live:
                episodes.pop(old).close()
            answer = (True, *_answer(environment, episodes, kind, number, argument))
        except Exception as error:  # noqa: BLE001 - the parent is told
            answer = _failed(error, told=kind != "step")
        signal.setitimer(signal.ITIMER_REAL, 0)
        _keep_output_small()
        try:
            connection.send(answer)
        except OSError:  # The parent is gone.
            return
        except Exception as error:  # noqa: BLE001 - the answer cannot be pickled
            connection.send(_failed(error, told=False))


def _answer(
    environment: InteractiveEnvironment,
    episodes: dict[int, Episode],
    kind: _Kind,
    number: int,
    argument: Any,
) -> tuple[Any, Reward | None]:
    match kind:
        case "conversation":
            return environment.conversation(argument), None
        case "reset":
            if number not in episodes:
                episodes[number] = environment.episode()
            return episodes[number].reset(argument), episodes[number].reward()
        case "step":
            return episodes[number].step(argument), episodes[number].reward()


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
        _end_group()
