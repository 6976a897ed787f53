"""Best of n: what the same positions buy as more answers of the reasoner alone, in place of memory.

An item's n answers are sampled at once, so its prompt is read once for all of them. Their positions are made equal to
memory's item by item: the answers count in the order of their samples as long as their positions together, the prompt
once, are at most those that memory took on the same item. The first always counts.

Two selectors choose among those that count. The oracle takes the one with the highest reward: no selector without the
reference answer can do better, so it is an upper bound. The vote takes the most frequent final answer
(`Environment.final_answer`; of equally frequent ones the earliest): it knows no reference, and needs a task with exact
answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from memgen.results.summary import Row


def positions(row: Row) -> float:
    """Positions that reasoner, weaver and trigger read for an answer."""
    return float(row["reasoner_positions"] + row["weaver_positions"] + row["trigger_positions"])


def positions_of_first(rows: Sequence[Row], count: int) -> float:
    """Positions of an item's first answers, as if no more had been sampled: the prompt counts whole.

    Args:
        rows: the scores of all n answers, in the order of their samples.
        count: how many count.
    """
    others = (len(rows) - count) / len(rows) * rows[0]["prompt_tokens"]
    return sum(positions(row) for row in rows[:count]) + float(others)


def affordable(rows: Sequence[Row], budget: float) -> int:
    """How many of an item's first answers have at most so many positions together; at least 1."""
    counts = range(1, len(rows) + 1)
    return max((count for count in counts if positions_of_first(rows, count) <= budget), default=1)


def oracle(rows: Sequence[Row]) -> Row:
    """The answer with the highest reward, the earliest of several."""
    return max(rows, key=lambda row: float(row["reward"]))


def vote(rows: Sequence[Row], finals: Sequence[str | None]) -> Row:
    """The first answer with the most frequent final answer.

    Args:
        rows: the scores of some answers.
        finals: the final answer of each; None: it gives none, and has no vote.
    """
    votes = Counter(final for final in finals if final is not None)
    # Of equally frequent ones Counter gives the first that was counted.
    chosen = votes.most_common(1)[0][0] if votes else finals[0]
    return rows[finals.index(chosen)]
