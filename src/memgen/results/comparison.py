"""Paired comparison of two recorded tests on the same items."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memgen.results.ledger import differences
from memgen.results.score_files import Recorded
from memgen.results.statistics import Interval, PairedTest, mean_interval, paired_test
from memgen.results.summary import Row, item_score


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of runs A and B, over the items with a valid answer in both.

    Attributes:
        metric: `reward`, or the name of a reward component.
        items: number of paired items.
        a: mean of run A.
        b: mean of run B.
        difference: mean of B - A, with a bootstrap interval over pairs.
        won: number of items on which B scores higher.
        lost: number of items on which A scores higher.
        tied: number of items with equal scores.
        test: significance test of the difference.
        left_out: number of items without a valid answer in one of the runs.
        settings: the settings in which the runs differ, with both values.
    """

    metric: str
    items: int
    a: Interval
    b: Interval
    difference: Interval
    won: int
    lost: int
    tied: int
    test: PairedTest
    left_out: int
    settings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """The comparison as lines of text."""
        lines = [
            f"{self.metric} of A: {self.a}",
            f"{self.metric} of B: {self.b}",
            f"B - A: {self.difference}, over {self.items} items",
            f"B is better on {self.won}, worse on {self.lost}, equal on {self.tied}",
            f"p = {self.test.p_value:.4g} ({self.test.name}, two-sided)",
        ]
        if self.left_out:
            lines.append(
                f"{self.left_out} items are left out: only one of the runs has a valid answer to them"
            )
        return [*lines, "the runs differ in: " + ("; ".join(self.settings) or "nothing that is recorded")]


def compare(a: Recorded, b: Recorded, metric: str = "reward", *, common: bool = False) -> Comparison:
    """Compares two runs, paired by item. An item's score is the mean over its valid answers.

    Args:
        a: run A.
        b: run B.
        metric: `reward`, or the name of a reward component.
        common: compare the items that both runs have, even if those are not all.

    Raises:
        ValueError: if the runs are of different data or not complete (unless `common`), if no item has a valid answer
            in both, or if a run has no such metric.
    """
    _require_same_data(a, b, common=common)
    groups_a, groups_b = _by_item(a.rows), _by_item(b.rows)
    shared = [item for item in groups_a if item in groups_b]
    valid_a = {item: group for item in shared if (group := _valid(groups_a[item]))}
    valid_b = {item: group for item in shared if (group := _valid(groups_b[item]))}
    pairs = [item for item in shared if item in valid_a and item in valid_b]
    if not pairs:
        raise ValueError(f"no item has a valid answer in both {a.folder} and {b.folder}")
    first = [item_score(valid_a[item], metric) for item in pairs]
    second = [item_score(valid_b[item], metric) for item in pairs]
    gains = [y - x for x, y in zip(first, second, strict=True)]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Comparison(
        metric=metric,
        items=len(pairs),
        a=mean_interval(first),
        b=mean_interval(second),
        difference=mean_interval(gains),
        won=won,
        lost=lost,
        tied=len(pairs) - won - lost,
        test=paired_test(first, second),
        left_out=len({*groups_a, *groups_b}) - len(pairs),
        settings=tuple(_differing(a.settings, b.settings)),
    )


def _require_same_data(a: Recorded, b: Recorded, *, common: bool) -> None:
    data_a, data_b = a.settings["data"], b.settings["data"]
    names = [f"{data['environment']} ({data['split']})" for data in (data_a, data_b)]
    if names[0] != names[1]:
        raise ValueError(
            f"the runs are of different data: {a.folder} of {names[0]}, {b.folder} of {names[1]}"
        )
    items_a, items_b = ({row["id"]: row["item"] for row in run.rows} for run in (a, b))
    changed = [name for name, found in items_a.items() if items_b.get(name, found) != found]
    if changed:
        raise ValueError(
            f"the runs are of different data: item {changed[0]} is another one in {b.folder} than in {a.folder} "
            f"({len(changed)} items differ)"
        )
    if common:
        return
    if data_a["hash"] != data_b["hash"]:
        raise ValueError(
            f"the runs are of different data: {a.folder} is to have {data_a['items']} items, {b.folder} "
            f"{data_b['items']}, and they are not the same ones in the same order; --common compares those that both have"
        )
    for run in (a, b):
        played = len({row["index"] for row in run.rows})
        if played < run.items:
            raise ValueError(
                f"{run.folder} is not complete: it has {played} of {run.items} items; run its memgen test again, which "
                "goes on, or compare the items that both runs have with --common"
            )


def _by_item(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def _valid(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["fault"] is None]


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [text.replace(" was ", " ", 1).replace(" and is ", " against ", 1) for text in differences(a, b)]
