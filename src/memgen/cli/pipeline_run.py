"""MLflow runs of commands that keep their state in a folder: one that others join as children, and those."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memgen.tracking.run_logger import RunLogger


@contextlib.contextmanager
def run_of(folder: Path) -> Iterator[RunLogger]:
    """The run of a folder, a new one if it has none; it is ended with the block."""
    from memgen.running.resume import LAST
    from memgen.tracking.run_logger import resumed_logger, run_logger
    from memgen.training.callbacks import RESUME

    logger = resumed_logger(run_logger(system_seconds=0), folder / RESUME / LAST)
    try:
        yield logger
    except BaseException:
        logger.finalize("failed")
        raise
    logger.finalize()


@contextlib.contextmanager
def parent_run(name: str, tags: Mapping[str, str], out: Path) -> Iterator[RunLogger]:
    """The run of a folder, which those begun inside the block join as children."""
    from memgen.tracking.family import PARENT_VARIABLE
    from memgen.tracking.run_logger import open_parent

    with run_of(out) as logger:
        parent = open_parent(name, "pipeline", logger, tags)
        parent.log_run_folder(out)
        os.environ[PARENT_VARIABLE] = parent.run_id or ""
        try:
            yield parent
        finally:
            del os.environ[PARENT_VARIABLE]
