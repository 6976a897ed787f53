"""Detects lost connections between the processes of a run (torch.distributed)."""

from __future__ import annotations

import re

STATUS = 1
"""Exit status of a process that has lost its connection to another."""


_SIGNS = (
    "gloo",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
)
"""Parts of the messages of gloo's RuntimeErrors."""


def lost_link(error: BaseException) -> str | None:
    """A message about a lost connection; None if the error is another one.

    Gloo raises plain RuntimeErrors. NCCL's watchdog ends the process itself, with a message of its own.
    """
    import torch.distributed as dist

    text = str(error)
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    told = isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    if not isinstance(error, kinds) and not told:
        return None
    # Without the path of torch's source file.
    reason = re.sub(r"^\[\S+\]\s*", "", text.strip().splitlines()[0]).rstrip(".")
    return (
        f"this process lost its connection to another process of this run ({reason}). The timeout is "
        "trainer.strategy.timeout; the run goes on from its last checkpoint by the same command "
        "with --run FOLDER, or with --ckpt_path FOLDER/resume/last.ckpt"
    )
