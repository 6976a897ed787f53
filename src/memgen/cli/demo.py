"""`memgen demo`: the whole pipeline on the embedded default, by the same commands that a user would type."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from memgen.cli.errors import UsageError

STAGE = Path("conf/weaver_sft.yaml")


def main(argv: Sequence[str]) -> int:
    """Builds the reasoner, trains a weaver, tests it, and prints what memory was worth.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if the configuration files are not below the working directory.
    """
    parser = argparse.ArgumentParser(
        prog="memgen demo",
        description="The whole pipeline on the embedded default: reasoner, weaver SFT, test, controls. "
        "It needs no network and about five CPU minutes the first time.",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weaver's training (0)")
    options = parser.parse_args(argv)
    if not STAGE.is_file():
        raise UsageError(f"{STAGE} is not below {Path.cwd()}; run the demo in the project's folder")

    from memgen.lab.assets import resolve_asset
    from memgen.lab.environment import Lab
    from memgen.lab.report import base_hash, report_on_weaver
    from memgen.model.backbone import BackboneConfig, load_backbone

    logging.getLogger("memgen").setLevel(logging.WARNING)
    begin = time.perf_counter()
    _say("1/4  reasoner: built on first use, then cached")
    resolve_asset("lab:reasoner")
    before = base_hash(load_backbone(BackboneConfig("lab:reasoner"), resolve_asset))
    seeds = [
        f"--seed_everything={options.seed}",
        f"--model.seed={options.seed}",
        f"--data.seed={options.seed}",
    ]
    _say("2/4  weaver SFT: memgen fit --config conf/weaver_sft.yaml")
    _memgen("fit", "--config", str(STAGE), *seeds)
    checkpoint = Path("runs/weaver_sft/latest").resolve() / "best"
    shown = Path(os.path.relpath(checkpoint))
    _say(f"3/4  test: memgen test --config conf/weaver_sft.yaml --checkpoint {shown}")
    _memgen("test", "--config", str(STAGE), "--checkpoint", str(shown))
    _say("4/4  controls: the same held-out items without memory, and with what only looks like it")
    report = report_on_weaver(checkpoint, Lab(), "test", progress=lambda name: _say(f"     {name}"))
    if report.base_hash != before:
        raise RuntimeError("the frozen reasoner's weights have changed; this is a bug")

    from rich.console import Console

    console = Console()
    console.print()
    console.print(report.table())
    console.print(f"The reasoner's weights are unchanged (SHA-256 {before[:16]}).")
    result = Path("runs/demo.json")
    result.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures: {result}. Done in {time.perf_counter() - begin:.0f} s.")
    console.print("Ask it yourself:   memgen generate --checkpoint runs/weaver_sft/latest/best \\")
    console.print(r"                     --prompt 'shop : fig , nut , tea .\n'", markup=False)
    console.print("Open MLflow on it: memgen ui")
    return 0


def _memgen(*arguments: str) -> None:
    """Runs a command in a process of its own, as a user would.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run([sys.executable, "-m", "memgen.cli.main", *arguments], check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(f"memgen {' '.join(arguments)} failed with exit status {done.returncode}")


def _say(text: str) -> None:
    print(text, flush=True)
