"""The records of a test: a line per answer, raw answers in one file and scores in another, and what they add up to.

A folder holds

- `answers.jsonl`: what was asked and what was said: `index`, `id`, `sample`, `seed`, `prompt` (messages), `answer` (the
  text that was scored; of several turns a list), `observations`, `insertions`, `token_ids`;
- `scores.jsonl`: `index`, `id`, `sample`, `item` (a hash of the item), `reward`, `parts`, tokens, insertions, positions
  that reasoner, weaver and trigger read, seconds;
- `journal.jsonl`: settings, and the items that are done (`memgen.results.ledger`);
- `summary.json`, once all items are done.

The files of a further process of the same run have its number in their names (`scores.rank1.jsonl`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from memgen.environments.base import Example
from memgen.results.ledger import Entry, Journal, Ledger, differences, read_journal, read_lines
from memgen.results.statistics import Interval, mean_interval, pass_at_k
from memgen.tracking.metrics import Measured

JOURNAL, ANSWERS, SCORES, SUMMARY = "journal.jsonl", "answers.jsonl", "scores.jsonl", "summary.json"
_JOURNAL_NAME = re.compile(r"journal(\.rank\d+)?\.jsonl")

Row = Mapping[str, Any]
"""A line of `scores.jsonl`."""


def item_hash(example: Example) -> str:
    """Tells items apart that have one name in two sets of data."""
    text = "\x1f".join((example.id, example.question, example.answer))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def data_hash(examples: Iterable[Example]) -> str:
    """Tells sets of items apart, and orders of one set."""
    return hashlib.sha256(" ".join(map(item_hash, examples)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answered:
    """All answers to one item.

    Attributes:
        index: the item.
        answers: lines of `answers.jsonl`, one per answer.
        scores: lines of `scores.jsonl`, likewise.
    """

    index: int
    answers: Sequence[Mapping[str, Any]]
    scores: Sequence[Row]


@final
class Records:
    """A folder of records, opened to be added to by one process of a run.

    Args:
        folder: made if it does not exist.
        settings: what decides answers and scores, as JSON values.
        about: anything else worth knowing, kept from when the folder was begun.
        rank: of this process.

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
        # Other processes' parts first: this one may have none yet.
        for other in _journals(folder):
            found = read_journal(other) if other != journal else None
            if found is not None and (wrong := differences(found.settings, settings)):
                raise ValueError(f"{other} was begun with other settings: {'; '.join(wrong)}")
        self._ledger = Ledger(journal, (self._answers, self._scores), settings, about)
        self.about = self._ledger.about
        self.done: dict[int, list[Row]] = {}
        """Scores of each item that is done, by any process."""
        for row in _rows(folder):
            self.done.setdefault(int(row["index"]), []).append(row)

    def add(self, items: Sequence[Answered]) -> None:
        """Writes items; when it returns, they are safe."""
        self._ledger.add(
            [
                Entry(item.index, {self._answers: item.answers, self._scores: item.scores}, {})
                for item in items
            ]
        )
        self.done |= {item.index: list(item.scores) for item in items}

    def write_summary(self, summary: Summary) -> None:
        """Writes `summary.json` in one step."""
        temporary = self.folder / f".{SUMMARY}.{os.getpid()}"
        text = json.dumps({**summary.as_dict(), "about": self.about}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.folder / SUMMARY)

    def close(self) -> None:
        """Lets the files go. It can be called twice."""
        self._ledger.close()


@dataclass(frozen=True)
class Recorded:
    """A folder of records as it was read.

    Attributes:
        folder: where.
        settings: what decided answers and scores.
        about: what else is known.
        rows: scores, by item and answer.
    """

    folder: Path
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def items(self) -> int:
        """Items that the run is to have."""
        return int(self.settings["data"]["items"])


def read_records(folder: Path) -> Recorded:
    """Reads a folder of records, also one that is being written.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if a file is broken, or parts of different runs lie there.
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


# What records add up to


@dataclass(frozen=True)
class Summary:
    """What the answers of a run add up to. Every item counts the same, however many of its answers are valid.

    Attributes:
        items: with at least one valid answer.
        answers: valid ones.
        faulted: answers that the environment failed; they count for nothing.
        reward: the mean over items of an item's mean reward.
        parts: likewise, over the items that have the part.
        pass_at_k: by k; over the items that have k valid answers.
        per_item: mean cost of an item, all its answers together: tokens, positions, seconds.
    """

    items: int
    answers: int
    faulted: int
    reward: Interval | None
    parts: Mapping[str, Interval]
    pass_at_k: Mapping[int, Interval]
    per_item: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def metrics(self) -> dict[str, float]:
        """Numbers by the names that they are logged under, beside the means that are logged anyway."""
        found = {f"{name}_per_item": value for name, value in self.per_item.items()}
        if self.reward is not None and self.reward.low is not None and self.reward.high is not None:
            found |= {"reward_low": self.reward.low, "reward_high": self.reward.high}
        return found | {f"pass_at_{k}": interval.mean for k, interval in self.pass_at_k.items()}

    def lines(self) -> list[str]:
        """The summary as text."""
        if self.reward is None:
            return [f"no valid answer: the environment failed all {self.faulted}"]
        lines = [f"reward {self.reward} of {self.items} items"]
        if self.faulted:
            lines.append(f"{self.faulted} answers are not counted: the environment failed them")
        lines += [f"pass@{k} {interval}" for k, interval in self.pass_at_k.items()]
        cost = ", ".join(f"{value:,.4g} {name.replace('_', ' ')}" for name, value in self.per_item.items())
        return [*lines, f"per item: {cost}"]


_COSTS = ("tokens", "reasoner_positions", "weaver_positions", "trigger_positions", "seconds")


def summarise(rows: Sequence[Row]) -> Summary:
    """What scores add up to."""
    by_item: dict[int, list[Row]] = {}
    for row in rows:
        by_item.setdefault(int(row["index"]), []).append(row)
    valid = {i: [r for r in group if r["fault"] is None] for i, group in sorted(by_item.items())}
    valid = {index: group for index, group in valid.items() if group}
    answers = sum(map(len, valid.values()))
    names = sorted({name for group in valid.values() for row in group for name in row["parts"]})
    parts = {
        name: [m for m in (_mean_part(group, name) for group in valid.values()) if m is not None]
        for name in names
    }
    drawn = max(map(len, valid.values()), default=0)
    return Summary(
        items=len(valid),
        answers=answers,
        faulted=len(rows) - answers,
        reward=mean_interval([item_score(group) for group in valid.values()]) if valid else None,
        parts={name: mean_interval(values) for name, values in parts.items()},
        pass_at_k={k: _pass_at(k, valid.values()) for k in _ks(drawn)},
        per_item={name: sum(row[name] for row in rows) / len(by_item) for name in _COSTS if rows and by_item},
    )


def item_score(rows: Sequence[Row], metric: str = "reward") -> float:
    """An item's mean reward, or of a part, over its valid answers.

    Raises:
        ValueError: if no valid answer has it.
    """
    found = sum(row["reward"] for row in rows) / len(rows) if metric == "reward" else _mean_part(rows, metric)
    if found is None:
        known = sorted({name for row in rows for name in row["parts"]})
        raise ValueError(
            f"item {rows[0]['id']} has no part {metric!r} of its reward; there are: reward, {', '.join(known)}"
        )
    return float(found)


def _mean_part(rows: Sequence[Row], name: str) -> float | None:
    values = [row["parts"][name] for row in rows if name in row["parts"]]
    return sum(values) / len(values) if values else None


def _ks(drawn: int) -> list[int]:
    """1, 2, 4 and so on, and the number of answers itself; nothing to tell of a single one."""
    if drawn < 2:
        return []
    powers = [2**i for i in range(drawn.bit_length()) if 2**i <= drawn]
    return powers if powers[-1] == drawn else [*powers, drawn]


def _pass_at(k: int, groups: Iterable[Sequence[Row]]) -> Interval:
    right = [
        (len(group), sum(Measured.from_record(row).right for row in group))
        for group in groups
        if len(group) >= k
    ]
    return mean_interval([pass_at_k(answers, correct, k) for answers, correct in right])
