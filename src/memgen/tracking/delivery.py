"""Outbox: a queue of records for a store that may be slow or down.

Logging only appends to a queue and to a file. A background thread delivers in order, tries again while the store does not
answer, and empties the file when everything has arrived. A store that is down neither stops nor slows training, and records
that a run could not deliver outlive it: a warning names the file, and `memgen deliver FILE` sends it later.
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
"""One delivery: `kind` and the fields of that kind, as JSON values."""

TOGETHER = 200
"""Most records of one kind that the recipient gets in one call."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two attempts, doubled from the first to the longest."""
PATIENCE = 10
"""Failed attempts for one record, by a store that answers otherwise, after which the record is set aside."""


class RefusedError(Exception):
    """The recipient rejected the record for good."""


class Recipient(Protocol):
    """Destination of records. Called from the delivery thread only."""

    def open(self) -> None:
        """Connects; called until it succeeds."""

    def send(self, records: Sequence[Record]) -> None:
        """Delivers records of one kind. Called again with the same records after an exception.

        Raises:
            RefusedError: if another attempt would not help.
        """

    def answers(self) -> bool:
        """Whether the recipient can be reached at all."""

    def header(self) -> Record:
        """What a later process needs to deliver the remaining records."""


@final
class Outbox:
    """The queue with its file and its delivery thread.

    Args:
        recipient: destination of the records.
        name: the recipient's name, for messages.
        path: path of the file; its folder is made with the first record.
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

    # Called by the training process

    def start(self) -> None:
        """Starts the delivery thread, which opens the recipient."""
        with self._change:
            self._start()

    def put(self, kind: str, **fields: Any) -> None:
        """Appends a record. Never waits for the recipient.

        Args:
            kind: kind of record, as the recipient knows it.
            fields: fields of the record, as JSON values.
        """
        record = {"kind": kind, **fields}
        with self._change:
            self._append(record)
            self._queue.append(record)
            self._gave_up = False
            self._start()
            self._change.notify_all()

    def opened(self, seconds: float) -> bool:
        """Whether the recipient is open, after waiting for the first attempt to open it, but not longer than `seconds`."""
        with self._change:
            self._start()
            if not self._change.wait_for(lambda: self._opened is not None, timeout=seconds):
                self._opened = False  # So that nothing waits a second time.
            return bool(self._opened)

    def flush(self, seconds: float) -> int:
        """Waits until everything is delivered, but not longer than `seconds`.

        Returns:
            Number of undelivered records; a warning says where they are kept.
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
        """Ends the thread at its next pause, even if records are left."""
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
        """Puts undelivered records of an earlier process in front of the queue."""
        with self._change:
            assert self._thread is None, "before anything is delivered"
            self._queue.extendleft(reversed(records))
            for record in records:
                self._append(record)

    # The delivery thread

    def _start(self) -> None:
        if self._thread is None and os.getpid() == self._process:
            self._thread = threading.Thread(target=self._run, name="memgen-delivery", daemon=True)
            self._thread.start()
            atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        """Gives queued records ten seconds if the process exits without `flush`."""
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
                # Failures during an outage do not count against the record.
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
        """Waits; returns whether the thread should end."""
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
            # Kept open while records wait: the lock tells other processes that this one delivers them.
            self._file = self.path.open("w", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write(self._recipient.header())
        self._write(record)
        self._file.flush()

    def _write(self, record: Record) -> None:
        self._file.write(f"{json.dumps(record)}\n")

    def _rewrite(self) -> None:
        """Rewrites the file with the current header and the queued records."""
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
    """Header and records of an outbox file that a process has left behind, without an incomplete last line.

    Raises:
        ValueError: if it is not an outbox file.
        BlockingIOError: if a running process still delivers it.
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
    """A file name that is unique to this process."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return folder / f"{stamp}-{os.uname().nodename}-{os.getpid()}-{time.time_ns() % 1_000_000:06d}.jsonl"


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
