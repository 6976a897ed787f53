"""From the command line to one resolved configuration.

LightningCLI resolves `${...}` file by file and replaces what a later file only adds to. So the files and the overrides
are merged here, deeply and in their order, and resolved once; LightningCLI gets a single document.

The arguments of a class stand beside its `class_path`. jsonargparse puts them below `init_args`; documents, overrides and
references in that form are read as well, and rewritten here.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from memgen.cli import renamed
from memgen.cli.errors import UsageError, nearest
from memgen.conf_files import packaged

Document = dict[str, Any]

SECTIONS = ("model", "data")
"""Sections that are a class, so that `--model CLASS` names it."""
VARIABLES = "vars"
"""A section for values that several places refer to; it is removed after the resolution."""
CLASS_KEYS = ("class_path", "dict_kwargs")
OPTIONS = ("config", "print_config", "checkpoint", "run", "help")
"""Options of a Trainer command besides overrides."""

COMMAND_LINE = "the command line"
"""The name of the layer of overrides."""

_OVERRIDE = re.compile(r"--([A-Za-z_][\w]*(?:\.\w+)*)(?:=(.*))?", re.DOTALL)
_REFERENCE = re.compile(r"\$\{[^{}]*\}")


@dataclass(frozen=True)
class Layer:
    """One source of configuration values.

    Attributes:
        name: for messages: a file name, or "the command line".
        text: as it was written.
        values: what it sets, without `init_args`, unresolved.
    """

    name: str
    text: str
    values: Document


@dataclass(frozen=True)
class Request:
    """The parsed command line of a Trainer command.

    Attributes:
        files: configuration files, in order.
        overrides: (key, value as typed), in order.
        print_config: print the configuration and stop.
        arguments: the command line as it was typed.
        run: folder of the run, resumed from its last checkpoint if it has one.
    """

    files: tuple[Path, ...]
    overrides: tuple[tuple[str, str], ...]
    print_config: bool
    arguments: tuple[str, ...]
    run: Path | None = None

    @classmethod
    def from_argv(cls, argv: Sequence[str], keys: Collection[str] = ()) -> Request:
        """Reads `--config FILE`, `--print_config`, `--checkpoint DIR`, `--run DIR`, `--a.b.c value`, `--a.b.c=value`.

        Args:
            argv: the arguments after the command.
            keys: keys at the top of the configuration, none of which is an option misspelt.

        Raises:
            UsageError: if an argument is no option, an option lacks its value, or there is no `--config`.
        """
        files: list[Path] = []
        overrides: list[tuple[str, str]] = []
        print_config = False
        run: Path | None = None
        remaining = ["--config" if token == "-c" else token for token in argv]
        while remaining:
            token = remaining.pop(0)
            match = _OVERRIDE.fullmatch(token)
            if match is None:
                raise UsageError(
                    f"'{token}' is not an option; write --config FILE, --key value or --key=value "
                    "(quote a value that holds spaces)"
                )
            key, value = match.groups()
            if key == "print_config":
                print_config = True
                continue
            if value is None:
                if not remaining or remaining[0].startswith("--"):
                    raise UsageError(f"--{key} needs a value: --{key} VALUE or --{key}=VALUE")
                value = remaining.pop(0)
            if key == "config":
                files.append(present(Path(value)))
            elif key == "checkpoint":
                overrides.append(("model.init_from", value))
            elif key == "run":
                run = Path(value)
            elif key not in (*OPTIONS, *keys) and nearest(key, OPTIONS) is not None and "." not in key:
                raise UsageError(f"unknown option --{key}; did you mean --{nearest(key, OPTIONS)}?")
            else:
                overrides.append((key, value))
        if not files:
            raise UsageError("--config is missing; for example: --config conf/weaver_sft.yaml")
        return cls(tuple(files), tuple(overrides), print_config, tuple(argv), run)

    def layers(self) -> list[Layer]:
        """The sources in the order in which they are merged: the files, then the command line.

        Raises:
            UsageError: if a file cannot be read or an override cannot be placed.
        """
        layers = [_read_layer(path) for path in self.files]
        if self.overrides:
            layers.append(
                Layer(
                    name=COMMAND_LINE,
                    text=shlex.join(self.arguments),
                    values=renamed.update(_nest_overrides(self.overrides)),
                )
            )
        return layers


def merge(layers: Sequence[Layer]) -> DictConfig:
    """Merges deeply: mappings key by key, later layers win, lists are replaced.

    A layer that names another `class_path` replaces the whole section: the arguments of one class mean nothing to another.

    Args:
        layers: sources in order.

    Returns:
        The configuration, unresolved.
    """
    merged: Document = {}
    for layer in layers:
        merged = cast(Document, _merge_values(merged, layer.values))
    return OmegaConf.create(merged)


def resolve(merged: DictConfig, layers: Sequence[Layer]) -> Document:
    """Replaces every `${...}` by its value.

    Args:
        merged: the result of `merge`.
        layers: what it was merged from, to name the file of a reference.

    Raises:
        UsageError: if a reference points nowhere or in a circle, or a value is marked `???`.
    """
    resolved: Document = {}
    _resolve_into(resolved, merged, layers)
    resolved.pop(VARIABLES, None)
    return resolved


def value_of(merged: DictConfig, key: str) -> Any:
    """One value of the merged configuration, resolved; None if it is not set or refers to nothing."""
    try:
        return OmegaConf.select(merged, key)
    except OmegaConfBaseException:
        return None


def with_init_args(value: Any) -> Any:
    """The same document in jsonargparse's form: the arguments of each class below `init_args`."""
    if isinstance(value, list):
        return [with_init_args(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = {key: with_init_args(item) for key, item in value.items()}
    if "class_path" not in items:
        return items
    arguments = {key: item for key, item in items.items() if key not in CLASS_KEYS}
    chosen = {key: items[key] for key in CLASS_KEYS if key in items}
    return {**chosen, "init_args": arguments} if arguments else chosen


def without_init_args(value: Any) -> Any:
    """The same document with the arguments of each class beside its `class_path`, and references that follow."""
    if isinstance(value, list):
        return [without_init_args(item) for item in value]
    if isinstance(value, str):
        return _REFERENCE.sub(lambda found: re.sub(r"\.init_args(?=[.\[}\s])", "", found[0]), value)
    if not isinstance(value, dict):
        return value
    items = {key: without_init_args(item) for key, item in value.items()}
    if isinstance(items.get("init_args"), dict | None):
        return _merge_values(items, items.pop("init_args", None) or {})
    return items


def to_yaml(document: Document) -> str:
    """A resolved document as YAML that reads back as the same document."""
    return cast(str, yaml.safe_dump(_escape(document), sort_keys=False, allow_unicode=True, width=110))


def source_of(key: str, layers: Sequence[Layer]) -> str | None:
    """The name of the last layer that sets a key, or None."""
    parts = key.split(".")
    for layer in reversed(layers):
        node: Any = layer.values
        for part in parts:
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                node = node[part]
            else:
                break
        else:
            return layer.name
    return None


def written(key: str, value: Any, layers: Sequence[Layer]) -> str:
    """A value as its source writes it: 007 is the number 7, and another text."""
    name = re.escape(key.rpartition(".")[2])
    source = source_of(key, layers)
    text = next((layer.text for layer in reversed(layers) if layer.name == source), "")
    for token in re.findall(rf"(?<!\w){name}(?:=|:\s*|\s+)([^\s#,}}\]]+)", text):
        with contextlib.suppress(UsageError):
            if parse_value(token) == value:
                return str(token)
    return str(value)


def parse_value(text: str) -> Any:
    """A value typed on the command line: a YAML scalar, or a list or mapping in YAML's flow syntax.

    Text that is neither, such as `a: b` or a date, stays the text it is.

    Raises:
        UsageError: if flow syntax is not closed or otherwise broken.
    """
    stripped = text.strip()
    if not stripped:
        return text
    structured = stripped[0] in "[{\"'"
    try:
        # OmegaConf reads YAML with its own rules (1e-4 is a number); this is its public way to read one value.
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if structured:
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise UsageError(f"the value {text} is not valid YAML: {problem}") from error
        return text
    assert isinstance(value, dict), "a dotlist makes a mapping"
    parsed = value["value"]
    if structured or isinstance(parsed, bool | int | float):
        return parsed
    return None if stripped.lower() in ("null", "~") else text


def require_files(argv: Sequence[str]) -> None:
    """Refuses configuration files that do not exist, before the imports that reading them takes.

    Args:
        argv: arguments of a command that takes `--config FILE`.

    Raises:
        UsageError: naming the first, and the nearest one that exists.
    """
    for option, after in pairwise([*argv, ""]):
        name, equals, value = option.partition("=")
        path = Path(value if equals else after)
        if name != "--config" or not path.name or path.is_file():
            continue
        own = packaged(path)
        if own is None or not own.is_file():
            raise UsageError(_missing_file(path))


def present(path: Path) -> Path:
    """The file itself, or the package's own of this name if there is none here, which is said."""
    own = None if path.exists() else packaged(path)
    if own is None or not own.is_file():
        return path
    print(f"{path} is not here; taken from the package: {own}", file=sys.stderr)
    return own


def _read_layer(path: Path) -> Layer:
    """Reads one configuration file."""
    if not path.is_file():
        raise UsageError(_missing_file(path))
    text = path.read_text(encoding="utf-8")
    try:
        loaded = OmegaConf.load(path) if text.strip() else OmegaConf.create({})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UsageError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        first = str(error).strip().splitlines()
        raise UsageError(f"{path}: not valid YAML: {first[0] if first else error}") from error
    values = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(values, dict):
        raise UsageError(
            f"{path}: a configuration is a mapping of keys to values, got a {type(values).__name__}"
        )
    if any(not isinstance(key, str) for key in values):
        raise UsageError(f"{path}: keys must be text, got {[k for k in values if not isinstance(k, str)]}")
    return Layer(name=str(path), text=text, values=renamed.update(without_init_args(values)))


def _missing_file(path: Path) -> str:
    """The message for a path that does not exist, with the nearest one that does."""
    if path.is_dir():
        return f"{path} is a folder; --config takes a YAML file"
    folder = path.parent if path.parent.is_dir() else packaged(path.parent)
    if folder is None:
        return f"{path} does not exist: there is no folder {path.parent} in {Path.cwd()}"
    present = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    stems = {Path(name).stem: name for name in present}
    guess = nearest(path.stem, stems)
    if guess is not None:
        return f"{path} does not exist; did you mean {path.parent / stems[guess]}?"
    if present:
        return f"{path} does not exist; {path.parent} has: {', '.join(present)}"
    return f"{path} does not exist, and {path.parent} has no YAML file"


def _nest_overrides(overrides: Sequence[tuple[str, str]]) -> Document:
    """The overrides as a nested document without `init_args`."""
    nested: Document = {}
    for key, text in overrides:
        value = parse_value(text)
        if key in SECTIONS and isinstance(value, str):
            key = f"{key}.class_path"
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = cast(Document, _merge_values(nested, without_init_args(value)))
    return nested


def _merge_values(base: Any, layer: Any) -> Any:
    """`layer` over `base`. A mapping whose keys are all numbers changes the items of a list.

    An object with the number after the last item is appended.
    """
    if isinstance(base, list) and isinstance(layer, dict) and layer and all(k.isdigit() for k in layer):
        items = list(base)
        for index, value in layer.items():
            if int(index) == len(items) and isinstance(value, dict) and "class_path" in value:
                items.append(value)
                continue
            if int(index) >= len(items):
                raise UsageError(
                    f"item {index} does not exist: the list has {len(items)} items, counted from 0"
                )
            items[int(index)] = _merge_values(items[int(index)], value)
        return items
    if not isinstance(base, dict) or not isinstance(layer, dict):
        return layer
    chosen = layer.get("class_path")
    if chosen is not None and base.get("class_path") not in (None, chosen):
        return layer
    merged = dict(base)
    for key, value in layer.items():
        merged[key] = _merge_values(base[key], value) if key in base else value
    return merged


def _escape(value: Any) -> Any:
    """Escapes `${` in resolved text, so that reading it back does not resolve it."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", r"\${")
    return value


def _resolve_into(target: Document, node: DictConfig, layers: Sequence[Layer], prefix: str = "") -> None:
    """Resolves key by key, so that an error can name its key."""
    for name in node:
        key = str(name)
        target[key] = _resolve_key(node, key, f"{prefix}{key}", layers)


def _resolve_key(node: Any, key: Any, full: str, layers: Sequence[Layer]) -> Any:
    """The value at one key, resolved."""
    try:
        value = node[key]
    except OmegaConfBaseException as error:
        raise UsageError(_unresolved(full, node, key, error, layers)) from error
    if OmegaConf.is_dict(value):
        resolved: Document = {}
        _resolve_into(resolved, value, layers, prefix=f"{full}.")
        return resolved
    if OmegaConf.is_list(value):
        return [_resolve_key(value, index, f"{full}.{index}", layers) for index in range(len(value))]
    return value


def _unresolved(
    full: str, node: Any, key: Any, error: OmegaConfBaseException, layers: Sequence[Layer]
) -> str:
    """The message for a reference that cannot be resolved, with its key and target."""
    source = source_of(full, layers)
    at = f"{full} ({source})" if source else full
    if isinstance(error, MissingMandatoryValue):
        return f"{at} is marked ??? and needs a value: --{full} VALUE"
    written = OmegaConf.to_container(node, resolve=False)
    assert isinstance(written, dict | list), "a container converts to a container"
    text = written[key]
    if isinstance(error, InterpolationKeyError):
        found = re.search(r"Interpolation key '(.+?)' not found", str(error))
        missing = found.group(1) if found else text
        guess = nearest(missing, _all_keys(merge(layers))) if not missing.startswith(".") else None
        hint = f"; did you mean ${{{guess}}}?" if guess else ""
        return f"{at} refers to ${{{missing}}}, which is not set{hint}"
    if isinstance(error, GrammarParseError):
        return f"{at}: {text} is not a valid reference; write ${{section.key}}"
    if isinstance(error, InterpolationResolutionError) and "Recursive" in str(error):
        return f"{at}: {text} refers to itself"
    reason = str(error).strip().splitlines()[0]
    reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", reason).strip("\"'")
    return f"{at}: {text} cannot be resolved: {reason}"


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    """Every full key of a configuration."""
    keys: list[str] = []
    raw = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    if isinstance(raw, dict):
        for name, value in raw.items():
            key = f"{prefix}{name!s}"
            keys.append(key)
            keys.extend(_all_keys(value, f"{key}."))
    return keys
