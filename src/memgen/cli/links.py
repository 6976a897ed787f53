"""What it looks like when a process of a run loses another."""

from __future__ import annotations

import re

STATUS = 1
"""Exit status of a process that has lost another."""


_SIGNS = (
    "gloo",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
)
"""What gloo writes into RuntimeErrors of its own."""


def lost_link(error: BaseException) -> str | None:
    """One line about a lost connection between the processes of a run; None if an error is something else.

    Gloo tells by plain RuntimeErrors. NCCL's watchdog ends the process itself, with a message of its own.
    """
    import torch.distributed as dist

    text = str(error)
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    told = isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    if not isinstance(error, kinds) and not told:
        return None
    # Without the path in torch's sources.
    reason = re.sub(r"^\[\S+\]\s*", "", text.strip().splitlines()[0]).rstrip(".")
    return (
        f"this process lost its connection to another process of this run ({reason}). How long one waits for "
        "another is trainer.strategy.timeout; the run goes on from its last checkpoint by the same command "
        "with --run FOLDER, or with --ckpt_path FOLDER/resume/last.ckpt"
    )
