"""Signals that a scheduler, or a terminal, sends to every process of a job.

The trainer handles them: it finishes its step and saves. A helper process must ignore them; one that died would make an
answer look wrong.
"""

from __future__ import annotations

import signal

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Sent before the time limit, and before preemption."""


def stay() -> None:
    """Makes this process ignore those signals and Ctrl-C; its parent ends it. Call it in the main thread."""
    for number in (*SCHEDULER_SIGNALS, signal.SIGINT):
        # Not SIG_IGN, which its child processes would inherit.
        signal.signal(number, lambda number, frame: None)
