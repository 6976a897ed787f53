"""`memgen demo`: the whole pipeline on the embedded default, by the same commands that a user would type; or on SmolLM2.

SmolLM2's stages are assets of the lab, so a demo that was stopped goes on inside the stage, and one that is there is not
trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memgen.cli.output import keep_libraries_quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memgen.lab.report import LabReport
    from memgen.model.memgen import MemGenModel

CONF = Path("conf")
SMOLLM2 = "lab:smollm2"
SMOLLM2_STAGES = {
    "weaver SFT, until it knows some of the prices": "smollm2_weaver_sft_half",
    "weaver SFT, the rest": "smollm2_weaver_sft",
    "weaver GRPO, from the weaver that SFT was stopped early on": "smollm2_weaver_grpo",
    "trigger RL": "smollm2_trigger_rl",
}
"""Assets of the lab by what they are."""
TABLE_MINUTES = 13
"""CPU minutes of SmolLM2's table on the machine on which the stages' minutes were measured."""
PROBE_ITEMS = 8
PROBE_SECONDS = 3.6
"""CPU seconds of answering so many items without memory, on the same machine."""


def main(argv: Sequence[str]) -> int:
    """Trains every stage, tests, and prints the accuracy of every stage and control.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="memgen demo",
        description="The whole pipeline on the embedded default: reasoner, weaver SFT, weaver GRPO, trigger RL, test, "
        "controls. It needs no network and about ten CPU minutes the first time. On SmolLM2-135M-Instruct (--backbone "
        f"{SMOLLM2}), with the lab's shop in plain English, it needs the network once and takes far longer; it says how "
        "long, and stopped at any moment, the same command goes on where it was.",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the training runs (0)")
    parser.add_argument(
        "--backbone",
        choices=("lab:reasoner", SMOLLM2),
        default="lab:reasoner",
        help="the reasoner: the lab's own (default), or a real language model",
    )
    options = parser.parse_args(argv)
    keep_libraries_quiet()
    return _on_smollm2(options.seed) if options.backbone == SMOLLM2 else _on_the_lab(options.seed)


def _on_the_lab(seed: int) -> int:
    from memgen.lab.assets import resolve_asset
    from memgen.lab.report import Checkpoints, base_hash, report_on_stages
    from memgen.lab.trained import asset_query, run_memgen
    from memgen.model.backbone import BackboneConfig, load_backbone
    from memgen.tracking.family import PARENT_VARIABLE
    from memgen.tracking.run_logger import open_parent

    logging.getLogger("memgen").setLevel(logging.WARNING)
    begin = time.perf_counter()
    pipeline = open_parent("demo", "pipeline", tags={"seed": str(seed)})
    # The commands below record child runs of it.
    os.environ[PARENT_VARIABLE] = pipeline.run_id or ""
    _say("1/6  reasoner: built on first use, then cached")
    resolve_asset("lab:reasoner")
    before = base_hash(load_backbone(BackboneConfig("lab:reasoner"), resolve_asset))
    seeds = [
        f"--seed_everything={seed}",
        f"--model.seed={seed}",
        f"--data.seed={seed}",
    ]
    weaver = _stage("2/6  weaver SFT", "weaver_sft", [], seeds)
    half = f"lab:weaver_sft_half{asset_query(seed, 0)}"
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

    result = Path("runs/demo.json")
    _show(report, result, begin)
    pipeline.log_text(result.read_text(encoding="utf-8"), result.name)
    pipeline.finalize()
    _say("Ask it yourself:   memgen generate --checkpoint runs/trigger_rl/latest/best \\")
    _say(r"                     --prompt 'shop : fig , nut , tea .\n'")
    _say("Open MLflow on it: memgen ui")
    return 0


def _on_smollm2(seed: int) -> int:
    from memgen.chat import load_tokenizer
    from memgen.lab.assets import RECIPE_VERSION, resolve_asset
    from memgen.lab.cache import memgen_home, recipe_hash
    from memgen.lab.report import Checkpoints, Questions, base_hash, report_on_stages
    from memgen.lab.trained import TRAINED, asset_query, is_trained
    from memgen.model.backbone import BackboneConfig
    from memgen.model.memgen import MemGenConfig, MemGenModel
    from memgen.model.trigger import TriggerConfig

    logging.getLogger("memgen").setLevel(logging.WARNING)
    begin = time.perf_counter()
    steps = len(SMOLLM2_STAGES) + 2
    _say(f"1/{steps}  {SMOLLM2}: fetched on first use, then cached")
    config = MemGenConfig(
        backbone=BackboneConfig(SMOLLM2, dtype="bfloat16"), trigger=TriggerConfig(kind="never")
    )
    tokenizer = load_tokenizer(resolve_asset(SMOLLM2))
    model = MemGenModel.build(config, tokenizer, resolve_asset).eval()
    before = base_hash(model.reasoner.backbone)
    missing = [name for name in SMOLLM2_STAGES.values() if not is_trained(name, seed, RECIPE_VERSION)]
    cpu_minutes = TABLE_MINUTES + sum(TRAINED[name].minutes for name in missing)
    _say(
        f"     {len(missing)} of {len(SMOLLM2_STAGES)} stages are to be trained. With the table that is about "
        f"{cpu_minutes * _slowness(model, tokenizer):.0f} minutes on this machine as it is now, by the time of {PROBE_ITEMS} "
        "answers. Stopped at any moment, the same command goes on where it was."
    )
    del model
    found = {}
    for number, (title, name) in enumerate(SMOLLM2_STAGES.items(), start=2):
        asset = f"lab:{name}{asset_query(seed, 0)}"
        _say(f"{number}/{steps}  {title}: {asset}{'' if name in missing else ' (there already)'}")
        found[name] = Path(resolve_asset(asset))
    _say(f"{steps}/{steps}  held-out items: every stage and its controls")
    half, weaver, grpo, trigger = (found[name] for name in SMOLLM2_STAGES.values())
    kept = memgen_home() / f"demo-{recipe_hash({name: path.name for name, path in found.items()})}"
    report = report_on_stages(
        Checkpoints(weaver=weaver, half=half, grpo=grpo, trigger=trigger),
        questions=Questions.english(),
        progress=lambda name: _say(f"     {name}"),
        keep=kept,
    )
    if report.base_hash != before:
        raise RuntimeError("the frozen reasoner's weights have changed; this is a bug")
    _show(report, Path("runs/demo_smollm2.json"), begin)
    _say(f"Ask it yourself: memgen generate --checkpoint {os.path.relpath(trigger)} \\")
    _say("                   --prompt 'What do a fig, a nut and tea cost?'")
    return 0


def _slowness(model: MemGenModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Minutes on this machine for each CPU minute of the one on which the stages' minutes were measured."""
    from memgen.lab.english import EnglishLab
    from memgen.lab.report import ENGLISH_NEW_TOKENS, held_out
    from memgen.results.controls import score

    task = held_out(EnglishLab(val_size=PROBE_ITEMS), "val", tokenizer, ENGLISH_NEW_TOKENS)
    score("warm-up", model, task)
    begin = time.perf_counter()
    score("probe", model, task)
    return (time.perf_counter() - begin) / PROBE_SECONDS


def _show(report: LabReport, result: Path, begin: float) -> None:
    """Prints the table and writes its figures."""
    from rich.console import Console

    console = Console()
    console.print()
    console.print(report.table())
    console.print(f"The reasoner's weights are unchanged (SHA-256 {report.base_hash[:16]}).")
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    console.print(f"Figures: {result}. Done in {time.perf_counter() - begin:.0f} s.")


def _stage(title: str, stage: str, start: Sequence[str], seeds: Sequence[str]) -> Path:
    """Trains a stage and returns its best checkpoint."""
    from memgen.lab.trained import run_memgen

    command = ["fit", "--config", str(CONF / f"{stage}.yaml"), *start]
    _say(f"{title}: memgen {' '.join(command)}")
    run_memgen(*command, *seeds)
    return Path("runs", stage, "latest").resolve() / "best"


def _say(text: str) -> None:
    print(text, flush=True)
