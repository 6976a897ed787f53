"""Runs a solution and its tests inside the sandbox. Standard library only: this package is not installed there.

Two processes. The first reads the task from standard input, a pipe that is at its end before the solution runs, applies the
resource limits, and forks the second, which runs the solution and its tests and says which tests passed. The first adds the
nonce that the caller made for this run, which the second never had, and writes the report to the file descriptor that was
standard output; what the solution prints goes to standard error. So a solution that exits early, forks, never returns or
writes into every open file produces no report that counts.

The solution and its tests share a process, as they do in the benchmarks' own harnesses. What judges was bound before the
solution is loaded: this module's functions have builtins of their own and are not reachable as `__main__`, the tests are
compiled and listed first, and unittest, contextlib and this module are compared with what they were after every test. A
verdict is one of three constants. In a test's comparison with a builtin value, an object whose class compares by a method of
the solution's is its builtin value, or unequal to everything. What remains: a solution written against this harness that
walks the interpreter's frames or memory, or that changes unittest and changes it back within one test.

Tests in pytest's style run on the subset of pytest in this file. pytest itself was tried and rejected: on 45
BigCodeBench items the verdicts agree, but an item takes 0.69 s instead of 0.26 s (import and configuration of pytest),
and the solution can forge a verdict through any of pytest's modules, hooks and plugins, in one line
(`_pytest.python.Function.runtest = lambda self: None`).
"""

from __future__ import annotations

import _weakref
import ast
import builtins
import collections
import contextlib
import inspect
import io
import itertools
import json
import linecache
import math
import operator
import os
import re
import select
import signal
import sys
import tempfile
import traceback
import types
import unittest
import unittest.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# The functions below see these builtins, whatever a solution does to the others.
globals()["__builtins__"] = dict(vars(builtins))

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
SOLUTION = "solution"
TESTS = "test_solution"
_REPORT_BYTES = 4 << 20
_ABSENT = object()
_signature, _product, _search, _format_exc = (
    inspect.signature,
    itertools.product,
    re.search,
    traceback.format_exc,
)
_getframe = sys._getframe
_quoted = json.encoder.encode_basestring_ascii


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
        if self.match is not None and not _search(self.match, str(value)):
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


class warns:
    """Fails if the block does not warn; the context is the list of warnings."""

    def __init__(self, expected: Any = Warning, *, match: str | None = None) -> None:
        self.expected, self.match = expected, match
        self.context = warnings.catch_warnings(record=True)

    def __enter__(self) -> Any:
        self.records = self.context.__enter__()
        warnings.simplefilter("always")
        return self.records

    def __exit__(self, kind: Any, value: Any, tb: Any) -> None:
        self.context.__exit__(kind, value, tb)
        if kind is None and not any(
            issubclass(r.category, self.expected)
            and (self.match is None or _search(self.match, str(r.message)))
            for r in self.records or ()
        ):
            raise Failed(f"did not warn {self.expected}")


class Approx:
    """`pytest.approx`: numbers, and sequences and mappings of them."""

    __array_ufunc__ = None
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:
        self.expected, self.nan_ok = expected, nan_ok
        self.made_in = _getframe(1).f_code.co_filename
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
        return function(*arguments[: len(_signature(function).parameters)])
    return None


def _fixtures_in(namespace: Mapping[str, Any]) -> dict[str, Any]:
    functions = [v for v in namespace.values() if type(v) is types.FunctionType and hasattr(v, "_fixture")]
    return {f._fixture["name"]: f for f in functions}


class _Fixtures:
    """The fixtures of one test case: known functions by name, and the parameter of each that has one."""

    def __init__(
        self,
        known: Mapping[str, Any],
        parameters: Mapping[str, Any],
        instance: Any,
        finalizers: list[Callable[[], Any]],
    ) -> None:
        self.known, self.parameters, self.instance = known, parameters, instance
        self.finalizers = finalizers
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
            addfinalizer=self.finalizers.append,
        )
        special = {"self": self.instance, "request": request}
        names = _signature(function).parameters
        result = function(**{n: special[n] if n in special else self.value(n) for n in names})
        if type(result) is not types.GeneratorType:
            return result
        self.finalizers.append(lambda: next(result, None))
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
    for arguments in _product(*argument_axes):
        for parameters in _product(*fixture_axes):
            yield _merged(arguments), _merged(parameters)


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in reversed(parts) for name, value in part.items()}


def _run_case(
    function: Any,
    instance: Any,
    known: Mapping[str, Any],
    arguments: dict[str, Any],
    parameters: Mapping[str, Any],
) -> None:
    finalizers: list[Callable[[], Any]] = []
    try:
        fixtures = _Fixtures(known, parameters, instance, finalizers)
        for name, made in known.items():
            if made._fixture.get("autouse"):
                fixtures.value(name)
        if instance is not None:
            _call(getattr(instance, "setup_method", None), function)
            _call(getattr(instance, "setup", None), function)
            finalizers.append(lambda: _call(getattr(instance, "teardown_method", None), function))
        for name, parameter in _signature(function).parameters.items():
            given = name in arguments or parameter.default is not parameter.empty
            if not given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                arguments[name] = fixtures.value(name)
        result = function(**arguments)
        if type(result) is types.CoroutineType:
            _await(result)
    finally:
        while finalizers:
            finalizers.pop()()


def _await(coroutine: Any) -> None:
    import asyncio

    ended = []

    async def whole() -> None:
        await coroutine
        ended.append(True)

    asyncio.run(whole())
    if not ended:
        raise Failed("the coroutine was not run")


def _run_function(name: str, function: Any, owner: Any, known: Mapping[str, Any], verdicts: Verdicts) -> None:
    verdicts.ran.add(name)
    marks = [*getattr(function, "_marks", []), *getattr(owner, "_marks", [])]
    if any(mark[0] == "skip" for mark in marks):
        verdicts.note(name, SKIPPED)
        return
    wanted = list(_signature(function).parameters)
    for number, (arguments, parameters) in enumerate(_cases(marks, known, wanted)):
        case = f"{name}[{number}]"
        try:
            instance = owner() if owner is not None else None
            bound = getattr(instance, function.__name__) if owner is not None else function
            _run_case(bound, instance, known, arguments, parameters)
        except BaseException:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of a solution are failures too
            verdicts.note(case, FAILED, _format_exc)
        else:
            verdicts.note(case, PASSED)


class Verdicts:
    """What came of each test: a constant by the name of its case. The details are for people and decide nothing."""

    def __init__(self, intact: Callable[[], bool]) -> None:
        self.outcomes: dict[str, str] = {}
        self.details: dict[str, str] = {}
        self.ran: set[str] = set()
        self.intact = intact
        self.error: str | None = None

    def note(self, case: str, verdict: str, detail: Callable[[], str] | None = None) -> None:
        """Notes a verdict; the first failure of a case stays."""
        if not self.intact():
            self.error = "the solution changed how tests are judged"
        if self.outcomes.get(case, PASSED) != FAILED:
            self.outcomes[case] = verdict
            if detail is not None:
                with contextlib.suppress(BaseException):
                    self.details[case] = str(detail())[-500:]


def run_pytest_style(module: types.ModuleType, verdicts: Verdicts) -> None:
    """Runs every `test*` function, `Test*` class and unittest.TestCase of a module."""
    contents = dict(vars(module))
    known = {**_BUILT_IN_FIXTURES, **_fixtures_in(contents)}
    _call(contents.get("setup_module") or contents.get("setUpModule"), module)
    for name, value in contents.items():
        if getattr(value, "__module__", None) != module.__name__:
            continue  # Imported, from the solution perhaps.
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            run_unittest(value, verdicts)
        elif isinstance(value, type) and name.startswith("Test") and "__init__" not in vars(value):
            methods = {k: v for base in reversed(value.__mro__) for k, v in vars(base).items()}
            _call(getattr(value, "setup_class", None))
            for method_name, method in methods.items():
                if method_name.startswith("test") and type(method) is types.FunctionType:
                    known_there = {**known, **_fixtures_in(methods)}
                    _run_function(f"{name}.{method_name}", method, value, known_there, verdicts)
        elif type(value) is types.FunctionType and name.startswith("test"):
            _run_function(name, value, None, known, verdicts)


# --- running unittest -------------------------------------------------------------------------------------------


class _Result(unittest.TestResult):
    def __init__(self, verdicts: Verdicts) -> None:
        super().__init__()
        self.verdicts = verdicts

    @staticmethod
    def _name(test: Any) -> str:
        return f"{type(test).__name__}.{getattr(test, '_testMethodName', 'setUpClass')}"

    def _fail(self, test: Any, error: Any) -> None:
        self.verdicts.note(
            self._name(test), FAILED, lambda: "".join(traceback.format_exception(*error, limit=-3))
        )

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.verdicts.ran.add(self._name(test))

    def addSuccess(self, test: Any) -> None:
        self.verdicts.note(self._name(test), PASSED)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.verdicts.note(self._name(test), PASSED)

    def addError(self, test: Any, err: Any) -> None:
        self._fail(test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._fail(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._fail(test, err)

    def addSkip(self, test: Any, reason: str) -> None:
        # A decorator's skip is the test author's; a raised one may be the solution's.
        method = getattr(test, getattr(test, "_testMethodName", ""), None)
        marked = getattr(type(test), "__unittest_skip__", False) or getattr(
            method, "__unittest_skip__", False
        )
        self.verdicts.note(
            self._name(test), SKIPPED if marked else FAILED, lambda: f"skipped while it ran: {reason}"
        )

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.verdicts.note(self._name(test), FAILED, lambda: "unexpected success")


_TestSuite = unittest.TestSuite


def run_unittest(case: type[unittest.TestCase], verdicts: Verdicts) -> None:
    """Runs every test of a class."""
    attributes = {name: value for base in reversed(case.__mro__) for name, value in vars(base).items()}
    names = sorted(name for name, value in attributes.items() if name.startswith("test") and callable(value))
    _TestSuite(case(name) for name in names).run(_Result(verdicts))


# --- comparisons in tests ---------------------------------------------------------------------------------------

_ATOMS = frozenset({int, float, complex, bool, str, bytes, bytearray, range, type(None)})
_BASES: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__add__(value, 0),
    float: lambda value: float.__add__(value, 0.0),
    complex: lambda value: complex.__add__(value, 0j),
    str: lambda value: str.__add__(value, ""),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    bytearray: lambda value: bytearray.__getitem__(value, slice(None)),
    list: lambda value: list.__getitem__(value, slice(None)),
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
}
"""Builtin types, and how to get the builtin value of an object of a class derived from one."""
_BUILTINS = _ATOMS | frozenset(_BASES)
_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_ASSERTIONS = frozenset(
    f"assert{name}"
    for name in (
        "Equal", "Equals", "NotEqual", "AlmostEqual", "NotAlmostEqual", "Greater", "GreaterEqual", "Less", "LessEqual",
        "In", "NotIn", "ListEqual", "TupleEqual", "DictEqual", "SetEqual", "CountEqual", "SequenceEqual", "MultiLineEqual",
    )
)  # fmt: skip
_mro = vars(type)["__mro__"].__get__
_attributes = vars(type)["__dict__"].__get__
_PROXIES = (_weakref.ProxyType, _weakref.CallableProxyType)


class _Unequal:
    """Stands for an object that decides itself what it is equal to: only another such object can be."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return type(other) is _Unequal and bool(self.value == other.value)


class Comparisons:
    """Comparisons of tests, in which no method of the solution's takes part if the other side is a builtin value."""

    def __init__(self, trusted: Sequence[str], any_is_meant: bool) -> None:
        """Takes the folders and files whose classes may compare as they like, and whether tests use `mock.ANY`."""
        self.trusted = tuple(trusted)
        self.any_is_meant = any_is_meant

    def pair(self, first: Any, second: Any) -> tuple[Any, Any]:
        """Both as they are to be compared."""
        if type(first) in _BUILTINS or type(second) in _BUILTINS or Approx in (type(first), type(second)):
            return self._plain(first, frozenset()), self._plain(second, frozenset())
        return first, second

    def comparing(self, operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The operator on such a pair."""
        return lambda first, second: operation(*self.pair(first, second))

    def _plain(self, value: Any, within: frozenset[int]) -> Any:
        kind = type(value)
        if kind is Approx and not value.made_in.startswith(self.trusted):
            return _Unequal(value)
        if kind in _ATOMS or kind is Approx or id(value) in within or len(within) > 100:
            return value
        base = next((base for base in _mro(kind) if base in _BASES), None)
        if self._decides_itself(kind):
            if base is None:
                return _Unequal(value)
            value, kind = _BASES[base](value), base
        if base in (list, tuple, set, frozenset):
            return self._children(value, base, within | {id(value)})
        if base is dict:
            within |= {id(value)}
            items = [(self._plain(k, within), self._plain(v, within)) for k, v in dict.items(value)]
            same = all(k is a and v is b for (k, v), (a, b) in zip(items, dict.items(value), strict=True))
            return value if same else dict(items)
        return value

    def _children(self, value: Any, base: Any, within: frozenset[int]) -> Any:
        items = list(base.__iter__(value))
        if all(type(item) in _ATOMS for item in items):
            return value
        plain = [self._plain(item, within) for item in items]
        if all(new is old for new, old in zip(plain, items, strict=True)):
            return value
        return base(plain)

    def _decides_itself(self, kind: type) -> bool:
        if kind in _PROXIES or (kind.__name__ == "_ANY" and not self.any_is_meant):
            return True
        for name in _COMPARISONS:
            method = next((_attributes(base)[name] for base in _mro(kind) if name in _attributes(base)), None)
            if type(method) is types.FunctionType:
                if not method.__code__.co_filename.startswith(self.trusted):
                    return True
            elif type(method) is types.WrapperDescriptorType:
                if method.__name__ != name:
                    return True
            elif method is not None and type(method).__name__ not in (
                "method_descriptor",
                "cython_function_or_method",
            ):
                return True
        return False


class _Rewriter(ast.NodeTransformer):
    """Puts marks, as constants, where comparisons are to be called."""

    def __init__(self) -> None:
        self.marks: dict[str, Any] = {}

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1 or type(node.ops[0]) not in _OPERATORS:
            return node
        arguments = [node.left, node.comparators[0]]
        return ast.copy_location(ast.Call(_mark(type(node.ops[0]).__name__), arguments, []), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        simple = len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2])
        if simple and isinstance(node.func, ast.Attribute) and node.func.attr in _ASSERTIONS:
            node.args[:2] = [ast.Starred(ast.Call(_mark("pair"), node.args[:2], []), ast.Load())]
        return node


_MARK = "\0memgen:"


def _mark(name: str) -> ast.Constant:
    return ast.Constant(_MARK + name)


def _compiled(text: str, path: str, comparisons: Comparisons) -> types.CodeType:
    """A test file's code, whose comparisons are those of `comparisons`; no name leads to them."""
    marks: dict[str, Any] = {
        _MARK + kind.__name__: comparisons.comparing(operation) for kind, operation in _OPERATORS.items()
    }
    marks[_MARK + "pair"] = comparisons.pair

    def replaced(code: types.CodeType) -> types.CodeType:
        constants = [
            replaced(c) if isinstance(c, types.CodeType) else marks.get(c, c) if type(c) is str else c
            for c in code.co_consts
        ]
        return code.replace(co_consts=tuple(constants))

    tree = ast.fix_missing_locations(_Rewriter().visit(ast.parse(text, path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A constant is called.
        return replaced(compile(tree, path, "exec", dont_inherit=True))


def _declared(text: str, style: str) -> set[str]:
    """The tests that the text of a test file declares at its top level."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))]
            is_case = any(ast.unparse(base).endswith("TestCase") for base in node.bases)
            plain = style == "pytest" and node.name.startswith("Test") and not node.bases
            if is_case or (plain and "__init__" not in {method.name for method in methods}):
                found |= {f"{node.name}.{m.name}" for m in methods if m.name.startswith("test")}
        elif (
            style == "pytest"
            and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.name.startswith("test")
            and not node.decorator_list
        ):
            found.add(node.name)
    return found


def _names_not_imported(text: str) -> set[str]:
    """Names that a test file uses and neither binds nor imports, builtins aside."""
    used: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return used - bound


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


class Judges:
    """The functions and classes that decide whether a test passes, to detect later that one was replaced or changed."""

    def __init__(self) -> None:
        """Takes them as they are now."""
        self._functions: list[tuple[Mapping[str, Any], str, Any, Any, Any, Any, Any]] = []
        self._sizes: list[tuple[Mapping[str, Any], int]] = []
        for contents in [*(vars(module) for module in _JUDGING), _GLOBALS]:
            self._see(contents)
            for value in list(contents.values()):
                if type(value) is type and value.__module__ == contents["__name__"]:
                    attributes = _attributes(value)
                    self._see(attributes)
                    self._sizes.append((attributes, len(attributes)))

    def _see(self, contents: Mapping[str, Any]) -> None:
        for name, value in list(contents.items()):
            inner = value.__func__ if type(value) in (staticmethod, classmethod) else value
            if type(inner) is types.FunctionType:
                own = (inner, inner.__code__, inner.__defaults__, inner.__kwdefaults__)
                self._functions.append((contents, name, value, *own))
            elif callable(value) or type(value) is property:
                self._functions.append((contents, name, value, None, None, None, None))

    def intact(self) -> bool:
        """Whether all of them are what they were."""
        for contents, name, value, inner, code, defaults, keywords in self._functions:
            if contents.get(name) is not value or (
                inner is not None
                and not (
                    inner.__code__ is code
                    and inner.__defaults__ is defaults
                    and inner.__kwdefaults__ is keywords
                )
            ):
                return False
        return all(len(contents) == size for contents, size in self._sizes)


_JUDGING = (
    contextlib, unittest, unittest.case, unittest.result, unittest.suite, unittest.util,
)  # fmt: skip
_GLOBALS = globals()


def _execute(module: types.ModuleType, path: str, text: str, code: types.CodeType) -> types.ModuleType:
    """Runs a module's code; tracebacks show the lines of its text."""
    module.__file__ = path
    sys.modules[module.__name__] = module
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    vars(module)["__builtins__"] = builtins
    exec(code, module.__dict__)
    return module


def _run(style: str, solution: str, tests: str, verdicts: Verdicts) -> None:
    folder = os.getcwd()
    path, test_path = (os.path.join(folder, f"{name}.py") for name in (SOLUTION, TESTS))
    with open(path, "w", encoding="utf-8") as file:
        file.write(solution)
    folders = [entry for entry in sys.path if entry and entry != folder]
    comparisons = Comparisons([*folders, "<frozen ", test_path], any_is_meant="ANY" in tests)
    declared, missing = _declared(tests, style), _names_not_imported(tests)
    test_code = _compiled(tests, test_path, comparisons)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        solution_code = compile(solution, path, "exec", dont_inherit=True)
    if style == "pytest":
        subset = pytest_subset()
        sys.path.insert(0, folder)
        sys.modules["pytest"] = subset
        made = _execute(types.ModuleType(SOLUTION), path, solution, solution_code)
        if sys.modules.get("pytest") is not subset:
            raise RuntimeError("the solution replaced the test framework")
        module = types.ModuleType(TESTS)
        # KodCode's own harness imports the solution before every test.
        vars(module).update({name: vars(made)[name] for name in missing if name in vars(made)})
        if "pytest" in missing:
            vars(module)["pytest"] = subset
        run_pytest_style(_execute(module, test_path, tests, test_code), verdicts)
    else:
        # One module, as in BigCodeBench's own harness. It also answers to __main__, for patches of `__main__.name`.
        program = types.ModuleType("__test__")
        program.__dict__.update({"sys": sys, "os": os, "environ": os.environ})
        sys.modules["__main__"] = program
        _execute(program, path, solution, solution_code)
        contents = vars(_execute(program, test_path, tests, test_code))
        cases = [
            v
            for v in contents.values()
            if isinstance(v, type) and issubclass(v, unittest.TestCase) and v is not unittest.TestCase
        ]
        for case in dict.fromkeys(cases):
            run_unittest(case, verdicts)
    if left := declared - verdicts.ran:
        raise RuntimeError(f"not all tests ran: {sorted(left)[:3]}")
    with open(path, encoding="utf-8") as file:
        if file.read() != solution:
            raise RuntimeError("the solution's file was changed")


def _sender(report: int, key: str) -> Callable[[str], None]:
    """A function that writes one line to the first process, which takes only lines that begin with the key."""
    write = os.write

    def send(line: str) -> None:
        data = f"{key}{line}\n".encode()
        while data:
            data = data[write(report, data) :]

    return send


def _answer(task: Mapping[str, Any], send: Callable[[str], None]) -> None:
    """Runs the solution and its tests, and sends what came of them. Does not return."""
    leave, getpid, flushes = os._exit, os.getpid, (sys.stdout.flush, sys.stderr.flush)
    started, intact = getpid(), Judges().intact
    verdicts = Verdicts(intact)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        _run(task["style"], task["solution"], task["tests"], verdicts)
        if not intact():
            verdicts.error = "the solution changed how tests are judged"
    except BaseException:  # noqa: BLE001 - a solution may raise anything, SystemExit too
        verdicts.error = "the code failed"
        with contextlib.suppress(BaseException):
            verdicts.error = str(_format_exc(limit=-3))[-1000:]
    if getpid() != started:
        leave(1)
    for flush in flushes:
        with contextlib.suppress(BaseException):
            flush()
    error = "null" if verdicts.error is None else _quoted(verdicts.error)
    outcomes, details = _object(verdicts.outcomes), _object(verdicts.details)
    send(f'{{"error": {error}, "outcomes": {outcomes}, "details": {details}}}')
    leave(0)


def _object(items: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{_quoted(name)}: {_quoted(value)}" for name, value in items.items()) + "}"


def _read(file: int, size: int) -> bytes:
    """So many bytes, or less at the end."""
    data = b""
    while len(data) < size and (chunk := os.read(file, size - len(data))):
        data += chunk
    return data


def _wait(child: int, report: int) -> tuple[int, bytes]:
    """The exit status of the second process, and what it has written until then."""
    data = b""
    process = os.pidfd_open(child)
    poll = select.poll()
    poll.register(report, select.POLLIN)
    poll.register(process, select.POLLIN)
    os.set_blocking(report, False)
    ended = False
    while not ended and len(data) <= _REPORT_BYTES:
        # Other processes of the solution may keep the pipe open, so its end is not waited for.
        ended = any(file == process for file, _ in poll.poll())
        with contextlib.suppress(BlockingIOError):
            while len(data) <= _REPORT_BYTES:
                chunk = os.read(report, 1 << 16)
                data += chunk
                if not chunk:  # All have closed it, the process is about to end.
                    ended = True
                    break
    if ended:
        return os.waitpid(child, 0)[1], data
    return 1, b""


def main() -> None:
    """One run."""
    size = int(_read(0, 16))
    task = json.loads(_read(0, size).decode("utf-8"))
    report = os.dup(1)
    os.dup2(2, 1)  # What the solution prints must not reach the report.
    _limit(task["limits"], task["uid"])
    results, result = os.pipe()
    wait, go = os.pipe()
    key = os.urandom(16).hex()
    send = _sender(result, key)
    child = os.fork()
    if child == 0:
        for file in (0, report, results, go):
            os.close(file)
        os.read(wait, 1)
        os.close(wait)
        os.open(os.devnull, os.O_RDONLY)  # Becomes standard input.
        del key
        _answer(task, send)
    nonce = _read(0, 1024).decode()  # Up to the end: the caller has closed its side.
    for file in (0, result, wait):
        os.close(file)
    if task["uid"] is None:
        _hide()
    os.write(report, b"begun\n")  # From here on, what goes wrong is the solution's doing.
    os.close(go)
    status, text = _wait(child, results)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), os.WTERMSIG(status))  # As if there were one process.
    answer: dict[str, Any] = {"outcomes": {}, "details": {}, "error": f"no report (status {status})"}
    if status == 0 and text.count(b"\n") == 1 and text.startswith(key.encode()):
        answer = json.loads(text[len(key) :])
    os.write(report, json.dumps({**answer, "nonce": nonce}).encode() + b"\n")
    os._exit(0)


def _hide() -> None:
    """Keeps other processes of the same user from reading this one's memory."""
    import ctypes

    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


if __name__ == "__main__":
    main()
