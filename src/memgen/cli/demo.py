"""`memgen demo`: the whole pipeline on the embedded default, by the same commands that a user would type."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from memgen.cli.errors import UsageError

CONF = Path("conf")


def main(argv: Sequence[str]) -> int:
    """Builds the reasoner, trains every stage, tests, and prints the accuracy of every stage and control.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if the configuration files are not below the working directory.
    """
    parser = argparse.ArgumentParser(
        prog="memgen demo",
        description="The whole pipeline on the embedded default: reasoner, weaver SFT, weaver GRPO, trigger RL, test, "
        "controls. It needs no network and about ten CPU minutes the first time.",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training runs (0)")
    options = parser.parse_args(argv)
    if not (CONF / "weaver_sft.yaml").is_file():
        raise UsageError(
            f"{CONF / 'weaver_sft.yaml'} is not below {Path.cwd()}; run the demo in the project's folder"
        )

    from memgen.lab.assets import resolve_asset
    from memgen.lab.report import Checkpoints, base_hash, report_on_stages
    from memgen.lab.trained import asset_query, run_memgen
    from memgen.model.backbone import BackboneConfig, load_backbone
    from memgen.tracking.family import PARENT_VARIABLE
    from memgen.tracking.run_logger import open_parent

    logging.getLogger("memgen").setLevel(logging.WARNING)
    begin = time.perf_counter()
    pipeline = open_parent("demo", "pipeline", tags={"seed": str(options.seed)})
    # The commands below record child runs of it.
    os.environ[PARENT_VARIABLE] = pipeline.run_id or ""
    _say("1/6  reasoner: built on first use, then cached")
    resolve_asset("lab:reasoner")
    before = base_hash(load_backbone(BackboneConfig("lab:reasoner"), resolve_asset))
    seeds = [
        f"--seed_everything={options.seed}",
        f"--model.seed={options.seed}",
        f"--data.seed={options.seed}",
    ]
    weaver = _stage("2/6  weaver SFT", "weaver_sft", [], seeds)
    half = f"lab:weaver_sft_half{asset_query(options.seed, 0)}"
    grpo = _stage(
        "3/6  weaver GRPO, from an SFT weaver that was stopped early",
        "weaver_grpo",
        ["--checkpoint", half],
        seeds,
    )
    trigger = _stage("4/6  trigger RL", "trigger_rl", ["--checkpoint", os.path.relpath(weaver)], seeds)
    shown = os.path.relpath(weaver)
    _say(f"5/6  test: memgen test --config {CONF / 'weaver_sft.yaml'} --checkpoint {shown}")
    run_memgen("test", "--config", str(CONF / "weaver_sft.yaml"), "--checkpoint", shown)
    _say("6/6  controls: the same held-out items without memory, and with what only looks like it")
    found = Checkpoints(weaver=weaver, half=Path(resolve_asset(half)), grpo=grpo, trigger=trigger)
    report = report_on_stages(found, progress=lambda name: _say(f"     {name}"))
    if report.base_hash != before:
        raise RuntimeError("the frozen reasoner's weights have changed; this is a bug")

    from rich.console import Console

    console = Console()
    console.print()
    console.print(report.table())
    console.print(f"The reasoner's weights are unchanged (SHA-256 {before[:16]}).")
    result = Path("runs/demo.json")
    result.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    pipeline.log_text(result.read_text(encoding="utf-8"), result.name)
    pipeline.finalize()
    console.print(f"Figures: {result}. Done in {time.perf_counter() - begin:.0f} s.")
    console.print("Ask it yourself:   memgen generate --checkpoint runs/trigger_rl/latest/best \\")
    console.print(r"                     --prompt 'shop : fig , nut , tea .\n'", markup=False)
    console.print("Open MLflow on it: memgen ui")
    return 0


def _stage(title: str, stage: str, start: Sequence[str], seeds: Sequence[str]) -> Path:
    """Trains a stage and returns its best checkpoint."""
    from memgen.lab.trained import run_memgen

    command = ["fit", "--config", str(CONF / f"{stage}.yaml"), *start]
    _say(f"{title}: memgen {' '.join(command)}")
    run_memgen(*command, *seeds)
    return Path("runs", stage, "latest").resolve() / "best"


def _say(text: str) -> None:
    print(text, flush=True)
