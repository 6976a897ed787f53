"""`memgen study`: memories beside each other, every method on every task, with one template and one budget."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memgen.cli import config
from memgen.cli.config import Document, Layer, Request
from memgen.cli.errors import UsageError
from memgen.cli.options import take_options
from memgen.cli.pipeline_run import parent_run, run_of

if TYPE_CHECKING:
    from memgen.study.results import Played
    from memgen.study.settings import Cell, MethodSettings, StudySettings, TaskSettings
    from memgen.tracking.run_logger import RunLogger

DEFAULT_OUT = "runs/study"
CELLS = "cells"
"""Folder of the cells."""
CONFIG, DONE = "config.yaml", "done.json"
"""A cell's configuration, and what is written when it is whole."""
MORE = ("methods", "tasks", "seeds", "protocols")
"""What may be added when a study goes on: every cell refuses other settings of its own."""
ALONE = {
    "logger": False,
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "enable_progress_bar": False,
}
"""Settings of the Trainer that plays cells: one process. Cells are recorded in runs of their own."""


def main(argv: Sequence[str]) -> int:
    """Plays every cell of a study and compares its methods; an interrupted one is continued.

    Args:
        argv: the arguments after the command's name.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used, or a package is missing.
        ValueError: if a cell cannot be played, or the folder was begun with other settings.
        ScribeError: if the scribe failed and `scribe.on_failure` is stop.
        KeyboardInterrupt: after Ctrl-C; finished items are on disk.
    """
    own, rest = take_options(argv, ("--out",), ("--help", "-h"))
    options = _parser().parse_args(own)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("needs matplotlib for its figure: pip install 'memgen[analysis]' installs it")

    from memgen.study.settings import StudySettings, read_settings

    request = Request.from_argv(rest, [field.name for field in fields(StudySettings)])
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
    command = shlex.join(["memgen", "study", *argv])
    return _run(settings, Path(options.out), command)


def _run(settings: StudySettings, out: Path, command: str) -> int:
    from memgen.continual.chain import keep_settings
    from memgen.files import hold, release
    from memgen.study import report
    from memgen.study.results import tables
    from memgen.study.settings import SEED, cells

    alike: dict[tuple[str, ...], Cell] = {}
    for cell in cells(settings, sampled=False):
        seed = str(cell.seed) if settings.methods[cell.method].uses(SEED) else ""
        alike.setdefault((cell.method, cell.task, seed), cell)
    documents = [document_of(settings, cell, out) for cell in alike.values()]
    _require_playable(settings, documents)
    temperature = _temperature(documents)
    hold(out, "--out DIR")
    try:
        keep_settings(out, {key: value for key, value in asdict(settings).items() if key not in MORE})
        recorded = any(_value(document, "trainer.logger") is not False for document in documents)
        with _parent(settings, out) if recorded else contextlib.nullcontext() as parent:
            played = {
                cell: _played(settings, cell, out, recorded=recorded)
                for cell in cells(settings, sampled=_sampled(temperature, documents))
            }
            bases = sorted({str(_value(d, "model.memgen.backbone.name")) for d in documents})
            found = tables(settings, played, title="Study", of=", ".join(bases), temperature=temperature)
            texts = report.write(found, settings, command, out)
            if parent is not None:
                for name, text in texts.items():
                    parent.log_text(text, f"study/{name}")
                parent.log_metrics(
                    {f"{t.protocol}/{line.name}": line.reward.mean for t in found for line in t.matrix.lines}
                )
    finally:
        release(out)
    print(texts[report.REPORT], end="")
    print(f"report: {out / report.REPORT}")
    return 0


# Before anything is played


def _require_playable(settings: StudySettings, documents: Iterable[Document]) -> None:
    """Refuses checkpoints that do not exist, and memories that cannot be made.

    Raises:
        UsageError: naming it.
    """
    from memgen.cli.run import require_checkpoints
    from memgen.study.session import constants_of, memory_class

    for document in documents:
        if _value(document, "model.class_path") is None:
            raise UsageError(f"stage {settings.stage} has no model.class_path; name a stage file")
        require_checkpoints(document)
    for name, method in settings.methods.items():
        if method.memory is None:
            continue
        try:
            kind = memory_class(method.memory.method)
            constants = constants_of(kind, method.memory.constants)
            if settings.embedder == "bm25":
                with tempfile.TemporaryDirectory() as folder, kind(Path(folder) / "memory.sqlite", constants):
                    pass
        except ValueError as error:
            raise UsageError(f"methods.{name}: {error}") from error


def _temperature(documents: Iterable[Document]) -> float:
    found = sorted({float(_value(document, "model.generation.temperature") or 0.0) for document in documents})
    if len(found) > 1:
        raise UsageError(
            f"all methods answer at one temperature, got {found}; set model.generation.temperature for all"
        )
    return found[0]


def _sampled(temperature: float, documents: Iterable[Document]) -> bool:
    """Whether an answer depends on its seed."""
    return temperature > 0 or any(
        _value(document, "model.generation.sample_decisions")
        or _value(document, "model.memgen.trigger.kind") == "random"
        for document in documents
    )


def document_of(settings: StudySettings, cell: Cell, out: Path) -> Document:
    """The configuration that a cell is played with.

    Raises:
        UsageError: if a file is missing, or a reference points nowhere.
    """
    from memgen.study.session import MEMORY_FILE
    from memgen.study.settings import FOLDER, MEMORY, SEED, TASK, filled

    given = settings.methods[cell.method]
    folder = (out / CELLS / cell.name).absolute()
    marks = {SEED: str(cell.seed), TASK: cell.task, MEMORY: str(folder / MEMORY_FILE), FOLDER: str(folder)}
    parts: dict[str, MethodSettings | TaskSettings] = {
        "all": settings.all,
        f"tasks.{cell.task}": settings.tasks[cell.task],
        f"methods.{cell.method}": given,
    }
    names = [settings.stage, *(name for part in parts.values() for name in part.overlays)]
    layers = Request(tuple(_file(filled(name, marks)) for name in names), (), False, ()).layers()
    layers += [_layer(f"{place}.settings", filled(part.settings, marks)) for place, part in parts.items()]
    # A method without a checkpoint does not start from the stage file's.
    start = None if given.checkpoint is None else filled(given.checkpoint, marks)
    layers.append(_layer("the cell", {"seed_everything": cell.seed, "model": {"init_from": start}}))
    return config.resolve(config.merge(layers), layers)


def _file(name: str) -> Path:
    """A configuration file: a path, or one below `conf/`."""
    from memgen.conf_files import conf_file

    if Path(name).is_file():
        return Path(name)
    try:
        return conf_file(name)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {name}, and none of this name below conf/") from error


def _layer(name: str, values: Document) -> Layer:
    return Layer(name=name, text=config.to_yaml(values), values=config.without_init_args(values))


def _value(document: Document, key: str) -> Any:
    node: Any = document
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


# Cells


def _played(settings: StudySettings, cell: Cell, out: Path, *, recorded: bool) -> Played:
    """Plays what is left of a cell; one that is whole is only read."""
    from memgen.continual.chain import keep_settings
    from memgen.results.score_files import read_records
    from memgen.study.results import Played, learning_costs
    from memgen.study.session import TEST, anywhere

    folder = out / CELLS / cell.name
    document = document_of(settings, cell, out)
    sections = {key: document.get(key) for key in ("model", "data")}
    keep_settings(folder, anywhere({**sections, "method": asdict(settings.methods[cell.method])}, folder))
    if not (folder / DONE).is_file():
        _play(settings, cell, document, folder, recorded=recorded)
    done = json.loads((folder / DONE).read_text(encoding="utf-8"))
    rows = read_records(folder / TEST).rows
    return Played(rows, done["name"], done["trained_parameters"], learning_costs(folder))


def _play(settings: StudySettings, cell: Cell, document: Document, folder: Path, *, recorded: bool) -> None:
    from memgen.cli.run import TrainerCommand, execute, subject_of
    from memgen.files import write_whole
    from memgen.study.session import Session

    values = {**document, "trainer": {**(document.get("trainer") or {}), **ALONE}}
    path = folder / CONFIG
    write_whole(path, config.to_yaml(values))

    def play(command: TrainerCommand) -> None:
        session = Session(subject_of(command, "study", folder, needs_checkpoint=False), settings, cell)
        rows = session.play(command.trainer)
        done = {"name": session.method_name(), "trained_parameters": session.trained_parameters()}
        write_whole(folder / DONE, json.dumps(done) + "\n")
        valid = [row["reward"] for row in rows if row["fault"] is None]
        mean = f"{sum(valid) / len(valid):.4f}" if valid else "none"
        print(f"{cell.name}: reward {mean} of {len(valid)} items", flush=True)

    with _child(settings, cell, folder) if recorded else contextlib.nullcontext() as child:
        status = execute("predict", Request.from_argv(["--config", str(path)]), instead=play)
        if status:
            raise RuntimeError(f"{cell.name} failed with exit status {status}")
        if child is not None:
            child.log_metrics(_metrics(folder))


def _metrics(folder: Path) -> dict[str, float]:
    """A cell's means, for its run."""
    from memgen.results.score_files import read_records
    from memgen.results.summary import summarise
    from memgen.study.results import learning_costs
    from memgen.study.session import TEST

    rows = read_records(folder / TEST).rows
    summary = summarise(rows)
    found = {f"test/{name}_per_item": value for name, value in summary.per_item.items()}
    if summary.reward is not None:
        found["test/reward"] = summary.reward.mean
    for name in ("retrievals", "scribe_calls", "scribe_tokens", "prompt_tokens"):
        found[f"test/{name}_per_item"] = sum(row.get(name, 0) for row in rows) / len(rows)
    return found | {f"test/{name}": value for name, value in learning_costs(folder).items()}


# MLflow


def _parent(settings: StudySettings, out: Path) -> contextlib.AbstractContextManager[RunLogger]:
    """The run that the cells join as children; of a study that goes on, the one that it began with."""
    tags = {"methods": " ".join(settings.methods), "tasks": " ".join(settings.tasks)}
    return parent_run("study", tags, out)


@contextlib.contextmanager
def _child(settings: StudySettings, cell: Cell, folder: Path) -> Iterator[RunLogger]:
    """A cell's run."""
    tags = {"stage": cell.name.replace("/", "_"), **{k: str(v) for k, v in asdict(cell).items()}}
    with run_of(folder) as child:
        child.describe(cell.name, tags)
        child.log_run_folder(folder)
        child.log_hyperparams({"method": asdict(settings.methods[cell.method])})
        yield child


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen study",
        description="Let methods answer the same test items with the same template and budget: the reasoner alone, worked "
        "examples, text memories, checkpoints, and controls of each. Say who is better, item by item and over orders, and what "
        "each costs. Run again with the same settings, it continues where it stopped; methods, tasks, seeds and protocols may "
        "be added.",
        usage="memgen study --config conf/study/lab.yaml [--config OVERLAY ...] [--out DIR] [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", metavar="DIR", default=DEFAULT_OUT, help=f"folder of cells and report ({DEFAULT_OUT})"
    )
    return parser
