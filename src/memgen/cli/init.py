"""`memgen init`: copies the package's configuration files into a folder of one's own, to be changed there."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from memgen.cli.errors import UsageError
from memgen.conf_files import CONF
from memgen.files import new_folder


def main(argv: Sequence[str]) -> int:
    """Copies `conf/`.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if there is a `conf` already.
        OSError: if the folder cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="memgen init",
        description="Copies the configuration files of the package into conf/, to be changed there. Without them, "
        "--config conf/NAME.yaml takes the package's own.",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="where conf/ goes (here)")
    folder = parser.parse_args(argv).folder / "conf"
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already; move it away, or name another folder: memgen init FOLDER")
    with new_folder(folder) as temporary:
        shutil.copytree(CONF, temporary, dirs_exist_ok=True)
    count = sum(path.is_file() for path in folder.rglob("*"))
    print(f"{count} configuration files: {folder}. Next: memgen fit --config {folder / 'weaver_sft.yaml'}")
    return 0
