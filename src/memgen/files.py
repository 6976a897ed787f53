"""Files and folders that appear whole or not at all, whatever happens to the process that writes them.

What is written goes to a temporary name beside the target, is forced to disk, and is renamed. The temporary name holds
host and process, so the next writer of the same target removes what a killed one left.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.new-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
_ABANDONED_SECONDS = 86_400.0
"""Age from which a temporary file of another host counts as left by a killed process."""
HOLD_SECONDS = 5.0
"""How long `hold` waits for another process."""
_LOCK = ".lock"
_HELD: dict[Path, FileLock] = {}
"""The folders that this process holds."""
_IN_USE: set[str] = set()
"""Temporary names that this process is writing to."""


def write_whole(path: Path, data: str | bytes) -> None:
    """Writes a file (text as UTF-8), or replaces it. Its folder is made if it does not exist.

    Raises:
        OSError: if the disk is full or not writable; the file is then as it was.
    """
    with new_file(path) as temporary:
        if isinstance(data, str):
            temporary.write_text(data, encoding="utf-8")
        else:
            temporary.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path; the file (or folder) that the block writes there replaces `path` when the block ends.

    If the block raises, `path` stays as it was and what was written is removed. On return everything is on disk. The
    folder around `path` is made if it does not exist.

    A folder replaces an older one in two renames, since POSIX cannot exchange folders in one. A process killed between the
    two leaves the older one under the name that `current` finds.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = _temporary_name(path)
    _IN_USE.add(temporary.name)
    try:
        yield temporary
        _replace(temporary, path)
    finally:
        _delete(temporary)
        _IN_USE.discard(temporary.name)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As `new_file`, with an empty folder at the temporary path."""
    with new_file(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the lock of a file or folder that one process builds for all, `<path>.lock`; waits for it if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is building %s; waiting for it", path)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def hold(folder: Path, option: str = "--run DIR") -> None:
    """Holds a folder that only one process may write to, until `release` or the end of the process; again: does nothing.

    Args:
        folder: made if it does not exist.
        option: the option that names another one, for the message.

    Raises:
        OSError: if another process holds it, also after a few seconds: one that was killed may still be ending.
    """
    place = folder.absolute()
    if place in _HELD:
        return
    place.mkdir(parents=True, exist_ok=True)
    held = FileLock(place / _LOCK)
    try:
        held.acquire(timeout=HOLD_SECONDS)
    except Timeout as error:
        raise OSError(
            f"another process is running in {folder}, and two would mix their files; wait for it or stop it, or choose "
            f"another folder ({option})"
        ) from error
    _HELD[place] = held


def release(folder: Path) -> None:
    """Lets go of a folder; does nothing if this process does not hold it."""
    held = _HELD.pop(folder.absolute(), None)
    if held is not None:
        # Before the release: filelock looks whether the file that it has locked still has its name.
        Path(held.lock_file).unlink(missing_ok=True)
        held.release()


def timed_path(parent: Path, ending: str = "", *, folder: bool = False) -> Path:
    """Makes an empty file or folder that is named after the time. No other process gets the same one."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        path = parent / f"{stamp}{f'-{number}' if number > 1 else ''}{ending}"
        try:
            path.mkdir() if folder else path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise AssertionError("itertools.count has no end")


def sync(path: Path) -> None:
    """Forces a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def current(folder: Path) -> Path:
    """The folder itself, or its backup if a writer was killed while replacing it."""
    backup = _backup(folder.absolute())
    return backup if not folder.exists() and backup.exists() else folder


def point_to(link: Path, target: Path) -> None:
    """Makes or moves a symbolic link to something in the same folder, in one step."""
    with new_file(link) as temporary:
        temporary.symlink_to(target.name, target_is_directory=target.is_dir())


def remove(path: Path) -> None:
    """Removes a file or folder. It is renamed first, so a process killed meanwhile leaves no half of it under its name."""
    hidden = _temporary_name(path)
    path.rename(hidden)
    _delete(hidden)


def remove_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Removes temporary files and folders of killed writers.

    Args:
        folder: where they wrote.
        name: name of the file or folder that they wrote; None: any.

    Returns:
        What was removed.
    """
    removed = []
    for path in folder.glob(".*.new-*" if name is None else f".{glob.escape(name)}.new-*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or name not in (None, found["name"]) or path.name in _IN_USE:
            continue
        if found["host"] == socket.gethostname():
            # This process's own number on a file that it does not write: an earlier process had the same number.
            stale = int(found["pid"]) == os.getpid() or not _is_alive(int(found["pid"]))
        else:
            try:
                stale = time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS
            except FileNotFoundError:
                continue
        if stale:
            _delete(path)
            removed.append(path)
    return removed


def _replace(temporary: Path, path: Path) -> None:
    if temporary.is_symlink():
        temporary.replace(path)
        sync(path.parent)
        return
    for written in (*temporary.rglob("*"), temporary):
        sync(written)
    backup = _backup(path)
    if temporary.is_dir() and path.is_dir():
        _delete(backup)
        path.rename(backup)
        try:
            temporary.rename(path)
        except BaseException:
            backup.rename(path)
            raise
    else:
        temporary.replace(path)
    sync(path.parent)
    if path.is_dir():
        _delete(backup)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.new-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _delete(path: Path) -> None:
    """Removes a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
