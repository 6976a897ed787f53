"""`memgen ablate`: the same test items with, without and with what only looks like memory; and sweeps over settings."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memgen.analysis.condition_names import COT_TEXT, DEFAULT, NAMES
from memgen.cli import submit, sweep
from memgen.cli.config import Request
from memgen.cli.errors import UsageError
from memgen.cli.options import take_options

_PLAYING = ("--conditions", "--cot-text", "--bon-temperature")
_SUBMITTING = tuple(option for option in submit.VALUED if option not in ("--array", "--run"))
_VALUED = ("--out", "--sweep", *_PLAYING)
_FLAGS = ("--help", "-h", "--submit")


def main(argv: Sequence[str]) -> int:
    """Plays the test items under several conditions and compares them; an interrupted ablation is continued.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used, or a package is missing.
        ValueError: if a condition cannot be played, or the folder was begun with other settings.
        KeyboardInterrupt: after Ctrl-C; finished items are on disk.
    """
    own, rest = take_options(argv, _VALUED, _FLAGS)
    options = _parser().parse_args(own)
    out = None if options.out is None else Path(options.out)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("needs matplotlib: pip install 'memgen[analysis]' installs what it needs")
    if options.sweep:
        return _sweep(options, own, rest, out)
    if options.submit:
        raise UsageError("--submit is for a sweep: --sweep KEY=V1,V2,...")
    request = Request.from_argv(rest)

    from memgen.analysis.ablation import AblationSettings, Condition
    from memgen.cli.run import TrainerCommand, execute

    settings = AblationSettings(
        conditions=None
        if options.conditions is None
        else tuple(Condition.parse(text) for text in options.conditions.split(",")),
        cot_text=COT_TEXT if options.cot_text is None else options.cot_text,
        bon_temperature=options.bon_temperature,
    )

    def ablate(command: TrainerCommand) -> None:
        _ablate(command, settings, out)

    return execute("predict", request, instead=ablate)


def _sweep(options: argparse.Namespace, own: Sequence[str], rest: list[str], out: Path | None) -> int:
    given = [option for option in _PLAYING if any(word.partition("=")[0] == option for word in own)]
    if given:
        raise UsageError(
            f"{given[0]} plays one checkpoint, --sweep trains one for each point; leave one of them out"
        )
    job, arguments = (
        take_options(submit.joined(rest), _SUBMITTING, submit.FLAGS) if options.submit else ([], rest)
    )
    return sweep.run(options.sweep, arguments, out, job if options.submit else None)


def _ablate(command: Any, settings: Any, out: Path | None) -> None:
    from memgen.analysis import ablation_report
    from memgen.analysis.ablation import Ablation
    from memgen.analysis.matrix import matrix
    from memgen.cli.run import subject_of
    from memgen.tracking.run_logger import run_loggers

    trainer = command.trainer
    ablation = Ablation(subject_of(command, "ablate", out), settings)
    try:
        trainer.predict(ablation, return_predictions=False)
    finally:
        ablation.close()
    found = matrix(ablation)
    page, numbers = ablation_report.write(found, ablation.folder)
    for logger in run_loggers(trainer.loggers):
        logger.log_text(page, f"ablation/{ablation_report.REPORT}")
        logger.log_text(numbers, f"ablation/{ablation_report.NUMBERS}")
        logger.log_table(ablation_report.columns(found), "tables/ablation.json")
        # The Trainer has ended the run already; this sends what came after.
        logger.finalize()
    print("\n".join(ablation_report.text_lines(found)))
    print(f"report: {ablation.folder / ablation_report.REPORT}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen ablate",
        description="Answer the test items under several conditions that differ in one thing, compare them item by item, and "
        "say what each costs. Run again with the same settings, it continues where it stopped. data.test_examples sets the "
        "number of items.",
        usage="memgen ablate --checkpoint DIR --config FILE [--config OVERLAY ...] [--conditions A,B,...] [--out DIR] "
        "[options] [--key value ...]\n"
        "       memgen ablate --sweep KEY=V1,V2,... [--sweep ...] --config FILE [--config OVERLAY ...] [--out DIR] "
        "[--key value ...] [--submit --time LIMIT [options of memgen submit]]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--conditions",
        metavar="A,B,...",
        help=f"of {', '.join(NAMES)}; all are compared with the first (default: {','.join(DEFAULT)}, and trained if the "
        "checkpoint holds a trained trigger)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of records and report (default: runs/ablations/NAME, NAME by settings and code; of a sweep "
        "runs/sweeps/NAME)",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="KEY=V1,V2,...",
        help="train and test every combination of these values, as memgen fit and memgen test would; model.memgen. may be "
        "left out in front of weaver, trigger, boundaries and backbone",
    )
    parser.add_argument(
        "--submit",
        action="store_true",
        help="the points become a SLURM array, which trains and tests them; the same command without --submit compares them",
    )
    parser.add_argument(
        "--cot-text", metavar="TEXT", help=f"what cot adds to the prompt, on a line of its own ({COT_TEXT!r})"
    )
    parser.add_argument(
        "--bon-temperature",
        type=float,
        metavar="T",
        help="sampling temperature of bon (that of all conditions, model.generation.temperature)",
    )
    return parser
