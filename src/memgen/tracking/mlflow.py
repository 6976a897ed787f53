"""The MLflow record of a run: its logger, and what is written besides the metrics that Lightning logs.

Nothing here waits for MLflow, except for a moment at the beginning (for the run's id) and, bounded, at the end: records go
through an outbox (`delivery`), which keeps what does not arrive. mlflow is imported inside the functions, because its
import takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

import memgen
from memgen.environments.base import Environment, Example
from memgen.tracking.address import SQLITE, STORE_VARIABLE
from memgen.tracking.delivery import Outbox, new_outbox_path, read_outbox
from memgen.tracking.family import (
    FAMILY_TAG,
    MODE_TAG,
    MONITOR_TAG,
    PARENT_TAG,
    Family,
    best_key,
    parent_run_id,
)
from memgen.tracking.store import RunAddress, RunStore
from memgen.tracking.system import SystemMonitor
from memgen.tracking.traces import Trace

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "memgen"
DEFAULT_ROOT = "runs"
RUN_FILE = "mlflow_run.json"
"""In a run's folder: its id in MLflow, the store, and where undelivered records wait."""
RUN_KEY = "mlflow_run_id"
"""The same in Lightning's checkpoints."""
PARAMETER_LENGTH = 500
"""Longest value of a parameter that MLflow's stores accept; a longer one is cut, and config/resolved.yaml has it in full."""
START_SECONDS = 60.0
"""How long a run waits for its id; much less if the store does not answer. A new sqlite store takes ten seconds."""


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


def run_logger(
    experiment: str = EXPERIMENT,
    root: str = DEFAULT_ROOT,
    tracking_uri: str | None = None,
    run_name: str | None = None,
    run_id: str | None = None,
    register_models: bool = True,
    traces: int = 8,
    system_seconds: float = 10.0,
    flush_seconds: float = 60.0,
) -> RunLogger:
    """A logger that writes to a store below `root`, or to the one that MLFLOW_TRACKING_URI names.

    Args:
        experiment: name of the experiment.
        root: folder of the default store: `mlflow.db` (sqlite) and `artifacts/`; undelivered records wait in `outbox/`.
        tracking_uri: another store; it goes before MLFLOW_TRACKING_URI.
        run_name: name of the run; by default stage, environment, backbone and seed.
        run_id: an existing run to go on with.
        register_models: whether checkpoints become versions of registered models.
        traces: episodes of several turns that each evaluation writes as traces; 0: none.
        system_seconds: between two measurements of the machine; 0: none.
        flush_seconds: how long the end of a run waits for records that are still under way.
    """
    uri = tracking_uri or os.environ.get(STORE_VARIABLE)
    folder = Path(root)
    artifacts: str | None = None
    if not uri:
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"{SQLITE}{folder / 'mlflow.db'}"
        artifacts = (folder / "artifacts").resolve().as_uri()
    parent = parent_run_id()
    address = RunAddress(
        uri=uri,
        experiment=experiment,
        artifacts=artifacts,
        run_id=run_id,
        name=run_name,
        tags={PARENT_TAG: parent} if parent is not None and run_id is None else {},
    )
    return RunLogger(
        address,
        folder / "outbox",
        RunLoggerSettings(register_models, traces, system_seconds, flush_seconds),
    )


def resumed_logger(settings: RunLogger, checkpoint: Path) -> RunLogger:
    """The logger of a run that goes on: same settings, the run that a Lightning checkpoint belongs to.

    Args:
        settings: a logger that has written nothing.
        checkpoint: what the run is resumed from. Without a record of its run, a new one is made.
    """
    recorded = recorded_run(checkpoint)
    if recorded is None or settings.address.run_id is not None:
        return settings
    address = settings.address
    if recorded.get("tracking_uri") not in (None, address.uri):
        logger.warning(
            "%s was recorded in %s, and goes on as a new run in %s",
            checkpoint,
            recorded["tracking_uri"],
            address.uri,
        )
        return settings
    again = RunLogger(replace(address, run_id=recorded["run_id"]), settings.folder, settings.settings)
    if recorded.get("outbox"):
        again.adopt(Path(recorded["outbox"]))
    return again


def recorded_run(checkpoint: Path) -> dict[str, Any] | None:
    """What is known about the MLflow run of a Lightning checkpoint: `run_id`, and perhaps `tracking_uri` and `outbox`.

    It stands in the run's folder; else beside the checkpoint, or in it.
    """
    for folder in list(checkpoint.absolute().parents)[:3]:
        if (folder / RUN_FILE).is_file():
            found: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
            return found
    beside = checkpoint.resolve().with_suffix(".json")
    if beside.is_file():
        state = json.loads(beside.read_text(encoding="utf-8"))
    elif checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    else:
        return None
    return {"run_id": state[RUN_KEY]} if state.get(RUN_KEY) else None


@dataclass(frozen=True)
class RunLoggerSettings:
    """See `run_logger`."""

    register_models: bool = True
    traces: int = 8
    system_seconds: float = 10.0
    flush_seconds: float = 60.0


@final
class RunLogger(Logger):
    """Lightning's logger for MLflow. Only the first rank writes.

    Differs from Lightning's own: (1) nothing waits for the store; (2) a run that goes on does not log steps twice;
    (3) names without a section get one.

    Args:
        address: which run, and where.
        folder: where undelivered records wait.
        settings: see `run_logger`.
    """

    def __init__(
        self,
        address: RunAddress,
        folder: Path,
        settings: RunLoggerSettings = RunLoggerSettings(),
    ) -> None:
        super().__init__()
        self.address = address
        self.folder = folder
        self.settings = settings
        self.model_name: str | None = None
        """Registered model whose versions the checkpoints become."""
        self._store: RunStore | None = None
        self._outbox: Outbox | None = None
        self._left: Path | None = None
        self._adopted: list[Path] = []
        self._last: dict[str, tuple[int, float]] = {}
        self._ended: str | None = None
        self.ends_as: str | None = None
        """The status that the run will end with in place of FINISHED or FAILED."""
        self._monitor: SystemMonitor | None = None
        self._run_folder: Path | None = None

    # The run

    def describe(self, name: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Name and tags of the run. Before anything is logged they are there from its beginning."""
        tags = dict(tags or {})
        if self._outbox is None:
            address = self.address
            self.address = replace(address, name=address.name or name, tags={**address.tags, **tags})
        elif name is not None and self.address.name is None and self.address.run_id is None:
            tags["mlflow.runName"] = name
        if (self._outbox is not None or self.address.run_id is not None) and tags:
            self.log_tags(tags)

    def adopt(self, path: Path) -> None:
        """Takes over what an earlier process of the run could not deliver, once anything is logged.

        Not at once: which process is the first rank is known only when the Trainer has set up.
        """
        self._left = path

    @property
    def outbox(self) -> Outbox:
        """What is on its way."""
        if self._outbox is None:
            self._store = RunStore(self.address)
            self._outbox = Outbox(self._store, f"MLflow at {self.address.uri}", new_outbox_path(self.folder))
            if self._left is not None:
                self._take_over(self._outbox, self._left)
        return self._outbox

    def _take_over(self, outbox: Outbox, path: Path) -> None:
        if not path.is_file():
            return
        try:
            _, records = read_outbox(path)
        except (BlockingIOError, ValueError) as error:
            logger.warning("%s is left as it is: %s", path, error)
            return
        outbox.adopt(records)
        self._adopted.append(path)
        logger.warning("%d records that an earlier process could not deliver are sent now", len(records))

    @property
    def store(self) -> RunStore:
        """Where it goes."""
        assert self.outbox is not None, "made together"
        assert self._store is not None, "made together"
        return self._store

    @property
    def run_id(self) -> str | None:
        """The run's id. Waits for the store, if it answers; None if it does not, or on another rank than the first."""
        if getattr(rank_zero_only, "rank", None) not in (None, 0):
            return None
        self.outbox.opened(START_SECONDS)
        return self.store.run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """A client of MLflow's, to ask the store; on another rank than the first, an object that does nothing.

        Lightning asks every rank for it. Two that make a new sqlite store at once would trip over each other.
        """
        self.outbox.opened(START_SECONDS)
        return self.store.client

    @property
    @override
    def name(self) -> str | None:
        return self.address.experiment

    @property
    @override
    def version(self) -> str | None:
        return self.run_id

    @rank_zero_only
    def log_run_folder(self, folder: Path) -> None:
        """Leaves `mlflow_run.json` in the run's folder, for a process that goes on with it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._run_folder = folder
        self._write_run_file()
        self.log_tags({"run.folder": str(folder.absolute())})

    def _write_run_file(self) -> None:
        if self._run_folder is None:
            return
        record = {
            "run_id": self.store.run_id,
            "tracking_uri": self.address.uri,
            "outbox": str(self.outbox.path.absolute()),
        }
        path = self._run_folder / RUN_FILE
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    # What is logged

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        at = step or 0
        values = {metric_name(key): float(value) for key, value in metrics.items()}
        # Lightning hands over the epoch with every group of metrics of a step.
        fresh = {key: value for key, value in values.items() if self._last.get(key) != (at, value)}
        self._last |= {key: (at, value) for key, value in fresh.items()}
        if fresh:
            self._put("metrics", values=fresh, step=at, time=_milliseconds())

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        self._put("parameters", values=flatten_parameters(values))

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._put("tags", values=dict(tags))

    @rank_zero_only
    def log_text(self, text: str, path: str) -> None:
        """Writes a text artifact."""
        self._put("text", text=text, path=path)

    @rank_zero_only
    def log_directory(self, directory: Path, path: str) -> None:
        """Copies a directory into the artifacts, as it is when it is delivered."""
        self._put("directory", directory=str(directory.absolute()), path=path)

    @rank_zero_only
    def log_table(self, columns: Mapping[str, Sequence[Any]], path: str) -> None:
        """Writes a table, a list for each column."""
        self._put("table", columns={name: list(values) for name, values in columns.items()}, path=path)

    @rank_zero_only
    def log_trace(self, trace: Trace) -> None:
        """Writes an episode as a trace of the run."""
        self._put("trace", trace=trace.to_record())

    @rank_zero_only
    def log_dataset(self, dataset: DatasetRecord) -> None:
        """Says what the run learned from or was tested on."""
        self._put("dataset", **vars(dataset))

    @rank_zero_only
    def register_model(self, path: str, tags: Mapping[str, str]) -> None:
        """Makes a checkpoint among the artifacts a version of a registered model."""
        if self.settings.register_models and self.model_name is not None:
            description = "Checkpoints of memgen; `memgen test --checkpoint models:/NAME/VERSION` loads one."
            self._put("model", name=self.model_name, path=path, tags=dict(tags), description=description)

    def _put(self, kind: str, **fields: Any) -> None:
        self.outbox.put(kind, **fields)
        self._ended = None

    # Beginning and end

    @rank_zero_only
    def watch_system(self) -> None:
        """Begins to measure the machine."""
        if self.settings.system_seconds > 0 and self._monitor is None:
            self._monitor = SystemMonitor(self._log_system, self.settings.system_seconds)
            self._monitor.start()

    def _log_system(self, values: Mapping[str, float]) -> None:
        self.outbox.put("metrics", values=dict(values), step=0, time=_milliseconds())

    @rank_zero_only
    def end_as(self, status: str) -> None:
        """The status that the run will end with in place of FINISHED or FAILED: SCHEDULED if it will go on, KILLED."""
        self.ends_as = status

    @override
    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Ends the run, and waits for what is under way, but not longer than `flush_seconds`."""
        if self._outbox is None:
            return
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None
        if self._ended is not None:  # Lightning may end a run that failed once more.
            return
        ended = self.ends_as or {"failed": "FAILED"}.get(status, "FINISHED")
        self.ends_as = None
        parent = self.address.tags.get(PARENT_TAG)
        if parent is not None:
            self._put("parent", parent=parent)
        self._put("status", status=ended)
        self._ended = ended
        left = self.outbox.flush(self.settings.flush_seconds)
        self._write_run_file()
        if not left:
            for path in self._adopted:
                path.unlink(missing_ok=True)
            self._adopted = []
            if self.address.uri.startswith("http"):
                address = f"{self.address.uri.rstrip('/')}/#/experiments/{self.store.experiment_id}/runs/{self.store.run_id}"
                logger.warning("MLflow: %s", address)


def metric_name(key: str) -> str:
    """A name that MLflow takes, with a section for its charts."""
    key = re.sub(r"[^\w/. -]", "_", key)
    return key if "/" in key else f"train/{key}"


def run_loggers(loggers: Iterable[Logger]) -> list[RunLogger]:
    """Those of a Trainer's loggers that are ours."""
    return [found for found in loggers if isinstance(found, RunLogger)]


def run_id_of(loggers: Iterable[Logger]) -> str | None:
    """The MLflow run of a Trainer; None if there is none, or the store does not answer, or on another rank than the first."""
    return next((found.run_id for found in run_loggers(loggers)), None)


def log_run_folder(loggers: Iterable[Logger], folder: Path) -> None:
    """Leaves in a run's folder which MLflow run it is (`mlflow_run.json`), so that a resumed run goes on with it."""
    for found in run_loggers(loggers):
        found.log_run_folder(folder)


def pause_runs(loggers: Iterable[Logger]) -> None:
    """Says that the runs go on in another process, which a cluster will start."""
    for found in run_loggers(loggers):
        found.end_as("SCHEDULED")


def open_parent(
    name: str, family: Family, loggers: RunLogger | None = None, tags: Mapping[str, str] | None = None
) -> RunLogger:
    """A run that others become children of, by naming it in the environment (`MEMGEN_PARENT_RUN`).

    Args:
        name: of the run.
        family: what its children are.
        loggers: where; default: `run_logger()`.
        tags: more tags.
    """
    parent = loggers or run_logger(system_seconds=0)
    parent.describe(name, {FAMILY_TAG: family, "stage": family, **(tags or {}), **git_revision()})
    return parent


@runtime_checkable
class RecordedData(Protocol):
    """A data module whose splits are recorded."""

    environment: Environment
    path: str | None
    items: Mapping[str, Sequence[Any]]


@final
class RunRecord(Callback):
    """Writes configuration, parameters, tags and data sets into the run before anything else happens.

    Lightning's own SaveConfigCallback needs a log folder, which a run in MLflow does not have.
    """

    def __init__(self, description: RunDescription) -> None:
        self.description = description
        self._written = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        for found in run_loggers(trainer.loggers):
            found.describe(run_name(self.description), run_tags(self.description))
            found.log_tags({"strategy": type(trainer.strategy).__name__, "ranks": str(trainer.world_size)})
            found.model_name = model_name(self.description)
            _write_configuration(found, self.description)
            found.log_hyperparams(dict(self.description.resolved))
            found.watch_system()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_data(trainer, ("train", "val"))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._log_data(trainer, ("val",))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_data(trainer, ("test",))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The step that loggers get. After some checkpoints Lightning counts one too many.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if trainer.loggers and trainer.optimizers:
            pl_module.log("train/learning_rate", trainer.optimizers[0].param_groups[0]["lr"])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A stop that was asked for brings the exit status of the process.
        if isinstance(exception, KeyboardInterrupt) or hasattr(exception, "status"):
            for found in run_loggers(trainer.loggers):
                found.end_as(found.ends_as or "KILLED")

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for found in run_loggers(trainer.loggers):
            if trainer.is_global_zero and found.store.run_id is not None:
                checkpoint[RUN_KEY] = found.store.run_id

    def _log_data(self, trainer: Trainer, splits: Sequence[str]) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not isinstance(data, RecordedData):
            return
        for split in splits:
            if split in data.items:
                examples = [item.example for item in data.items[split]]
                for found in run_loggers(trainer.loggers):
                    found.log_dataset(dataset_record(data.environment, data.path, split, examples))


@dataclass(frozen=True)
class DatasetRecord:
    """What MLflow keeps about a split.

    Attributes:
        name: of the environment and the split.
        digest: of all items, so that equal data is recognised.
        source_type: what `source` is.
        source: where the data is from.
        schema: fields of an item, as JSON.
        profile: how many items there are, as JSON.
        context: what it was used for.
    """

    name: str
    digest: str
    source_type: str
    source: str
    schema: str
    profile: str
    context: str


def dataset_record(
    environment: Environment, path: str | None, split: str, examples: Sequence[Example]
) -> DatasetRecord:
    """The items of a split as they were used."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.question, example.target, example.answer]).encode())
    kind = type(environment)
    columns = [
        {"type": "string", "name": name, "required": True} for name in ("id", "question", "target", "answer")
    ]
    source = (
        {"uri": str(Path(path).absolute())} if path else {"code": f"{kind.__module__}.{kind.__qualname__}"}
    )
    return DatasetRecord(
        name=f"{getattr(environment, 'name', kind.__name__)}-{split}",
        digest=digest.hexdigest()[:12],
        source_type="local" if path else "code",
        source=json.dumps(source),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": len(examples)}),
        context={"train": "training", "val": "validation"}.get(split, split),
    )


def run_name(description: RunDescription) -> str:
    """What a person calls the run: command (unless it trains), stage, environment, backbone, seed."""
    tags = run_tags(description)
    parts = [description.command] if description.command != "fit" else []
    parts += [tags[key] for key in ("stage", "environment", "backbone") if key in tags]
    if "seed" in tags:
        parts.append(f"seed {tags['seed']}")
    return " ".join(parts)


def model_name(description: RunDescription) -> str | None:
    """The registered model whose versions a run's checkpoints become; None if it does not train."""
    tags = run_tags(description)
    if description.command != "fit" or "stage" not in tags:
        return None
    name = "-".join(tags[key] for key in ("stage", "environment", "backbone") if key in tags)
    # MLflow takes neither slashes nor colons.
    return re.sub(r"[^\w.-]+", "-", name)


def slurm_tags() -> dict[str, str]:
    """The job that the run belongs to, if SLURM has started it."""
    names = {
        "slurm.job_id": "SLURM_JOB_ID",
        "slurm.job_name": "SLURM_JOB_NAME",
        "slurm.array_job_id": "SLURM_ARRAY_JOB_ID",
        "slurm.array_task_id": "SLURM_ARRAY_TASK_ID",
        "slurm.nodes": "SLURM_JOB_NODELIST",
        "slurm.restarts": "SLURM_RESTART_COUNT",
    }
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


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
        "init_from": model.get("init_from"),
        **slurm_tags(),
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


def log_checkpoint(
    loggers: Iterable[Logger],
    directory: Path,
    name: str = "checkpoint",
    scores: Mapping[str, float] | None = None,
) -> None:
    """Copies a checkpoint directory into the run's artifacts, and registers it as a version of the run's model.

    Args:
        loggers: the Trainer's; those that are not MLflow's are left alone.
        directory: an adapter-only checkpoint.
        name: folder below the run's artifacts.
        scores: metrics by which a person chooses a version.

    Raises:
        FileNotFoundError: if there is no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no checkpoint directory")
    for found in run_loggers(loggers):
        found.log_directory(directory, name)
        found.register_model(name, {key: f"{value:.6g}" for key, value in (scores or {}).items()})


def log_best(loggers: Iterable[Logger], monitor: str, mode: str, value: float, step: int) -> None:
    """Says what the best checkpoint was chosen by, and its value: as metric `best/...`, which parents of the run show."""
    for found in run_loggers(loggers):
        found.log_tags({MONITOR_TAG: monitor, MODE_TAG: mode})
        found.log_metrics({best_key(monitor): value}, step)


def _write_configuration(found: RunLogger, description: RunDescription) -> None:
    for index, (name, text) in enumerate(description.raw.items()):
        found.log_text(text, f"config/raw/{index:02d}_{Path(name).name}")
    found.log_text(shlex.join(description.arguments) + "\n", "config/arguments.txt")
    found.log_text(description.resolved_yaml, "config/resolved.yaml")
    found.log_text(installed_packages(), "config/packages.txt")


def _milliseconds() -> int:
    return int(time.time() * 1000)


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
