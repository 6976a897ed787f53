"""Runs a solution and its tests inside the sandbox. Standard library only: this package is not installed there.

Reads one JSON object (the task) from standard input, applies the resource limits, runs the tests, and writes one JSON
object (the report) to the file descriptor that was standard output; what the solution prints goes to standard error.
The report carries a nonce that the caller made for this run. It is written only after the last test has ended, and
only by the process that was started: a solution that exits early, forks or never returns produces no report. The
solution and its tests share a process, as they do in the benchmarks' own harnesses, so a solution that searches the
interpreter's frames could forge a report; patched assertions and changed files are detected.

Tests in pytest's style run on the subset of pytest in this file. pytest itself was tried and rejected: on 45
BigCodeBench items the verdicts agree, but an item takes 0.69 s instead of 0.26 s (import and configuration of pytest),
and the solution can forge a verdict through any of pytest's modules, hooks and plugins, in one line
(`_pytest.python.Function.runtest = lambda self: None`).
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import io
import itertools
import json
import linecache
import math
import os
import re
import sys
import tempfile
import traceback
import types
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

SOLUTION = "solution"
TESTS = "test_solution"
_ABSENT = object()


class Skipped(Exception):
    """Raised by `skip`. A test that raises it has not passed: the solution may have raised it."""


class Failed(AssertionError):
    """Raised by `pytest.fail`, and by a `raises` block that did not raise."""


# --- the subset of pytest that test files use -------------------------------------------------------------------


class _Raises:
    def __init__(self, expected: Any, match: str | None) -> None:
        self.expected, self.match, self.value = expected, match, None
        self.type: Any = None
        self.tb: Any = None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, value: Any, tb: Any) -> bool:
        if kind is None:
            raise Failed(f"did not raise {self.expected}")
        if not issubclass(kind, self.expected):
            return False
        self.type, self.value, self.tb = kind, value, tb
        if self.match is not None and not re.search(self.match, str(value)):
            raise Failed(f"{value} does not match {self.match}")
        return True


def raises(expected: Any, *call: Any, match: str | None = None, **keywords: Any) -> Any:
    """As a context, or with a callable and its arguments."""
    context = _Raises(expected, match)
    if not call:
        return context
    with context:
        call[0](*call[1:], **keywords)
    return context


@contextlib.contextmanager
def warns(expected: Any = Warning, *, match: str | None = None) -> Iterator[Any]:
    """Fails if the block does not warn; yields the warnings."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        yield records
    if not any(
        issubclass(r.category, expected) and (match is None or re.search(match, str(r.message)))
        for r in records
    ):
        raise Failed(f"did not warn {expected}")


class Approx:
    """`pytest.approx`: numbers, and sequences and mappings of them."""

    __array_ufunc__ = None
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:
        self.expected, self.nan_ok = expected, nan_ok
        self.relative = rel if rel is not None else 1e-6 if abs is None else 0.0
        self.absolute = abs if abs is not None else 1e-12

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"

    def __eq__(self, actual: object) -> bool:
        return self._close(self.expected, actual)

    def _close(self, expected: Any, actual: Any) -> bool:
        expected, actual = (v.tolist() if hasattr(v, "tolist") else v for v in (expected, actual))
        if isinstance(expected, Mapping):
            return (
                isinstance(actual, Mapping)
                and expected.keys() == actual.keys()
                and all(self._close(v, actual[k]) for k, v in expected.items())
            )
        if isinstance(expected, Sequence) and not isinstance(expected, (str, bytes)):
            return (
                isinstance(actual, Sequence)
                and not isinstance(actual, (str, bytes))
                and len(expected) == len(actual)
                and all(map(self._close, expected, actual))
            )
        if expected == actual:
            return True
        if isinstance(expected, bool) or isinstance(actual, bool):
            return False
        try:
            difference, size = abs(expected - actual), abs(expected)
        except TypeError:
            return False
        if math.isnan(difference):
            return self.nan_ok and bool(expected != expected) and bool(actual != actual)
        return bool(math.isfinite(size) and difference <= max(self.absolute, self.relative * size))


def _marked(*mark: Any) -> Callable[[Any], Any]:
    """A decorator that adds a mark to a function or class."""

    def decorate(target: Any) -> Any:
        target._marks = [*vars(target).get("_marks", ()), mark]
        return target

    return decorate


class _Marks:
    """`pytest.mark`: parametrize, skip and skipif count; other marks change nothing."""

    @staticmethod
    def parametrize(names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        return _marked("parametrize", names, list(values))

    @staticmethod
    def skipif(condition: Any, **_: Any) -> Callable[[Any], Any]:
        return _marked("skip" if condition else "other")

    def __getattr__(self, name: str) -> Any:
        def mark(*arguments: Any, **_: Any) -> Any:
            decorate = _marked(name)
            return (
                decorate(arguments[0]) if len(arguments) == 1 and callable(arguments[0]) else decorate
            )  # With or without parentheses.

        return mark


class _Param(tuple):
    __slots__ = ()


def param(*values: Any, marks: Any = (), id: str | None = None) -> Any:
    """One case of a parametrized test."""
    return _Param(values)


def fixture(function: Any = None, **options: Any) -> Any:
    """A fixture, made anew for each test whatever its scope."""
    if function is None:
        return lambda f: fixture(f, **options)
    function._fixture = {"name": options.get("name") or function.__name__, **options}
    return function


def skip(reason: str = "", **_: Any) -> None:
    """Ends a test."""
    raise Skipped(reason)


def fail(reason: str = "", **_: Any) -> None:
    """Ends a test as failed."""
    raise Failed(reason)


def importorskip(name: str, *_: Any, **__: Any) -> Any:
    """A module, or the test is skipped."""
    try:
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        raise Skipped(name) from error


class MonkeyPatch:
    """Changes that end with the test."""

    def __init__(self) -> None:
        self._changes = contextlib.ExitStack()

    def _change(self, write: Any, owner: Any, name: Any, old: Any, new: Any, missing: Any = None) -> None:
        """Writes a new value, or deletes it (`_ABSENT`); raises `missing` if there was none before."""
        if missing is not None and old is _ABSENT:
            raise missing(name)
        self._changes.callback(write, owner, name, old)
        write(owner, name, new)

    def setattr(self, target: Any, name: Any, value: Any = _ABSENT, raising: bool = True) -> None:
        """An attribute of an object, or of a module by its path."""
        if value is _ABSENT:
            path, value = target, name
            module, _, name = path.rpartition(".")
            target = __import__(module, fromlist=["_"])
        old = getattr(target, name, _ABSENT)
        self._change(_write_attribute, target, name, old, value, AttributeError if raising else None)

    def delattr(self, target: Any, name: str, raising: bool = True) -> None:
        """An attribute goes away."""
        old = getattr(target, name, _ABSENT)
        self._change(_write_attribute, target, name, old, _ABSENT, AttributeError if raising else None)

    def setitem(self, mapping: Any, key: Any, value: Any) -> None:
        """A key of a mapping."""
        self._change(_write_item, mapping, key, mapping.get(key, _ABSENT), value)

    def delitem(self, mapping: Any, key: Any, raising: bool = True) -> None:
        """A key goes away."""
        old = mapping.get(key, _ABSENT)
        self._change(_write_item, mapping, key, old, _ABSENT, KeyError if raising else None)

    def setenv(self, name: str, value: Any, prepend: str | None = None) -> None:
        """An environment variable."""
        old = os.environ.get(name)
        self.setitem(os.environ, name, f"{value}{prepend}{old}" if prepend and old else str(value))

    def delenv(self, name: str, raising: bool = True) -> None:
        """An environment variable goes away."""
        self.delitem(os.environ, name, raising)

    def chdir(self, path: Any) -> None:
        """The working directory."""
        self._changes.enter_context(contextlib.chdir(path))

    def syspath_prepend(self, path: Any) -> None:
        """Where modules are looked for."""
        self.setattr(sys, "path", [str(path), *sys.path])

    def undo(self) -> None:
        """All as it was."""
        self._changes.close()


def _write_attribute(owner: Any, name: str, value: Any) -> None:
    if value is not _ABSENT:
        setattr(owner, name, value)
    elif hasattr(owner, name):
        delattr(owner, name)


def _write_item(owner: Any, key: Any, value: Any) -> None:
    if value is not _ABSENT:
        owner[key] = value
    elif key in owner:
        del owner[key]


Captured = collections.namedtuple("Captured", ["out", "err"])


class _Capture:
    """`capsys`: what was printed since the last look."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()

    def readouterr(self) -> Captured:
        """What was printed since the last look."""
        result = Captured(self.out.getvalue(), self.err.getvalue())
        for stream in (self.out, self.err):
            stream.seek(0)
            stream.truncate()
        return result


@fixture
def monkeypatch() -> Iterator[MonkeyPatch]:
    """Changes that end with the test."""
    patch = MonkeyPatch()
    yield patch
    patch.undo()


@fixture
def tmp_path() -> Any:
    """An empty folder."""
    import pathlib

    return pathlib.Path(tempfile.mkdtemp())


@fixture
def tmpdir(tmp_path: Any) -> Any:
    """An empty folder."""
    return tmp_path


@fixture
def capsys() -> Iterator[_Capture]:
    """What is printed."""
    capture = _Capture()
    with contextlib.redirect_stdout(capture.out), contextlib.redirect_stderr(capture.err):
        yield capture


_BUILT_IN_FIXTURES = {f.__name__: f for f in (monkeypatch, tmp_path, tmpdir, capsys)}


def pytest_subset() -> types.ModuleType:
    """The module that `import pytest` finds."""
    module = types.ModuleType("pytest")
    names = (raises, warns, param, fixture, skip, fail, importorskip, MonkeyPatch)
    vars(module).update({f.__name__: f for f in names})
    vars(module).update(
        approx=Approx,
        mark=_Marks(),
        main=lambda *_, **__: 0,
        deprecated_call=lambda **_: warns((DeprecationWarning, PendingDeprecationWarning)),
    )
    return module


# --- running tests in pytest's style ----------------------------------------------------------------------------


def _call(function: Any, *arguments: Any) -> Any:
    """Calls a hook, if there is one, with as many of the arguments as it takes."""
    if callable(function):
        return function(*arguments[: len(inspect.signature(function).parameters)])
    return None


def _fixtures_in(namespace: Mapping[str, Any]) -> dict[str, Any]:
    functions = [v for v in namespace.values() if inspect.isfunction(v) and hasattr(v, "_fixture")]
    return {f._fixture["name"]: f for f in functions}


class _Fixtures:
    """The fixtures of one test case: known functions by name, and the parameter of each that has one."""

    def __init__(
        self,
        known: Mapping[str, Any],
        parameters: Mapping[str, Any],
        instance: Any,
        stack: contextlib.ExitStack,
    ) -> None:
        self.known, self.parameters, self.instance, self.stack = known, parameters, instance, stack
        self.made: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> Any:
        if name not in self.known:
            raise Failed(f"there is no fixture {name}")
        function = self.known[name]
        request = types.SimpleNamespace(
            param=self.parameters.get(name),
            instance=self.instance,
            getfixturevalue=self.value,
            addfinalizer=self.stack.callback,
        )
        special = {"self": self.instance, "request": request}
        names = inspect.signature(function).parameters
        result = function(**{n: special[n] if n in special else self.value(n) for n in names})
        if not inspect.isgenerator(result):
            return result
        self.stack.callback(next, result, None)
        return next(result)


def _cases(marks: Sequence[Any], known: Mapping[str, Any], wanted: Sequence[str]) -> Iterator[Any]:
    """The arguments of each case of a parametrized test, and the parameters of its fixtures."""
    argument_axes = [
        [dict(zip(names, v if len(names) > 1 or isinstance(v, _Param) else [v], strict=True)) for v in values]
        for _, names, values in (mark for mark in marks if mark[0] == "parametrize")
    ]
    fixture_axes = [
        [{name: value} for value in known[name]._fixture["params"]]
        for name in wanted
        if name in known and known[name]._fixture.get("params")
    ]
    for arguments in itertools.product(*argument_axes):
        for parameters in itertools.product(*fixture_axes):
            yield dict(collections.ChainMap(*arguments)), dict(collections.ChainMap(*parameters))


def _run_case(
    function: Any,
    instance: Any,
    known: Mapping[str, Any],
    arguments: dict[str, Any],
    parameters: Mapping[str, Any],
) -> None:
    with contextlib.ExitStack() as stack:
        fixtures = _Fixtures(known, parameters, instance, stack)
        for name, made in known.items():
            if made._fixture.get("autouse"):
                fixtures.value(name)
        if instance is not None:
            _call(getattr(instance, "setup_method", None), function)
            _call(getattr(instance, "setup", None), function)
            stack.callback(_call, getattr(instance, "teardown_method", None), function)
        for name, parameter in inspect.signature(function).parameters.items():
            given = name in arguments or parameter.default is not parameter.empty
            if not given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                arguments[name] = fixtures.value(name)
        result = function(**arguments)
        if inspect.iscoroutine(result):
            import asyncio

            asyncio.run(result)


def _run_function(
    name: str, function: Any, owner: Any, known: Mapping[str, Any], outcomes: dict[str, str]
) -> None:
    marks = [*getattr(function, "_marks", []), *getattr(owner, "_marks", [])]
    if any(mark[0] == "skip" for mark in marks):
        outcomes[name] = "skipped"
        return
    wanted = list(inspect.signature(function).parameters)
    for number, (arguments, parameters) in enumerate(_cases(marks, known, wanted)):
        case = f"{name}[{number}]"
        try:
            instance = owner() if owner is not None else None
            bound = getattr(instance, function.__name__) if owner is not None else function
            _run_case(bound, instance, known, arguments, parameters)
        except BaseException:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of a solution are failures too
            outcomes[case] = f"failed: {traceback.format_exc(limit=-3)[-500:]}"
        else:
            outcomes[case] = "passed"


def run_pytest_style(module: types.ModuleType) -> dict[str, str]:
    """Outcome of every `test*` function, `Test*` class and unittest.TestCase of a module, by the name of the case."""
    outcomes: dict[str, str] = {}
    contents = dict(vars(module))
    known = {**_BUILT_IN_FIXTURES, **_fixtures_in(contents)}
    _call(contents.get("setup_module") or contents.get("setUpModule"), module)
    for name, value in contents.items():
        if getattr(value, "__module__", None) != module.__name__:
            continue  # Imported, from the solution perhaps.
        if inspect.isclass(value) and issubclass(value, unittest.TestCase):
            outcomes.update(run_unittest(value))
        elif inspect.isclass(value) and name.startswith("Test") and "__init__" not in vars(value):
            methods = {k: v for base in reversed(value.__mro__) for k, v in vars(base).items()}
            _call(getattr(value, "setup_class", None))
            for method_name, method in methods.items():
                if method_name.startswith("test") and inspect.isfunction(method):
                    known_there = {**known, **_fixtures_in(methods)}
                    _run_function(f"{name}.{method_name}", method, value, known_there, outcomes)
        elif inspect.isfunction(value) and name.startswith("test"):
            _run_function(name, value, None, known, outcomes)
    return outcomes


# --- running unittest -------------------------------------------------------------------------------------------


class _Result(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.outcomes[str(test)] = "passed"

    def _note(self, test: Any, error: Any) -> None:
        text = "".join(traceback.format_exception(*error, limit=-3))
        self.outcomes[str(test)] = f"failed: {text[-500:]}"

    def addError(self, test: Any, err: Any) -> None:
        self._note(test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._note(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._note(test, err)

    def addSkip(self, test: Any, reason: str) -> None:
        # A decorator's skip is the test author's; a raised one may be the solution's.
        method = getattr(test, getattr(test, "_testMethodName", ""), None)
        marked = getattr(type(test), "__unittest_skip__", False) or getattr(
            method, "__unittest_skip__", False
        )
        self.outcomes[str(test)] = "skipped" if marked else f"skipped while it ran: {reason}"

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.outcomes[str(test)] = "unexpected success"


def run_unittest(case: type[unittest.TestCase]) -> dict[str, str]:
    """Outcome of every test of a class, by name."""
    result = _Result()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result.outcomes


# --- the run ----------------------------------------------------------------------------------------------------


def _limit(limits: Mapping[str, int], uid: int | None) -> None:
    import resource

    # Started as root: processes are counted per user, so each run becomes a user of its own.
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, value in limits.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        # One more second lets the kernel kill what catches the first signal.
        resource.setrlimit(kind, (value, value + 1 if name == "RLIMIT_CPU" and hard < 0 else value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _assertions() -> dict[str, Any]:
    """The functions and classes that decide whether a test passes, to detect afterwards that one was replaced."""
    seen: dict[str, Any] = {}
    for owner in (
        unittest.TestCase,
        unittest.TestResult,
        unittest.TestSuite,
        _Result,
        Approx,
        _Raises,
    ):
        seen.update({f"{owner.__module__}.{owner.__qualname__}.{k}": v for k, v in vars(owner).items()})
    for name in ("run_unittest", "run_pytest_style", "_run_function", "_run_case", "warns"):
        seen[name] = globals()[name]
    return {k: v for k, v in seen.items() if not k.rpartition(".")[2].startswith("__") or callable(v)}


def _execute(module: types.ModuleType, path: str, text: str) -> types.ModuleType:
    """Runs a module's text; tracebacks show its lines."""
    module.__file__ = path
    sys.modules[module.__name__] = module
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    return module


def _run(style: str, solution: str, tests: str) -> dict[str, str]:
    folder = os.getcwd()
    path = os.path.join(folder, f"{SOLUTION}.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(solution)
    if style == "pytest":
        subset = pytest_subset()
        sys.path.insert(0, folder)
        sys.modules["pytest"] = subset
        _execute(types.ModuleType(SOLUTION), path, solution)
        if sys.modules.get("pytest") is not subset:
            raise RuntimeError("the solution replaced the test framework")
        test_path = os.path.join(folder, f"{TESTS}.py")
        outcomes = run_pytest_style(_execute(types.ModuleType(TESTS), test_path, tests))
    else:
        # One module, as in BigCodeBench's own harness. It also answers to __main__, for patches of `__main__.name`.
        program = types.ModuleType("__test__")
        program.__dict__.update({"sys": sys, "os": os, "environ": os.environ})
        sys.modules["__main__"] = program
        contents = vars(_execute(program, path, f"{solution}\n{tests}"))
        cases = [
            v
            for v in contents.values()
            if inspect.isclass(v) and issubclass(v, unittest.TestCase) and v is not unittest.TestCase
        ]
        outcomes = {}
        for case in dict.fromkeys(cases):
            outcomes.update(run_unittest(case))
    with open(path, encoding="utf-8") as file:
        if file.read() != solution:
            raise RuntimeError("the solution's file was changed")
    return outcomes


def main() -> None:
    """One run."""
    task = json.loads(sys.stdin.buffer.read().decode("utf-8"))
    report = os.dup(1)
    os.dup2(2, 1)  # What the solution prints must not reach the report.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    started = os.getpid()
    nonce = task.pop("nonce")
    _limit(task["limits"], task["uid"])
    before = _assertions()
    write, getpid, leave, dumps = os.write, os.getpid, os._exit, json.dumps
    outcomes: dict[str, str] = {}
    error = None
    write(report, b"begun\n")  # From here on, what goes wrong is the solution's doing.
    try:
        outcomes = _run(task["style"], task["solution"], task["tests"])
        after = _assertions()
        if before.keys() != after.keys() or any(after[k] is not v for k, v in before.items()):
            error = "the solution changed how tests are judged"
    except BaseException:  # noqa: BLE001 - a solution may raise anything, SystemExit too
        error = traceback.format_exc(limit=-3)[-1000:]
    if getpid() != started:
        leave(1)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    text = dumps({"nonce": nonce, "outcomes": outcomes, "error": error}).encode() + b"\n"
    while text:
        text = text[write(report, text) :]
    leave(0)


if __name__ == "__main__":
    main()
