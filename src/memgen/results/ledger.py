"""Files that grow item by item and survive being killed: the lines of an item are there whole, or not at all.

Beside the data files lies a journal. An item's lines are appended to the data files and forced to disk, and only then
does the journal get its line: the item, what was said of it, and how long the data files are now. What a killed process
left behind the last such length (half a line, or lines of an item that was not finished) is cut off when the files
are opened again. The journal's first line holds the settings that everything was made with; under others nothing is
added.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

FORMAT_VERSION = 1
SHOWN_DIFFERENCES = 6
"""Settings that a refusal names; the others it counts."""


@dataclass(frozen=True)
class Entry:
    """What is to be written about one item.

    Attributes:
        index: the item.
        lines: for each data file by its name, records that become a line each.
        note: what the journal says of the item.
    """

    index: int
    lines: Mapping[str, Sequence[Mapping[str, Any]]]
    note: Mapping[str, Any]


@dataclass(frozen=True)
class Journal:
    """What a journal says.

    Attributes:
        settings: what everything was made with.
        about: what else was said when it was begun; nothing depends on it.
        notes: of each item that is done.
        ends: bytes of each data file that are good.
    """

    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    notes: Mapping[int, Mapping[str, Any]]
    ends: Mapping[str, int]


def read_journal(path: Path) -> Journal | None:
    """Reads a journal, also one that another process is writing; None if not even its first line is whole.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is broken anywhere but behind its last whole line.
    """
    return _parsed(path, path.read_bytes())[0]


def read_lines(journal_path: Path, name: str) -> list[dict[str, Any]]:
    """The records of a data file, as far as the journal vouches for them.

    Raises:
        FileNotFoundError: if there is no such journal.
        ValueError: if a file is broken.
    """
    journal = read_journal(journal_path)
    end = 0 if journal is None else journal.ends.get(name, 0)
    path = journal_path.parent / name
    content = path.read_bytes()[:end] if path.exists() else b""
    if len(content) < end:
        raise ValueError(f"{path} has {len(content)} bytes, but its journal {journal_path} vouches for {end}")
    return [
        _object(line, f"{path}, line {number}")
        for number, line in enumerate(content.split(b"\n")[:-1], start=1)
    ]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says of each setting in which two differ what it was and what it is."""
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
        about: anything else to be kept with it when it is begun.

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
        self._journal = _Appended(journal)
        try:
            _lock(self._journal, journal)
            found, whole = _parsed(journal, journal.read_bytes())
            if found is None:
                self._begin(files, settings, about or {})
                found = Journal(settings, about or {}, {}, {})
            else:
                _require_same(journal, found.settings, settings)
                self._journal.cut(whole)
            self.about = found.about
            self.notes: dict[int, Mapping[str, Any]] = dict(found.notes)
            """What was said of each item that is done."""
            self._files = {name: self._opened(name, found.ends.get(name, 0)) for name in files}
        except BaseException:
            self._journal.close()
            raise

    def _begin(self, files: Sequence[str], settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        for name in files:
            data = self.path.parent / name
            if data.exists() and data.stat().st_size:
                raise ValueError(
                    f"{data} exists, but its journal {self.path} does not, so it is not known what it was made with; "
                    "give another name, or move it away"
                )
        self._journal.cut(0)
        header = {"format": FORMAT_VERSION, "settings": settings, "about": about}
        self._journal.append([header])
        _sync_folder(self.path.parent)

    def _opened(self, name: str, end: int) -> _Appended:
        data = self.path.parent / name
        if data.is_dir():
            raise ValueError(f"{data} is a folder; give the name of a file")
        size = data.stat().st_size if data.exists() else 0
        if size < end:
            raise ValueError(
                f"{data} has {size} bytes, but its journal {self.path} vouches for {end}: it was changed since; "
                "give another name, or move both away"
            )
        file = _Appended(data)
        file.cut(end)
        _sync_folder(data.parent)
        return file

    def add(self, entries: Sequence[Entry]) -> None:
        """Writes items. When it returns, they survive whatever happens to the process or the machine."""
        noted = []
        for entry in entries:
            for name, records in entry.lines.items():
                self._files[name].append(records, sync=False)
            ends = {name: file.size for name, file in self._files.items()}
            noted.append({"index": entry.index, "note": dict(entry.note), "ends": ends})
        for file in self._files.values():
            file.sync()
        self._journal.append(noted)
        self.notes |= {entry.index: dict(entry.note) for entry in entries}

    def close(self) -> None:
        """Lets the files go. It can be called twice."""
        for file in (*self._files.values(), self._journal):
            file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class _Appended:
    """A file that is written at its end only."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self.size = path.stat().st_size

    def fileno(self) -> int:
        return self._file.fileno()

    def append(self, records: Sequence[Mapping[str, Any]], *, sync: bool = True) -> None:
        rest = memoryview(b"".join(_line(record) for record in records))
        while rest:
            written = self._file.write(rest)
            self.size += written
            rest = rest[written:]
        if sync:
            self.sync()

    def cut(self, size: int) -> None:
        self._file.truncate(size)
        self.sync()
        self.size = size

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # Half of a surrogate pair stands in a text: JSON can say it, UTF-8 cannot.
        return json.dumps(record).encode() + b"\n"


def _lock(file: _Appended, path: Path) -> None:
    """Ends with the process, however that ends."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {path}; wait for it, or give another name") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parsed(path: Path, content: bytes) -> tuple[Journal | None, int]:
    """What the whole lines say, and how many bytes they take."""
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].split(b"\n")[:-1]
    if not lines:
        return None, 0
    header, *items = (_object(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1))
    if header.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is no journal of this version of memgen: its format is {header.get('format')!r}, not {FORMAT_VERSION}"
        )
    notes = {int(item["index"]): item["note"] for item in items}
    ends = items[-1]["ends"] if items else {}
    return Journal(header["settings"], header.get("about", {}), notes, ends), whole


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(record, dict):
        message = f"{where}: expected an object, got {record!r:.80}"
        raise ValueError(message)  # noqa: TRY004 - the file is broken, not the call
    return record


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
