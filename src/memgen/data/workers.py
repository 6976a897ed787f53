"""Loaders whose worker processes outlive the signals that a scheduler sends to every process of a job."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from memgen.environments.signals import SCHEDULER_SIGNALS


class Loader(DataLoader[Any]):
    """A DataLoader whose workers live as long as their loader and their parent, where torch's die of SIGTERM.

    The trainer finishes its step and saves after SIGTERM, for which it needs them.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Starts the workers and yields the batches."""
        self.worker_init_fn = _outlive
        with _blocked():  # Workers inherit it, so that no signal finds them before `_outlive`.
            return super().__iter__()


@contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive(worker: int) -> None:
    """In a worker: of the scheduler's signals only the parent's SIGTERM ends it, which torch and Python rely on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULER_SIGNALS)
    threading.Thread(target=_wait_for, args=(os.getppid(),), daemon=True).start()


def _wait_for(parent: int) -> None:
    while True:
        sent = signal.sigwaitinfo({signal.SIGTERM})
        if sent.si_pid == parent or os.getppid() != parent:
            os._exit(0)
