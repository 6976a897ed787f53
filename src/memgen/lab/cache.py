"""Folders that are built once and kept: the lab's assets.

A folder appears under its name only when it is complete (`memgen.files`). A manifest with every file's size and checksum
shows damage, and a damaged folder is built again. A lock lets one process build while the others wait. The name holds a
hash of the recipe, so another recipe is another folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from memgen.files import lock, new_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def memgen_home() -> Path:
    """Folder of built assets: `MEMGEN_HOME`, else the platform's cache folder."""
    chosen = os.environ.get("MEMGEN_HOME")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("memgen"))


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that differ between recipes."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def build_once(root: Path, name: str, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder of a recipe, built if it is missing or damaged.

    Args:
        root: folder of all built folders; made if missing.
        name: first part of the folder's name.
        recipe: everything that decides the result, as JSON values.
        build: writes the files into the empty folder that it is given.

    Returns:
        An absolute path to a complete folder.

    Raises:
        OSError: if `root` cannot be written.
    """
    final = _folder(root, name, recipe)
    if _is_complete(final):
        return final
    with lock(final):
        if not _is_complete(final):
            if final.exists():
                logger.warning("%s is damaged (a file is missing or has changed); it is built again", final)
            with new_folder(final) as folder:
                build(folder)
                _write_manifest(folder, recipe)
    return final


def find_built(root: Path, name: str, recipe: Mapping[str, Any]) -> Path | None:
    """The folder that `build_once` would return without building; None if it is missing or damaged."""
    final = _folder(root, name, recipe)
    return final if _is_complete(final) else None


def _folder(root: Path, name: str, recipe: Mapping[str, Any]) -> Path:
    return root.resolve() / f"{name}-{recipe_hash(recipe)}"


def _write_manifest(folder: Path, recipe: Mapping[str, Any]) -> None:
    files = {
        str(path.relative_to(folder)): _describe(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    manifest = {"recipe": dict(recipe), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Whether the folder has the files of its manifest, unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not files:
            return False
        return all(_describe(folder / name) == known for name, known in files.items())
    except (OSError, ValueError):
        return False


def _describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
