r"""Is a mathematical answer right? Decided by math-verify, in worker processes that a bad answer may hang or crash.

Differs from calling math-verify directly: (1) only an answer the text marks as final counts, the last complete
`\boxed{...}` or else the last `#### ...` line, where math-verify alone takes a number from any sentence;
(2) math-verify limits its time by `signal.alarm`, which works in the main thread only; here a worker process that
does not answer in time is killed, from whichever thread asked; (3) the released code compares normalised strings
and takes the first `\boxed`.

The worker is this module as a program (`python -m`), see `memgen.environments.processes`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import resource
import sys
from abc import ABC
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, final

from typing_extensions import override

from memgen.environments.base import Example, Reward
from memgen.environments.processes import READY, Launch, WorkerLostError, WorkerPool
from memgen.environments.qa import notation
from memgen.environments.questions import QuestionEnvironment, Questions
from memgen.environments.signals import stay

PROMPT = (
    "Solve the math problem with proper reasoning, and make sure to put the FINAL ANSWER inside \\boxed{}."
    "Question: {question}\n"
)
"""The released code's user message for mathematics."""

_DEGREES = r"^\circ"
_MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a worker: `9^{9^{9}}` has to fail in the worker, not in the machine."""

_LONGEST_TEXT = 1 << 20
"""Characters at the end of a solution that are searched for a final answer."""
_LONGEST_ANSWER = 4096
"""Characters of an answer; a longer one is wrong."""

_BRACES = re.compile(
    r"\\(?:boxed|fbox)\s*\{|\\boxed[ \t]+(?P<bare>[^\s${}\\][^\s$]*)"
    r"|\\\\(?!boxed|fbox)|\\[{}]|(?P<brace>[{}])"
)
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*)$", re.MULTILINE)


def final_answer(text: str) -> str | None:
    r"""The answer a solution marks as final.

    The last complete `\boxed{...}` that is not empty (see `boxed_answer`); in a text without one, what follows `####` on
    the last line that begins so. A full stop behind the answer is not part of it.

    Args:
        text: a solution; of more than a million characters only the end counts.

    Returns:
        The answer as it is written, or None if none is marked.
    """
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    marked = _HASHES.findall(text[-_LONGEST_TEXT:])
    return _stripped(marked[-1]) or None if marked else None


def boxed_answer(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` of a solution holds that is not empty, or None if there is none.

    `\fbox{...}` counts too, and `\boxed 5` up to the next white space: some solutions of MATH are written so.
    """
    text = text[-_LONGEST_TEXT:]
    boxes: list[tuple[int, int]] = []
    open_braces: list[int | None] = []  # Where the content of a box begins; None: another brace.
    for match in _BRACES.finditer(text):
        if match["bare"] is not None:
            boxes.append(match.span("bare"))
        elif match["brace"] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, match.start()))
        elif match["brace"] == "{":
            open_braces.append(None)
        elif match[0].endswith("{") and match[0] != r"\{":
            open_braces.append(match.end())
    # The last to begin, so of nested boxes the innermost.
    for start, end in sorted(boxes, reverse=True):
        content = text[start:end]
        if not content.isspace() and (answer := _stripped(content)):
            return answer
    return None


def _stripped(answer: str) -> str:
    return answer.strip().removesuffix(".").rstrip()


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
        self.timeout_s = timeout_s
        self.workers = workers
        self._pool = WorkerPool(
            partial(_launch, timeout_s),
            workers,
            "the maths checker could not be started; is math-verify installed?",
        )

    def equivalent(self, gold: str, answer: str) -> bool:
        r"""Whether an answer equals the reference. The order matters: math-verify is lenient towards the second.

        Args:
            gold: the reference, as it would be written in a `\boxed{}`.
            answer: the answer to check, likewise.

        Returns:
            False also if the comparison hung or crashed its worker.

        Raises:
            RuntimeError: if a worker cannot be started (math-verify is not installed, for instance).
        """
        if len(answer) > _LONGEST_ANSWER:
            return False
        try:
            return bool(self._pool.ask([gold, answer], self.timeout_s))
        except WorkerLostError:
            return False

    def correct(self, gold: str, solution: str) -> bool:
        """Whether the answer a solution marks as final (see `final_answer`) equals the reference."""
        return self.reward(gold, solution).total == 1.0

    def reward(self, gold: str, solution: str) -> Reward:
        """1 for a solution whose answer equals the reference, else 0; and whether it marks an answer at all."""
        answer = final_answer(solution)
        correct = float(answer is not None and self.equivalent(gold, answer))
        return Reward(total=correct, parts={"correct": correct, "has_answer": float(answer is not None)})

    def rewards(self, golds: Sequence[str], solutions: Sequence[str]) -> list[Reward]:
        """Many, as many at once as there are workers."""
        pairs = list(zip(golds, solutions, strict=True))
        return self._pool.map(lambda pair: self.reward(*pair), pairs)

    def close(self) -> None:
        """Ends the workers. A later question starts new ones."""
        self._pool.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return self._pool.pids

    def __reduce__(self) -> tuple[type[MathsVerifier], tuple[float, int]]:
        """A copy, in this process or another, has workers of its own."""
        return MathsVerifier, (self.timeout_s, self.workers)


@contextlib.contextmanager
def _launch(timeout_s: float, number: int) -> Iterator[Launch]:
    """This module as a program."""
    # The package may be importable only through this process's sys.path (a notebook, a checkout).
    search_path = os.pathsep.join(entry for entry in sys.path if entry)
    yield Launch(
        command=[sys.executable, "-P", "-m", __name__, str(timeout_s)],
        environment={**os.environ, "PYTHONPATH": search_path, "OPENBLAS_NUM_THREADS": "1"},
        folder=os.curdir,
    )


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

    @override
    def final_answer(self, example: Example, answer: str) -> str | None:
        """The answer marked as final, in one way of writing: a vote does not see that 1/2 and 0.5 are equal."""
        found = final_answer(answer)
        return None if found is None else "".join(notation.comparable(found).split())


# What follows runs in the worker process.


def _matches(gold: str, answer: str) -> bool:
    if "".join(gold.split()) == "".join(answer.split()):
        return True  # The reference to the letter is right whether math-verify can read it or not (`\\frac \\pi4`).
    reference, given = notation.comparable(gold), notation.comparable(answer)
    if reference == given:
        return True
    wanted = notation.words(reference)
    if wanted is not None:
        return wanted == notation.words(given)
    reference, reference_unit = notation.without_units(reference)
    if notation.is_number(reference):
        given, unit = notation.without_units(given)
        if notation.units_differ(reference_unit, unit):
            return False
    elif reference_unit:
        reference = f"{reference} {reference_unit}"
    if notation.has_words(given) and not notation.has_words(reference):
        return False
    if not notation.same_kind(reference, given):
        return False
    numbers = notation.decimal(reference), notation.decimal(given)
    if None not in numbers:
        return numbers[0] == numbers[1] or notation.close(*numbers)
    return _equal(reference, given) or _equal_angles(reference, given)


def _equal_angles(gold: str, answer: str) -> bool:
    """Whether one is in degrees and the other the same angle in radians."""
    degrees = [value for value in (gold, answer) if _DEGREES in value]
    if len(degrees) != 1:
        return False

    def radians(value: str) -> str:
        return rf"\frac{{\pi}}{{180}} \cdot ({value.replace(_DEGREES, '')})" if value in degrees else value

    return _equal(radians(gold), radians(answer))


def _equal(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    as_latex = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]

    def parsed(value: str) -> list[Any]:
        boxed = "\\boxed{" + value + "}"
        # The time limit is the parent's; math-verify's own would need signals.
        return list(parse(boxed, as_latex, fallback_mode="no_fallback", parsing_timeout=None))

    golds, answers = parsed(gold), parsed(answer)
    if not verify(golds, answers, timeout_seconds=None):
        return False
    # The first of each is the expression, the other its text.
    return not (golds and answers) or notation.same_size(golds[0], answers[0])


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard < 0 else min(soft, hard), hard))


def _limit_cpu(seconds: float) -> None:
    """Ends this process by a signal when it has used that much more CPU time.

    The parent kills a slow worker earlier; this holds when the parent itself is gone, even inside one long
    operation on big integers, which no Python thread could interrupt.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1)


def _serve(connection: Connection, timeout_s: float) -> None:
    """Reads `[gold, answer]`, writes `true` or `false`, until the parent is gone."""
    logging.disable(logging.WARNING)  # math-verify warns that its own time limit is off.
    _limit(resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES)
    _equal("1", "x")  # Loads the grammar, so that the first answer's time is its own.
    connection.send_bytes(READY)
    silence = os.open(os.devnull, os.O_WRONLY)  # Output so far tells why a worker did not start.
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    while True:
        try:
            gold, answer = json.loads(connection.recv_bytes())
        except EOFError:
            return
        _limit_cpu(timeout_s)
        try:
            verdict = _matches(gold, answer)
        except Exception:  # noqa: BLE001 - an answer that cannot be parsed is wrong
            verdict = False
        connection.send_bytes(json.dumps(verdict).encode())


if __name__ == "__main__":
    stay()
    _serve(Connection(int(sys.argv[2])), float(sys.argv[1]))
