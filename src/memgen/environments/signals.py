"""Signals that a scheduler, or a terminal, sends to every process of a job.

They are meant for the trainer, which finishes its step and saves. A helper process that died of one would leave an
answer that looks wrong.
"""

from __future__ import annotations

import signal

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Warnings before the time limit, and before preemption."""


def stay() -> None:
    """Lets this process outlive such signals, and Ctrl-C; the parent ends it. To be called in its main thread."""
    for number in (*SCHEDULER_SIGNALS, signal.SIGINT):
        # Not SIG_IGN, which what this process starts would inherit.
        signal.signal(number, lambda number, frame: None)
