"""Everything of torch's private state that this package uses. tests/distributed/test_internals.py says what each must do."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d


def set_group_timeouts(timeout: timedelta) -> None:
    """Sets how long the collectives of all existing process groups wait for other ranks."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)
