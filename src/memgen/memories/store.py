"""The file of a text memory: one SQLite database with items, search index, vectors, links, state and a log.

Every write is one transaction, so that a killed writer loses the write under way and nothing else, and a full disk leaves
the file as it was. The log holds each transaction's changes, vectors included; `rebuild` makes the file again from it, up
to any entry. A memory that another method, other settings, another embedder or another seed has written is refused.

The clock counts writes (ticks): nothing depends on the time of day. Search is BM25 (SQLite's FTS5, as in
`memgen.environments.search.retrieval`) without an embedder, and the cosine with one.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from memgen.environments.search.retrieval import BEST_WORDS, WORDS_TABLE, match_expression, storable
from memgen.files import new_file
from memgen.memories.embedders import Embedder

FORMAT = 1
"""Version of the tables."""
BUSY_SECONDS = 10.0
"""How long a write waits for another process's."""

_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE items (number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, grp TEXT NOT NULL, "
    "created INTEGER NOT NULL, accessed INTEGER NOT NULL, strength REAL NOT NULL, key TEXT, text TEXT NOT NULL, "
    "data TEXT NOT NULL)",
    "CREATE INDEX items_by_kind ON items (kind, grp)",
    f"CREATE VIRTUAL TABLE words USING fts5(key, content='items', content_rowid='number', {WORDS_TABLE})",
    "CREATE TABLE vectors (number INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE links (source INTEGER NOT NULL, target INTEGER NOT NULL, relation TEXT NOT NULL, "
    "PRIMARY KEY (source, target, relation)) WITHOUT ROWID",
    "CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE log (number INTEGER PRIMARY KEY, cause TEXT NOT NULL, changes TEXT NOT NULL)",
)
_COLUMNS = "number, kind, grp, created, accessed, strength, key, text, data"


@dataclass(frozen=True)
class Identity:
    """What a file must have been written with to be read."""

    method: str
    """Name of the method."""
    settings: Mapping[str, Any]
    """Its constants."""
    embedder: str
    """`Embedder.id`, or bm25."""
    seed: int
    """Of the method's random decisions."""


@dataclass(frozen=True)
class Item:
    """A piece of memory."""

    number: int
    """Its place in the order of creation; never used twice."""
    kind: str
    """What it is, among the kinds of its method."""
    group: str
    """`Experience.group`, where the method keeps groups apart."""
    created: int
    """Tick at which it was made."""
    accessed: int
    """Tick at which it was last recalled; at first that of its creation."""
    strength: float
    """Votes, importance or stability: what the method counts."""
    key: str | None
    """What a search compares with the query; None: it is not found by searching."""
    text: str
    """What is shown."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the method keeps, as JSON."""


@dataclass(frozen=True)
class Found:
    """An item that was found."""

    item: Item
    """The item."""
    score: float
    """BM25's score or the cosine: higher is better, comparable within one query only."""


@dataclass(frozen=True)
class Changes:
    """How many items a transaction concerns."""

    added: int
    """New items that it leaves."""
    changed: int
    """Items that were there before and are different now."""
    removed: int
    """Items that were there before and are no more."""


@final
class MemoryStore:
    """A memory's file. One connection, for one thread at a time."""

    def __init__(self, path: Path, identity: Identity, embedder: Embedder | None = None) -> None:
        """Opens a file, or begins one.

        Args:
            path: of the file; its folder must exist.
            identity: what writes it.
            embedder: makes the vectors; None: BM25.

        Raises:
            ValueError: if the file is none of a memory, or one of another identity; the message says what differs.
            OSError: if it can be neither read nor made.
        """
        self.path = path
        self.embedder = embedder
        self._changes: list[list[Any]] | None = None
        self._vectors: dict[str, tuple[list[int], np.ndarray]] = {}
        self._seen = -1
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path.parent} for the memory {path.name}; make it first"
            )
        self._connection = connect(path)
        try:
            with named_errors(self.path):
                self._open(identity)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: Identity) -> None:
        if self._is_new():
            with self._exclusively():
                if self._is_new():  # no other process was faster
                    _begin(self._connection, {"format": FORMAT, **_plain(identity)})
        _require_same(self.path, _about(self._connection, self.path), identity)

    def _is_new(self) -> bool:
        return self._connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None

    # Transactions

    @contextlib.contextmanager
    def transaction(self, cause: Mapping[str, Any]) -> Iterator[None]:
        """All changes of the block together, or none of them.

        Args:
            cause: why, for the log.

        Raises:
            OSError: if they cannot be written (a full disk, another writer); the file is then as it was.
        """
        assert self._changes is None, "transactions do not nest"
        with named_errors(self.path), self._exclusively():
            self._changes = []
            try:
                yield
                if self._changes:
                    row = (json.dumps(cause), json.dumps(self._changes))
                    self._connection.execute("INSERT INTO log (cause, changes) VALUES (?, ?)", row)
            finally:
                self._changes = None

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        try:
            with exclusively(self._connection):
                yield
        except BaseException:
            self._vectors.clear()
            raise

    def _do(self, *change: Any) -> None:
        """Makes a change, and remembers it for the log."""
        assert self._changes is not None, "changes are made inside a transaction"
        _apply(self._connection, change)
        self._changes.append(list(change))
        if change[0] in ("add", "set", "remove"):
            self._vectors.clear()

    def pending(self) -> Changes:
        """What the transaction under way has changed so far."""
        done = self._changes or []
        added = {c[1] for c in done if c[0] == "add"}
        removed = {c[1] for c in done if c[0] == "remove"}
        changed = {c[1] for c in done if c[0] == "set"} - added - removed
        return Changes(len(added - removed), len(changed), len(removed - added))

    # Changes

    def add(
        self,
        kind: str,
        text: str,
        *,
        key: str | None = None,
        group: str = "",
        strength: float = 0.0,
        data: Mapping[str, Any] | None = None,
    ) -> int:
        """Adds an item; the fields are those of `Item`. Returns its number."""
        (last,) = self._connection.execute(
            "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'items'), 0)"
        ).fetchone()
        fields = {
            "kind": kind,
            "grp": storable(group),
            "created": self.tick,
            "accessed": self.tick,
            "strength": strength,
            "key": None if key is None else storable(key),
            "text": storable(text),
            "data": json.dumps(data or {}),
        }
        self._do("add", int(last) + 1, fields, self._vector(key))
        return int(last) + 1

    def update(
        self,
        item: Item,
        *,
        text: str | None = None,
        key: str | None = None,
        strength: float | None = None,
        accessed: int | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Changes fields of an item; None leaves one as it is. A new key has a new vector."""
        fields = {
            "text": None if text is None else storable(text),
            "key": None if key is None else storable(key),
            "strength": strength,
            "accessed": accessed,
            "data": None if data is None else json.dumps(data),
        }
        given = {name: value for name, value in fields.items() if value is not None}
        same = {"text": item.text, "key": item.key, "strength": item.strength, "accessed": item.accessed}
        given = {name: value for name, value in given.items() if name == "data" or value != same[name]}
        if given:
            self._do("set", item.number, given, self._vector(key if "key" in given else None))

    def remove(self, item: Item) -> None:
        """Removes an item and its links."""
        self._do("remove", item.number)

    def link(self, source: int, target: int, relation: str = "") -> None:
        """Links two items by their numbers."""
        self._do("link", source, target, relation)

    def set_state(self, name: str, value: Any) -> None:
        """Keeps a value of the method's by name, as JSON."""
        self._do("state", name, json.dumps(value))

    def advance(self) -> None:
        """Moves the clock on by a tick."""
        self.set_state("tick", self.tick + 1)

    def _vector(self, key: str | None) -> str | None:
        if self.embedder is None or key is None:
            return None
        vector = np.asarray(self.embedder.encode([storable(key)])[0], dtype="<f4")
        if vector.shape != (self.embedder.dim,):
            raise ValueError(
                f"embedder {self.embedder.id} gave a vector of shape {vector.shape}, not ({self.embedder.dim},)"
            )
        return base64.b64encode(vector.tobytes()).decode()

    # Reading

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with named_errors(self.path):
            return self._connection.execute(statement, tuple(values)).fetchall()

    @property
    def tick(self) -> int:
        """Writes so far, the one under way included."""
        return int(self.state("tick", 0))

    @property
    def entries(self) -> int:
        """Number of the log's last entry; `rebuild` goes up to one."""
        return int(self._rows("SELECT coalesce(max(number), 0) FROM log")[0][0])

    def state(self, name: str, default: Any = None) -> Any:
        """A value that `set_state` has kept."""
        rows = self._rows("SELECT value FROM state WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else default

    def item(self, number: int) -> Item | None:
        """An item by its number; None if there is none."""
        found = self._select("WHERE number = ?", (number,))
        return found[0] if found else None

    def items(self, kind: str, group: str | None = None, *, newest: int | None = None) -> list[Item]:
        """The items of a kind in the order of their creation, those of one group only if it is given.

        Args:
            kind: of the items.
            group: of the items; None: any.
            newest: only so many, the last ones.
        """
        where, values = "WHERE kind = ?", [kind]
        if group is not None:
            where, values = where + " AND grp = ?", [kind, group]
        return self._select(
            f"{where} ORDER BY number DESC LIMIT {-1 if newest is None else int(newest)}", values
        )[::-1]

    def count(self, kind: str) -> int:
        """Items of a kind."""
        return int(
            self._connection.execute("SELECT count(*) FROM items WHERE kind = ?", (kind,)).fetchone()[0]
        )

    def linked(self, source: int, relation: str = "") -> list[Item]:
        """The items that an item is linked to, in the order of their creation."""
        chosen = (
            "WHERE number IN (SELECT target FROM links WHERE source = ? AND relation = ?) ORDER BY number"
        )
        return self._select(chosen, (source, relation))

    def links(self, relation: str = "") -> list[tuple[int, int]]:
        """All links of a relation, (source, target)."""
        rows = self._rows(
            "SELECT source, target FROM links WHERE relation = ? ORDER BY source, target", (relation,)
        )
        return [(int(source), int(target)) for source, target in rows]

    def search(
        self, query: str, k: int, kind: str, group: str | None = None, leave_out: Collection[int] = ()
    ) -> list[Found]:
        """The items of a kind whose keys are nearest to a query, best first, ties in the order of creation.

        With BM25 an item that shares no word with the query is not found; with vectors every item has a cosine.

        Args:
            query: any text.
            k: items at most.
            kind: of the items.
            group: of the items; None: any.
            leave_out: numbers of items that are not wanted.
        """
        ranked = (
            self._cosines(query, kind)
            if self.embedder
            else self._bm25(query, kind, k + len(leave_out), group)
        )
        found: list[Found] = []
        for number, score in ranked:
            if len(found) == k:
                break
            item = None if number in leave_out else self.item(number)
            if item is not None and group in (None, item.group):
                found.append(Found(item, score))
        return found

    def relevance(self, query: str, kind: str) -> dict[int, float]:
        """The score of every item of a kind by its number; with BM25, 0 where no word is shared."""
        if self.embedder:
            return dict(self._cosines(query, kind))
        numbers = self._rows("SELECT number FROM items WHERE kind = ?", (kind,))
        return dict.fromkeys((n for (n,) in numbers), 0.0) | dict(self._bm25(query, kind, -1, None))

    def _bm25(self, query: str, kind: str, k: int, group: str | None) -> list[tuple[int, float]]:
        match = match_expression(query)
        if match is None:
            return []
        statement = BEST_WORDS.format(
            join="CROSS JOIN items ON items.number = words.rowid",
            where="AND items.kind = ?" + ("" if group is None else " AND items.grp = ?"),
        )
        values = (match, kind, *(() if group is None else (group,)), k)
        return [(int(number), -score) for number, score in self._rows(statement, values)]

    def _cosines(self, query: str, kind: str) -> list[tuple[int, float]]:
        assert self.embedder is not None, "only a memory with vectors has cosines"
        numbers, matrix = self._matrix(kind)
        if not numbers:
            return []
        cosines = matrix @ np.asarray(self.embedder.encode([storable(query)])[0], dtype=np.float32)
        return [(numbers[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")]

    def _matrix(self, kind: str) -> tuple[list[int], np.ndarray]:
        """Numbers and vectors of the items of a kind, kept until something changes."""
        seen = self._rows("PRAGMA data_version")[0][0]
        if seen != self._seen:  # another process has written
            self._vectors.clear()
            self._seen = seen
        if kind not in self._vectors:
            rows = self._rows(
                "SELECT items.number, vector FROM items JOIN vectors ON vectors.number = items.number "
                "WHERE kind = ? ORDER BY items.number",
                (kind,),
            )
            flat = np.frombuffer(b"".join(blob for _, blob in rows), dtype="<f4")
            self._vectors[kind] = [n for n, _ in rows], flat.reshape(len(rows), -1) if rows else flat
        return self._vectors[kind]

    def _select(self, where: str, values: Sequence[Any]) -> list[Item]:
        rows = self._rows(f"SELECT {_COLUMNS} FROM items {where}", values)
        return [Item(*(*row[:8], json.loads(row[8]))) for row in rows]

    # The file as a whole

    def contents(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that the file says, by table; two files with the same contents are the same memory.

        Raises:
            ValueError: if the search index does not fit the items.
        """
        self._rows("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
        tables = ("about", "items", "vectors", "links", "state", "log")
        return {name: self._rows(f"SELECT * FROM {name} ORDER BY 1, 2") for name in tables}

    def copy_to(self, path: Path) -> None:
        """Copies the file, whole or not at all; a frozen evaluation reads a copy, so that its recalls change nothing.

        Raises:
            OSError: if the copy cannot be written.
        """
        with (
            named_errors(path),
            new_file(path) as temporary,
            contextlib.closing(connect(temporary)) as copy,
        ):
            self._connection.backup(copy)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()


def rebuild(source: Path, target: Path, until: int | None = None) -> int:
    """Makes a memory's file again from its log.

    Args:
        source: a memory's file; of its tables only the log and what it was written with are read.
        target: the new file, whole or not at all.
        until: number of the last entry to follow; None: all of them.

    Returns:
        Entries that were followed.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is none of a memory.
    """
    if not source.is_file():
        raise FileNotFoundError(f"there is no memory file {source}")
    with named_errors(source), contextlib.closing(connect(source)) as old:
        about = _about(old, source)
        entries = old.execute("SELECT number, cause, changes FROM log ORDER BY number").fetchall()
    followed = [entry for entry in entries if until is None or entry[0] <= until]
    with named_errors(target), new_file(target) as temporary, contextlib.closing(connect(temporary)) as new:
        new.execute("BEGIN")
        _begin(new, about)
        for entry in followed:
            for change in json.loads(entry[2]):
                _apply(new, change)
            new.execute("INSERT INTO log VALUES (?, ?, ?)", entry)
        new.execute("COMMIT")
    return len(followed)


@contextlib.contextmanager
def exclusively(connection: sqlite3.Connection) -> Iterator[None]:
    """Begins and commits, or rolls back; other processes can read meanwhile, and none can write."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself where the disk is full.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def named_errors(
    path: Path,
    called: str = "memory",
    remedy: str = "choose another file, or rebuild it from its log (memgen.memories.store.rebuild)",
) -> Iterator[None]:
    """SQLite's errors in words that say what to do.

    Args:
        path: of the file.
        called: what the file is.
        remedy: what to do with a damaged one.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        told = str(error)
        if "full" in told or "disk I/O" in told:
            raise OSError(
                errno.ENOSPC, f"the {called} {path} could not be written ({told}) and is as it was; make room"
            ) from error
        if "locked" in told:
            raise OSError(
                errno.EBUSY, f"another process is writing the {called} {path}; wait for it, or use a copy"
            ) from error
        raise OSError(errno.EIO, f"the {called} {path} cannot be used: {told}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no {called} file, or a damaged one: {error}; {remedy}") from error


def connect(path: Path, called: str = "memory") -> sqlite3.Connection:
    """Opens a file; one that does not exist is begun, empty.

    Raises:
        OSError: if it cannot be opened.
    """
    try:
        # A server loads an agent in one thread and answers in another; they take turns.
        return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise OSError(errno.EIO, f"the {called} {path} cannot be opened: {error}") from error


def _begin(connection: sqlite3.Connection, about: Mapping[str, Any]) -> None:
    """Makes the tables of an empty file."""
    for statement in _TABLES:
        connection.execute(statement)
    rows = [(name, json.dumps(value, sort_keys=True)) for name, value in about.items()]
    connection.executemany("INSERT INTO about VALUES (?, ?)", rows)


def _apply(connection: sqlite3.Connection, change: Sequence[Any]) -> None:
    """Makes one change of the log: the only place that changes items, vectors, links and state."""
    kind, *values = change
    if kind == "add":
        number, fields, vector = values
        names = ", ".join(fields)
        marks = ", ".join("?" for _ in fields)
        connection.execute(
            f"INSERT INTO items (number, {names}) VALUES (?, {marks})", (number, *fields.values())
        )
        _index(connection, number, vector)
    elif kind == "set":
        number, fields, vector = values
        if "key" in fields:
            _unindex(connection, number)
        changes = ", ".join(f"{name} = ?" for name in fields)
        connection.execute(f"UPDATE items SET {changes} WHERE number = ?", (*fields.values(), number))
        if "key" in fields:
            _index(connection, number, vector)
    elif kind == "remove":
        (number,) = values
        _unindex(connection, number)
        connection.execute("DELETE FROM items WHERE number = ?", (number,))
        connection.execute("DELETE FROM links WHERE source = ? OR target = ?", (number, number))
    elif kind == "link":
        connection.execute("INSERT OR IGNORE INTO links VALUES (?, ?, ?)", values)
    else:
        assert kind == "state", "the log has no other changes"
        connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", values)


def _index(connection: sqlite3.Connection, number: int, vector: str | None) -> None:
    connection.execute(
        "INSERT INTO words (rowid, key) SELECT number, key FROM items WHERE number = ?", (number,)
    )
    if vector is not None:
        connection.execute("INSERT INTO vectors VALUES (?, ?)", (number, base64.b64decode(vector)))


def _unindex(connection: sqlite3.Connection, number: int) -> None:
    connection.execute(
        "INSERT INTO words (words, rowid, key) SELECT 'delete', number, key FROM items WHERE number = ?",
        (number,),
    )
    connection.execute("DELETE FROM vectors WHERE number = ?", (number,))


def _plain(identity: Identity) -> dict[str, Any]:
    return {
        "method": identity.method,
        "settings": dict(identity.settings),
        "embedder": identity.embedder,
        "seed": identity.seed,
    }


def _about(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    try:
        about = {
            name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM about")
        }
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no memory file: {error}; choose another file") from error
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a memory of format {about.get('format')!r}, this version reads format {FORMAT}; "
            "begin another file"
        )
    return about


def _require_same(path: Path, about: Mapping[str, Any], identity: Identity) -> None:
    wanted = _plain(identity)
    if about["method"] != wanted["method"]:
        raise ValueError(
            f"{path} is a memory of {about['method']}, not of {wanted['method']}; choose another file or method"
        )
    if about["embedder"] != wanted["embedder"]:
        raise ValueError(
            f"{path} was written with the embedder {about['embedder']}, whose vectors cannot be compared with those of "
            f"{wanted['embedder']}; choose another file or embedder"
        )
    plain = json.loads(json.dumps(wanted["settings"]))
    for name in sorted({*about["settings"], *plain}):
        was, now = about["settings"].get(name), plain.get(name)
        if was != now:
            raise ValueError(
                f"{path} was written with {name} {was!r}, not {now!r}; choose another file or setting"
            )
    if about["seed"] != wanted["seed"]:
        raise ValueError(
            f"{path} was written with seed {about['seed']}, not {wanted['seed']}; choose another file or seed"
        )
