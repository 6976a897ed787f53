"""Finds the key at fault in a configuration that jsonargparse refused, and the nearest valid key.

jsonargparse decides what is valid, but its message lists every branch of every union that did not fit. This module walks
the same document along the signatures to the first key that does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from memgen.cli.config import CLASS_KEYS, Document, with_init_args
from memgen.cli.errors import nearest


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument of a class or function.

    Attributes:
        annotation: its type; Any if it has none that can be evaluated.
        required: True if it has no default.
    """

    annotation: Any
    required: bool


@dataclasses.dataclass(frozen=True)
class Problem:
    """The first thing found wrong.

    Attributes:
        key: the full key.
        message: what is wrong with it; follows the key in the printed line.
        unquoted: the value, if it would be right as a text.
    """

    key: str
    message: str
    unquoted: bool | float | None = None


def find_problem(
    document: Document, top_level: Mapping[str, Any], arguments_of: Mapping[str, Callable[..., Any]]
) -> Problem | None:
    """Walks a resolved document along the signatures.

    Args:
        document: the configuration, without `init_args`.
        top_level: the keys that may stand at the top, each with its type.
        arguments_of: more keys of the top, each with the class whose arguments stand directly below it (trainer).

    Returns:
        The first problem, or None if nothing can be found that way.
    """
    valid = [*arguments_of, *top_level]
    for key, value in document.items():
        if key in arguments_of:
            problem = _check_arguments(value, arguments_of[key], key)
        elif key in top_level:
            problem = _check(value, top_level[key], key)
        else:
            problem = Problem(key, unknown_key(key, valid))
        if problem is not None:
            return problem
    return None


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that no signature has.

    Args:
        key: the full key.
        valid: the keys that may stand in its place, by their last part.
    """
    prefix, _, name = key.rpartition(".")
    guess = nearest(name, valid)
    if guess is not None:
        return f"is not a known key; the nearest valid one is {f'{prefix}.' if prefix else ''}{guess}"
    return f"is not a known key; valid here: {', '.join(sorted(valid)) or 'none'}"


def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """The arguments of a class or function by name, those that `**kwargs` hands to a base class included."""
    functions: list[Callable[..., Any]] = [target]
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target):
            hints = _hints(target)
            return {
                field.name: Parameter(
                    hints.get(field.name, Any),
                    field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
                )
                for field in dataclasses.fields(target)
                if field.init
            }
        functions = [cls.__dict__["__init__"] for cls in target.__mro__ if "__init__" in cls.__dict__]
    found: dict[str, Parameter] = {}
    for function in functions:
        signature = _signature(function)
        hints = _hints(function)
        for index, (name, parameter) in enumerate(signature.items()):
            keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if not keyword or (index == 0 and inspect.isclass(target)):
                continue
            found.setdefault(name, Parameter(hints.get(name, Any), parameter.default is parameter.empty))
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.values()):
            break
    return found


def describe(annotation: Any) -> str:
    """A type in words."""
    if annotation is None or annotation is type(None):
        return "null"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(member) for member in get_args(annotation))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) in (list, tuple, set, typing.Sequence) and get_args(annotation):
        members = [describe(member) for member in get_args(annotation) if member is not Ellipsis]
        return f"a list of {' and '.join(members)}"
    if inspect.isclass(annotation) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    # Lightning wraps Trainer.__init__ (functools.wraps), which `signature` follows.
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(target))
    except (NameError, TypeError, AttributeError):
        # An annotation that only a type checker can evaluate; jsonargparse's own message is shown then.
        return {}


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _check_class(value: Document, base: Any, key: str) -> Problem | None:
    """A class named by `class_path`, with its arguments beside it."""
    path = value["class_path"]
    target, reason = load_class(path, base)
    if reason is not None:
        return Problem(f"{key}.class_path", reason)
    if target is None:
        return None
    arguments = {name: item for name, item in value.items() if name not in CLASS_KEYS}
    return _check_arguments(arguments, target, key, complete=True, name=str(path))


def _check_arguments(
    arguments: Any, target: Any, key: str, *, complete: bool = False, name: str = ""
) -> Problem | None:
    """Arguments against a signature."""
    if not isinstance(arguments, dict):
        return Problem(key, f"must be a mapping, got {arguments!r}")
    known = parameters(target)
    for argument, value in arguments.items():
        full = f"{key}.{argument}"
        if argument not in known:
            return Problem(full, unknown_key(full, list(known)))
        problem = _check(value, known[argument].annotation, full)
        if problem is not None:
            return problem
    if complete:
        for argument, parameter in known.items():
            if parameter.required and argument not in arguments:
                return Problem(f"{key}.{argument}", f"is missing; {name or describe(target)} needs it")
    return None


def _check(value: Any, annotation: Any, key: str) -> Problem | None:
    """A value against a type: deeper problems first, as they say more."""
    members = list(_members(annotation))
    problem = None
    if isinstance(value, dict):
        problem = _check_mapping(value, members, key)
    elif isinstance(value, list):
        element = next(
            (get_args(m)[0] for m in members if get_origin(m) in (list, tuple) and get_args(m)), None
        )
        checked = (
            [] if element is None else [_check(item, element, f"{key}.{i}") for i, item in enumerate(value)]
        )
        problem = next((found for found in checked if found is not None), None)
    # jsonargparse lets a number through to the constructor where a record belongs.
    misplaced = dataclasses.is_dataclass(members[0]) and not isinstance(value, dict) and value is not None
    if problem is None and (misplaced or not _fits(value, annotation)):
        unquoted = value if str in members and isinstance(value, bool | int | float) else None
        wanted = describe(annotation)
        if misplaced:
            wanted = f"a mapping ({wanted})"
        return Problem(key, f"must be {wanted}, got {value!r} ({type(value).__name__})", unquoted)
    return problem


def _check_mapping(value: Document, members: list[Any], key: str) -> Problem | None:
    """A mapping for a record, or for a class with its arguments."""
    members = [member for member in members if member is not type(None)]
    classes = [member for member in members if inspect.isclass(member)]
    if "class_path" in value:
        return _check_class(value, classes[0] if classes else object, key)
    records = [member for member in members if dataclasses.is_dataclass(member)]
    if len(records) == 1:
        return _check_arguments(value, records[0], key, complete=True)
    if len(classes) == len(members) and not any(issubclass(member, Mapping) for member in classes):
        return Problem(key, f"has no class_path, which names the {describe(classes[0])} to build")
    return None


def _fits(value: Any, annotation: Any) -> bool:
    """Asks jsonargparse about one value."""
    if annotation is Any:
        return True
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=annotation)
    except ValueError:
        # A type that jsonargparse takes only inside a signature.
        return True
    try:
        parser.parse_object({"value": with_init_args(value)})
    except ArgumentError:
        return False
    return True


def load_class(path: Any, base: Any) -> tuple[Any, str | None]:
    """Finds what a `class_path` names.

    Args:
        path: the value of `class_path`: a dotted name, or the short name of a class that is already imported.
        base: what it must be a subclass of.

    Returns:
        The class or function (None if it is not known), and why it cannot be used (None if it can).
    """
    if not isinstance(path, str):
        return None, f"must be the dotted name of a class, got {path!r}"
    if "." not in path:
        candidates = {cls.__name__: cls for cls in _subclasses(base)} if inspect.isclass(base) else {}
        if path in candidates or not candidates:
            return candidates.get(path), None
        guess = nearest(path, candidates)
        return None, f"is {path}, which is no known {describe(base)}" + (
            f"; did you mean {guess}?" if guess else ""
        )
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return None, f"is {path}, which cannot be imported: {error}"
    if not hasattr(module, name):
        classes = [n for n, item in vars(module).items() if inspect.isclass(item) or inspect.isfunction(item)]
        guess = nearest(name, classes)
        hint = f"; did you mean {module_name}.{guess}?" if guess else ""
        return None, f"is {path}, but {module_name} has no {name}{hint}"
    target = getattr(module, name)
    if inspect.isclass(target) and inspect.isclass(base) and not issubclass(target, base):
        return None, f"is {path}, which is not a {describe(base)}"
    return target, None


def _subclasses(base: type) -> Iterator[type]:
    """A class and everything that inherits from it, as far as it has been imported."""
    yield base
    subclasses: list[type] = type.__subclasses__(base)
    for subclass in subclasses:
        yield from _subclasses(subclass)
