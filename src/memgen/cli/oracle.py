"""`memgen oracle`: what a trigger can gain on a checkpoint, before trigger RL is paid for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memgen.cli.config import Request
from memgen.cli.options import take_options

_VALUED = ("--out", "--budget", "--oracle-seed")
_FLAGS = ("--help", "-h")


def main(argv: Sequence[str]) -> int:
    """Tries policies of a trigger on the test items; an interrupted run is continued.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used.
        ValueError: if there is too little to decide, or the folder was begun with other settings.
        KeyboardInterrupt: after Ctrl-C; finished items are on disk.
    """
    own, rest = take_options(argv, _VALUED, _FLAGS)
    options = _parser().parse_args(own)
    request = Request.from_argv(rest)

    from memgen.analysis.oracle import OracleSettings
    from memgen.cli.run import TrainerCommand, execute

    given = {"budget": options.budget, "seed": options.oracle_seed}
    settings = OracleSettings(**{key: value for key, value in given.items() if value is not None})

    def oracle(command: TrainerCommand) -> None:
        _oracle(command, settings, options.out)

    return execute("predict", request, instead=oracle)


def _oracle(command: Any, settings: Any, out: str | None) -> None:
    from dataclasses import replace

    from memgen.analysis import oracle_report
    from memgen.analysis.oracle import FOLDER, explore
    from memgen.analysis.playing import Player
    from memgen.cli.run import subject_of
    from memgen.files import current
    from memgen.model.trigger import TriggerConfig
    from memgen.tracking.run_logger import run_loggers
    from memgen.training.checkpoint import TRIGGER_FILE

    subject, trainer = subject_of(command, "oracle", None if out is None else Path(out)), command.trainer
    folder = current(Path(subject.resolve_asset(str(subject.init_from))))
    has_trigger = subject.memgen.trigger.learned and (folder / TRIGGER_FILE).exists()
    subject = replace(
        subject,
        # Any other trigger has no say, not even in the identity of what is recorded.
        memgen=subject.memgen if has_trigger else replace(subject.memgen, trigger=TriggerConfig()),
        generation=replace(subject.generation, temperature=0.0, sample_decisions=False),
    )
    player = Player(subject, FOLDER)
    found = explore(player, trainer, settings, has_trigger=has_trigger)
    tables, numbers = oracle_report.write(found, player.folder)
    for logger in run_loggers(trainer.loggers):
        logger.log_text(tables, f"oracle/{oracle_report.TABLES}")
        logger.log_text(numbers, f"oracle/{oracle_report.NUMBERS}")
        # The Trainer has ended the run already; this sends what came after.
        logger.finalize()
    print(tables, end="")
    print(f"report: {player.folder / oracle_report.TABLES}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen oracle",
        description="Answer every test item under many policies of a trigger, greedily: never, always, at each boundary alone, "
        "at all but one, at pairs of boundaries. Say what the best policy shared by all items gains, what the best policy of "
        "each item would gain at most, and how close the checkpoint's trained trigger comes. Run again with the same settings, "
        "it continues where it stopped, and a larger budget adds to a smaller one. data.test_examples sets the number of items.",
        usage="memgen oracle --checkpoint DIR --config FILE [--config OVERLAY ...] [--budget N] [--out DIR] [options] "
        "[--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="decoded policies per item, never and always among them (16)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of answers and results (default: runs/oracle/NAME, NAME by settings and code)",
    )
    parser.add_argument("--oracle-seed", type=int, metavar="N", help="seed of the items' halves (0)")
    return parser
