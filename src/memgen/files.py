"""Files and directories that appear whole or not at all, whatever happens to the process that writes them.

They are written under a temporary name, forced to disk, and renamed. The name says who writes, so that a later process
removes what a killed one left behind. Imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

LAST = "last.ckpt"
"""Link to the newest of several checkpoints."""


def sync(path: Path) -> None:
    """Forces a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A name beside a target for what shall take its place. It says who writes it, for `sweep`."""
    who = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.new-{who}")
    _IN_WORK.add(temporary.name)
    return temporary


def take_place(temporary: Path, path: Path) -> None:
    """Puts a file or directory that was written under a temporary name in its place, in one step.

    When this returns, it is on disk. A killed process leaves the old one or the new one, whole; where the file system
    cannot exchange directories, the old one may be left under the name that `standing` knows.
    """
    for written in (*temporary.rglob("*"), temporary):
        sync(written)
    if temporary.is_dir():
        temporary.chmod(0o755)
    if temporary.is_file() or not path.exists():
        temporary.replace(path)
    elif not _exchange(temporary, path):
        old = aside(path)
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
    sync(path.parent)


def discard(temporary: Path) -> None:
    """Removes what is left under a temporary name, if anything is."""
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)
    _IN_WORK.discard(temporary.name)


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Removes what killed writers left behind.

    Whether a writer on another machine lives cannot be seen from here: what it left is removed a day later.

    Args:
        folder: where they wrote.
        name: what they wrote; None: anything.

    Returns:
        What was removed.
    """
    removed = []
    for path in folder.glob(".*.new-*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or name not in (None, found["name"]) or path.name in _IN_WORK:
            continue
        if found["host"] == socket.gethostname():
            # Of two processes with one number, one after the other, only the later one can be this.
            stale = int(found["pid"]) == os.getpid() or not _lives(int(found["pid"]))
        else:
            try:
                stale = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
            except FileNotFoundError:
                continue
        if stale:
            discard(path)
            removed.append(path)
    return removed


_TEMPORARY = re.compile(r"\.(?P<name>.+)\.new-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
_ABANDONED_SECONDS = 86_400.0
_IN_WORK: set[str] = set()
"""Temporary names that this process is writing under."""


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def aside(directory: Path) -> Path:
    """Where an old directory waits for its successor, on file systems that cannot exchange the two."""
    return directory.with_name(f".{directory.name}.old")


def standing(directory: Path) -> Path:
    """The directory, or what a killed writer had set aside for it."""
    old = aside(directory.absolute())
    return old if not directory.exists() and old.exists() else directory


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two directories in one step (Linux, renameat2). False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def point_to(link: Path, target: Path) -> None:
    """Makes or moves a symbolic link to something beside it, in one step."""
    temporary = temporary_beside(link)
    try:
        temporary.symlink_to(target.name, target_is_directory=target.is_dir())
        temporary.replace(link)
    finally:
        discard(temporary)


def publish(temporary: Path, path: Path, keep: int, beside: Sequence[str] = ()) -> None:
    """Makes what was written under a temporary name the newest checkpoint of its series, and removes the oldest.

    Args:
        temporary: what was written, from `temporary_beside(path)`.
        path: its name: of a series, and behind the last `_` its number.
        keep: how many of the series to keep.
        beside: suffixes of files that stand beside a checkpoint, and go with it.
    """
    take_place(temporary, path)
    point_to(path.parent / LAST, path)
    sync(path.parent)
    # Others may keep checkpoints of their own there.
    series = path.stem.rpartition("_")[0]
    others = [other for other in path.parent.glob(f"{series}_*{path.suffix}") if other != path]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    for old in others[keep - 1 :]:
        # Out of sight first: half a directory must not look like a checkpoint.
        hidden = temporary_beside(old)
        old.rename(hidden)
        discard(hidden)
    for suffix in beside:
        # Those of what was removed, now or by a process that was killed meanwhile.
        for other in path.parent.glob(f"{series}_*{suffix}"):
            if not other.with_suffix(path.suffix).exists():
                other.unlink()
