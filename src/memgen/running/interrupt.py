"""Requests to stop: received from process start on, acted on by all ranks at the end of the same training step.

Two signals and a clock. SIGUSR1 (SLURM's warning) and a time limit that is near ask a run to save itself and to be
started again; SIGTERM (a person, or preemption) asks it to save itself and to leave. A signal only records the request;
`Agreement` decides at which step all ranks act on it.

Differs from Lightning's handlers: those save inside the signal handler, wherever each rank happens to be, and run a
collective there; and a SIGUSR1 that comes before training has begun ends the process.

Imports only the standard library, so that the command line can listen before it imports anything that takes time.
"""

from __future__ import annotations

import enum
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import final

CONTINUES = 75
"""Exit status of a run that has saved itself and asks to be started again (EX_TEMPFAIL)."""
LEFT = 128 + signal.SIGTERM
"""Exit status of a run that has saved itself after SIGTERM."""
END_TIME = "SLURM_JOB_END_TIME"
"""Environment variable: when SLURM will end the job, in seconds since 1970."""
AGREE_SECONDS = 5.0
"""How often ranks exchange requests to stop; at most once per step."""


class Wish(enum.IntEnum):
    """What a run was asked to do. Of several requests the largest counts."""

    NONE = 0
    LEAVE = 1
    """Save and leave."""
    REQUEUE = 2
    """Save, leave and be started again."""


class Interrupted(Exception):
    """A run has saved itself and stops before its end, on all ranks at the same step.

    Attributes:
        wish: the request.
    """

    def __init__(self, wish: Wish, message: str) -> None:
        super().__init__(message)
        self.wish = wish

    @property
    def status(self) -> int:
        """The process's exit status."""
        return CONTINUES if self.wish is Wish.REQUEUE else LEFT


@final
class Listener:
    """Records what the signals of this process asked for."""

    def __init__(self) -> None:
        self.wish = Wish.NONE
        self._thread: threading.Thread | None = None

    def listen(self) -> None:
        """Receives SIGUSR1 from now on. To be called first, in the main thread; a second call does nothing.

        The signal is blocked, and a thread waits for it. So it interrupts no system call, and child processes inherit
        the block: SLURM signals every process of a step, and an environment's worker that died of it would change the
        episodes.
        """
        if self._thread is not None or threading.current_thread() is not threading.main_thread():
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        # For threads that existed before and have not blocked it. Lightning keeps a handler that it finds.
        signal.signal(signal.SIGUSR1, lambda number, frame: self.ask(Wish.REQUEUE))
        self._thread = threading.Thread(target=self._wait, name="signals", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            self.ask(Wish.REQUEUE)

    def listen_to_termination(self) -> None:
        """Receives SIGTERM from now on. To be called once there is something to save; before, it ends the process."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_termination)

    def _on_termination(self, number: int, frame: FrameType | None) -> None:
        self.ask(Wish.LEAVE)

    def ask(self, wish: Wish) -> None:
        """Records a request."""
        self.wish = max(self.wish, wish)

    def forget(self) -> None:
        """Clears the request."""
        self.wish = Wish.NONE


LISTENER = Listener()
"""The listener of this process: signals are sent to processes."""


@dataclass(frozen=True)
class Limit:
    """The time by which a run must have saved itself.

    Attributes:
        end: when it will be ended, in seconds since 1970.
        margin: seconds before that by which a checkpoint must stand.
    """

    end: float
    margin: float

    @classmethod
    def find(
        cls, time_limit: str | None, margin: float, environment: Mapping[str, str] = os.environ
    ) -> Limit | None:
        """The limit that was set, counted from now; else SLURM's for this job; else None.

        Args:
            time_limit: as SLURM writes it: minutes, "minutes:seconds", "hours:minutes:seconds", "days-hours:...".
            margin: seconds before the end by which a checkpoint must stand.
            environment: where SLURM says when the job ends.
        """
        if time_limit is not None:
            return cls(time.time() + seconds_of(time_limit), margin)
        end = environment.get(END_TIME, "")
        return cls(float(end), margin) if end.isdecimal() else None

    def reached(self, step_seconds: float, steps: int, save_seconds: float) -> bool:
        """Whether there is no time left for that many further steps and a save."""
        return time.time() + step_seconds * steps + save_seconds >= self.end - self.margin


def seconds_of(duration: str) -> float:
    """A duration as SLURM's --time takes it.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", duration.strip())
    if match is None:
        raise ValueError(
            f"{duration!r} is no duration; write minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds"
        )
    days, *parts = (None if part is None else int(part) for part in match.groups())
    first, second, third = parts
    assert first is not None, "the pattern has it"
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)


@dataclass(frozen=True)
class Verdict:
    """What all ranks do after a step.

    Attributes:
        wish: the largest of all ranks' requests.
        save: whether it is time for a checkpoint.
    """

    wish: Wish = Wish.NONE
    save: bool = False


@final
class Agreement:
    """Decides at which step all ranks stop or save, with one small all-reduce every few steps.

    After an optimizer step that is due, the ranks take the maximum of three numbers: the request (of a signal or the
    clock), the longest recent step, and whether a checkpoint is due. The next exchange is as many steps ahead as take
    `AGREE_SECONDS` at the longest step's pace, at least one and at most twice as many as last time. All ranks compute the
    same from the same maxima. A single process decides after every step.

    Args:
        over_ranks: the largest of each number over all ranks; None for a single process.
        limit: the time by which the run must have saved itself.
        listener: of this process's signals.
    """

    def __init__(
        self,
        over_ranks: Callable[[Sequence[float]], list[float]] | None,
        limit: Limit | None,
        listener: Listener = LISTENER,
    ) -> None:
        self._over_ranks = over_ranks
        self._limit = limit
        self._listener = listener
        self._ahead = 1
        self._steps_left = 1
        self._recent: deque[float] = deque(maxlen=50)
        self._clock = time.monotonic()

    def after_step(self, save_due: bool, save_seconds: float) -> Verdict:
        """To be called by every rank after each optimizer step.

        Args:
            save_due: whether this rank's clock says that it is time for a checkpoint.
            save_seconds: what a checkpoint takes.
        """
        now = time.monotonic()
        self._recent.append(now - self._clock)
        self._clock = now
        self._steps_left -= 1
        if self._steps_left > 0:
            return Verdict()
        slowest = max(self._recent)
        ahead = 1 if self._over_ranks is None else self._ahead
        wish = self._listener.wish
        if self._limit is not None and self._limit.reached(slowest, 2 * ahead, save_seconds):
            wish = Wish.REQUEUE
        values = [float(wish), slowest, float(save_due)]
        if self._over_ranks is not None:
            values = self._over_ranks(values)
            self._ahead = max(1, min(2 * self._ahead, int(AGREE_SECONDS / max(values[1], 1e-6))))
            self._steps_left = self._ahead
        else:
            self._steps_left = 1
        return Verdict(Wish(int(values[0])), bool(values[2]))

    def paused(self) -> None:
        """Excludes the time since the last step from the next one: a checkpoint was written."""
        self._clock = time.monotonic()
