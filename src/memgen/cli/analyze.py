"""`memgen analyze`: what a checkpoint's latent memory is and does, with the controls that could refute it."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memgen.cli.config import Request
from memgen.cli.errors import UsageError
from memgen.cli.options import take_options

_VALUED = ("--out", "--clusters", "--top-k", "--analysis-seed", "--null-draws", "--labels")
_FLAGS = ("--help", "-h")
_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def main(argv: Sequence[str]) -> int:
    """Analyses a checkpoint; an interrupted analysis is continued.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used, or a package is missing.
        ValueError: if there is too little to analyse, or the folder was begun with other settings.
        KeyboardInterrupt: after Ctrl-C; finished items are on disk.
    """
    own, rest = take_options(argv, _VALUED, _FLAGS)
    options = _parser().parse_args(own)
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"needs {' and '.join(missing)}: pip install 'memgen[analysis]' installs what it needs"
        )
    request = Request.from_argv(rest)

    from memgen.cli.run import TrainerCommand, execute

    def analyze(command: TrainerCommand) -> None:
        _analyze(command, options)

    return execute("predict", request, instead=analyze)


def _analyze(command: Any, options: argparse.Namespace) -> None:
    from memgen.analysis import report
    from memgen.analysis.labels import PAGE, read_labels, write_failures
    from memgen.analysis.pipeline import AnalysisSettings, analyze
    from memgen.analysis.playing import Player
    from memgen.cli.run import subject_of
    from memgen.tracking.run_logger import run_loggers

    trainer = command.trainer
    subject = subject_of(command, "analyze", None if options.out is None else Path(options.out))
    given = {
        "clusters": options.clusters,
        "top_k": options.top_k,
        "seed": options.analysis_seed,
        "null_draws": options.null_draws,
    }
    labels = [read_labels(Path(path)) for path in options.labels]
    settings = AnalysisSettings(**{key: value for key, value in given.items() if value is not None})
    player = Player(subject)
    result = analyze(player, trainer, settings, labels)
    analysis = result.analysis
    write_failures(result.failures, f"Failures of {analysis.environment}", player.folder)
    page, numbers = report.write(analysis, result.collection, player.folder)
    for found in run_loggers(trainer.loggers):
        found.log_text(page, f"analysis/{report.REPORT}")
        found.log_text(numbers, f"analysis/{report.NUMBERS}")
        # The Trainer has ended the run already; this sends what came after.
        found.finalize()
    print("\n".join([analysis.verdict.headline, *analysis.verdict.sentences]))
    for sides in () if analysis.labelling is None else analysis.labelling.agreements:
        kappa = "not defined" if sides.kappa is None else f"{sides.kappa:.3f}"
        print(f"{sides.first} and {sides.second}: Cohen's kappa {kappa} on {sides.failures} failures")
    print(f"{len(result.failures)} failures to label: {player.folder / PAGE}")
    print(f"report: {player.folder / report.REPORT}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen analyze",
        description="Collect every block of latents that a checkpoint weaves into the test items, measure and cluster them, "
        "answer again with blocks removed or replaced, and say in words what follows. Run again with the same settings, it "
        "continues where it stopped. data.test_examples sets the number of items.",
        usage="memgen analyze --checkpoint DIR --config FILE [--config OVERLAY ...] [--out DIR] [options] [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of collection, answers and report (default: runs/analysis/NAME, NAME by settings and code)",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        action="append",
        default=[],
        help="a file of labels that the page label.html of this analysis saved; twice: those of two annotators. They take the "
        "place of the rules' types of failure",
    )
    parser.add_argument(
        "--clusters",
        type=int,
        metavar="N",
        help="clusters to intervene on (default: the best number if there are clusters, and the paper's 4)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="neighbours of the paper's rule of removal (10)"
    )
    parser.add_argument(
        "--analysis-seed",
        type=int,
        metavar="N",
        help="seed of the items' halves, of K-means and of random interventions (0); answers keep model.generation.seed",
    )
    parser.add_argument(
        "--null-draws",
        type=int,
        metavar="N",
        help="samples without clusters to compare with; the smallest p-value is 1 / (N + 1) (99)",
    )
    return parser
