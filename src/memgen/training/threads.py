"""How many CPU threads torch uses for a model, where nobody has said it.

On a model of the lab's size one thread is as fast as two, and far steadier beside other work: threads of a busy machine
wait for one another in every small operation (docs/performance.md).
"""

from __future__ import annotations

import logging
import os

import torch

from memgen.model.memgen import MemGenModel

logger = logging.getLogger(__name__)

VARIABLE = "OMP_NUM_THREADS"
TINY = 1_000_000
"""Parameters of all bases together up to which one thread is chosen. The lab's reasoner has 0.3 million."""

# What was there before one thread was chosen in this process.
_before: int | None = None


def choose_threads(model: MemGenModel) -> None:
    """One thread for a tiny model, and for a larger one in the same process what there was before.

    Nothing is chosen if OMP_NUM_THREADS is set. What changes is said: times depend on it.
    """
    global _before
    if os.environ.get(VARIABLE):
        return
    threads = torch.get_num_threads()
    tiny = sum(parameter.numel() for base in model.bases() for parameter in base.parameters()) <= TINY
    if tiny and threads > 1:
        _before = threads
        torch.set_num_threads(1)
        logger.warning(
            "one CPU thread instead of %d: as fast on so small a model, and steadier beside other work (set %s to "
            "choose otherwise)",
            threads,
            VARIABLE,
        )
    elif not tiny and _before is not None:
        torch.set_num_threads(_before)
        logger.warning("%d CPU threads again, for a larger model", _before)
        _before = None
