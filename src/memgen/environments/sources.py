"""Data files and datasets of the Hugging Face hub as records, each of which knows its place for error messages.

JSON lines (also in a file named .json), a JSON array, CSV, TSV and Parquet, packed with gzip or not. The files of a
split are found by name (`train`; `val`, `valid`, `validation` or `dev`; `test`): one file, numbered shards
(`train-00000-of-00002.parquet`), or a folder of files. A file named in the configuration takes precedence.

Files are read here rather than by `datasets.load_dataset`, which changes what they say (dates become datetimes, the
text NA and empty cells become None, a missing column becomes None), reports a broken record without its line, writes
an Arrow cache first, and took 4 to 16 times as long on the benchmarks' own files.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memgen.environments.base import Split

LoneFile = Literal["by_name", "to_split", "test", "refused"]
"""Which splits a path that is a single file stands for, see `Source.lone_file`."""

_NAMES: dict[Split, str] = {"train": "train", "val": "val|valid|validation|dev", "test": "test"}
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

_Row = tuple[Any, str]
"""A record's content, and its place."""


@dataclass(frozen=True)
class Record:
    """One record of a dataset."""

    fields: Mapping[str, Any]
    """Its columns."""
    where: str
    """File and line (or row), for error messages."""
    number: int
    """Counted from 1 within its split."""

    def text(self, column: str, empty: bool = False) -> str:
        """A column's text without white space around it.

        Args:
            column: its name.
            empty: whether it may be empty.

        Raises:
            ValueError: if the column is missing, is not a text, or is empty though it must not be.
        """
        value = self.value(column)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.error(column, f"is empty or no text: {value!r:.80}")
        return value.strip()

    def value(self, column: str) -> Any:
        """A column's value.

        Raises:
            ValueError: if the column is missing, or has half of a surrogate pair, which is no character.
        """
        if column not in self.fields:
            has = ", ".join(map(str, self.fields)) or "no columns"
            raise self.error(column, f"is missing (the record has {has:.200})")
        value = self.fields[column]
        written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if (half := _HALF_PAIR.search(written)) is not None:
            raise self.error(
                column, f"has half of a surrogate pair ({half[0]!a}), which is no character; remove it"
            )
        return value

    def error(self, column: str, what: str) -> ValueError:
        """An error about a column, whose message names file and line."""
        return ValueError(f'{self.where}: "{column}" {what}')


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the hub."""

    split: str
    """Its name on the hub."""
    config: str | None = None
    """The dataset's configuration; None if it has only one."""
    name: str | None = None
    """`owner/name` of another dataset than the source's, read at its newest revision."""


@dataclass(frozen=True)
class Source:
    """Where the data of a benchmark is: a folder, a file, or a dataset of the hub."""

    task: str
    """The benchmark's name, for error messages."""
    path: str
    """The folder, the file, or `owner/name` on the hub."""
    files: Mapping[Split, str | None] = field(default_factory=dict)
    """Configured file names in the folder `path` (absolute ones may be elsewhere); None: found by name."""
    hub: Mapping[Split, Sequence[HubSplit]] = field(default_factory=dict)
    """The hub's splits that make up each split; one that is missing here has no data on the hub."""
    revision: str | None = None
    """Branch, tag or commit of the hub's dataset; None: its newest."""
    splits: Sequence[Split] = ("train", "val", "test")
    """Splits that may have data of their own. Files of others are not looked at."""
    folders: Sequence[str] = ()
    """Subfolders of `path` that are searched after it."""
    prefer: Mapping[Split, str] = field(default_factory=dict)
    """If several files or folders fit a split: those whose names this expression finds."""
    names: Mapping[Split, str] = field(default_factory=dict)
    """Expressions for file names, where they differ from the splits' names."""
    lone_file: LoneFile = "by_name"
    """What a `path` that is a single file holds. "by_name": training data if its name says so, else validation and
    test data. "to_split": the same, but a file named after no split (also the only one of a folder) is the whole data
    set and stands for "train". "test": test data. "refused": nothing."""
    setting: str | None = None
    """The configuration key of the file name, for error messages; None: "train_file", "val_file" or "test_file"."""

    def has(self, split: Split) -> bool:
        """Whether a split has data of its own.

        Raises:
            FileNotFoundError: if the path does not exist, or a file named in the configuration does not.
            ValueError: if several files fit.
        """
        if split not in self.splits:
            return False
        return bool(self.local_files(split)) if self._is_local(split) else split in self.hub

    def records(self, split: Split) -> list[Record]:
        """All records of a split, in the order of the files.

        Raises:
            FileNotFoundError: if there is no data for it.
            ValueError: if a file is broken, or several fit; the message names file and line.
        """
        if self._is_local(split):
            files = self.local_files(split)
            if not files:
                raise FileNotFoundError(f"{self.task}: {self._no_file(split)}")
            found = [record for file in files for record in read_file(file)]
        elif split in self.hub:
            found = [
                record
                for part in self.hub[split]
                for record in read_hub(self.task, self.path, part, self.revision)
            ]
        else:
            raise FileNotFoundError(
                f"{self.task}: {self.path} has no {split} split on the hub; set {self._setting(split)}"
            )
        return [Record(record.fields, record.where, number) for number, record in enumerate(found, start=1)]

    def local_files(self, split: Split) -> list[Path]:
        """The files of a split in order; none if the folder or file holds nothing for it.

        Raises:
            FileNotFoundError: if a file named in the configuration does not exist.
            ValueError: if several files fit.
        """
        root = Path(self.path).expanduser()
        named = self.files.get(split)
        if named is not None:
            # pathlib: an absolute name replaces the folder.
            file = (root if root.is_dir() else Path()) / Path(named).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"{self.task}: there is no file {file}; see {self._setting(split)}")
            return [file]
        if root.is_file():
            return [root] if self._lone_file_is(root, split) else []
        folders = [folder for folder in (root, *(root / name for name in self.folders)) if folder.is_dir()]
        for folder in folders:
            if found := self._find(folder, split):
                return found
        if self.lone_file == "to_split" and split == "train":
            files = [file for folder in folders for file in sorted(folder.iterdir()) if _is_data(file)]
            if len(files) == 1 and not self._is_named(files[0]):
                return files
        return []

    def _is_local(self, split: Split) -> bool:
        """Whether a split is read from files.

        Raises:
            FileNotFoundError: if the path neither exists nor looks like a name on the hub.
        """
        if self.files.get(split) is not None or Path(self.path).expanduser().exists():
            return True
        if _HUB_NAME.fullmatch(self.path) and self.hub:
            return False
        raise FileNotFoundError(
            f"{self.task}: there is no directory {self.path} and no such file; set data.path to a file, to a folder "
            "with a file for each split, or to a dataset of the hub (owner/name)"
        )

    def _lone_file_is(self, file: Path, split: Split) -> bool:
        match self.lone_file:
            case "refused":
                return False
            case "test":
                return split == "test"
            case "to_split" if not self._is_named(file):
                return split == "train"
            case _:
                return (split == "train") == self._fits(file, "train")

    def _no_file(self, split: Split) -> str:
        setting = self._setting(split)
        if Path(self.path).expanduser().is_file():
            return (
                f"{self.path} is a file, which is not read as {split} data; set {setting}, or path to a folder "
                "with a file for each split"
            )
        return f"there is no file named {self._name(split)} in {self.path}; set {setting} to its name"

    def _setting(self, split: Split) -> str:
        return self.setting or f"{split}_file"

    def _name(self, split: Split) -> str:
        return self.names.get(split) or _NAMES[split]

    def _fits(self, file: Path, split: Split) -> bool:
        expression = rf"(?<![a-z])(?:{self._name(split)})(?![a-z])"
        return re.search(expression, _stem(file).lower()) is not None

    def _is_named(self, file: Path) -> bool:
        return any(self._fits(file, split) for split in _NAMES)

    def _find(self, folder: Path, split: Split) -> list[Path]:
        """The files of a split in a folder: those named after it, else those of the subfolder named after it."""
        entries = sorted(folder.iterdir())
        files = self._preferred([e for e in entries if _is_data(e) and self._fits(e, split)], split)
        if len({_SHARD.sub("", _stem(file)) for file in files}) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(
                f"{self.task}: {folder} has several {split} files ({names}); set {self._setting(split)} to one of them"
            )
        if files:
            return files
        folders = [e for e in entries if e.is_dir() and re.fullmatch(self._name(split), e.name.lower())]
        for inner in self._preferred(folders, split)[:1]:
            return sorted(filter(_is_data, inner.rglob("*")), key=_natural_order)
        return []

    def _preferred(self, entries: list[Path], split: Split) -> list[Path]:
        expression = self.prefer.get(split)
        if expression is None:
            return entries
        return [entry for entry in entries if re.search(expression, entry.name)] or entries


def _natural_order(file: Path) -> list[tuple[int, str]]:
    return [(int(w), "") if w.isdigit() else (-1, w) for w in re.split(r"(\d+)", str(file)) if w]


def _is_data(file: Path) -> bool:
    # Hidden files are no data: macOS writes "._NAME" beside NAME, and editors and download tools have theirs.
    return file.is_file() and _suffix(file) in _SUFFIXES and not file.name.startswith(".")


def _suffix(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _stem(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).stem


def read_file(file: Path) -> Iterator[Record]:
    """The records of a file in any of the formats.

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
            rows = _read_json(file, content.removeprefix(codecs.BOM_UTF8))
        case ".csv":
            rows = _read_csv(file, content.removeprefix(codecs.BOM_UTF8), ",")
        case ".tsv":
            rows = _read_csv(file, content.removeprefix(codecs.BOM_UTF8), "\t")
        case ".parquet":
            rows = _read_parquet(file, content)
        case other:
            raise ValueError(
                f"{file}: files that end in {other or 'nothing'} are not read; use {', '.join(_SUFFIXES)}"
            )
    for number, (fields, where) in enumerate(rows, start=1):
        if not isinstance(fields, Mapping):
            message = f"{where}: expected an object with named columns, got {fields!r:.80}"
            raise ValueError(message)  # noqa: TRY004 - the data is broken, not the call
        yield Record(fields, where, number)


def _read_json(file: Path, content: bytes) -> Iterator[_Row]:
    if _suffix(file) == ".json":
        try:
            whole = json.loads(content)
        except ValueError as error:
            if content.lstrip()[:1] == b"[":
                raise ValueError(f"{file}: not a JSON array: {error}") from error
            whole = None  # JSON lines, or broken: reading lines says where.
        if isinstance(whole, list):
            if not whole:
                raise ValueError(f"{file} has no records; expected a JSON array of objects")
            yield from ((fields, f"{file}, record {number}") for number, fields in enumerate(whole, start=1))
            return
        if isinstance(whole, Mapping):
            yield whole, str(file)
            return
    # Not splitlines(): it would also split at separators that may be part of a JSON string.
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} has no lines; expected one JSON object per line")
    for number, line in lines:
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line.decode("utf-8"))
        except ValueError as error:  # Covers broken UTF-8 too.
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        yield fields, where


def _read_csv(file: Path, content: bytes, delimiter: str) -> Iterator[_Row]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: not UTF-8: {error}") from error
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Solutions and tests are longer than its default.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begin = 1
    columns: list[str] | None = None
    empty = True
    try:
        for row in reader:
            where = f"{file}, line {begin}"
            begin = reader.line_num + 1
            if columns is None:
                columns = row
            elif row:
                if len(row) != len(columns):
                    raise ValueError(f"{where}: {len(row)} columns, but the first line names {len(columns)}")
                empty = False
                yield dict(zip(columns, row, strict=True)), where
    except csv.Error as error:
        raise ValueError(f"{file}, line {begin}: broken CSV: {error}") from error
    if empty:
        raise ValueError(f"{file} has no lines; expected a line of column names and one line per record")


def _read_parquet(file: Path, content: bytes) -> Iterator[_Row]:
    import pyarrow  # A tenth of a second that other formats need not wait.
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: broken Parquet file: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no rows")
    yield from ((fields, f"{file}, row {number}") for number, fields in enumerate(rows, start=1))


def read_hub(task: str, path: str, split: HubSplit, revision: str | None) -> Iterator[Record]:
    """The records of a split on the hub, through the package `datasets`.

    Raises:
        FileNotFoundError: if the hub or the dataset cannot be reached.
    """
    import datasets  # Two seconds.

    name = split.name or path
    settings = {"split": split.split}
    if revision is not None and split.name is None:
        settings["revision"] = revision
    try:
        rows = datasets.load_dataset(*([name] if split.config is None else [name, split.config]), **settings)
    except Exception as error:
        # The hub's client raises errors of several HTTP libraries; all of them mean that there is no data.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{task}: {name} is no local directory and could not be read from the hub ({reason}); set data.path to a "
            "folder or file with the data"
        ) from error
    described = f"{name}{'' if split.config is None else f' {split.config}'} {split.split}"
    for number, fields in enumerate(rows, start=1):
        yield Record(fields, f"{described}, row {number}", number)
