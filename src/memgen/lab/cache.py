"""Directories that are built once and never seen half-written.

A directory is built under a temporary name, its files are flushed to disk, and it is renamed to its final name: whoever
finds that name finds a complete directory. A manifest with every file's size and checksum tells a damaged one, which is
built again. A lock file lets one process build while the others wait. The name holds a hash of the recipe, so that
another recipe is another directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from memgen.training.checkpoint import sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def memgen_home() -> Path:
    """Where built assets are kept: `MEMGEN_HOME`, else the platform's cache directory."""
    chosen = os.environ.get("MEMGEN_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("memgen"))


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that differ between recipes."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def build_once(root: Path, name: str, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The directory of a recipe, built if it is missing or damaged.

    Args:
        root: where built directories are kept; made if missing.
        name: what is built; the first part of the directory's name.
        recipe: everything that decides the result, as JSON values.
        build: writes the files into the empty directory that it is given.

    Returns:
        An absolute path to a complete directory.

    Raises:
        OSError: if `root` cannot be written.
    """
    final = root.resolve() / f"{name}-{recipe_hash(recipe)}"
    if _is_complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.parent / f"{final.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is building %s; waiting for it", final)
        lock.acquire()
    try:
        if not _is_complete(final):
            _build(final, recipe, build)
    finally:
        lock.release()
    return final


def _build(final: Path, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> None:
    """Builds `final`; the caller holds its lock."""
    # With the lock held no other build is alive: what stands under a temporary name is from one that was killed.
    for leftover in final.parent.glob(f"{final.name}.building-*"):
        logger.warning("removing %s, left by a build that did not finish", leftover)
        shutil.rmtree(leftover)
    working = Path(tempfile.mkdtemp(prefix=f"{final.name}.building-", dir=final.parent))
    try:
        build(working)
        files = {
            str(path.relative_to(working)): _describe(path)
            for path in sorted(working.rglob("*"))
            if path.is_file()
        }
        manifest = {"recipe": dict(recipe), "files": files}
        (working / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in [*working.rglob("*"), working]:
            sync(path)
        working.chmod(0o755)  # a temporary directory is its owner's alone
        if final.exists():
            logger.warning("%s is damaged (a file is missing or has changed); it was built again", final)
            shutil.rmtree(final)
        working.replace(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _is_complete(directory: Path) -> bool:
    """Whether the directory has the files of its manifest, unchanged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not files:
            return False
        return all(_describe(directory / name) == known for name, known in files.items())
    except (OSError, ValueError):
        return False


def _describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
