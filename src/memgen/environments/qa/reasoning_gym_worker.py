"""Draws Reasoning Gym's items and scores answers, as a worker process (`memgen.environments.processes`).

Standard library and reasoning_gym only: in the sandbox this package is not installed. Every answer is scored in a child of its
own, with limits of time and memory, so an answer can neither stop the worker nor change what later answers get.

Differs from calling the library: (1) text of an answer is never run as code: four scorers get a list by `eval`, which sees
their own variables, and five an expression by sympy's `parse_expr`, which runs any Python; here the four read literals and the
five expressions of numbers, variables and functions, so that the question as an `Integral` is no answer to it; (2) `nan` is no complex number (`complex_arithmetic` gives it full marks);
(3) items come from blocks of `BLOCK` that are drawn from their first to their last with all random generators seeded, since
some generators draw from shared ones.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import pickle
import random
import re
import resource
import select
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

READY = b"ready"
"""As `memgen.environments.processes.READY`."""
BLOCK = 50
"""Items that are drawn together."""

_SET_BY_US = ("seed", "size")
_LISTS = (
    "algorithmic.binary_matrix", "algorithmic.spiral_matrix", "algorithmic.string_insertion", "games.n_queens",
)  # fmt: skip
_FUNCTIONS = {
    "sqrt", "cbrt", "exp", "log", "ln", "Abs", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot",
    "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfi", "erfc", "Rational", "pi", "E", "I", "oo",
}  # fmt: skip
_NOT_IN_EXPRESSIONS = re.compile(r"[^\w\s+\-*/^().,]|_|\.\s*[^\W\d]|[^\W\d]\s*\.")
_NOT_IN_SUMS = re.compile(r"[^\d\s+\-*/().]")


def ask(request: list[Any], connection: int, alone: bool) -> Any:
    """The answer to a request.

    Args:
        request: `["check", task, parameters]`, `["draw", task, parameters, seed]`, or `["score", task, parameters, entry,
            answer, CPU seconds, seconds in all, MB]`.
        connection: the file descriptor that a child must not keep.
        alone: whether this process has a process namespace with nobody else in it.
    """
    kind, task, parameters, *rest = request
    if kind == "check":
        return _check(task, parameters)
    if kind == "draw":
        return _draw(task, parameters, *rest)
    return _score_in_child(_scorer(task, json.dumps(parameters)), task, rest, connection, alone)


def _check(task: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The library's version, or why a task with these parameters is refused."""
    import importlib.metadata

    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        return {"refused": f"{task!r} is not a task of Reasoning Gym{_nearest(task, DATASETS)}"}
    known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in _SET_BY_US]
    for name in parameters:
        if name in _SET_BY_US:
            return {"refused": f"{task}: {name} is no parameter, but a setting of the environment"}
        if name not in known:
            hint = _nearest(name, known) or f"; it has {', '.join(known) or 'none'}"
            return {"refused": f"{task} has no parameter {name!r}{hint}"}
    try:
        _dataset(task, parameters, 0)
    except Exception as error:  # noqa: BLE001 - the library's own checks are assertions and more
        reason = str(error) or type(error).__name__
        return {"refused": f"{task} does not take the parameters {json.dumps(parameters)}: {reason}"}
    return {"version": importlib.metadata.version("reasoning-gym")}


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _dataset(task: str, parameters: Mapping[str, Any], seed: int) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset

    tuples = {field.name for field in dataclasses.fields(DATASETS[task][1]) if _is_tuple(field)}
    given = {
        name: tuple(v) if name in tuples and isinstance(v, list) else v for name, v in parameters.items()
    }
    return create_dataset(task, **given, seed=seed, size=BLOCK)


def _is_tuple(field: dataclasses.Field[Any]) -> bool:
    """Whether a field's default is a tuple, which JSON does not have."""
    if field.default_factory is not dataclasses.MISSING:
        return isinstance(field.default_factory(), tuple)
    return isinstance(field.default, tuple)


def _draw(task: str, parameters: Mapping[str, Any], seed: int) -> list[Any]:
    """Items of a block: [question, reference or None, its score or None, entry], or the error that was raised."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generators' own
    dataset = _dataset(task, parameters, seed)
    return [_item(dataset, task, index) for index in range(BLOCK)]


def _item(dataset: Any, task: str, index: int) -> list[Any] | str:
    try:
        entry = dataset[index]
        pickled = base64.b64encode(pickle.dumps(entry)).decode()
    except Exception as error:  # noqa: BLE001 - some generators fail now and then
        return f"{type(error).__name__}: {error}"
    answer = entry["answer"]
    if answer is not None:
        answer = str(answer).strip()
    score = None if answer is None else _score(dataset, task, entry, answer).get("score", 0.0)
    return [str(entry["question"]), answer, score, pickled]


@functools.lru_cache(maxsize=8)
def _scorer(task: str, parameters: str) -> Any:
    return _dataset(task, json.loads(parameters), 0)


def _score(dataset: Any, task: str, entry: Any, answer: str) -> dict[str, Any]:
    """The score of an answer, or the name of the error that the scorer raised."""
    if task == "complex_arithmetic" and "nan" in answer.lower():
        return {"score": 0.0}
    try:
        score = float(dataset.score_answer(answer, entry))
    except Exception as error:  # noqa: BLE001 - of an answer that it cannot read
        return {"error": type(error).__name__}
    return {"score": score} if math.isfinite(score) else {"error": "not a number"}


def _score_in_child(
    dataset: Any,
    task: str,
    request: list[Any],
    connection: int,
    alone: bool,
) -> dict[str, Any]:
    """As `_score`; or {"stopped": "time"}, or the error "died" of a scorer that ended its process."""
    pickled, answer, cpu_s, wall_s, memory_mb = request
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.close(connection)
            _limit(cpu_s, memory_mb)
            result = _score(dataset, task, pickle.loads(base64.b64decode(pickled)), answer)
            os.write(writer, json.dumps(result).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], wall_s)
        said = os.read(reader, 1024) if ready else b""
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        if alone:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(-1, signal.SIGKILL)  # What it started and let go; the sandbox holds nobody else.
        _, status = os.waitpid(child, 0)
    if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return {"stopped": "time"}
    return dict(json.loads(said)) if said else {"error": "died"}


def _limit(cpu_s: float, memory_mb: int) -> None:
    """Limits of this process. Memory is what it may take beyond the library's."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_CPU: math.ceil(cpu_s),
        resource.RLIMIT_AS: used + (memory_mb << 20),
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard < 0 else min(value, hard)
        # One more second lets the kernel kill what catches the first signal.
        resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU and hard < 0 else value))


def _read_answers_as_data() -> None:
    """Replaces what would run an answer as code in the library's scorers."""
    import sympy

    for name in _LISTS:
        vars(importlib.import_module(f"reasoning_gym.{name}"))["eval"] = ast.literal_eval
    parse = sympy.parse_expr
    for name, forbidden in (("games.countdown", _NOT_IN_SUMS), ("games.puzzle24", _NOT_IN_SUMS)):
        vars(importlib.import_module(f"reasoning_gym.{name}"))["parse_expr"] = _reading(parse, forbidden)
    sympy.parse_expr = _reading(parse, _NOT_IN_EXPRESSIONS)


def _reading(parse: Callable[..., Any], forbidden: re.Pattern[str]) -> Callable[..., Any]:
    import sympy

    # The names that sympy's own reading of numbers and variables writes.
    names = _FUNCTIONS | {"Integer", "Float", "Symbol", "Function", "factorial"}
    known = {name: getattr(sympy, name) for name in names if hasattr(sympy, name)} | {"__builtins__": {}}

    def read(text: str, local_dict: dict[str, Any] | None = None, **options: Any) -> Any:
        words = set(re.findall(r"[^\W\d]\w*", text))
        unknown = {word for word in words if len(word.rstrip("0123456789")) > 1} - _FUNCTIONS
        if forbidden.search(text) or unknown:
            raise ValueError("not an expression")
        return parse(text, local_dict=local_dict, global_dict=dict(known), **options)

    return read


def _stay() -> None:
    # As memgen.environments.signals: the trainer handles them.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)


def _begin(uid: int, processes: int) -> None:
    """Gives privileges away; the library is loaded by now."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    import ctypes

    # PR_SET_DUMPABLE: a child, which is of the same user, must not read or write this process's memory or files.
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def main() -> None:
    """Arguments: user id (0: stay), processes (0: no limit), descriptor."""
    uid, processes, descriptor = map(int, sys.argv[1:])
    _stay()
    import reasoning_gym  # noqa: F401 - before privileges are given away

    _read_answers_as_data()
    _begin(uid, processes)
    connection = Connection(descriptor)
    connection.send_bytes(READY)
    silence = os.open(os.devnull, os.O_RDWR)  # Output so far tells why a worker did not start.
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(ask(request, descriptor, processes > 0)).encode())


if __name__ == "__main__":
    main()
