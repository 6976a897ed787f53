"""The oracle's findings as files: numbers as JSON, tables and verdict as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from memgen.analysis.oracle import Oracle
from memgen.files import write_whole
from memgen.results.statistics import Interval, Share

TABLES, NUMBERS = "oracle.md", "oracle.json"
SHOWN = 12
"""Shared policies in the table; all are in the numbers."""


def write(found: Oracle, folder: Path) -> tuple[str, str]:
    """Writes both files into the folder. Returns the texts: tables, numbers."""
    tables = oracle_markdown(found)
    numbers = json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / TABLES, tables)
    write_whole(folder / NUMBERS, numbers)
    return tables, numbers


def oracle_markdown(found: Oracle) -> str:
    """Verdict and tables."""
    scores = [found.never, found.always, found.optimum]
    if found.trigger is not None:
        scores.append(found.trigger)
    gains = [found.shared_gain, found.optimum_gain, found.trigger_gain, found.trigger_loss]
    shares = [
        ("failures of never that some policy solves", found.rescued["never"]),
        ("failures of always that some policy solves", found.rescued["always"]),
        ("successes of never that some insertion breaks", found.broken["never"]),
        ("successes of always that some omission breaks", found.broken["always"]),
    ]
    left = f" {found.faulted} more are left out: their environment failed." if found.faulted else ""
    return "\n".join(
        [
            f"# What a trigger can gain: {found.environment}",
            "",
            found.headline,
            "",
            *(f"- {sentence}" for sentence in found.sentences),
            "",
            f"{found.items} items, {found.boundaries:.2f} boundaries per episode without memory, {found.decoded} decoded "
            f"policies (budget {found.settings.budget} per item), greedy.{left}",
            "",
            *_table(
                ("decided by", "accuracy", "95 % interval", "insertions"),
                [(s.name, *_interval(s.accuracy), f"{s.insertions:.2f}") for s in scores],
            ),
            "",
            *_table(("items", "share", "95 % interval", "count"), [(name, *_share(s)) for name, s in shares]),
            "",
            *_table(
                ("difference", "against", "accuracy", "95 % interval", "p"),
                [
                    (g.of, g.against, *_interval(g.difference), f"{g.p_value:.2g}")
                    for g in gains
                    if g is not None
                ],
            ),
            "",
            f"The policies shared by all items ({len(found.policies)}), by their accuracy on the half that they are chosen on:",
            "",
            *_table(
                ("policy", "chosen on", "scored on", "all items", "insertions"),
                [
                    (
                        p.name,
                        f"{p.chosen_on:.4f}",
                        f"{p.scored_on:.4f}",
                        f"{p.accuracy:.4f}",
                        f"{p.insertions:.2f}",
                    )
                    for p in found.policies[:SHOWN]
                ],
            ),
            "",
        ]
    )


def _interval(found: Interval) -> tuple[str, str]:
    ends = "" if found.low is None or found.high is None else f"{found.low:.4f} to {found.high:.4f}"
    return f"{found.mean:.4f}", ends


def _share(found: Share) -> tuple[str, str, str]:
    if found.low is None or found.high is None:
        return "", "", "0 of 0"
    value = f"{found.count / found.total:.4f}"
    return value, f"{found.low:.4f} to {found.high:.4f}", f"{found.count} of {found.total}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
