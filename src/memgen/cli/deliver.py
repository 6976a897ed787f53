"""`memgen deliver`: sends records to MLflow that a run could not deliver."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from memgen.cli.errors import UsageError

DEFAULT_FOLDER = Path("runs/outbox")


def main(argv: Sequence[str]) -> int:
    """Delivers the records of one or more outboxes.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status: 1 if something could not be delivered.

    Raises:
        UsageError: if a file does not exist or is not an outbox.
    """
    parser = argparse.ArgumentParser(prog="memgen deliver", description=__doc__)
    parser.add_argument(
        "outbox",
        nargs="*",
        type=Path,
        help=f"files named in a run's warning; default: all in {DEFAULT_FOLDER}",
    )
    given: list[Path] = parser.parse_args(argv).outbox
    paths = given or sorted(
        path for path in DEFAULT_FOLDER.glob("*.jsonl") if not path.name.endswith(".refused.jsonl")
    )
    if not paths:
        print(f"no undelivered records in {DEFAULT_FOLDER}")
        return 0
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UsageError(f"{missing[0]} does not exist")
    return max(_deliver(path) for path in paths)


def _deliver(path: Path) -> int:
    from memgen.tracking.delivery import read_outbox
    from memgen.tracking.store import deliver

    try:
        header, records = read_outbox(path)
    except BlockingIOError:
        print(f"{path}: a running process still delivers it")
        return 0
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        run_id, refused = deliver(header, records)
    except Exception as error:  # noqa: BLE001 - networks, databases and disks fail in many ways
        print(f"{path}: {header['uri']} does not accept the records ({error}); they are kept")
        return 1
    for reason in refused:
        print(f"{path}: refused: {reason}")
    if refused:
        print(f"{path}: the other records are in run {run_id}; the file is kept")
        return 1
    path.unlink()
    print(f"{path}: {len(records)} records are in run {run_id} now")
    return 0
