r"""Is a mathematical answer right? Decided by math-verify, in worker processes that a bad answer may hang or crash.

Differs from calling math-verify directly: (1) only an answer the text marks as final counts, the last complete
`\boxed{...}` or else the last `#### ...` line, where math-verify alone takes a number from any sentence;
(2) math-verify limits its time by `signal.alarm`, which works in the main thread only; here a worker process that
does not answer in time is killed, from whichever thread asked; (3) the released code compares normalised strings
and takes the first `\boxed`.

The worker is a fresh interpreter running this module (`python -m`), never a fork and never a second import of the
caller's main script: answers may be scored from notebooks, from threads and under a running CUDA context.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import weakref
from abc import ABC
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, final

from typing_extensions import override

from memgen.environments.base import Example, Reward
from memgen.environments.questions import QuestionEnvironment, Questions
from memgen.environments.signals import stay

PROMPT = (
    "Solve the math problem with proper reasoning, and make sure to put the FINAL ANSWER inside \\boxed{}."
    "Question: {question}\n"
)
"""The released code's user message for mathematics."""

_READY = "ready"
_START_LIMIT_S = 120.0
"""Importing math-verify on a busy machine; not the time of an answer."""
_MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a worker: `9^{9^{9}}` has to fail in the worker, not in the machine."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed[ \t]+(?P<bare>[^\s${}\\][^\s$]*)")
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*)$", re.MULTILINE)


def final_answer(text: str) -> str | None:
    r"""The answer a solution marks as final.

    The last complete `\boxed{...}` (see `boxed_answer`); in a text without one, what follows `####` on the last line
    that begins so. A full stop behind the answer is not part of it.

    Args:
        text: a solution.

    Returns:
        The answer as it is written, or None if none is marked or the marked one is empty.
    """
    boxes = _boxes(text)
    marked = boxes or _HASHES.findall(text)
    if not marked:
        return None
    return str(marked[-1]).strip().removesuffix(".").rstrip() or None


def boxed_answer(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` of a solution holds, or None if there is none or it is empty.

    `\fbox{...}` counts too, and `\boxed 5` up to the next white space: some solutions of MATH are written so.
    """
    boxes = _boxes(text)
    return (boxes[-1].strip().removesuffix(".").rstrip() or None) if boxes else None


def _boxes(text: str) -> list[str]:
    found = []
    for match in _BOXED.finditer(text):
        content = match["bare"] if match["bare"] is not None else _braced(text, match.end())
        if content is not None:
            found.append(content)
    return found


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace that ends before `start` and its partner; None if it has no partner."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # An escaped brace is a character of the answer.
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


@final
class MathsVerifier:
    """Compares answers in a pool of persistent, time-limited worker processes.

    Workers start on the first question and end with the verifier or the interpreter. Any thread may ask; as many
    questions run at once as there are workers.
    """

    def __init__(self, timeout_s: float = 5.0, workers: int = 1) -> None:
        """Starts nothing yet.

        Args:
            timeout_s: seconds a comparison may take; the worker of a longer one is killed and the answer is wrong.
            workers: worker processes.

        Raises:
            ValueError: if an argument is not positive.
        """
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.timeout_s = timeout_s
        self.workers = workers
        self._open_pool()

    def _open_pool(self) -> None:
        self._owner = os.getpid()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._slots.put(None)
        self._alive: set[_Worker] = set()
        self._finalizer = weakref.finalize(self, _kill_all, self._alive, self._owner)

    def equivalent(self, gold: str, answer: str) -> bool:
        r"""Whether an answer equals the reference. The order matters: math-verify is lenient towards the second.

        Args:
            gold: the reference, as it would stand in a `\boxed{}`.
            answer: the answer to check, likewise.

        Returns:
            False also if the comparison hung or crashed its worker.

        Raises:
            RuntimeError: if a worker cannot be started (math-verify is not installed, for instance).
        """
        if os.getpid() != self._owner:  # A forked child must not write into its parent's pipes.
            self._open_pool()
        worker = self._slots.get()
        try:
            if worker is None or not worker.alive:
                if worker is not None:
                    self._alive.discard(worker)
                    worker.kill()
                worker = _Worker(self.timeout_s)
                self._alive.add(worker)
            verdict = worker.ask(gold, answer, self.timeout_s)
            if verdict is None:
                self._alive.discard(worker)
                worker.kill()
                worker = None
            return verdict is True
        finally:
            self._slots.put(worker)

    def correct(self, gold: str, solution: str) -> bool:
        """Whether the answer a solution marks as final (see `final_answer`) equals the reference."""
        answer = final_answer(solution)
        return answer is not None and self.equivalent(gold, answer)

    def reward(self, gold: str, solution: str) -> Reward:
        """1 for a solution whose answer equals the reference, else 0; and whether it marks an answer at all."""
        answer = final_answer(solution)
        correct = float(answer is not None and self.equivalent(gold, answer))
        return Reward(total=correct, parts={"correct": correct, "has_answer": float(answer is not None)})

    def rewards(self, golds: Sequence[str], solutions: Sequence[str]) -> list[Reward]:
        """Many, as many at once as there are workers."""
        if self.workers == 1 or len(solutions) <= 1:
            return [self.reward(gold, solution) for gold, solution in zip(golds, solutions, strict=True)]
        with ThreadPoolExecutor(self.workers, thread_name_prefix="maths") as threads:
            return list(threads.map(self.reward, golds, solutions))

    def close(self) -> None:
        """Ends the workers. A later question starts new ones."""
        self._finalizer()
        self._open_pool()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return tuple(sorted(worker.pid for worker in self._alive))

    def __reduce__(self) -> tuple[type[MathsVerifier], tuple[float, int]]:
        """A copy, in this process or another, has workers of its own."""
        return MathsVerifier, (self.timeout_s, self.workers)


def _kill_all(workers: set[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in list(workers):
            worker.kill()
        workers.clear()


@final
class _Worker:
    """One worker process. Answers arrive through a thread, since a pipe cannot be read with a time limit everywhere."""

    def __init__(self, timeout_s: float) -> None:
        # The package may be importable only through this process's sys.path (a notebook, a checkout).
        search_path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "memgen.environments.qa.maths", str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": search_path, "OPENBLAS_NUM_THREADS": "1"},
        )
        self._replies: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        assert self._process.stdout is not None, "stdout is a pipe"
        assert self._process.stderr is not None, "stderr is a pipe"
        self._reader = threading.Thread(
            target=_forward, args=(self._process.stdout, self._replies), daemon=True, name="maths-answers"
        )
        self._error_reader = threading.Thread(
            target=_collect, args=(self._process.stderr, self._errors), daemon=True, name="maths-errors"
        )
        self._reader.start()
        self._error_reader.start()
        if self._reply(_START_LIMIT_S) != _READY:
            self.kill()
            raise RuntimeError(
                "the maths checker could not be started; is math-verify installed? It said: "
                + ("".join(self._errors[-3:]).strip().replace("\n", " | ") or "nothing")
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, gold: str, answer: str, timeout_s: float) -> bool | None:
        """The verdict, or None if the worker hung or died over it."""
        assert self._process.stdin is not None, "stdin is a pipe"
        try:
            self._process.stdin.write(json.dumps([gold, answer]) + "\n")
            self._process.stdin.flush()
        except OSError:  # The worker died; the pipe is closed.
            return None
        reply = self._reply(timeout_s)
        return None if reply is None else bool(json.loads(reply))

    def _reply(self, timeout_s: float) -> str | None:
        try:
            return self._replies.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._error_reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                # What could not be flushed to a dead worker is lost on purpose.
                with contextlib.suppress(OSError):
                    pipe.close()


def _forward(pipe: IO[str], replies: queue.SimpleQueue[str | None]) -> None:
    for line in pipe:
        replies.put(line.rstrip("\n"))
    replies.put(None)


def _collect(pipe: IO[str], lines: list[str]) -> None:
    for line in pipe:
        lines.append(line)
        del lines[:-20]


class MathsEnvironment(QuestionEnvironment, ABC):
    """A benchmark whose answers are compared by a `MathsVerifier`; reward 1 for the right answer, else 0."""

    def __init__(self, questions: Questions, timeout_s: float, workers: int) -> None:
        """Starts nothing yet.

        Args:
            questions: the items; `Example.answer` is the reference.
            timeout_s: seconds the comparison of one answer may take; beyond, the answer is wrong.
            workers: processes that compare answers.

        Raises:
            ValueError: if an argument is not positive.
        """
        super().__init__(questions)
        self._verifier = MathsVerifier(timeout_s, workers)

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the answer marked as final equals the reference, else 0."""
        return self._verifier.reward(example.answer, answer)

    @override
    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Compares in `reward_workers` processes at once."""
        return self._verifier.rewards([example.answer for example in examples], answers)


# What follows runs in the worker process.


def _matches(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    as_latex = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]

    def parsed(value: str) -> list[Any]:
        boxed = "\\boxed{" + value + "}"
        return list(parse(boxed, as_latex, fallback_mode="no_fallback", parsing_timeout=None))

    # The time limit is the parent's; math-verify's own would need signals. It does not read every LaTeX that occurs in
    # references (`\frac \pi4`), and the reference to the letter is right whether it is read or not.
    return "".join(gold.split()) == "".join(answer.split()) or bool(
        verify(parsed(gold), parsed(answer), timeout_seconds=None)
    )


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Ends this process by a signal when the comparison has used that much CPU time.

    The parent kills a slow worker earlier; this holds when the parent itself is gone, even inside one long
    operation on big integers, which no Python thread could interrupt.
    """
    try:
        import resource
    except ImportError:  # No such limits on this platform; the parent's remains.
        yield
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))
    yield


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY_LIMIT_BYTES if hard < 0 else min(_MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _serve(timeout_s: float) -> None:
    """Reads `[gold, answer]` lines, writes `true` or `false` lines, until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Whatever a parser prints must not look like a reply.
    import logging

    logging.disable(logging.WARNING)  # It warns that its own time limit is off.
    _limit_memory()
    _matches("1", "1")  # Loads the grammar, so that the first answer's time is its own.
    print(_READY, file=replies, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        with _cpu_limit(timeout_s):
            try:
                verdict = _matches(gold, answer)
            except Exception:  # noqa: BLE001 - an answer nobody can parse is wrong
                verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    stay()
    _serve(float(sys.argv[1]))
