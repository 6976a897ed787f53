"""Where an item comes from: records of local files and of the Hugging Face hub, each with its place for errors.

JSON lines (also in a file named .json), a JSON array, CSV, TSV and Parquet, packed with gzip or not. A split of a
folder is found by its name (`train`; `val`, `valid`, `validation` or `dev`; `test`), as one file, as numbered shards
(`train-00000-of-00002.parquet`), or as a folder of files; a file that is named in the configuration goes before.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Part = Literal["train", "val", "test"]

_NAMES: dict[Part, str] = {"train": "train", "val": "val|valid|validation|dev", "test": "test"}
_LONE: tuple[Part, ...] = ("train", "val")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Record:
    """One record of a data file.

    Attributes:
        fields: its columns.
        where: file and line (or row), for errors.
        number: counted from 1 within its split.
    """

    fields: Mapping[str, Any]
    where: str
    number: int

    def text(self, column: str, empty: bool = False) -> str:
        """A column's text without white space around it.

        Args:
            column: its name.
            empty: whether it may be empty.

        Raises:
            ValueError: if the column is missing, no text, or empty though it must not be.
        """
        value = self.value(column)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.error(column, f"is empty or no text: {value!r:.80}")
        return value.strip()

    def value(self, column: str) -> Any:
        """A column.

        Raises:
            ValueError: if it is missing.
        """
        if column not in self.fields:
            has = ", ".join(map(str, self.fields)) or "no columns"
            raise self.error(column, f"is missing (the record has {has:.200})")
        return self.fields[column]

    def error(self, column: str, what: str) -> ValueError:
        """An error about a column that names the place."""
        return ValueError(f'{self.where}: "{column}" {what}')


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset of the hub.

    Attributes:
        split: its name there.
        config: the dataset's configuration, or None if it has only one.
        name: another dataset than the source's path.
    """

    split: str
    config: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Source:
    """The data of a task: a folder, a file, or a dataset of the hub.

    Attributes:
        task: the task's name, for errors.
        path: the folder, the file, or `owner/name` on the hub.
        files: names of files in the folder `path` (absolute ones may stand elsewhere) for parts that are not to be
            found by their names.
        hub: the splits that make up each part on the hub; a part that the hub does not have is not in it.
        revision: of the hub's dataset (branch, tag or commit), or None for its newest.
        folders: subfolders of `path` that are looked into as well.
        prefer: of several files that fit, the one whose name this expression finds.
        names: expressions for the names of files, where they are not those of the splits.
        lone_file: whether `path` may be a single file, whose name then says which split it is.
        setting: the configuration key of the file names, for errors; "{part}_file" if it is not given.
    """

    task: str
    path: str
    files: Mapping[Part, str | None] = field(default_factory=dict)
    hub: Mapping[Part, Sequence[HubSplit]] = field(default_factory=dict)
    revision: str | None = None
    folders: Sequence[str] = ()
    prefer: Mapping[Part, str] = field(default_factory=dict)
    names: Mapping[Part, str] = field(default_factory=dict)
    lone_file: bool = True
    setting: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the path is a file or a folder of this machine."""
        return Path(self.path).expanduser().exists()

    def has(self, part: Part) -> bool:
        """Whether this part has data of its own.

        Raises:
            FileNotFoundError: if the path is nothing at all, or a file named in the configuration does not exist.
            ValueError: if several files fit.
        """
        if self.files.get(part) is not None or self._local_root() is not None:
            return bool(self._local_files(part))
        return part in self.hub

    def splits(self, part: Part) -> bool:
        """Whether this part has data of its own, and not the source's one file, which no name assigns to a part.

        Raises:
            FileNotFoundError: as for `has`.
            ValueError: as for `has`.
        """
        return not self._is_one_file(part) and self.has(part)

    def _is_one_file(self, part: Part) -> bool:
        root = Path(self.path).expanduser()
        return (
            self.files.get(part) is None and root.is_file() and not any(self._fits(root, p) for p in _NAMES)
        )

    def records(self, part: Part, whole: bool = False) -> list[Record]:
        """All records of a part, in the order of the files.

        Args:
            part: which.
            whole: whether a source that is not split (a file, or the only file of a folder, that is not named after
                a part) stands for this part.

        Raises:
            FileNotFoundError: if there are none to be had.
            ValueError: if a file is broken, or several fit; the message names file and line.
        """
        if self.files.get(part) is not None or self._local_root() is not None:
            files = self._local_files(part) or (self._only_file() if whole else [])
            if not files:
                raise FileNotFoundError(f"{self.task}: {self._nothing(part)}")
            found = [record for file in files for record in read_file(file)]
        elif part in self.hub:
            found = [
                r for split in self.hub[part] for r in read_hub(self.task, self.path, split, self.revision)
            ]
        else:
            raise FileNotFoundError(
                f"{self.task}: {self.path} has no {part} split on the hub; set {self._setting(part)}"
            )
        return [Record(record.fields, record.where, number) for number, record in enumerate(found, start=1)]

    def _nothing(self, part: Part) -> str:
        if Path(self.path).expanduser().is_file():
            return (
                f"{self.path} is a file, and not of what {self._setting(part)} stands for, by its name; set "
                f"{self._setting(part)}, or path to a folder with a file for each split"
            )
        return (
            f"there is no file named {self._name(part)} in {self.path}; set {self._setting(part)} to its name"
        )

    def _setting(self, part: Part) -> str:
        return self.setting or f"{part}_file"

    def _name(self, part: Part) -> str:
        return self.names.get(part) or _NAMES[part]

    def _fits(self, file: Path, part: Part) -> bool:
        expression = rf"(?<![a-z])(?:{self._name(part)})(?![a-z])"
        return re.search(expression, _stem(file).lower()) is not None

    def _local_root(self) -> Path | None:
        root = Path(self.path).expanduser()
        if root.exists():
            return root
        if _HUB_NAME.fullmatch(self.path) and self.hub:
            return None
        known = next((s.name or "owner/name" for splits in self.hub.values() for s in splits), "owner/name")
        raise FileNotFoundError(
            f"{self.task}: there is no directory {self.path} and no such file; set data.path to a file, to a folder "
            f"with a file for each split, or to a dataset of the hub such as {known}"
        )

    def _local_files(self, part: Part) -> list[Path]:
        named = self.files.get(part)
        if named is not None:
            # pathlib: an absolute name stands for itself.
            root = Path(self.path).expanduser()
            file = (root if root.is_dir() else Path()) / Path(named).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"{self.task}: there is no file {file}; see {self._setting(part)}")
            return [file]
        root = Path(self.path).expanduser()
        if root.is_file():
            if not self.lone_file or self.names:
                return [root] if self.lone_file else []
            own = next((p for p in _LONE if self._fits(root, p)), "test")
            # What is not named after training is for evaluation, whichever split is asked for.
            return [root] if own == part or (part != "train" and own != "train") else []
        for folder in (root, *(root / name for name in self.folders)):
            if found := self._find(folder, part):
                return found
        return []

    def _only_file(self) -> list[Path]:
        """The one file of the source, if no name assigns it to a part."""
        root = Path(self.path).expanduser()
        folders = [] if root.is_file() else [root, *(root / name for name in self.folders)]
        files = [root] if root.is_file() else [f for d in folders if d.is_dir() for f in sorted(d.iterdir())]
        files = [f for f in files if f.is_file() and _suffix(f) in _SUFFIXES]
        return files if len(files) == 1 and not any(self._fits(files[0], p) for p in _NAMES) else []

    def _find(self, folder: Path, part: Part) -> list[Path]:
        if not folder.is_dir():
            return []
        entries = sorted(folder.iterdir())
        fitting = [e for e in entries if e.is_file() and _suffix(e) in _SUFFIXES and self._fits(e, part)]
        if len(fitting) > 1 and part in self.prefer:
            fitting = [e for e in fitting if re.search(self.prefer[part], e.name)] or fitting
        if len(fitting) > 1 and len({_SHARD.sub("", _stem(e)) for e in fitting}) > 1:
            names = ", ".join(e.name for e in fitting)
            raise ValueError(
                f"{self.task}: {folder} has several {part} files ({names}); set {self._setting(part)} to one of them"
            )
        if fitting:
            return fitting
        for entry in entries:
            if entry.is_dir() and re.fullmatch(self._name(part), entry.name.lower()):
                return sorted(
                    (f for f in entry.rglob("*") if f.is_file() and _suffix(f) in _SUFFIXES),
                    key=_natural_order,
                )
        return []


def _natural_order(file: Path) -> list[tuple[int, str]]:
    return [(int(w), "") if w.isdigit() else (-1, w) for w in re.split(r"(\d+)", str(file)) if w]


def _suffix(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _stem(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).stem


def read_file(file: Path) -> Iterator[Record]:
    """The records of a file, whatever its format.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a record is broken; the message names file and line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    content = file.read_bytes()
    if file.name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{file}: broken gzip file: {error}") from error
    match _suffix(file):
        case ".jsonl" | ".json":
            yield from _read_json(file, content)
        case ".csv":
            yield from _read_csv(file, content, ",")
        case ".tsv":
            yield from _read_csv(file, content, "\t")
        case ".parquet":
            yield from _read_parquet(file, content)
        case other:
            raise ValueError(
                f"{file}: files that end in {other or 'nothing'} are not read; use {', '.join(_SUFFIXES)}"
            )


def _read_json(file: Path, content: bytes) -> Iterator[Record]:
    if _suffix(file) == ".json":
        try:
            whole = json.loads(content)
        except ValueError:
            whole = None  # Lines, then, or broken: reading lines says where.
        if isinstance(whole, list) or content.lstrip()[:1] == b"[":
            yield from _read_array(file, content, whole)
            return
        if isinstance(whole, Mapping):
            yield Record(whole, str(file), 1)
            return
    # Not splitlines(): it would also split at separators that may stand inside a JSON string.
    lines = content.split(b"\n")
    if lines[-1].strip() == b"":
        lines.pop()
    if not lines:
        raise ValueError(f"{file} has no lines; expected one JSON object per line")
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # Covers broken UTF-8 too.
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        yield Record(_object(record, where), where, number)


def _read_array(file: Path, content: bytes, whole: Any) -> Iterator[Record]:
    if not isinstance(whole, list):
        try:
            json.loads(content)
        except ValueError as error:
            raise ValueError(f"{file}: not a JSON array: {error}") from error
    if not whole:
        raise ValueError(f"{file} has no records; expected a JSON array of objects")
    for number, record in enumerate(whole, start=1):
        where = f"{file}, record {number}"
        yield Record(_object(record, where), where, number)


def _object(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        message = f"{where}: expected an object with named columns, got {record!r:.80}"
        raise ValueError(message)  # noqa: TRY004 - the data is broken, not the call
    return record


def _read_csv(file: Path, content: bytes, delimiter: str) -> Iterator[Record]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: not UTF-8: {error}") from error
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Solutions and tests are longer than its default.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number, begin = 0, 1
    columns: list[str] | None = None
    try:
        for row in reader:
            where = f"{file}, line {begin}"
            begin = reader.line_num + 1
            if columns is None:
                columns = row
                continue
            if not row:
                continue
            if len(row) != len(columns):
                raise ValueError(f"{where}: {len(row)} columns, but the first line names {len(columns)}")
            number += 1
            yield Record(dict(zip(columns, row, strict=True)), where, number)
    except csv.Error as error:
        raise ValueError(f"{file}, line {begin}: broken CSV: {error}") from error
    if not number:
        raise ValueError(f"{file} has no lines; expected a line of column names and one line per record")


def _read_parquet(file: Path, content: bytes) -> Iterator[Record]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise RuntimeError(
            f"{file}: reading Parquet needs the package pyarrow; install it (pip install pyarrow)"
        ) from error
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: broken Parquet file: {error}") from error
    rows = table.to_pylist()
    if not rows:
        raise ValueError(f"{file} has no rows")
    for number, record in enumerate(rows, start=1):
        yield Record(record, f"{file}, row {number}", number)


def read_hub(task: str, path: str, split: HubSplit, revision: str | None) -> Iterator[Record]:
    """The records of a split of the hub, through the package `datasets`.

    Raises:
        FileNotFoundError: if the hub or the dataset cannot be reached.
    """
    name = split.name or path
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(
            f"{task}: {name} is no local directory, and the package `datasets`, which reads the hub, is not installed"
        ) from error
    settings = {"split": split.split} | ({} if revision is None else {"revision": revision})
    try:
        rows = datasets.load_dataset(*([name] if split.config is None else [name, split.config]), **settings)
    except Exception as error:
        # The hub's client raises errors of several HTTP libraries; all of them mean that the data is not here.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{task}: {name} is no local directory and could not be read from the hub ({reason}); set data.path to a "
            "folder or file with the data"
        ) from error
    described = f"{name}{'' if split.config is None else f' {split.config}'} {split.split}"
    for number, record in enumerate(rows, start=1):
        yield Record(record, f"{described}, row {number}", number)


def normalised(question: str) -> str:
    """A question without differences of case, width and white space, to recognise it in another file."""
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split())


def share(question: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on the question alone: which side of a split it goes to, in any order of files."""
    digest = hashlib.sha256(f"{seed}\x1f{purpose}\x1f{normalised(question)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def checked_fraction(name: str, value: float) -> float:
    """The value of a setting that is a share.

    Raises:
        ValueError: if it is not in [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value
