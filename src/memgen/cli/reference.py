"""Every key of a configuration, with its type, default and one line: `memgen fit --help` and docs/configuration.md.

Read from the signatures and docstrings of the classes that the keys belong to. `python -m memgen.cli.reference FILE` writes them
into a document.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import docstring_parser

from memgen.cli.explain import describe, parameters
from memgen.data import EnvironmentData
from memgen.files import write_whole
from memgen.training.trigger_rl import TriggerRL
from memgen.training.weaver_grpo import WeaverGRPO
from memgen.training.weaver_sft import WeaverSFT

STAGES = {"Weaver SFT": WeaverSFT, "Weaver GRPO": WeaverGRPO, "Trigger RL": TriggerRL}
WIDTH = 100
_FOREIGN = ("builtins", "abc", "typing", "torch", "lightning")
BEGIN, END = "<!-- reference -->", "<!-- end -->"

_OPTIONS = """\
usage: memgen {command} --config FILE [--config FILE ...] [--KEY VALUE ...]

  --config FILE     a configuration file; later ones are merged over earlier ones
  --KEY VALUE       a value over those of the files, typed as YAML: one of the keys below, or of the Trainer
  --checkpoint DIR  start from what was trained before (short for --model.init_from DIR)
{own}  --print_config    print the complete resolved configuration and stop
  --verbose         show what libraries report
  --help-trainer    the keys of Lightning's Trainer (--trainer.*), and its own options
  --model.help CLASS, --data.environment.help CLASS
                    the keys of a class of yours, or of another one of ours, by its import path
"""
_OWN = {
    "fit": "  --run DIR         keep the run in this folder, and go on from its last checkpoint if it has one\n",
    "test": (
        "  --records DIR     keep the records of the items in this folder\n"
        "  --gold            score the data's reference answers, without a model\n"
    ),
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: with all sections.
        kind: its type in words.
        default: as YAML would have it, or "required".
        meaning: in one line.
    """

    name: str
    kind: str
    default: str
    meaning: str


def sections() -> dict[str, list[Key]]:
    """All keys by title: what every stage has, what single stages have, and the data's."""
    of_stage = {title: list(keys(stage, "model")) for title, stage in STAGES.items()}
    common = set.intersection(*({key.name for key in found} for found in of_stage.values()))
    first = next(iter(of_stage.values()))
    # A default of a single stage is shown there.
    alike = {key.name for key in first if all(key in found for found in of_stage.values())}
    result = {"Every stage": [key for key in first if key.name in common & alike]}
    for title, found in of_stage.items():
        result[f"{title} (`{STAGES[title].__module__}.{STAGES[title].__name__}`)"] = [
            key for key in found if key.name not in alike
        ]
    result[f"Data (`{EnvironmentData.__module__.rpartition('.')[0]}.EnvironmentData`)"] = list(
        keys(EnvironmentData, "data")
    )
    return result


def keys(target: Callable[..., Any], prefix: str, values: object = None) -> Iterator[Key]:
    """The keys below a section, those of its records included.

    Args:
        target: the section's class.
        prefix: the section.
        values: an instance of it whose values are the defaults; None: those of the signature.
    """
    meanings = _meanings(target)
    defaults = inspect.signature(target).parameters
    for name, parameter in parameters(target).items():
        default = defaults[name].default if name in defaults else inspect.Parameter.empty
        if values is not None:
            default = getattr(values, name)
        key = f"{prefix}.{name}"
        record = parameter.annotation
        if dataclasses.is_dataclass(record) and isinstance(record, type):
            given = default if isinstance(default, record) else None
            yield from keys(record, key, given if given is not None else _default_of(record))
        else:
            required = parameter.required and values is None
            yield Key(key, _kind(record), "required" if required else _shown(default), meanings.get(name, ""))
            members = [member for member in get_args(record) if isinstance(member, type)]
            records = [member for member in members if dataclasses.is_dataclass(member)]
            if len(records) == 1 and default is None:  # what may stand there in place of null
                yield from keys(records[0], key, _default_of(records[0]))


def class_help(target: type, prefix: str) -> str:
    """What `--data.environment.help CLASS` prints: the keys below a section if it is of this class."""
    title = f"--{prefix} {target.__module__}.{target.__qualname__}"
    return "\n".join([title, "", *_listed(keys(target, prefix))]) + "\n"


def help_text(command: str) -> str:
    """What `memgen fit --help` prints."""
    lines = [_OPTIONS.format(command=command, own=_OWN.get(command, ""))]
    for title, found in sections().items():
        lines += ["", title.replace("`", ""), "", *_listed(found)]
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """The same as tables."""
    lines: list[str] = []
    for title, found in sections().items():
        lines += [f"### {title}", "", "| key | type | default | |", "|---|---|---|---|"]
        for key in found:
            kind, meaning = (text.replace("|", "\\|") for text in (key.kind, key.meaning))
            lines.append(f"| `{key.name}` | {kind} | `{key.default}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def update(path: Path) -> None:
    """Writes the tables into a document, between the lines `<!-- reference -->` and `<!-- end -->`."""
    head, _, rest = path.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    _, _, tail = rest.partition(END)
    write_whole(path, f"{head}{BEGIN}\n{markdown()}{END}{tail}")


def _listed(found: Iterable[Key]) -> Iterator[str]:
    for key in found:
        yield f"  --{key.name}  {key.kind}, {key.default}"
        yield from textwrap.wrap(
            key.meaning, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False
        )


def _default_of(record: type) -> object:
    """The record of its defaults, or None if some have none."""
    try:
        return record()
    except TypeError:
        return None


def _kind(annotation: Any) -> str:
    members = [member for member in get_args(annotation) if member is not type(None)]
    if len(members) == 1 and type(None) in get_args(annotation):
        return f"{_kind(members[0])} or null"
    return describe(annotation)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list | frozenset):
        return f"[{', '.join(repr(item) if isinstance(item, str) else _shown(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return repr(value) if "\n" in value else value
    return str(value) if isinstance(value, int | Mapping) else type(value).__name__


def _meanings(target: Any) -> dict[str, str]:
    """One line about each argument, of the docstrings of a class and of those that it comes from."""
    found: dict[str, str] = {}
    for owner in [cls for cls in inspect.getmro(target) if cls.__module__.partition(".")[0] not in _FOREIGN]:
        documented = [docstring_parser.parse_from_object(owner)]
        own = vars(owner).get("__init__")
        if own is not None and own.__doc__:
            documented.append(docstring_parser.parse(own.__doc__))
        for parsed in documented:
            for entry in parsed.params:
                text = " ".join((entry.description or "").split())
                if text:
                    found.setdefault(entry.arg_name, text)
    return found


if __name__ == "__main__":
    update(Path(sys.argv[1]))
