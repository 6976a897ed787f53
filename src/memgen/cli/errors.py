"""Errors of the command line that are shown as one line."""

from __future__ import annotations

import difflib
import linecache
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

PACKAGE = Path(__file__).resolve().parent.parent


class UsageError(Exception):
    """The command line or a configuration cannot be used. Printed as it is, without a traceback; exit status 2."""


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
