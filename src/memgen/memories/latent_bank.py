"""The file of a latent bank: woven blocks of successful episodes, each with the reasoner's state as its key.

    score(block) = cosine(query, key) * exp(-decay * age)        age: episodes written since the block
    a block is found if its score is at least `least`; above `capacity` blocks the oldest are dropped

The constants are those of a public fork of the released code (White-or-Black9/MemGen, `latent_memory_bank.py`), whose bank is
gone when the process ends. Differs from it: (1) one SQLite database, whose blobs are latents as safetensors: a write is one
transaction, so that a killed writer loses the write under way and nothing else; (2) a key is the mean of the reasoner's states
in front of the insertion, where the fork's is the mean of the latents, which live in another space than its query; (3) only
blocks of successful episodes are kept; (4) a block that was inserted as it was in a later success is renewed instead of being
kept twice. A bank of another reasoner is refused by its name: its blocks and keys mean nothing to this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from safetensors.numpy import load, save

from memgen.environments.search.retrieval import storable
from memgen.memories.store import connect, exclusively, named_errors

FORMAT = 1
"""Version of the tables."""
_CALLED = "latent bank"
_REMEDY = "choose another file"
_SMALLEST = 1e-6
"""Length of a key below which it has no direction."""
_TOLERANCE = 1e-6
"""Of a score, which is computed in float32."""
_TABLES = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE blocks (number INTEGER PRIMARY KEY AUTOINCREMENT, episode TEXT NOT NULL, kind TEXT NOT NULL, "
    "size INTEGER NOT NULL, written INTEGER NOT NULL, reward REAL NOT NULL, text TEXT NOT NULL, digest TEXT NOT NULL, "
    "key BLOB NOT NULL, latents BLOB NOT NULL)",
    "CREATE INDEX blocks_by_episode ON blocks (episode)",
    "CREATE INDEX blocks_by_digest ON blocks (digest)",
    "CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
)
_OLDEST = "SELECT number FROM blocks ORDER BY written DESC, number DESC LIMIT -1 OFFSET ?"


@dataclass(frozen=True)
class BankIdentity:
    """What a bank must have been written with to be used."""

    reasoner: str
    """Name of the reasoner's base, for messages."""
    fingerprint: str
    """Hash of its weights."""
    hidden: int
    """Its width."""
    key_tokens: int
    """Tokens whose states make a key."""


@dataclass(frozen=True)
class NewBlock:
    """A block to keep."""

    kind: str
    """Of its insertion: prompt or inference."""
    key: np.ndarray
    """The reasoner's state in front of it, float32 (hidden,)."""
    latents: np.ndarray
    """The block, float32 (K, hidden)."""
    text: str = ""
    """The end of the text in front of it, to be looked at."""


@dataclass(frozen=True)
class StoredBlock:
    """A block that is kept, without its tensors."""

    number: int
    """Its place in the order of creation; never used twice."""
    episode: str
    """The episode that it is from."""
    kind: str
    """Of its insertion."""
    size: int
    """K."""
    written: int
    """Tick at which it was kept, or last renewed."""
    reward: float
    """Of the episode."""
    text: str
    """The end of the text in front of it."""


@dataclass(frozen=True)
class Hit:
    """A block that was found."""

    number: int
    """Of the block."""
    score: float
    """cosine * exp(-decay * age)."""


@dataclass(frozen=True)
class Kept:
    """What a write did."""

    added: int
    """New blocks."""
    renewed: int
    """Blocks that were there, and are as young as new ones now."""
    dropped: int
    """Blocks that are no more: those of an earlier attempt at the task, and the oldest above the capacity."""


@final
class LatentBank:
    """A bank's file. One connection, for one thread at a time.

    What is found is as of the opening and of the last write through this object: what other processes write meanwhile is
    not seen before.

    Args:
        path: of the file; its folder must exist.
        identity: what uses it; None: whatever it was written with, and it must exist.
        begin: whether to begin a file where there is none.

    Raises:
        FileNotFoundError: if there is no file, and none is to be begun.
        ValueError: if the file is no bank, or one of another reasoner or of other keys; the message says what differs.
        OSError: if it can be neither read nor made.
    """

    def __init__(self, path: Path, identity: BankIdentity | None = None, *, begin: bool = False) -> None:
        self.path = path
        if not path.is_file() and (identity is None or not begin):
            raise FileNotFoundError(f"there is no latent bank {path}")
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"there is no folder {path.parent} for the latent bank {path.name}; make it first"
            )
        self._connection = connect(path, _CALLED)
        try:
            with self._named_errors():
                if identity is not None and begin and self._is_new():
                    self._begin(identity)
                self.about = self._about()
                if identity is not None:
                    _require_same(path, self.about, identity)
                self._load()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        with named_errors(self.path, _CALLED, _REMEDY):
            yield

    def _is_new(self) -> bool:
        return self._connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None

    def _begin(self, identity: BankIdentity) -> None:
        with exclusively(self._connection):
            if not self._is_new():  # another process was faster
                return
            for statement in _TABLES:
                self._connection.execute(statement)
            about = {"format": FORMAT, **asdict(identity)}
            self._connection.executemany(
                "INSERT INTO about VALUES (?, ?)",
                [(name, json.dumps(value)) for name, value in about.items()],
            )

    def _about(self) -> dict[str, Any]:
        if self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'blocks'").fetchone() is None:
            raise ValueError(f"{self.path} is no latent bank; choose another file")
        about = {name: json.loads(value) for name, value in self._connection.execute("SELECT * FROM about")}
        if about.get("format") != FORMAT:
            raise ValueError(
                f"{self.path} is a latent bank of format {about.get('format')!r}, this version reads format {FORMAT}; "
                "begin another file"
            )
        return about

    def _load(self) -> None:
        """Takes over keys and ages from the file."""
        rows = self._connection.execute(
            "SELECT number, kind, size, written, key FROM blocks ORDER BY number"
        ).fetchall()
        self._numbers = [int(row[0]) for row in rows]
        self._kinds = np.array([(kind, size) for _, kind, size, _, _ in rows], dtype=object).reshape(-1, 2)
        self._written = np.array([row[3] for row in rows], dtype=np.int64)
        flat = np.frombuffer(b"".join(row[4] for row in rows), dtype="<f4")
        self._keys = flat.reshape(len(rows), self.about["hidden"])
        found = self._connection.execute("SELECT value FROM state WHERE name = 'tick'").fetchone()
        self.tick = 0 if found is None else int(found[0])
        """Episodes written so far."""

    # Writing

    def keep(self, episode: str, reward: float, blocks: Sequence[NewBlock], capacity: int) -> Kept:
        """Keeps the blocks of a successful episode, all of them or none, in the place of those of an earlier attempt.

        Args:
            episode: names the task; another attempt at it has the same name.
            reward: of the episode.
            blocks: in the order of their insertion.
            capacity: blocks that stay at most, the youngest.

        Raises:
            OSError: if the file cannot be written; it is then as it was.
        """
        with self._named_errors(), exclusively(self._connection):
            tick = 1 + (self._value("SELECT value FROM state WHERE name = 'tick'") or 0)
            self._connection.execute("INSERT OR REPLACE INTO state VALUES ('tick', ?)", (tick,))
            inserted = [block for block in blocks if not self._renew(block, tick)]
            earlier = self._changed(
                "DELETE FROM blocks WHERE episode = ? AND written < ?", (storable(episode), tick)
            )
            for block in inserted:
                self._add(block, episode, reward, tick)
            beyond = self._changed(f"DELETE FROM blocks WHERE number IN ({_OLDEST})", (capacity,))
        self._load()
        return Kept(len(inserted), len(blocks) - len(inserted), earlier + beyond)

    def _renew(self, block: NewBlock, tick: int) -> bool:
        """Makes a block that is here already as young as a new one. False: it is not here."""
        return (
            self._changed("UPDATE blocks SET written = ? WHERE digest = ?", (tick, _digest(block.latents)))
            > 0
        )

    def _add(self, block: NewBlock, episode: str, reward: float, tick: int) -> None:
        latents = np.ascontiguousarray(block.latents, dtype="<f4")
        hidden = self.about["hidden"]
        assert latents.shape[1:] == block.key.shape == (hidden,), "blocks and keys have the reasoner's width"
        values = (
            storable(episode), block.kind, len(latents), tick, reward, storable(block.text), _digest(latents),
            block.key.astype("<f4").tobytes(), save({"latents": latents}),
        )  # fmt: skip
        marks = ", ".join("?" for _ in values)
        self._connection.execute(
            "INSERT INTO blocks (episode, kind, size, written, reward, text, digest, key, latents) "
            f"VALUES ({marks})",
            values,
        )

    def prune(
        self, *, capacity: int | None = None, older_than: int | None = None, episode: str | None = None
    ) -> int:
        """Removes blocks, and gives their room back to the disk.

        Args:
            capacity: blocks that stay at most, the youngest.
            older_than: removes those of which more episodes were written since.
            episode: removes those of an episode.

        Returns:
            How many were removed.

        Raises:
            OSError: if the file cannot be written; it is then as it was.
        """
        removed = 0
        with self._named_errors(), exclusively(self._connection):
            if episode is not None:
                removed += self._changed("DELETE FROM blocks WHERE episode = ?", (storable(episode),))
            if older_than is not None:
                removed += self._changed("DELETE FROM blocks WHERE ? - written > ?", (self.tick, older_than))
            if capacity is not None:
                removed += self._changed(f"DELETE FROM blocks WHERE number IN ({_OLDEST})", (capacity,))
        with self._named_errors():
            self._connection.execute("VACUUM")
            self._load()
        return removed

    def _changed(self, statement: str, values: Sequence[Any]) -> int:
        return self._connection.execute(statement, tuple(values)).rowcount

    def _value(self, statement: str) -> Any:
        row = self._connection.execute(statement).fetchone()
        return None if row is None else row[0]

    # Reading

    def search(
        self,
        key: np.ndarray,
        kind: str,
        size: int,
        *,
        count: int,
        least: float,
        decay: float,
        centred: bool = False,
    ) -> list[Hit]:
        """The blocks whose keys are nearest to a query, best first, ties in the order of creation.

        Args:
            key: the query, (hidden,).
            kind: of the insertions.
            size: K of the blocks.
            count: blocks at most.
            least: lowest score.
            decay: how fast a score falls with age.
            centred: whether the mean key of the kind is taken off keys and query.
        """
        places = np.flatnonzero(self._kinds[:, 0] == kind)
        if not len(places):
            return []
        keys = self._unit_keys(places, centred=centred)
        asked = key - self._keys[places].mean(axis=0) if centred else key
        cosines = keys @ asked.astype(np.float32) / max(float(np.linalg.norm(asked)), _SMALLEST)
        scores = cosines * np.exp(-decay * (self.tick - self._written[places]))
        fits = (self._kinds[places, 1] == size) & (scores >= least - _TOLERANCE)
        order = [row for row in np.argsort(-scores, kind="stable") if fits[row]]
        return [Hit(self._numbers[places[row]], float(scores[row])) for row in order[:count]]

    def _unit_keys(self, places: np.ndarray, *, centred: bool) -> np.ndarray:
        """Keys of length 1; one that is the mean itself has length 0."""
        keys = self._keys[places]
        if centred:
            keys = keys - keys.mean(axis=0)
        unit: np.ndarray = keys / np.linalg.norm(keys, axis=1, keepdims=True).clip(_SMALLEST)
        return unit

    def latents(self, number: int) -> np.ndarray | None:
        """A block, float32 (K, hidden); None if another process has removed it."""
        with self._named_errors():
            row = self._connection.execute(
                "SELECT latents FROM blocks WHERE number = ?", (number,)
            ).fetchone()
        if row is None:
            return None
        found: np.ndarray = load(row[0])["latents"]
        return found

    def cosines(self, kind: str, *, centred: bool = False, newest: int = 500) -> np.ndarray:
        """The cosines between the keys of different episodes, of the newest blocks of a kind, ascending."""
        episodes = {block.number: block.episode for block in self.blocks()}
        places = np.flatnonzero(self._kinds[:, 0] == kind)[-newest:]
        keys = self._unit_keys(places, centred=centred)
        names = np.array([episodes.get(self._numbers[place], "") for place in places])
        return np.sort((keys @ keys.T)[np.triu(names[:, None] != names[None, :])])

    def blocks(self) -> list[StoredBlock]:
        """All blocks in the order of their creation."""
        with self._named_errors():
            rows = self._connection.execute(
                "SELECT number, episode, kind, size, written, reward, text FROM blocks ORDER BY number"
            ).fetchall()
        return [StoredBlock(*row) for row in rows]

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def __enter__(self) -> LatentBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _digest(latents: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(latents, dtype="<f4").tobytes()).hexdigest()


def _require_same(path: Path, about: Mapping[str, Any], identity: BankIdentity) -> None:
    if about["fingerprint"] != identity.fingerprint:
        raise ValueError(
            f"{path} is a latent bank of {about['reasoner']} (weights {about['fingerprint'][:12]}), whose blocks and keys mean "
            f"nothing to {identity.reasoner} (weights {identity.fingerprint[:12]}); choose another file "
            "(model.memgen.weaver.bank.path) or backbone"
        )
    if about["key_tokens"] != identity.key_tokens:
        raise ValueError(
            f"{path} was written with keys of {about['key_tokens']} tokens, not {identity.key_tokens}; set "
            f"model.memgen.weaver.bank.key_tokens to {about['key_tokens']}, or choose another file"
        )
