"""Errors of the command line that are shown as one line."""

from __future__ import annotations

import difflib
import errno
import linecache
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

PACKAGE = Path(__file__).resolve().parent.parent


class UsageError(Exception):
    """The command line or a configuration cannot be used. Printed as it is, without a traceback; exit status 2."""


_DISK = {
    errno.ENOSPC: "make room, or choose another disk",
    errno.EDQUOT: "make room, or choose another disk",
    errno.EIO: "is the disk in order?",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check its permissions, or choose another folder",
    errno.EPERM: "check its permissions, or choose another folder",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EEXIST: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""What to do about an error of the file system."""


def file_system_error(error: BaseException) -> str | None:
    """A message about an error of the file system, wherever it was raised; None if the error is another one."""
    # Some libraries raise another error over it.
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in _DISK):
        cause = cause.__cause__
    if cause is None:
        if "PytorchStreamWriter failed writing" in str(error):
            return (
                f"a checkpoint could not be written: {_DISK[errno.ENOSPC]} (MEMGEN_TRACEBACK=1 shows where)"
            )
        return None
    assert isinstance(cause, OSError), "the loop stops at one"
    place = "" if cause.filename is None else f": {cause.filename}"
    return f"{cause.strerror}{place}; {_DISK[cause.errno or 0]} (MEMGEN_TRACEBACK=1 shows where)"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The most similar candidate, or None if none is similar."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None


def refuses_input(error: BaseException, within: Path | None = PACKAGE) -> bool:
    """Whether an error was raised by a `raise` statement, whose message says what to change.

    An error from any other expression, or from a library, is a bug and keeps its traceback.

    Args:
        error: the caught error.
        within: folder whose `raise` statements count; None: any.
    """
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        return False
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    file = last.tb_frame.f_code.co_filename
    if within is not None and not Path(file).is_relative_to(within):
        return False
    return linecache.getline(file, last.tb_lineno).lstrip().startswith("raise")
