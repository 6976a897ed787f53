"""Seeds derived from other seeds: one rule for each purpose, the same on every machine."""

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
