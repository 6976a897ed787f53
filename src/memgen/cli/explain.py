"""Says in one line what is wrong with a configuration that jsonargparse refused.

jsonargparse decides what is valid. Its message lists every branch of every union that did not fit; this module walks the
same document along the signatures and finds the one key, with its full name, and the valid key nearest to it.
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

from memgen.cli.config import CLASS_KEYS, SECTIONS, Document
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
        key: the full key, in the form a person writes.
        message: what is wrong with it, to stand behind the key.
    """

    key: str
    message: str


def find_problem(
    document: Document, top_level: Mapping[str, Any], sections: Mapping[str, Any]
) -> Problem | None:
    """Walks a resolved document in tidy form.

    Args:
        document: the configuration.
        top_level: the keys that may stand at the top, each with its type.
        sections: the class whose arguments a section takes (trainer), or the base class that its `class_path` names
            (model, data).

    Returns:
        The first problem, or None if nothing can be found that way.
    """
    valid = [*sections, *top_level]
    for key, value in document.items():
        if key not in valid:
            return Problem(key, unknown_key(key, valid))
        if key in top_level:
            problem = _check(value, top_level[key], key)
        elif key in SECTIONS:
            problem = _check_section(value, sections[key], key)
        else:
            problem = _check_arguments(value, sections[key], key)
        if problem is not None:
            return problem
    return None


def unknown_key(key: str, valid: list[str]) -> str:
    """What to say behind the full name of a key that nothing takes.

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
    """A type as a person would say it."""
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
        # An annotation that only a type checker can evaluate; jsonargparse's own message has to do then.
        return {}


def _members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _check_section(value: Any, base: Any, key: str) -> Problem | None:
    """A class chosen by `class_path`, with its arguments beside it."""
    if not isinstance(value, dict):
        return Problem(key, f"must be a mapping with class_path, got {value!r}")
    arguments = {name: item for name, item in value.items() if name not in CLASS_KEYS}
    return _check_class(value.get("class_path"), arguments, base, key, separator="")


def _check_class(path: Any, arguments: Any, base: Any, key: str, separator: str) -> Problem | None:
    """A class named by `class_path` and the arguments given for it."""
    if path is None:
        return Problem(key, f"has no class_path, which names the {describe(base)} to build")
    target, reason = load_class(path, base)
    if reason is not None:
        return Problem(f"{key}.class_path", reason)
    if target is None or not isinstance(arguments, dict):
        return None
    return _check_arguments(arguments, target, f"{key}{separator}", complete=True, name=str(path))


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
    if isinstance(value, dict):
        problem = _check_mapping(value, members, key)
        if problem is not None:
            return problem
    if isinstance(value, list):
        element = next(
            (
                get_args(member)[0]
                for member in members
                if get_origin(member) in (list, tuple) and get_args(member)
            ),
            None,
        )
        for index, item in enumerate(value if element is not None else []):
            problem = _check(item, element, f"{key}.{index}")
            if problem is not None:
                return problem
    elif not isinstance(value, dict) and dataclasses.is_dataclass(members[0]) and value is not None:
        return Problem(
            key, f"must be a mapping ({describe(annotation)}), got {value!r} ({type(value).__name__})"
        )
    return _check_type(value, annotation, key)


def _check_mapping(value: Document, members: list[Any], key: str) -> Problem | None:
    """A mapping that stands for a record, or for a class with its arguments."""
    records = [member for member in members if dataclasses.is_dataclass(member)]
    if "class_path" in value:
        others = [name for name in value if name not in (*CLASS_KEYS, "init_args")]
        if others:
            return Problem(f"{key}.{others[0]}", f"belongs below init_args: {key}.init_args.{others[0]}")
        bases = [member for member in members if inspect.isclass(member) and member is not type(None)]
        return _check_class(
            value["class_path"],
            value.get("init_args") or {},
            bases[0] if bases else object,
            key,
            ".init_args",
        )
    if len(records) == 1:
        return _check_arguments(value, records[0], key, complete=True)
    return None


def _check_type(value: Any, annotation: Any, key: str) -> Problem | None:
    """Asks jsonargparse about one value."""
    if annotation is Any:
        return None
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=annotation)
    except ValueError:
        # A type that jsonargparse takes only inside a signature.
        return None
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        hint = ""
        if str in _members(annotation) and isinstance(value, bool | int | float):
            hint = f"; to mean the text, quote it: '\"{value}\"'"
        return Problem(key, f"must be {describe(annotation)}, got {value!r} ({type(value).__name__}){hint}")
    return None


def load_class(path: Any, base: Any) -> tuple[Any, str | None]:
    """Finds what a `class_path` names.

    Args:
        path: the value of `class_path`: a dotted name, or the short name of a class that is already imported.
        base: what it must be a subclass of.

    Returns:
        The class or function (None if that cannot be told from here), and why it cannot be used (None if it can).
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
