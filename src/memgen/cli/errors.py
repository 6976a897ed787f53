"""What a command tells a person who gave it something it cannot use."""

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
    """The candidate most like `name`, or None if none is like it."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None


def refuses_input(error: BaseException, within: Path | None = PACKAGE) -> bool:
    """Whether a value was refused on purpose, by a `raise` whose message says what to change.

    An error that comes out of an expression, or of a library, is a fault and keeps its traceback.

    Args:
        error: what was caught.
        within: folder of the code that may refuse; None: any code.
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
