"""Passages for a query: from an index on this machine, or from a search server.

`PassageIndex` is the embedded default: an SQLite FTS5 table ranked by BM25, built once from a passage file and never
changed afterwards. Its name holds the hash of the passage file, so many processes may read it, and another file gives
another index.

`SearchServer` asks any server that speaks Search-R1's protocol (arXiv 2503.09516, `retrieval_server.py`):
`POST /retrieve {"queries": [...], "topk": k, "return_scores": true}` answers
`{"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list per query, where `contents` is the
quoted title, a line break and the text. Differs from Search-R1's client, which waits without limit and accepts any
answer: a request has a time limit as a whole, is repeated with growing pauses, and an answer that does not fit the
request is a failure (`memgen.http_post`). `memgen serve-search` offers a `PassageIndex` under the same protocol.

A failure raises `SearchError` and never gives an empty result: the agent is not to blame for a server's error.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import json
import logging
import os
import queue
import re
import sqlite3
import sys
import threading
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import platformdirs

from memgen.files import lock, new_file, write_whole
from memgen.http_post import HttpFailure, HttpServer, split_address

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
"""Version of the tables, part of an index's name."""
MAX_QUERY_TOKENS = 64
"""Distinct words of a query that are searched for at most, so that a model's endless query does not take minutes."""

WORDS_TABLE = "tokenize='porter unicode61 remove_diacritics 2'"
"""Setting of an FTS5 table: stems, blind to accents and case."""
BEST_WORDS = (
    "SELECT words.rowid AS number, bm25(words) AS score FROM words {join} WHERE words MATCH ? {where} "
    "ORDER BY bm25(words), words.rowid LIMIT ?"
)
"""BM25's ranking of a table `words`; SQLite's score is negative, the best is the lowest."""

_WORD = re.compile(r"[^\W_]+")
_CLITIC = re.compile(r"(?<=\w)['\u2019](?:d|ll|m|re|s|t|ve)\b", re.IGNORECASE)
"""Endings behind an apostrophe; as words of their own they would match half of all passages."""
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by did do does for from had has have he her his how i in is it its of on or "
        "she that the their there they this to was were what when where which who whom whose why will with",
    )
)
_SETTLED_S = 2.0
"""Age below which a file may still change without a change of its time stamp."""


class SearchError(RuntimeError):
    """A search was not answered, or the answer cannot be used."""


@dataclass(frozen=True)
class Passage:
    """A piece of text to be found."""

    id: str
    """From the passage file; if that has none, its number there."""
    title: str
    """Empty if it has none."""
    text: str
    """Shown to the agent."""

    @property
    def contents(self) -> str:
        """Title and text in the protocol's form: the title in quotes, a line break, the text."""
        return f'"{self.title}"\n{self.text}'

    @classmethod
    def from_contents(cls, identifier: str, contents: str) -> Passage:
        """From the protocol's form; the quotes around the title may be missing."""
        title, _, text = contents.partition("\n")
        title = title.strip()
        if len(title) >= 2 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return cls(id=identifier, title=title, text=text)


@dataclass(frozen=True)
class Hit:
    """A passage that was found, and its score."""

    passage: Passage
    """The passage."""
    score: float
    """Higher is better; comparable within one query only."""


class Searcher(ABC):
    """Finds passages."""

    topk: int
    """Passages per query, at most."""

    @abstractmethod
    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        """The best passages for each query, best first; an empty list if none fits.

        Raises:
            SearchError: if the search could not be carried out.
        """


# ---------------------------------------------------------------------------------------------- the embedded index


@final
class PassageIndex(Searcher):
    """BM25 over a passage file, with Porter stemming, blind to accents and case."""

    def __init__(self, path: str, topk: int = 3, index_dir: str | None = None) -> None:
        """Builds nothing yet.

        Args:
            path: the passages, one of
                `.jsonl`: objects with `text` and optionally `id` and `title`, or with `contents` (the title, a line
                break, the text);
                `.tsv`: columns id, text, title, as in DPR's Wikipedia dump, or in the order of a header line;
                `.json`: a list of such objects, or of items with such objects in `paragraphs`, of which each
                distinct one counts once (so PopQA's data file is a passage file too).
                All of them may end in `.gz`.
            topk: passages per query.
            index_dir: where indices are kept; default: `search` in `MEMGEN_HOME`, else in the platform's cache
                directory.

        Raises:
            ValueError: if `topk` is less than 1.
        """
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        self.path = path
        self.topk = topk
        self.index_dir = index_dir
        self._database: Path | None = None
        self._connections: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._process = os.getpid()
        self._opening = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """The settings; a connection cannot be used in another process."""
        return {"path": self.path, "topk": self.topk, "index_dir": self.index_dir}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)

    def open(self) -> Path:
        """The index file, built if it is missing or damaged. A search opens it by itself.

        Raises:
            FileNotFoundError: if there is no passage file.
            ValueError: if the passage file is broken or holds no passage.
            OSError: if the index cannot be written.
        """
        with self._opening:
            if self._database is None:
                source = Path(self.path).expanduser()
                if not source.is_file():
                    raise FileNotFoundError(f"there is no passage file {self.path}")
                directory = Path(self.index_dir).expanduser() if self.index_dir else _default_index_dir()
                self._database = _build_once(source, directory)
            return self._database

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        """The best passages for each query, best first."""
        return [[hit.passage for hit in self.hits(query)] for query in queries]

    def hits(self, query: str, topk: int | None = None) -> list[Hit]:
        """The best passages for a query and their scores.

        Args:
            query: any text; its words are searched for, none of it is query syntax.
            topk: in place of the index's own.

        Raises:
            SearchError: if the index cannot be read.
        """
        match = match_expression(query)
        if match is None:
            return []
        with self._connection() as connection:
            try:
                rows = connection.execute(
                    # The inner query sorts numbers alone; the texts of all that match need not be read.
                    f"SELECT p.id, p.title, p.text, -best.score FROM ({BEST_WORDS.format(join='', where='')}) AS best "
                    "JOIN passages AS p ON p.number = best.number ORDER BY best.score, best.number",
                    (match, self.topk if topk is None else topk),
                ).fetchall()
            except sqlite3.Error as error:
                raise SearchError(f"the search index {self._database} cannot be read: {error}") from error
        return [
            Hit(Passage(id=identifier, title=title, text=text), score)
            for identifier, title, text, score in rows
        ]

    def __len__(self) -> int:
        """Number of passages in the index."""
        with self._connection() as connection:
            return int(connection.execute("SELECT passages FROM about").fetchone()[0])

    def close(self) -> None:
        """Closes the connections that are not in use. The next search opens new ones."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._connections.get_nowait().close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One connection per search at a time: an SQLite connection serves one thread, and one process only."""
        if (
            self._process != os.getpid()
        ):  # After a fork the parent's connections must be neither used nor closed.
            self._connections, self._process = queue.LifoQueue(), os.getpid()
            self._opening = threading.Lock()
        database = self.open()
        try:
            connection = self._connections.get_nowait()
        except queue.Empty:
            connection = _connect(database)
        try:
            yield connection
        finally:
            self._connections.put(connection)


def _default_index_dir() -> Path:
    home = os.environ.get("MEMGEN_HOME")
    return (Path(home) if home else Path(platformdirs.user_cache_dir("memgen"))) / "search"


def match_expression(query: str) -> str | None:
    """The words of a query, any of which may occur; None if it has none.

    Each is quoted, so that AND, NEAR, *, : or a quote is a word or nothing, never an operator. Stop words are left
    out where something else is left: they match nearly every passage and decide nothing.
    """
    words = list(dict.fromkeys(word.lower() for word in _WORD.findall(_CLITIC.sub("", query))))
    telling = [word for word in words if word not in _STOP_WORDS] or words
    return " OR ".join(f'"{word}"' for word in telling[:MAX_QUERY_TOKENS]) or None


def _connect(database: Path) -> sqlite3.Connection:
    # An index never changes once it has its name, so readers need no locks, also on a network file system.
    address = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
    return sqlite3.connect(address, uri=True, check_same_thread=False)


def _build_once(source: Path, directory: Path) -> Path:
    """The index of a passage file, built if it does not exist yet or is damaged."""
    directory.mkdir(parents=True, exist_ok=True)
    database = directory / f"passages-v{INDEX_FORMAT}-{_fingerprint(source, directory)}.sqlite"
    if _is_complete(database):
        return database
    with lock(database):
        if not _is_complete(database):
            logger.info("building the search index of %s", source)
            with (
                new_file(database) as working,
                contextlib.closing(sqlite3.connect(working, isolation_level=None)) as connection,
            ):
                count = _write_index(connection, source)
            logger.info("%s: %d passages", database, count)
    return database


def _write_index(connection: sqlite3.Connection, source: Path) -> int:
    """Writes every passage of a file. Returns their number."""
    # The file gets its name only when it is complete, so no journal is needed.
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("BEGIN")
    connection.execute("CREATE TABLE about (passages INTEGER NOT NULL)")
    connection.execute(
        "CREATE TABLE passages "
        "(number INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL)"
    )
    connection.execute(
        "CREATE VIRTUAL TABLE words USING fts5(title, text, content='passages', content_rowid='number', "
        f"{WORDS_TABLE})"
    )
    count = 0
    for count, passage in enumerate(read_passages(source), start=1):
        identifier, title, text = (storable(part) for part in (passage.id, passage.title, passage.text))
        connection.execute("INSERT INTO passages VALUES (?, ?, ?, ?)", (count, identifier, title, text))
        connection.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", (count, title, text))
    if count == 0:
        raise ValueError(f"{source} holds no passage")
    connection.execute("INSERT INTO words (words) VALUES ('optimize')")
    connection.execute("INSERT INTO about VALUES (?)", (count,))
    connection.execute("COMMIT")
    return count


def _is_complete(database: Path) -> bool:
    """Whether an index file exists, opens, and is as long as its header says."""
    if not database.is_file():
        return False
    try:
        with contextlib.closing(_connect(database)) as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            page_size = connection.execute("PRAGMA page_size").fetchone()[0]
            found = connection.execute("SELECT passages FROM about").fetchone()
    except sqlite3.Error:
        found = None
    if found is None or pages * page_size != database.stat().st_size:
        logger.warning("the search index %s is damaged; it is built again", database)
        return False
    return True


def _fingerprint(source: Path, directory: Path) -> str:
    """A hash of a file's content, cached until the file's size, time stamps or inode change."""
    before = source.stat()
    state = json.dumps(
        [
            str(source.resolve()),
            before.st_dev,
            before.st_ino,
            before.st_size,
            before.st_mtime_ns,
            before.st_ctime_ns,
        ]
    )
    cached = directory / f"seen-{hashlib.sha256(state.encode()).hexdigest()[:24]}"
    with contextlib.suppress(OSError):
        known = cached.read_text()
        if re.fullmatch("[0-9a-f]{24}", known):
            return known
    digest = hashlib.sha256(source.name.encode())  # The ending says how the content is read.
    with source.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    after = source.stat()
    if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    ):
        raise ValueError(f"{source} has changed while it was read; try again when it is complete")
    fingerprint = digest.hexdigest()[:24]
    if time.time() - after.st_ctime > _SETTLED_S:
        write_whole(cached, fingerprint)
    return fingerprint


def storable(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate, which JSON can hold, becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ----------------------------------------------------------------------------------------------------- passage files


def read_passages(path: Path) -> Iterator[Passage]:
    """The passages of a file; `PassageIndex` says which forms there are.

    Raises:
        ValueError: if the file is of no known form, or a record is broken; the message says where.
    """
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    with _open_text(path) as file:
        try:
            match kind:
                case "jsonl":
                    yield from _json_lines(path, file)
                case "json":
                    yield from _json_list(path, file)
                case "tsv":
                    yield from _tab_separated(path, file)
                case _:
                    raise ValueError(
                        f"{path} has a name that ends in none of .jsonl, .json, .tsv (or these and .gz), so its form "
                        "is unknown; rename it"
                    )
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_lines(path: Path, file: IO[str]) -> Iterator[Passage]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        yield _passage(record, str(number), where)


def _json_list(path: Path, file: IO[str]) -> Iterator[Passage]:
    try:
        records = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        message = f"{path}: expected a list of passages, got {records!r:.80}"
        raise ValueError(message)  # noqa: TRY004 - the data is broken, not the call
    seen: set[tuple[str, str]] = set()
    for number, record in enumerate(records, start=1):
        where = f"{path}, item {number}"
        if not (isinstance(record, Mapping) and isinstance(record.get("paragraphs"), list)):
            yield _passage(record, str(number), where)
            continue
        for place, paragraph in enumerate(record["paragraphs"], start=1):
            passage = _passage(paragraph, str(len(seen) + 1), f"{where}, paragraph {place}")
            if (passage.title, passage.text) not in seen:
                seen.add((passage.title, passage.text))
                yield passage


def _passage(record: Any, number: str, where: str) -> Passage:
    if not isinstance(record, Mapping):
        message = f"{where}: expected an object with text or contents, got {record!r:.80}"
        raise ValueError(message)  # noqa: TRY004
    identifier = str(record.get("id", number))
    title, text, contents = record.get("title", ""), record.get("text"), record.get("contents")
    if isinstance(text, str) and isinstance(title, str) and (text.strip() or title.strip()):
        return Passage(id=identifier, title=title, text=text)
    if isinstance(contents, str) and contents.strip():
        return Passage.from_contents(identifier, contents)
    raise ValueError(f'{where}: there is neither a "text" nor "contents", or no text in it: {record!r:.80}')


def _tab_separated(path: Path, file: IO[str]) -> Iterator[Passage]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(file, delimiter="\t")
    columns = ["id", "text", "title"]
    for number, row in enumerate(rows, start=1):
        if number == 1 and {"id", "text", "title"} <= set(row):
            columns = row
            continue
        if not row:
            continue
        if len(row) != len(columns):
            raise ValueError(f"{path}, row {number}: expected {len(columns)} columns, got {len(row)}")
        yield _passage(dict(zip(columns, row, strict=True)), str(number), f"{path}, row {number}")


# ------------------------------------------------------------------------------------------------------- the client


@final
class SearchServer(Searcher):
    """A search server reached over HTTP. Proxies named in the environment are not used."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8001/retrieve",
        topk: int = 3,
        timeout_s: float = 30.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        batch_size: int = 512,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: of the server; the path `/retrieve` may be left out.
            topk: passages per query.
            timeout_s: seconds that a request may take from the connection to the last byte.
            retries: further attempts after a failure that may be temporary: no connection, no answer in time, a
                status that says so (5xx, 429), an answer that does not fit the request.
            backoff_s: pause before the second attempt; each further pause is twice as long, up to 30 s.
            batch_size: queries per request, at most.

        Raises:
            ValueError: if a setting is not usable.
        """
        address = split_address(url, "http://HOST:PORT/retrieve")
        for name, value, least in (("topk", topk, 1), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.url = url
        self.topk = topk
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.batch_size = batch_size
        path = address.path if address.path not in ("", "/") else "/retrieve"
        place = urllib.parse.urlunsplit((address.scheme, address.netloc, path, "", ""))
        self._server = HttpServer(place, "search server", timeout_s, retries, backoff_s)

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        """The best passages for each query, best first; one request for up to `batch_size` queries.

        Raises:
            SearchError: if the server cannot be reached, is too slow, refuses, or answers what cannot be used, at
                every attempt.
        """
        found: list[list[Passage]] = []
        for start in range(0, len(queries), self.batch_size):
            found += self._search_batch(
                [storable(query) for query in queries[start : start + self.batch_size]]
            )
        return found

    def _search_batch(self, queries: Sequence[str]) -> list[list[Passage]]:
        body = json.dumps({"queries": queries, "topk": self.topk, "return_scores": True}).encode()
        try:
            return self._server.ask(body, lambda content: _read_result(content, len(queries), self.topk))
        except HttpFailure as failure:
            raise SearchError(f"search server {self.url}: {failure}") from failure


def _read_result(content: bytes, queries: int, topk: int) -> list[list[Passage]]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HttpFailure(f"the answer is no JSON: {content[:80]!r}") from error
    found = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise HttpFailure(f'the answer has no list "result": {content[:80]!r}')
    if len(found) != queries:
        raise HttpFailure(f"{queries} queries were asked, {len(found)} results came back")
    for documents in found:
        if not isinstance(documents, list):
            raise HttpFailure(f"the result of a query is no list: {documents!r:.80}")
    return [[_read_document(document) for document in documents[:topk]] for documents in found]


def _read_document(item: Any) -> Passage:
    """A document with its score around it, or bare, the protocol's form without scores."""
    document = item.get("document", item) if isinstance(item, dict) else None
    if isinstance(document, dict):
        try:
            return _passage(document, "", "document")
        except ValueError:
            pass  # Raised below, with the document.
    raise HttpFailure(f"a document of the answer has no text: {item!r:.80}")
