"""`memgen continual`: tasks learnt one after another, by memory and by fine-tuning, and what is left of each."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from memgen.cli import config
from memgen.cli.config import Document, Layer, Request
from memgen.cli.errors import UsageError
from memgen.cli.options import take_options
from memgen.cli.pipeline_run import parent_run

if TYPE_CHECKING:
    from memgen.continual.chain import Stage
    from memgen.continual.measures import Measures, Scores
    from memgen.continual.settings import ContinualSettings
    from memgen.tracking.run_logger import RunLogger

DEFAULT_OUT = "runs/continual"
CONFIGS = "configs"
"""Folder of the stages' configuration files."""


def main(argv: Sequence[str]) -> int:
    """Learns and tests a chain of tasks; an interrupted one is continued.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used, or a package is missing.
        ValueError: if the folder was begun with other settings.
        RuntimeError: if a training or a test fails.
        KeyboardInterrupt: after Ctrl-C; what was done is kept.
    """
    own, rest = take_options(argv, ("--out",), ("--help", "-h"))
    options = _parser().parse_args(own)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("needs matplotlib for its figure: pip install 'memgen[analysis]' installs it")

    from memgen.continual.settings import ContinualSettings, read_settings

    request = Request.from_argv(rest, [field.name for field in fields(ContinualSettings)])
    if request.run is not None:
        raise UsageError("takes --out DIR, not --run")
    layers = request.layers()
    document = config.resolve(config.merge(layers), layers)

    try:
        settings = read_settings(document)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if request.print_config:
        print(config.to_yaml(document), end="")
        return 0
    return _run(settings, Path(options.out))


def _run(settings: ContinualSettings, out: Path) -> int:
    from memgen.continual import report
    from memgen.continual.chain import Chain, keep_settings
    from memgen.continual.settings import LORA, STAGE_OF
    from memgen.files import hold, release

    built = {
        (stage, task): _built(settings, stage, task)
        # With weaver SFT's the reasoner is tested before the first task.
        for stage in dict.fromkeys(["weaver_sft", *(STAGE_OF[method] for method in settings.methods)])
        for task in settings.tasks
    }
    _require_one_model(
        {f"{stage} of {task}": found for (stage, task), found in built.items() if stage != LORA}
    )
    hold(out, "--out DIR")
    try:
        kept = {f"{stage}-{task}": _fixed(values) for (stage, task), values in built.items()}
        keep_settings(out, {**asdict(settings), "stages": kept})
        stages = {
            (stage, task): _stage(out / CONFIGS / f"{stage}-{task}.yaml", values)
            for (stage, task), values in built.items()
        }
        recorded = any(values["trainer"].get("logger") is not False for values in built.values())
        with _parent(settings, out) if recorded else contextlib.nullcontext() as parent:
            scores = Chain(settings, stages, out, _Commands(), _say).run()
            measures = report.measured(scores)
            page, numbers = report.write(scores, measures, settings.seed, out)
            if parent is not None:
                for step, metrics in enumerate(report.metrics(scores, measures)):
                    parent.log_metrics(metrics, step)
                parent.log_text(page, f"continual/{report.REPORT}")
                parent.log_text(numbers, f"continual/{report.NUMBERS}")
    finally:
        release(out)
    _show(scores, measures)
    print(f"report: {out / report.REPORT}")
    return 0


class _Commands:
    """The commands as a user would type them. Tests run in this process, since starting one takes longer than the lab's."""

    def fit(self, config: Path, overrides: Mapping[str, object], run: Path) -> None:
        from memgen.lab.trained import fit

        fit([config], overrides, run)

    def test(self, config: Path, overrides: Mapping[str, object], records: Path) -> None:
        from memgen.cli.run import main as run

        # One process, whatever the trainings take; cells are recorded in the parent's run.
        alone = {
            "logger": "false",
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "enable_progress_bar": "false",
        }
        values = {**{f"trainer.{key}": value for key, value in alone.items()}, **overrides}
        arguments = [f"--{key}={value}" for key, value in values.items()]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = run(["test", "--config", str(config), "--records", str(records), *arguments])
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise RuntimeError(f"the test for {records} failed with exit status {status}")


def _built(settings: ContinualSettings, stage: str, task: str) -> Document:
    """A stage's whole configuration on a task."""
    from memgen.cli.run import built_from
    from memgen.data import EnvironmentData

    layers = _layers(settings, stage, task)
    request = Request(tuple(Path(layer.name) for layer in layers[:1]), (), False, ())
    command = built_from(request, layers)
    values = command.resolved()
    if not isinstance(command.datamodule, EnvironmentData):
        raise UsageError(f"{stage} of {task}: memgen continual needs memgen.data.EnvironmentData")
    steps = values["trainer"]["max_steps"]
    if steps < 1:
        raise UsageError(
            f"{stage} of {task}: trainer.max_steps must be at least 1, got {steps}; a chain counts in steps, so that every "
            "method takes as many"
        )
    if values["model"].get("init_from") is not None:
        raise UsageError(
            f"{stage} of {task}: model.init_from is {values['model']['init_from']}, but a chain begins without memory; set it "
            "to null"
        )
    return values


def _layers(settings: ContinualSettings, stage: str, task: str) -> list[Layer]:
    """The sources of a stage's configuration on a task."""
    from memgen.conf_files import conf_file
    from memgen.continual.settings import LORA
    from memgen.lab.trained import stage_file

    given = {"all": settings.all, f"tasks.{task}": settings.tasks[task]}
    trained = "weaver_sft" if stage == LORA else stage
    files = [stage_file(trained), *(_file(name) for part in given.values() for name in part.overlays)]
    layers = Request(tuple(files), (), False, ()).layers()
    seed = {
        "seed_everything": settings.seed,
        "model": {"seed": settings.seed, **({"init_from": None} if stage == "trigger_rl" else {})},
        "data": {"seed": settings.seed},
    }
    layers.append(_layer("seed", seed))
    for place, part in given.items():
        layers += [_layer(f"{place}.settings", part.settings), _layer(f"{place}.{trained}", part.of(trained))]
    if stage == LORA:
        # Behind the weaver's own settings, whose place it takes.
        layers += Request((conf_file("baselines/lora_sft.yaml"),), (), False, ()).layers()
        if settings.lora_lr is not None:
            layers.append(_layer("lora_lr", {"model": {"optimizer": {"lr": settings.lora_lr}}}))
    return layers


def _file(name: str) -> Path:
    """A configuration file: a path, or one below `conf/`."""
    from memgen.conf_files import conf_file

    if Path(name).is_file():
        return Path(name)
    try:
        return conf_file(name)
    except FileNotFoundError as error:
        raise UsageError(f"overlays: there is no file {name}, and none of this name below conf/") from error


def _layer(name: str, values: Document) -> Layer:
    return Layer(name=name, text=config.to_yaml(values), values=values)


def _require_one_model(documents: Mapping[str, Document]) -> None:
    """Refuses tasks whose settings make different models: there is one, which learns them all."""
    from memgen.results.ledger import differences

    first: dict[str, tuple[str, Document]] = {}
    for name, document in documents.items():
        model = dict(document["model"]["memgen"])
        parts = {f"trigger of {name.split(' of ')[0]}": model.pop("trigger"), "model": model}
        for part, values in parts.items():
            earlier, before = first.setdefault(part, (name, values))
            if wrong := differences(before, values):
                raise UsageError(
                    f"the tasks are learnt by one model, but model.memgen of {name} is not that of {earlier}: {wrong[0]}; set "
                    "it for all tasks (all.settings.model.memgen)"
                )


def _fixed(document: Document) -> Document:
    """A configuration without what changes nothing that is learnt."""
    from memgen.running.settings import FREE

    free = {tuple(key.split(".")) for key in FREE}
    return {
        section: {key: value for key, value in values.items() if (section, key) not in free}
        if isinstance(values, dict)
        else values
        for section, values in document.items()
        if (section,) not in free
    }


def _stage(path: Path, values: Document) -> Stage:
    from memgen.continual.chain import Stage
    from memgen.files import write_whole

    write_whole(path, config.to_yaml(values))
    return Stage(path, values)


def _parent(settings: ContinualSettings, out: Path) -> contextlib.AbstractContextManager[RunLogger]:
    """The run that the trainings join as children; of a chain that goes on, the one that it began with."""
    return parent_run("continual", {"seed": str(settings.seed), "chain": " ".join(settings.chain)}, out)


def _show(scores: Mapping[str, Scores], measures: Mapping[str, Measures]) -> None:
    from rich.console import Console

    from memgen.continual import report

    console = Console()
    for table in report.tables(scores, measures):
        console.print(table)


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen continual",
        description="Learn a chain of tasks one after another, by latent memory (weaver SFT, with and without trigger RL after "
        "each task) and by LoRA-SFT of the reasoner (with and without replay), test all tasks before and after each, and say "
        "what was forgotten and what was transferred. Run again with the same settings, it continues where it stopped.",
        usage="memgen continual --config conf/continual.yaml [--config OVERLAY ...] [--out DIR] [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=DEFAULT_OUT,
        help=f"folder of trainings, tests and report ({DEFAULT_OUT})",
    )
    return parser
