"""JSON Lines files that grow item by item: after a crash, an item's lines are there completely or not at all.

A journal lies beside the data files. An item's lines are appended to the data files and forced to disk; only then does
the journal get a line with the item, a note about it, and the sizes of the data files. Reopening truncates the data files
to the last recorded sizes, which removes what a killed process had not finished. The journal's first line holds the
settings that everything was made with; under other settings nothing is added.

Not an SQLite database: these files are what users read, and what training reads, while they grow. A database would be a
second copy of every line, with an export, and a reader for the files that exist.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, final

from memgen.files import sync

FORMAT_VERSION = 1
SHOWN_DIFFERENCES = 6
"""Settings that a refusal names; the others it counts."""


@dataclass(frozen=True)
class Entry:
    """What to write about one item.

    Attributes:
        index: the item.
        lines: for each data file by its name, records that become a line each.
        note: what the journal keeps about the item.
    """

    index: int
    lines: Mapping[str, Sequence[Mapping[str, Any]]]
    note: Mapping[str, Any]


@dataclass(frozen=True)
class Journal:
    """Contents of a journal.

    Attributes:
        settings: what everything was made with.
        about: further facts from when it was begun; nothing depends on them.
        notes: note of each completed item, by index.
        ends: size in bytes of each data file after the last completed item.
        size: bytes of the journal's own complete lines.
    """

    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    notes: Mapping[int, Mapping[str, Any]]
    ends: Mapping[str, int]
    size: int


def read_journal(path: Path) -> Journal | None:
    """Reads a journal, also one that another process is writing; None if not even its first line is complete.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is broken anywhere but behind its last complete line.
    """
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    if not size:
        return None
    header, *items = _objects(path, content[:size])
    if header.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is no journal of this version of memgen: its format is {header.get('format')!r}, not {FORMAT_VERSION}"
        )
    return Journal(
        settings=header["settings"],
        about=header.get("about", {}),
        notes={int(item["index"]): item["note"] for item in items},
        ends=items[-1]["ends"] if items else {},
        size=size,
    )


def read_lines(journal_path: Path, name: str) -> list[dict[str, Any]]:
    """Records of the completed items in a data file.

    Raises:
        FileNotFoundError: if there is no such journal.
        ValueError: if a file is broken.
    """
    journal = read_journal(journal_path)
    path = journal_path.parent / name
    end = 0 if journal is None else journal.ends.get(name, 0)
    _require_size(path, end, journal_path)
    return _objects(path, path.read_bytes()[:end]) if end else []


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """For each setting that differs, a phrase with its old and new value."""
    flat_before, flat_now = _flat(before), _flat(now)
    names = [*flat_before, *(name for name in flat_now if name not in flat_before)]
    return [
        f"{name} was {_shown(flat_before, name)} and is {_shown(flat_now, name)}"
        for name in names
        if flat_before.get(name, ...) != flat_now.get(name, ...)
    ]


@final
class Ledger:
    """Data files and their journal, opened by the one process that writes them.

    Args:
        journal: the journal's path. Data files lie beside it. Folders are made.
        files: names of the data files.
        settings: what everything is made with, as JSON values.
        about: further facts to keep when it is begun.

    Raises:
        ValueError: if the files were made with other settings, have been changed since, have no journal, or are being
            written by another process.
    """

    def __init__(
        self,
        journal: Path,
        files: Sequence[str],
        settings: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = journal
        settings = json.loads(json.dumps(settings))
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {}
        self._journal = journal.open("ab")
        try:
            _lock(self._journal, journal)
            found = read_journal(journal)
            if found is None:
                found = Journal(settings, about or {}, {}, {}, 0)
                _require_unused([journal.parent / name for name in files], journal)
            _require_same(journal, found.settings, settings)
            _truncate(self._journal, found.size)
            if not found.size:
                header = {"format": FORMAT_VERSION, "settings": found.settings, "about": found.about}
                _append(self._journal, [header])
                os.fsync(self._journal.fileno())
            for name in files:
                self._files[name] = _opened(journal.parent / name, found.ends.get(name, 0), journal)
            sync(journal.parent)
        except BaseException:
            self.close()
            raise
        self.about = found.about
        self.notes: dict[int, Mapping[str, Any]] = dict(found.notes)
        """Note of each completed item."""

    def add(self, entries: Sequence[Entry]) -> None:
        """Writes items. When it returns, they are on disk."""
        noted = []
        for entry in entries:
            for name, records in entry.lines.items():
                _append(self._files[name], records)
            ends = {name: file.tell() for name, file in self._files.items()}
            noted.append({"index": entry.index, "note": dict(entry.note), "ends": ends})
        for file in self._files.values():
            os.fsync(file.fileno())
        _append(self._journal, noted)
        os.fsync(self._journal.fileno())
        self.notes |= {entry.index: dict(entry.note) for entry in entries}

    def close(self) -> None:
        """Closes the files. It can be called twice."""
        for file in (*self._files.values(), self._journal):
            file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path, end: int, journal: Path) -> BinaryIO:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    _require_size(path, end, journal)
    file = path.open("ab")
    _truncate(file, end)
    return file


def _append(file: BinaryIO, records: Sequence[Mapping[str, Any]]) -> None:
    file.write(b"".join(map(_line, records)))
    file.flush()


def _truncate(file: BinaryIO, size: int) -> None:
    file.truncate(size)
    file.seek(size)
    os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except (
        UnicodeEncodeError
    ):  # A text has half of a surrogate pair: JSON can escape it, UTF-8 cannot encode it.
        return json.dumps(record).encode() + b"\n"


def _lock(file: BinaryIO, path: Path) -> None:
    """The lock ends with the process, however that ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {path}; wait for it, or give another name") from error


def _objects(path: Path, content: bytes) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object: {error}") from error
        if not isinstance(record, dict):
            message = f"{path}, line {number}: expected an object, got {record!r:.80}"
            raise ValueError(message)  # noqa: TRY004 - the file is broken, not the call
        records.append(record)
    return records


def _require_unused(files: Sequence[Path], journal: Path) -> None:
    for path in files:
        if path.is_file() and path.stat().st_size:
            raise ValueError(
                f"{path} exists, but its journal {journal} does not, so it is not known what it was made with; "
                "give another name, or move it away"
            )


def _require_size(path: Path, end: int, journal: Path) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < end:
        raise ValueError(
            f"{path} has {size} bytes, but {end} by its journal {journal}: it was changed since; "
            "give another name, or move both away"
        )


def _require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    found = differences(before, now)
    if not found:
        return
    more = len(found) - SHOWN_DIFFERENCES
    listed = "; ".join(found[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    raise ValueError(
        f"{path} was begun with other settings: {listed}. Give these settings again, or another place to write to"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return flat


def _shown(flat: Mapping[str, Any], name: str) -> str:
    if name not in flat:
        return "not set"
    text = json.dumps(flat[name], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
