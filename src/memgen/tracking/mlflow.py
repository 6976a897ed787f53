"""The MLflow record of a run: where it is kept, and what is written besides the metrics that Lightning logs.

mlflow is imported inside the functions, because its import takes seconds.
"""

from __future__ import annotations

import html
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger
from typing_extensions import override

import memgen

EXPERIMENT = "memgen"
DEFAULT_ROOT = "runs"
PARAMETER_LENGTH = 500
"""Longest value of a parameter that MLflow's stores accept; a longer one is cut, and config/resolved.yaml has it in full."""
BATCH = 100
"""Parameters that MLflow takes in one call."""


@dataclass(frozen=True)
class RunDescription:
    """How a run came about.

    Attributes:
        command: the Trainer's method.
        arguments: the command line as it was typed.
        raw: text of each configuration file as it was read, by file name, in the order of merging.
        resolved_yaml: the complete configuration, defaults included.
        resolved: the same as nested mappings.
    """

    command: str
    arguments: Sequence[str] = ()
    raw: Mapping[str, str] = field(default_factory=dict)
    resolved_yaml: str = ""
    resolved: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """A stretch of an answer.

    Attributes:
        text: the text; of a mark, what to write at the place ("8" for eight latents).
        is_insertion: True where memory was woven in, False for text.
    """

    text: str
    is_insertion: bool = False


@dataclass(frozen=True)
class Sample:
    """One answer to look at.

    Attributes:
        prompt: what was asked.
        segments: the answer, cut at its insertion points.
        title: one line above it, such as the item's name and its reward.
    """

    prompt: str
    segments: Sequence[Segment]
    title: str = ""


def run_logger(
    experiment: str = EXPERIMENT,
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    run_name: str | None = None,
    run_id: str | None = None,
) -> MLFlowLogger:
    """A logger that writes to a store below `root`, or to the one that MLFLOW_TRACKING_URI names.

    Args:
        experiment: name of the experiment.
        root: folder of the default store: `mlflow.db` (sqlite) and `artifacts/`.
        tracking_uri: another store; it goes before MLFLOW_TRACKING_URI.
        run_name: name of the run; MLflow makes one up by default.
        run_id: an existing run to go on with.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    artifacts: str | None = None
    if not uri:
        folder = Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        artifacts = (folder / "artifacts").resolve().as_uri()
    return MLFlowLogger(
        experiment_name=experiment,
        run_name=run_name,
        tracking_uri=uri,
        artifact_location=artifacts,
        run_id=run_id,
    )


@final
class RunRecord(Callback):
    """Writes configuration, parameters and tags into the run before anything else happens.

    Lightning's own SaveConfigCallback needs a log folder, which MLFlowLogger does not have.
    """

    def __init__(self, description: RunDescription) -> None:
        self.description = description
        self._written = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        for logger in _mlflow_loggers(trainer.loggers):
            _write_configuration(logger, self.description)
            _write_parameters(logger, self.description.resolved)
            for name, value in run_tags(self.description).items():
                logger.experiment.set_tag(logger.run_id, name, value)


def run_tags(description: RunDescription) -> dict[str, str]:
    """What a person filters runs by: stage, backbone, environment, code revision, seed, versions."""
    model = _mapping(description.resolved.get("model"))
    data = _mapping(description.resolved.get("data"))
    memgen_settings = _mapping(model.get("memgen"))
    tags = {
        "command": description.command,
        "stage": _stage_name(model.get("class_path")),
        "backbone": _mapping(memgen_settings.get("backbone")).get("name"),
        "environment": _class_name(data.get("environment")),
        "seed": description.resolved.get("seed_everything"),
        "memgen.version": memgen.__version__,
        "python.version": platform.python_version(),
        "torch.version": torch.__version__,
        **git_revision(),
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def git_revision() -> dict[str, str]:
    """Commit of the package's source and whether it was changed since; empty if git does not keep the source."""
    source = Path(memgen.__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside a repository that is not its own.
    if git("ls-files", "--error-unmatch", source.name) is None:
        return {}
    revision = git("rev-parse", "HEAD")
    if revision is None:
        return {}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git.revision": revision,
        "git.dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }


def installed_packages() -> str:
    """The environment as `name==version` lines, sorted."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def flatten_parameters(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, values as text of at most 500 characters.

    An empty list or mapping keeps its name, a list's items are numbered if one of them is nested.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, list | tuple) and any(
            isinstance(item, Mapping | list | tuple) for item in value
        ):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat.update(flatten_parameters(value, f"{key}."))
        else:
            text = str(value)
            flat[key] = text if len(text) <= PARAMETER_LENGTH else f"{text[: PARAMETER_LENGTH - 3]}..."
    return flat


def log_checkpoint(loggers: Iterable[Logger], directory: Path, name: str = "checkpoint") -> None:
    """Copies a checkpoint directory into the run's artifacts.

    Args:
        loggers: the Trainer's; those that are not MLflow's are left alone.
        directory: an adapter-only checkpoint.
        name: folder below the run's artifacts.

    Raises:
        FileNotFoundError: if there is no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no checkpoint directory")
    for logger in _mlflow_loggers(loggers):
        logger.experiment.log_artifacts(logger.run_id, str(directory), artifact_path=name)


def log_samples(loggers: Iterable[Logger], samples: Sequence[Sample], name: str) -> None:
    """Writes answers with their insertion points as a page `samples/<name>.html` of the run."""
    for logger in _mlflow_loggers(loggers):
        logger.experiment.log_text(logger.run_id, samples_html(samples), f"samples/{name}.html")


def samples_html(samples: Sequence[Sample]) -> str:
    """A page of answers; a mark stands where memory was woven in."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Sample generations</title><style>'
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:.7em;border-radius:4px}"
        "mark{background:#ffd75e;border-radius:3px;padding:0 .25em;font-size:.8em}"
        "h2{font-size:1em}</style>"
        "<p>A <mark>mark</mark> stands where memory was woven in.</p>"
    ]
    for index, sample in enumerate(samples):
        answer = "".join(
            f"<mark>{html.escape(segment.text)}</mark>" if segment.is_insertion else html.escape(segment.text)
            for segment in sample.segments
        )
        title = html.escape(sample.title or f"Sample {index + 1}")
        parts.append(
            f"<section><h2>{title}</h2><pre>{html.escape(sample.prompt)}</pre><pre>{answer}</pre></section>"
        )
    return "\n".join([*parts, "</html>\n"])


def _mlflow_loggers(loggers: Iterable[Logger]) -> list[MLFlowLogger]:
    return [logger for logger in loggers if isinstance(logger, MLFlowLogger)]


def _write_configuration(logger: MLFlowLogger, description: RunDescription) -> None:
    client, run = logger.experiment, logger.run_id
    for index, (name, text) in enumerate(description.raw.items()):
        client.log_text(run, text, f"config/raw/{index:02d}_{Path(name).name}")
    client.log_text(run, shlex.join(description.arguments) + "\n", "config/arguments.txt")
    client.log_text(run, description.resolved_yaml, "config/resolved.yaml")
    client.log_text(run, installed_packages(), "config/packages.txt")


def _write_parameters(logger: MLFlowLogger, resolved: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    client, run = logger.experiment, logger.run_id
    # A run that goes on keeps its parameters: MLflow refuses another value for one that is set.
    present = client.get_run(run).data.params
    new = [Param(key, value) for key, value in flatten_parameters(resolved).items() if key not in present]
    for start in range(0, len(new), BATCH):
        client.log_batch(run, params=new[start : start + BATCH])


def _stage_name(class_path: Any) -> str | None:
    """weaver_sft for memgen.training.weaver_sft.WeaverSFT: the module is named after the stage."""
    if not isinstance(class_path, str):
        return None
    parts = class_path.split(".")
    return parts[-2] if len(parts) > 1 else parts[-1]


def _class_name(value: Any) -> str | None:
    """The class that a setting chooses, or the setting itself if it is a name."""
    if isinstance(value, Mapping):
        value = value.get("class_path")
    return None if value is None else str(value).rpartition(".")[2]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
