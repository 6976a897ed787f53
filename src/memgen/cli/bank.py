"""`memgen bank inspect|prune`: looks into a latent bank, or removes blocks from it. No model is loaded."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from memgen.cli.errors import UsageError

if TYPE_CHECKING:
    from memgen.memories.latent_bank import LatentBank, StoredBlock


def main(argv: Sequence[str]) -> int:
    """Prints what a bank holds, or prunes it.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if nothing is said about what to prune.
        FileNotFoundError: if there is no such file.
        ValueError: if it is no latent bank.
    """
    options = _parser().parse_args(argv)

    from memgen.memories.latent_bank import LatentBank

    with LatentBank(Path(options.file).expanduser()) as bank:
        if options.action == "inspect":
            blocks = bank.blocks()
            shown = blocks[-options.last :] if options.last else []
            print(_as_json(bank, blocks) if options.json else "\n".join(_lines(bank, blocks, shown)))
            return 0
        wanted = {name: getattr(options, name) for name in ("capacity", "older_than", "episode")}
        if all(value is None for value in wanted.values()):
            raise UsageError("say what to prune: --capacity N, --older-than N or --episode NAME")
        removed = bank.prune(**wanted)
        print(f"{options.file}: {removed} blocks removed, {len(bank.blocks())} left")
    return 0


def _as_json(bank: LatentBank, blocks: Sequence[StoredBlock]) -> str:
    listed = [asdict(block) | {"age": bank.tick - block.written} for block in blocks]
    return json.dumps({**bank.about, "written": bank.tick, "blocks": listed}, indent=2, ensure_ascii=False)


def _lines(bank: LatentBank, blocks: Sequence[StoredBlock], shown: Sequence[StoredBlock]) -> list[str]:
    about = bank.about
    kinds = Counter((block.kind, block.size) for block in blocks)
    held = ", ".join(f"{count} {kind} of {size} latents" for (kind, size), count in sorted(kinds.items()))
    episodes = len({block.episode for block in blocks})
    lines = [
        f"{bank.path}: {len(blocks)} blocks of {episodes} episodes, {bank.path.stat().st_size / 1e6:.1f} MB",
        f"reasoner {about['reasoner']} (weights {about['fingerprint'][:12]}, width {about['hidden']}), keys of "
        f"{about['key_tokens']} tokens; {bank.tick} episodes were written",
    ]
    if held:
        lines.append(held)
    for kind in sorted({kind for kind, _ in kinds}):
        for name, centred in (("", False), (", centred", True)):
            cosines = bank.cosines(kind, centred=centred)
            if len(cosines):
                low, middle, high = (cosines[int(share * (len(cosines) - 1))] for share in (0.05, 0.5, 0.95))
                lines.append(
                    f"cosines between keys of different episodes, {kind}{name}: 5 % {low:.3f}, median {middle:.3f}, "
                    f"95 % {high:.3f}"
                )
    for block in shown:
        text = " ".join(block.text.split())
        lines.append(
            f"{block.number:>6}  age {bank.tick - block.written:<5} reward {block.reward:<5g} {block.kind:<9} "
            f"{block.episode}  ...{text[-60:]}"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen bank",
        description="Look into a latent bank (model.memgen.weaver.bank), or remove blocks from it. An age is the number of "
        "episodes that were written since.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|prune")
    inspect = actions.add_parser("inspect", help="print what a bank holds")
    inspect.add_argument("file", metavar="FILE", help="the bank")
    inspect.add_argument(
        "--last", type=_count, default=10, metavar="N", help="list so many blocks, the last ones (10)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON, with all blocks")
    prune = actions.add_parser("prune", help="remove blocks, and give their room back")
    prune.add_argument("file", metavar="FILE", help="the bank")
    prune.add_argument("--capacity", type=_count, metavar="N", help="keep so many blocks, the youngest")
    prune.add_argument("--older-than", type=_count, metavar="N", help="remove blocks of a greater age")
    prune.add_argument("--episode", metavar="NAME", help="remove the blocks of an episode")
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, got {text}")
    return value
