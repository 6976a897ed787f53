"""The folder of a recorded test: raw answers in one JSON Lines file, their scores in another, one line per answer.

A folder holds

- `answers.jsonl`: prompt and answer: `index`, `id`, `sample`, `seed`, `prompt` (messages), `answer` (the
  text that was scored; of several turns a list), `observations`, `insertion_points`, `token_ids`;
- `scores.jsonl`: `index`, `id`, `sample`, `item` (a hash of the item), `reward`, `parts` (its components), tokens,
  insertions, positions read by reasoner, weaver and trigger, tokens of the first prompt, seconds, CPU seconds;
- `journal.jsonl`: settings, and the completed items (`memgen.results.ledger`);
- `summary.json`, once all items are completed.

Every further process of the run writes files of its own, with its rank in their names (`scores.rank1.jsonl`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from memgen.environments.base import Example
from memgen.files import write_whole
from memgen.results.ledger import Entry, Journal, Ledger, differences, read_journal, read_lines
from memgen.results.summary import Row, Summary

JOURNAL, ANSWERS, SCORES, SUMMARY = "journal.jsonl", "answers.jsonl", "scores.jsonl", "summary.json"
_JOURNAL_NAME = re.compile(r"journal(\.rank\d+)?\.jsonl")


def item_hash(example: Example) -> str:
    """Hash of an item's id, question and answer: equal ids of two data sets may be different items."""
    text = "\x1f".join((example.id, example.question, example.answer))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def data_hash(examples: Iterable[Example]) -> str:
    """Hash of a set of items and their order."""
    return hashlib.sha256(" ".join(map(item_hash, examples)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answered:
    """All answers to one item.

    Attributes:
        index: the item's index.
        answers: lines of `answers.jsonl`, one per answer.
        scores: lines of `scores.jsonl`, in the same order.
    """

    index: int
    answers: Sequence[Mapping[str, Any]]
    scores: Sequence[Row]


@final
class Records:
    """Writes the records of one process of a run.

    Args:
        folder: folder of the recorded test; made if it does not exist.
        settings: everything that decides answers and scores, as JSON values.
        about: further facts to keep when the folder is begun.
        rank: rank of this process.

    Raises:
        ValueError: if the folder's records were made with other settings, or are being written by another process.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], rank: int = 0
    ) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        part = f".rank{rank}" if rank else ""
        self._answers, self._scores = _with(ANSWERS, part), _with(SCORES, part)
        journal = folder / _with(JOURNAL, part)
        # Other ranks' journals first: this rank may have none yet.
        for other in _journals(folder):
            found = read_journal(other) if other != journal else None
            if found is not None and (wrong := differences(found.settings, settings)):
                raise ValueError(f"{other} was begun with other settings: {'; '.join(wrong)}")
        self._ledger = Ledger(journal, (self._answers, self._scores), settings, about)
        self.about = self._ledger.about
        self.done: dict[int, list[Row]] = {}
        """Scores of each completed item, whichever process completed it."""
        for row in _rows(folder):
            self.done.setdefault(int(row["index"]), []).append(row)

    def add(self, items: Sequence[Answered]) -> None:
        """Writes items; when it returns, they are on disk."""
        self._ledger.add(
            [
                Entry(item.index, {self._answers: item.answers, self._scores: item.scores}, {})
                for item in items
            ]
        )
        self.done |= {item.index: list(item.scores) for item in items}

    def write_summary(self, summary: Summary) -> None:
        """Writes `summary.json`, which appears whole or not at all."""
        text = json.dumps({**summary.as_dict(), "about": self.about}, indent=2, ensure_ascii=False)
        write_whole(self.folder / SUMMARY, text + "\n")

    def close(self) -> None:
        """Closes the files. It can be called twice."""
        self._ledger.close()


@dataclass(frozen=True)
class Recorded:
    """A recorded test, as read from its folder.

    Attributes:
        folder: the folder.
        settings: everything that decided answers and scores.
        about: further facts.
        rows: scores, ordered by item and sample.
    """

    folder: Path
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def items(self) -> int:
        """Number of items that the completed run has."""
        return int(self.settings["data"]["items"])


def read_records(folder: Path) -> Recorded:
    """Reads a folder of records, also one that is being written.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if a file is broken, or the files are of different runs.
    """
    journals = [(path, found) for path in _journals(folder) if (found := read_journal(path)) is not None]
    if not journals:
        raise FileNotFoundError(f"{folder} holds no records: it has no {JOURNAL}; memgen test writes them")
    first: Journal = journals[0][1]
    for path, journal in journals:
        if wrong := differences(first.settings, journal.settings):
            raise ValueError(f"{path} belongs to another run than {journals[0][0]}: {'; '.join(wrong)}")
    return Recorded(folder, first.settings, first.about, _rows(folder))


def _rows(folder: Path) -> list[Row]:
    rows = [
        row
        for journal in _journals(folder)
        for row in read_lines(journal, journal.name.replace("journal", "scores", 1))
    ]
    return sorted(rows, key=lambda row: (row["index"], row["sample"]))


def _journals(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _JOURNAL_NAME.fullmatch(path.name))


def _with(name: str, part: str) -> str:
    stem, dot, ending = name.partition(".")
    return f"{stem}{part}{dot}{ending}"
