"""Seeds derived from other seeds, the same on every machine.

Small sums where the caller's numbers are already distinct (`episode_seeds`, `turn_seed`), a hash of the whole key where
they are not (`seed_of`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def seed_of(*key: object) -> int:
    """A 63-bit seed from any key: a hash of the text of its parts. For training and for collecting."""
    text = " ".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def episode_seeds(seed: int, indices: Sequence[int], group_size: int = 1) -> list[int]:
    """A seed for each evaluation episode, `group_size` of each item; depends on the item alone, not on its batch.

    Args:
        seed: of the generation settings.
        indices: of the items.
        group_size: episodes of each item.
    """
    return [
        seed * 1_000_003 + index * group_size + member for index in indices for member in range(group_size)
    ]


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn of an episode, from the episode's seed; the first turn has the episode's."""
    return (seed + turn * 0x9E3779B97F4A7C15) % 2**63
