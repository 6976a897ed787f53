"""The configuration files that come with the package: `conf/` of a checkout, which a wheel holds too."""

from __future__ import annotations

from pathlib import Path

CONF = (Path(__file__).parent / "conf").resolve()
"""Folder of the package's own configuration files."""


def conf_file(name: str) -> Path:
    """One of the package's configuration files.

    Args:
        name: its path below `conf/`.

    Raises:
        FileNotFoundError: if there is none of this name.
    """
    path = CONF / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no conf/{name} in the package ({CONF})")
    return path


def packaged(path: Path) -> Path | None:
    """The package's own file or folder for a path such as `conf/weaver_sft.yaml`, or None if it has none."""
    if path.is_absolute() or path.parts[:1] != ("conf",) or ".." in path.parts:
        return None
    found = CONF.joinpath(*path.parts[1:])
    return found if found.exists() else None
