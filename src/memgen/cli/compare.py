"""`memgen compare`: paired comparison of two recorded tests on the same items."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Compares two recorded tests.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        FileNotFoundError: if a folder holds no recorded test.
        ValueError: if the runs cannot be compared.
    """
    options = _parser().parse_args(argv)

    from memgen.results.comparison import compare
    from memgen.results.score_files import read_records

    found = compare(
        read_records(Path(options.run_a)),
        read_records(Path(options.run_b)),
        options.metric,
        common=options.common,
    )
    if options.json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(f"A: {options.run_a}", f"B: {options.run_b}", *found.lines(), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen compare",
        description="Compare two tests item by item: the difference of means with a paired bootstrap interval, and "
        "McNemar's exact test, or a sign-flip permutation test where scores are not 0 or 1.",
    )
    parser.add_argument("run_a", metavar="RUN_A", help="folder of a recorded test, as memgen test prints it")
    parser.add_argument("run_b", metavar="RUN_B", help="another such folder")
    parser.add_argument(
        "--metric",
        default="reward",
        metavar="NAME",
        help="reward (default), or the name of a reward component",
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="compare the items that both runs have, even if those are not all",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
