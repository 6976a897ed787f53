"""Runs a solution and its tests, inside the sandbox. Standard library only; nothing of this package is there.

Reads one JSON object from standard input, limits itself, runs, and writes one JSON object to the file descriptor
that was standard output. What the solution prints goes to the other pipe. The object carries a nonce that the caller
made for this run, and it is written only after the last test has ended, by the process that began: a solution that
exits early, forks or never returns gets no report out. The solution and its tests share a process, as they do in the
benchmarks' own harnesses, so a solution that digs through the interpreter's frames could forge a report; patched
assertions and removed files are noticed.

Tests in pytest's style run without pytest: `PytestStandIn` has what test files of the benchmarks use.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
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


class Skipped(Exception):
    """What `skip` raises. A test that raises it has not passed: the solution may have raised it."""


class Failed(AssertionError):
    """`pytest.fail`, and a `raises` block that did not raise."""


# --- what test files expect of pytest ---------------------------------------------------------------------------


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


class _Warns:
    def __init__(self, expected: Any, match: str | None) -> None:
        self.expected, self.match = expected, match
        self.caught: Any = warnings.catch_warnings(record=True)

    def __enter__(self) -> Any:
        self.records = self.caught.__enter__()
        warnings.simplefilter("always")
        return self.records

    def __exit__(self, kind: Any, value: Any, tb: Any) -> None:
        self.caught.__exit__(kind, value, tb)
        if kind is None and not any(
            issubclass(r.category, self.expected)
            and (self.match is None or re.search(self.match, str(r.message)))
            for r in self.records
        ):
            raise Failed(f"did not warn {self.expected}")


def warns(expected: Any = Warning, *, match: str | None = None) -> Any:
    """As a context."""
    return _Warns(expected, match)


class Approx:
    """`pytest.approx`: numbers, and sequences and mappings of them."""

    __array_ufunc__ = None
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs, nan_ok

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"

    def __eq__(self, actual: object) -> bool:
        return self._close(self.expected, actual)

    def _close(self, expected: Any, actual: Any) -> bool:
        if hasattr(expected, "tolist"):
            expected = expected.tolist()
        if hasattr(actual, "tolist"):
            actual = actual.tolist()
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
                and all(self._close(e, a) for e, a in zip(expected, actual))  # noqa: B905 - of one length
            )
        if expected == actual:
            return True
        if isinstance(expected, bool) or isinstance(actual, bool):
            return False
        try:
            difference = abs(expected - actual)
            size = abs(expected)
        except TypeError:
            return False
        if math.isnan(size) or math.isnan(difference):
            return self.nan_ok and bool(expected != expected) and bool(actual != actual)
        if math.isinf(size) or math.isinf(difference):
            return False
        absolute = self.abs if self.abs is not None else 1e-12
        relative = self.rel if self.rel is not None else (0.0 if self.abs is not None else 1e-6)
        return bool(difference <= max(absolute, relative * size))


class _Marks:
    """`pytest.mark`: parametrize, skip and skipif count; other marks change nothing."""

    @staticmethod
    def parametrize(names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)

        def mark(target: Any) -> Any:
            _own_marks(target).append(("parametrize", names, list(values)))
            return target

        return mark

    @staticmethod
    def skip(*reason: Any, **_: Any) -> Any:
        if len(reason) == 1 and callable(reason[0]):
            _own_marks(reason[0]).append(("skip",))
            return reason[0]
        return _Marks.skipif(True)

    @staticmethod
    def skipif(condition: Any, **_: Any) -> Callable[[Any], Any]:
        def mark(target: Any) -> Any:
            if condition:
                _own_marks(target).append(("skip",))
            return target

        return mark

    def __getattr__(self, name: str) -> Any:
        def mark(*arguments: Any, **_: Any) -> Any:
            if len(arguments) == 1 and callable(arguments[0]):
                return arguments[0]
            return lambda target: target

        return mark


def _own_marks(target: Any) -> list[Any]:
    if "_marks" not in vars(target):
        target._marks = []
    marks: list[Any] = vars(target)["_marks"]
    return marks


def param(*values: Any, marks: Any = (), id: str | None = None) -> Any:
    """One case of a parametrized test."""
    return _Param(values)


class _Param(tuple):
    __slots__ = ()


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


def pytest_stand_in() -> types.ModuleType:
    """A module that answers to `import pytest`."""
    module = types.ModuleType("pytest")
    contents: dict[str, Any] = {
        **{f.__name__: f for f in (raises, warns, param, fixture, skip, fail, importorskip)},
        "approx": Approx,
        "mark": _Marks(),
        "main": lambda *_, **__: 0,
        "MonkeyPatch": MonkeyPatch,
    }
    for name, value in contents.items():
        setattr(module, name, value)
    module.deprecated_call = lambda **_: warns((DeprecationWarning, PendingDeprecationWarning))  # type: ignore[attr-defined]
    return module


_ABSENT = object()


class MonkeyPatch:
    """Changes that end with the test."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def setattr(self, target: Any, name: Any, value: Any = _ABSENT, raising: bool = True) -> None:
        """An attribute of an object, or of a module by its path."""
        if value is _ABSENT:
            path, value = target, name
            module, _, name = path.rpartition(".")
            target = __import__(module, fromlist=["_"])
        old = getattr(target, name, _ABSENT)
        if raising and old is _ABSENT:
            raise AttributeError(name)
        self._undo.append(lambda: delattr(target, name) if old is _ABSENT else setattr(target, name, old))
        setattr(target, name, value)

    def delattr(self, target: Any, name: str, raising: bool = True) -> None:
        """An attribute goes away."""
        if not hasattr(target, name):
            if raising:
                raise AttributeError(name)
            return
        old = getattr(target, name)
        self._undo.append(lambda: setattr(target, name, old))
        delattr(target, name)

    def setitem(self, mapping: Any, key: Any, value: Any) -> None:
        """A key of a mapping."""
        old = mapping.get(key, _ABSENT)
        self._undo.append(lambda: mapping.pop(key, None) if old is _ABSENT else mapping.update({key: old}))
        mapping[key] = value

    def delitem(self, mapping: Any, key: Any, raising: bool = True) -> None:
        """A key goes away."""
        if key not in mapping:
            if raising:
                raise KeyError(key)
            return
        old = mapping.pop(key)
        self._undo.append(lambda: mapping.update({key: old}))

    def setenv(self, name: str, value: Any, prepend: str | None = None) -> None:
        """An environment variable."""
        old = os.environ.get(name)
        self.setitem(os.environ, name, f"{value}{prepend}{old}" if prepend and old else str(value))

    def delenv(self, name: str, raising: bool = True) -> None:
        """An environment variable goes away."""
        self.delitem(os.environ, name, raising)

    def chdir(self, path: Any) -> None:
        """The working directory."""
        old = os.getcwd()
        self._undo.append(lambda: os.chdir(old))
        os.chdir(path)

    def syspath_prepend(self, path: Any) -> None:
        """Where modules are looked for."""
        self._undo.append(lambda: sys.path.remove(str(path)))
        sys.path.insert(0, str(path))

    def undo(self) -> None:
        """All as it was."""
        while self._undo:
            self._undo.pop()()


class _Capture:
    """`capsys`: what was printed since the last look."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()

    def readouterr(self) -> Any:
        """What was printed since the last look."""
        result = Captured(self.out.getvalue(), self.err.getvalue())
        for stream in (self.out, self.err):
            stream.seek(0)
            stream.truncate()
        return result


class Captured(tuple):
    """The pair (out, err)."""

    __slots__ = ()

    def __new__(cls, out: str, err: str) -> Captured:
        """Both texts."""
        return super().__new__(cls, (out, err))

    @property
    def out(self) -> str:
        """What went to stdout."""
        return str(self[0])

    @property
    def err(self) -> str:
        """What went to stderr."""
        return str(self[1])


# --- running tests in pytest's style ----------------------------------------------------------------------------


class _Fixtures:
    """The fixtures one test asked for."""

    def __init__(self, known: Mapping[str, Any], instance: Any, stack: contextlib.ExitStack) -> None:
        self.known, self.instance, self.stack = known, instance, stack
        self.made: dict[str, Any] = {}

    def value(self, name: str, parameter: Any = _ABSENT) -> Any:
        if name not in self.made:
            self.made[name] = self._make(name, parameter)
        return self.made[name]

    def _make(self, name: str, parameter: Any) -> Any:
        if name in self.known:
            function = self.known[name]
            names = [n for n in inspect.signature(function).parameters if n != "self"]
            request = types.SimpleNamespace(
                param=None if parameter is _ABSENT else parameter,
                instance=self.instance,
                getfixturevalue=self.value,
                addfinalizer=lambda f: self.stack.callback(f),
            )
            arguments = {n: request if n == "request" else self.value(n) for n in names}
            if "self" in inspect.signature(function).parameters:
                arguments["self"] = self.instance
            result = function(**arguments)
            if inspect.isgenerator(result):
                generator = result
                result = next(generator)
                self.stack.callback(lambda: next(generator, None))
            return result
        match name:
            case "monkeypatch":
                patch = MonkeyPatch()
                self.stack.callback(patch.undo)
                return patch
            case "tmp_path":
                import pathlib

                return pathlib.Path(tempfile.mkdtemp())
            case "tmpdir":
                return self.value("tmp_path")
            case "capsys":
                capture = _Capture()
                self.stack.enter_context(contextlib.redirect_stdout(capture.out))
                self.stack.enter_context(contextlib.redirect_stderr(capture.err))
                return capture
        raise Failed(f"there is no fixture {name}")


def _cases(marks: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a parametrized test."""
    axes = []
    for mark in marks:
        if mark[0] == "parametrize":
            _, names, values = mark
            axes.append(
                [
                    dict(
                        zip(
                            names,
                            value if len(names) > 1 or isinstance(value, _Param) else [value],
                            strict=True,
                        )
                    )
                    for value in values
                ]
            )
    for combination in itertools.product(*axes):
        yield {name: value for part in combination for name, value in part.items()}


def _fixture_cases(known: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    axes = [
        [(name, value) for value in known[name]._fixture["params"]]
        for name in names
        if name in known and known[name]._fixture.get("params")
    ]
    for combination in itertools.product(*axes):
        yield dict(combination)


def _run_case(
    function: Any,
    instance: Any,
    known: Mapping[str, Any],
    given: dict[str, Any],
    parameters: dict[str, Any],
    setup: str,
    teardown: str,
) -> None:
    with contextlib.ExitStack() as stack:
        fixtures = _Fixtures(known, instance, stack)
        for name, fixed in known.items():
            if fixed._fixture.get("autouse"):
                fixtures.value(name, parameters.get(name, _ABSENT))
        if instance is not None:
            for hook in (getattr(instance, setup, None), getattr(instance, "setup", None)):
                if callable(hook):
                    hook(*([function] if len(inspect.signature(hook).parameters) else []))
            last = getattr(instance, teardown, None)
            if callable(last):
                stack.callback(last, *([function] if len(inspect.signature(last).parameters) else []))
        arguments = dict(given)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in given or parameter.default is not inspect.Parameter.empty:
                continue
            if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            arguments[name] = fixtures.value(name, parameters.get(name, _ABSENT))
        result = function(**arguments)
        if inspect.iscoroutine(result):
            import asyncio

            asyncio.run(result)


def _run_function(
    name: str, function: Any, owner: Any, known: Mapping[str, Any], outcomes: dict[str, str]
) -> None:
    marks = list(getattr(function, "_marks", [])) + list(getattr(owner, "_marks", []))
    if any(mark[0] == "skip" for mark in marks):
        outcomes[name] = "skipped"
        return
    wanted = list(inspect.signature(function).parameters)
    cases = itertools.product(list(_cases(marks)), list(_fixture_cases(known, wanted)))
    for number, (given, parameters) in enumerate(cases):
        case_name = f"{name}[{number}]"
        try:
            instance = owner() if owner is not None else None
            bound = getattr(instance, function.__name__) if owner is not None else function
            _run_case(bound, instance, known, given, parameters, "setup_method", "teardown_method")
        except BaseException:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of a solution are failures too
            outcomes[case_name] = traceback.format_exc(limit=-3)[-500:]
        else:
            outcomes[case_name] = "passed"


def run_pytest_style(module: types.ModuleType) -> dict[str, str]:
    """Every `test*` function, `Test*` class and unittest.TestCase of a module: what became of each case."""
    outcomes: dict[str, str] = {}
    contents = dict(vars(module))
    known = {
        v._fixture["name"]: v for v in contents.values() if inspect.isfunction(v) and hasattr(v, "_fixture")
    }
    setup = contents.get("setup_module") or contents.get("setUpModule")
    if callable(setup):
        setup(*([module] if len(inspect.signature(setup).parameters) else []))
    for name, value in contents.items():
        if getattr(value, "__module__", None) != module.__name__:
            continue  # Imported, from the solution perhaps.
        if inspect.isclass(value) and issubclass(value, unittest.TestCase):
            outcomes.update(run_unittest(value))
        elif inspect.isclass(value) and name.startswith("Test") and "__init__" not in vars(value):
            methods = {k: v for base in reversed(value.__mro__) for k, v in vars(base).items()}
            own = {
                v._fixture["name"]: v
                for v in methods.values()
                if inspect.isfunction(v) and hasattr(v, "_fixture")
            }
            hook = getattr(value, "setup_class", None)
            if callable(hook):
                hook()
            for method_name, method in methods.items():
                if method_name.startswith("test") and inspect.isfunction(method):
                    unbound = _without_self(method)
                    _run_function(f"{name}.{method_name}", unbound, value, {**known, **own}, outcomes)
        elif inspect.isfunction(value) and name.startswith("test"):
            _run_function(name, value, None, known, outcomes)
    return outcomes


def _without_self(method: Any) -> Any:
    """The method with the signature that a caller sees, for looking up its arguments."""

    class Seen:
        __name__ = method.__name__
        __signature__ = inspect.Signature(list(inspect.signature(method).parameters.values())[1:])
        _marks = vars(method).get("_marks", [])

        def __call__(self) -> None:
            raise AssertionError("called through its instance")

    return Seen()


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
        self.outcomes[str(test)] = text[-500:]

    def addError(self, test: Any, err: Any) -> None:
        self._note(test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._note(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._note(test, err)

    def addSkip(self, test: Any, reason: str) -> None:
        # A decorator's skip is the test author's; one that is raised may be the solution's.
        method = getattr(test, getattr(test, "_testMethodName", ""), None)
        marked = getattr(type(test), "__unittest_skip__", False) or getattr(
            method, "__unittest_skip__", False
        )
        self.outcomes[str(test)] = "skipped" if marked else f"skipped while it ran: {reason}"

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.outcomes[str(test)] = "unexpected success"


def run_unittest(case: type[unittest.TestCase]) -> dict[str, str]:
    """Every test of a class: what became of it."""
    result = _Result()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result.outcomes


# --- the run ----------------------------------------------------------------------------------------------------


def _limit(limits: Mapping[str, int], uid: int | None) -> None:
    import resource

    if (
        uid is not None
    ):  # Begun as root, so that the limit of processes can be counted for a user of this run alone.
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
    """What decides over a test, to see afterwards that it is what it was."""
    seen: dict[str, Any] = {}
    for owner in (
        unittest.TestCase,
        unittest.TestResult,
        unittest.TestSuite,
        _Result,
        Approx,
        _Raises,
        _Warns,
    ):
        seen.update({f"{owner.__module__}.{owner.__qualname__}.{k}": v for k, v in vars(owner).items()})
    for name in ("run_unittest", "run_pytest_style", "_run_function", "_run_case"):
        seen[name] = globals()[name]
    return {k: v for k, v in seen.items() if not k.rpartition(".")[2].startswith("__") or callable(v)}


def _load(name: str, path: str, text: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    import linecache

    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    return module


def _run(style: str, solution: str, tests: str) -> dict[str, str]:
    folder = os.getcwd()
    path = os.path.join(folder, f"{SOLUTION}.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(solution)
    if style == "pytest":
        stand_in = pytest_stand_in()
        sys.path.insert(0, folder)
        sys.modules["pytest"] = stand_in
        _load(SOLUTION, path, solution)
        if sys.modules.get("pytest") is not stand_in:
            raise RuntimeError("the solution replaced the test framework")
        outcomes = run_pytest_style(_load(TESTS, os.path.join(folder, f"{TESTS}.py"), tests))
    else:
        # One module, as in BigCodeBench's own harness. It also answers to __main__, for patches of `__main__.name`.
        program = types.ModuleType("__test__")
        program.__dict__.update({"sys": sys, "os": os, "environ": os.environ, "__file__": path})
        sys.modules["__test__"] = sys.modules["__main__"] = program
        text = solution + "\n" + tests
        import linecache

        linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
        exec(compile(text, path, "exec", dont_inherit=True), program.__dict__)
        cases = [
            v
            for v in vars(program).values()
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
    os.dup2(2, 1)  # What the solution prints is no report.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    begun = os.getpid()
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
    if getpid() != begun:
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
