"""`memgen agent-flan`: collected trajectories rewritten as training data (Agent-FLAN), for `data.trajectories`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from memgen.cli.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """Writes the training data.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if there is such a file already.
        FileNotFoundError: if there are no trajectories.
        ValueError: if a line is broken, a share is out of range, or nothing is kept.
    """
    from memgen.environments.trajectories import Trajectories
    from memgen.files import write_whole
    from memgen.results.agent_flan import FlanSettings, rewrite

    options = _parser().parse_args(argv)
    out = Path(options.out)
    if out.exists():
        raise UsageError(f"{out} exists; give another name (--out), or remove it")
    given = {field.name: getattr(options, field.name) for field in fields(FlanSettings)}
    settings = FlanSettings(**{name: value for name, value in given.items() if value is not None})
    general = None if options.general is None else Trajectories(options.general)
    lines = rewrite(Trajectories(options.collected), settings, general)
    write_whole(out, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    counts = Counter(line["skill"] for line in lines)
    print(f"{out}: {len(lines)} conversations ({', '.join(f'{n} {name}' for name, n in counts.items())})")
    print(f"train on it with --config conf/data/trajectories.yaml --data.trajectories {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from memgen.results.agent_flan import FlanSettings

    parser = argparse.ArgumentParser(
        prog="memgen agent-flan",
        description="Rewrite collected trajectories as Agent-FLAN does (arXiv 2403.12881): turns in plain words, a question for "
        "each skill, shares of the skills, negatives, ordinary conversations.",
        allow_abbrev=False,
    )
    parser.add_argument("collected", metavar="FILE", help="what memgen collect wrote")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON lines, for data.trajectories")
    parser.add_argument(
        "--general",
        metavar="FILE",
        help='ordinary conversations, mixed in: lines with messages, the assistant\'s marked "agent": true',
    )
    for field in fields(FlanSettings):
        kind, what = (
            (int, "decides which are kept") if field.name == "seed" else (float, "share that is kept")
        )
        parser.add_argument(f"--{field.name}", type=kind, metavar="N", help=f"{what} ({field.default})")
    return parser
