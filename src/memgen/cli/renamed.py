"""Old class paths and configuration keys, accepted for one release with a warning that names the new one."""

from __future__ import annotations

import re
import warnings
from typing import Any

from memgen.cli.errors import UsageError

MOVED = {
    "memgen.environments.code_answers": "memgen.environments.code.answers",
    "memgen.environments.bigcodebench": "memgen.environments.code.bigcodebench",
    "memgen.environments.execution": "memgen.environments.code.execution",
    "memgen.environments.kodcode": "memgen.environments.code.kodcode",
    "memgen.environments.sandbox": "memgen.environments.code.sandbox",
    "memgen.environments.aqua": "memgen.environments.qa.aqua",
    "memgen.environments.competition_math": "memgen.environments.qa.competition_math",
    "memgen.environments.gpqa": "memgen.environments.qa.gpqa",
    "memgen.environments.gsm8k": "memgen.environments.qa.gsm8k",
    "memgen.environments.multiple_choice": "memgen.environments.qa.multiple_choice",
    "memgen.environments.popqa": "memgen.environments.search.popqa",
    "memgen.environments.search_qa": "memgen.environments.search.search_qa",
    "memgen.environments.search.PassageIndex": "memgen.environments.search.retrieval.PassageIndex",
    "memgen.environments.search.SearchServer": "memgen.environments.search.retrieval.SearchServer",
    "memgen.environments.triviaqa": "memgen.environments.search.triviaqa",
    "memgen.environments.alfworld": "memgen.environments.worlds.alfworld",
    "memgen.environments.scienceworld": "memgen.environments.worlds.scienceworld",
    "memgen.environments.thought_action": "memgen.environments.worlds.thought_action",
    "memgen.environments.workers": "memgen.environments.worlds.workers",
    "memgen.training.resume": "memgen.running.resume",
    "memgen.training.strategy": "memgen.distributed.zero",
    "memgen.tracking.mlflow.run_logger": "memgen.tracking.run_logger.run_logger",
}
"""Old module (every class in it moved), or old full name of one class or function -> the new one."""

KEYS: dict[str, str] = {}
"""Old key -> new key, both in full and without `init_args`; `*` stands for any item of a list:
"model.rollout.decisions": "model.rollout.sample_decisions"."""

_NAME = re.compile(r"(?P<module>[a-z_][\w.]*)\.(?P<name>[A-Za-z_]\w*)")


def class_path(path: str) -> str:
    """The present name of a class or function; `path` itself if it has not moved or is no dotted name."""
    found = _NAME.fullmatch(path)
    if found is None:
        return path
    if path in MOVED:
        return MOVED[path]
    module = MOVED.get(found["module"])
    return path if module is None else f"{module}.{found['name']}"


def update(values: Any) -> Any:
    """The same document with the present class paths and keys, after a warning for each old one.

    Args:
        values: one configuration file, or the overrides, without `init_args`.

    Raises:
        UsageError: if an old key and the new one in its place are both set.
    """
    values = _update_strings(values)
    for old, new in KEYS.items():
        values = _move(values, old.split("."), new.split("."), old, new)
    return values


def _update_strings(value: Any) -> Any:
    """Replaces class paths, wherever one may be named, and references to old keys."""
    if isinstance(value, dict):
        return {key: _update_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_update_strings(item) for item in value]
    if not isinstance(value, str):
        return value
    present = class_path(value)
    if present != value:
        _warn(value, present)
    for old, new in KEYS.items():
        replaced = re.sub(rf"\$\{{(\s*){re.escape(old)}(?=[\s.}}\[])", rf"${{\g<1>{new}", present)
        if replaced != present:
            _warn(old, new)
            present = replaced
    return present


def _move(node: Any, old: list[str], new: list[str], full_old: str, full_new: str) -> Any:
    """Moves what stands below the key `old` to `new`."""
    if len(old) > 1 and len(new) > 1 and old[0] == new[0]:
        if old[0] == "*":
            if isinstance(node, list):
                return [_move(item, old[1:], new[1:], full_old, full_new) for item in node]
            names = list(node) if isinstance(node, dict) and all(key.isdigit() for key in node) else []
        else:
            names = [old[0]] if isinstance(node, dict) and old[0] in node else []
        moved = {name: _move(node[name], old[1:], new[1:], full_old, full_new) for name in names}
        return {**node, **moved} if moved else node
    value, found = _taken(node, old)
    if not found:
        return node
    _warn(full_old, full_new)
    rest = _without(node, old)
    if _taken(rest, new)[1]:
        raise UsageError(f"{full_old} is now {full_new}; both are set: remove {full_old}")
    return _with(rest, new, value)


def _taken(node: Any, key: list[str]) -> tuple[Any, bool]:
    for name in key:
        if not isinstance(node, dict) or name not in node:
            return None, False
        node = node[name]
    return node, True


def _without(node: dict[str, Any], key: list[str]) -> dict[str, Any]:
    rest = {name: value for name, value in node.items() if name != key[0]}
    if len(key) > 1:
        inner = _without(node[key[0]], key[1:])
        return {**rest, key[0]: inner} if inner else rest
    return rest


def _with(node: Any, key: list[str], value: Any) -> dict[str, Any]:
    node = node if isinstance(node, dict) else {}
    return {**node, key[0]: value if len(key) == 1 else _with(node.get(key[0]), key[1:], value)}


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old name is accepted for one release"
    warnings.warn(message, FutureWarning, stacklevel=2)
