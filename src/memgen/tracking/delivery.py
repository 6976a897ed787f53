"""Records on their way to a store that may be slow, or down.

Whoever logs only appends to a queue and to a file beside it. A background thread delivers in order, tries again when
the store does not answer, and empties the file when all has arrived. So a store that is down neither stops nor slows
training, and what a run could not deliver outlives it: the file is said once, and `memgen deliver FILE` sends it later.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""What is delivered at once: `kind`, and what that kind needs, as JSON takes it."""

TOGETHER = 200
"""Records of one kind that are handed to the recipient in one call."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two tries: doubled from the first to the longest."""
PATIENCE = 10
"""Tries in a row for a record that the store fails on although it answers otherwise. Then it is set aside."""


class RefusedError(Exception):
    """The recipient answered, and will never take the record."""


class Recipient(Protocol):
    """Where records go. Called from the delivery thread only."""

    def open(self) -> None:
        """Makes ready; called until it succeeds."""

    def send(self, records: Sequence[Record]) -> None:
        """Delivers records of one kind. May be called again with the same ones, if it raised.

        Raises:
            RefusedError: if it never will.
        """

    def answers(self) -> bool:
        """Whether it can be reached at all."""

    def header(self) -> Record:
        """What a later process needs to deliver the rest."""


@final
class Outbox:
    """The queue, its file and its thread.

    Args:
        recipient: where records go.
        name: of the recipient, for messages.
        path: of the file; its folder is made when the first record comes.
    """

    def __init__(self, recipient: Recipient, name: str, path: Path) -> None:
        self._recipient = recipient
        self._name = name
        self.path = path
        self._queue: deque[Record] = deque()
        self._change = threading.Condition()
        self._file: Any = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._opened: bool | None = None
        self._failure: str | None = None
        self._gave_up = False
        self._stopping = False

    # The side that logs

    def start(self) -> None:
        """Starts delivering, and with it opens the recipient."""
        with self._change:
            self._start()

    def put(self, kind: str, **fields: Any) -> None:
        """Appends a record. Never waits for the recipient.

        Args:
            kind: what the recipient knows it by.
            fields: as JSON takes them.
        """
        record = {"kind": kind, **fields}
        with self._change:
            self._append(record)
            self._queue.append(record)
            self._gave_up = False
            self._start()
            self._change.notify_all()

    def opened(self, seconds: float) -> bool:
        """Whether the recipient is open; waits until it is, or its first try has failed, or the time is over."""
        with self._change:
            self._start()
            self._change.wait_for(lambda: self._opened is not None, timeout=seconds)
            return bool(self._opened)

    def flush(self, seconds: float) -> int:
        """Waits until all is delivered, but not longer than that.

        Returns:
            The number of records that are left; a message says where they are kept.
        """
        with self._change:
            if not self._queue and self._thread is None:
                return 0
            if not self._gave_up:
                self._change.notify_all()
                self._change.wait_for(lambda: not self._queue, timeout=seconds)
            left = len(self._queue)
            if left and not self._gave_up:
                self._gave_up = True
                logger.warning(
                    "%d records could not be delivered to %s within %g s (%s); they are kept, and sent by:  "
                    "memgen deliver %s",
                    left,
                    self._name,
                    seconds,
                    self._failure or "it is slow",
                    self.path,
                )
            elif not left:
                self._discard()
        return left

    def stop(self) -> None:
        """Ends the thread at its next pause, whatever is left."""
        atexit.unregister(self._at_exit)
        with self._change:
            self._stopping = True
            self._change.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=LONGEST_PAUSE)
        with self._change:
            if self._file is not None:
                self._file.close()
                self._file = None

    def adopt(self, records: Sequence[Record]) -> None:
        """Puts what an earlier process has left in front of everything else."""
        with self._change:
            assert self._thread is None, "before anything is delivered"
            self._queue.extendleft(reversed(records))
            for record in records:
                self._append(record)

    # The side that delivers

    def _start(self) -> None:
        if self._thread is None and os.getpid() == self._process:
            self._thread = threading.Thread(target=self._run, name="memgen-delivery", daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        """For a process that ends without a word: what is queued gets a moment."""
        if os.getpid() == self._process:
            self.flush(10.0)

    def _run(self) -> None:
        self._open()
        tries, pause = 0, FIRST_PAUSE
        while True:
            with self._change:
                self._change.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return
                batch = self._head()
            try:
                self._recipient.send(batch)
            except RefusedError as error:
                self._set_aside(batch, str(error))
            except Exception as error:  # noqa: BLE001 - networks, databases and disks fail in many ways
                self._report_failure(error)
                # Failures of an outage do not count: only a store that answers says something about the record.
                tries = tries + 1 if self._recipient.answers() else 0
                if tries < PATIENCE:
                    if self._pause(pause):
                        return
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                batch = batch[:1]
                self._set_aside(batch, _short(error))
            tries, pause = 0, FIRST_PAUSE
            self._report_success()
            self._done(batch)

    def _open(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                self._recipient.open()
            except Exception as error:  # noqa: BLE001 - as above
                with self._change:
                    self._opened = False
                    self._change.notify_all()
                self._report_failure(error)
                if self._pause(pause):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            with self._change:
                self._opened = True
                self._rewrite()
                self._change.notify_all()
            self._report_success()
            return

    def _pause(self, seconds: float) -> bool:
        """Waits; whether the thread is to end."""
        with self._change:
            return self._change.wait_for(lambda: self._stopping, timeout=seconds)

    def _head(self) -> list[Record]:
        kind = self._queue[0]["kind"]
        same = itertools.takewhile(lambda record: record["kind"] == kind, self._queue)
        return list(itertools.islice(same, TOGETHER))

    def _done(self, batch: Sequence[Record]) -> None:
        with self._change:
            for record in batch:
                assert self._queue[0] is record, "records leave in their order"
                self._queue.popleft()
            if not self._queue:
                self._rewrite()
            self._change.notify_all()

    def _report_failure(self, error: Exception) -> None:
        if self._failure is None:
            logger.warning(
                "%s does not take records (%s); training goes on. They are kept in %s and sent as soon as it "
                "answers again",
                self._name,
                _short(error),
                self.path,
            )
        self._failure = _short(error)

    def _report_success(self) -> None:
        if self._failure is not None:
            with self._change:
                waiting = len(self._queue)
            logger.warning("%s answers again; %d records are being sent", self._name, waiting)
        self._failure = None

    def _set_aside(self, batch: Sequence[Record], reason: str) -> None:
        path = self.path.with_suffix(".refused.jsonl")
        logger.warning(
            "%s refuses a record of the kind %s (%s); it is kept in %s",
            self._name,
            batch[0]["kind"],
            reason,
            path,
        )
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps({**record, 'refused': reason})}\n" for record in batch)

    # The file

    def _append(self, record: Record) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Open as long as records wait: the lock says that a process takes care of them.
            self._file = self.path.open("w", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write(self._recipient.header())
        self._write(record)
        self._file.flush()

    def _write(self, record: Record) -> None:
        self._file.write(f"{json.dumps(record)}\n")

    def _rewrite(self) -> None:
        """Leaves what is queued, under the header as it is now."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.truncate()
        self._write(self._recipient.header())
        for record in self._queue:
            self._write(record)
        self._file.flush()

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)


def read_outbox(path: Path) -> tuple[Mapping[str, Any], list[Record]]:
    """Header and records of a file that a process has left. A last line that was cut short is left out.

    Raises:
        ValueError: if it is no such file.
        BlockingIOError: if a process still takes care of it.
    """
    with path.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lines = file.read().splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{path}:{number + 1} is no record of a run: {error}") from error
    if not records or "kind" in records[0]:
        raise ValueError(f"{path} holds no records of a run")
    return records[0], records[1:]


def new_outbox_path(folder: Path) -> Path:
    """A name of its own for this process's file."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return folder / f"{stamp}-{os.uname().nodename}-{os.getpid()}-{time.time_ns() % 1_000_000:06d}.jsonl"


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
