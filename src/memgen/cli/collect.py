"""`memgen collect`: lets an agent play the training items and keeps good trajectories as training data."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memgen.cli.config import Request
from memgen.cli.errors import UsageError
from memgen.cli.options import take_options

if TYPE_CHECKING:
    from memgen.results.collect import Collected

_VALUED = ("--out", "--samples", "--temperature", "--seed", "--min-reward", "--max-per-item")
_FLAGS = ("--best", "--help", "-h")


def main(argv: Sequence[str]) -> int:
    """Collects trajectories; an interrupted collection is continued.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used.
        ValueError: if the file was begun with other settings.
        KeyboardInterrupt: after Ctrl-C; finished items are on disk.
    """
    own, rest = take_options(argv, _VALUED, _FLAGS)
    options = _parser().parse_args(own)
    if options.out is None:
        raise UsageError("--out is missing; for example: --out trajectories.jsonl")
    # Collecting is not recorded in MLflow.
    request = Request.from_argv([*rest, "--trainer.logger=false"])

    from memgen.cli.run import TrainerCommand, execute

    def collect(command: TrainerCommand) -> None:
        _collect(command, options)

    return execute("predict", request, instead=collect)


def _collect(command: Any, options: argparse.Namespace) -> None:
    from memgen.cli.run import stage_and_data
    from memgen.results.collect import Collector, KeepRule

    stage, data = stage_and_data(command, "collect", needs_checkpoint=False)
    resolved, trainer = command.resolved(), command.trainer
    sampling = getattr(stage, "rollout", stage.generation)
    given = {"group_size": options.samples, "temperature": options.temperature, "seed": options.seed}
    sampling = dataclasses.replace(
        sampling, **{key: value for key, value in given.items() if value is not None}
    )
    rule = KeepRule(min_reward=options.min_reward, best=options.best, max_per_item=options.max_per_item)
    collector = Collector(
        memgen=stage.config,
        data=data,
        rollout=sampling,
        episodes=stage.episodes,
        keep=rule,
        out=Path(options.out),
        init_from=stage.init_from,
        environment=resolved["data"]["environment"],
        resolve_asset=data.resolve_asset,
    )
    try:
        trainer.predict(collector, return_predictions=False)
    finally:
        collector.close()
        collected = collector.collected()
        if collected is not None:
            print("\n".join(collected.lines(rule)))
            print(_outlook(collected, options.out))


def _outlook(collected: Collected, out: str) -> str:
    if collected.items < collected.total:
        return f"{out} is not complete; the same command continues it"
    if not collected.kept:
        return f"{out} is empty: lower --min-reward, or sample more (--samples)"
    return f"{out} is complete: train on it with --config conf/data/trajectories.yaml"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen collect",
        description="Play the training items of a configuration with its checkpoint (--checkpoint DIR; without one: the "
        "bare reasoner), and keep trajectories by their reward. Run again with the same settings, it continues where it "
        "stopped.",
        usage="memgen collect --config FILE [--config OVERLAY ...] [--checkpoint DIR] --out FILE [options] "
        "[--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", metavar="FILE", help="JSON lines, one per kept trajectory; FILE.journal lies beside it"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="trajectories of each item (model.rollout.group_size, or 1)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature (that of model.rollout, or model.generation)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="sampling seed (likewise)")
    parser.add_argument(
        "--min-reward", type=float, default=1.0, metavar="R", help="lowest reward that is kept (1)"
    )
    parser.add_argument("--best", action="store_true", help="of an item, only those with its highest reward")
    parser.add_argument(
        "--max-per-item", type=int, metavar="K", help="at most so many of an item, the best first (all)"
    )
    return parser
