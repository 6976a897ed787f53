"""Lightning's logger for MLflow.

Training does not wait for MLflow, except for the run's id at the start and, for a limited time, at the end: records go
through an outbox (`delivery.py`), which keeps what has not arrived. mlflow is imported inside functions, because its import
takes seconds.
"""

from __future__ import annotations

import logging
import os
import re
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from memgen.lightning_internals import no_experiment
from memgen.tracking.address import DEFAULT_ROOT, SQLITE, STORE_VARIABLE
from memgen.tracking.datasets import DatasetRecord
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
from memgen.tracking.run_description import flatten_parameters, git_revision
from memgen.tracking.run_file import recorded_run, write_run_file
from memgen.tracking.store import RunAddress, RunStore
from memgen.tracking.system import SystemMonitor
from memgen.tracking.traces import Trace

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

EXPERIMENT = "memgen"
START_SECONDS = 60.0
"""Longest time that a run waits for its id. A new sqlite store takes ten seconds; a store that does not answer ends it."""


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
    """Makes a logger for the store below `root`, or for the one that MLFLOW_TRACKING_URI names.

    Args:
        experiment: name of the experiment.
        root: folder of the default store: `mlflow.db` (sqlite) and `artifacts/`; undelivered records wait in `outbox/`.
        tracking_uri: another store; takes precedence over MLFLOW_TRACKING_URI.
        run_name: name of the run; by default stage, environment, backbone and seed.
        run_id: an existing run to continue.
        register_models: whether checkpoints become versions of registered models.
        traces: number of multi-turn episodes that each evaluation writes as traces; 0: none.
        system_seconds: seconds between two measurements of system metrics; 0: none.
        flush_seconds: seconds that the end of a run waits for undelivered records.
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
    """The logger of a resumed run: same settings, and the MLflow run that a Lightning checkpoint belongs to.

    Args:
        settings: a logger that has logged nothing yet.
        checkpoint: the checkpoint to resume from. If its run is not known, a new one is made.
    """
    recorded = recorded_run(checkpoint)
    if recorded is None or settings.address.run_id is not None:
        return settings
    address = settings.address
    if recorded.get("tracking_uri") not in (None, address.uri):
        logger.warning(
            "%s was recorded in %s; it continues as a new run in %s",
            checkpoint,
            recorded["tracking_uri"],
            address.uri,
        )
        return settings
    again = RunLogger(replace(address, run_id=recorded["run_id"]), settings.folder, settings.settings)
    if recorded.get("outbox"):
        again.adopt(Path(recorded["outbox"]))
    return again


@dataclass(frozen=True)
class RunLoggerSettings:
    """See `run_logger`."""

    register_models: bool = True
    traces: int = 8
    system_seconds: float = 10.0
    flush_seconds: float = 60.0


@final
class RunLogger(Logger):
    """Logs to an MLflow run. Only the first rank writes.

    Differs from Lightning's MLFlowLogger: (1) training does not wait for the store; (2) a resumed run does not log steps
    twice; (3) metric names without a section get one.

    Args:
        address: the run and its store.
        folder: folder for undelivered records.
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
        """Registered model that gets the checkpoints as versions."""
        self._store: RunStore | None = None
        self._outbox: Outbox | None = None
        self._left: Path | None = None
        self._adopted: list[Path] = []
        self._last: dict[str, tuple[int, float]] = {}
        self._ended: str | None = None
        self.ends_as: str | None = None
        """Status with which the run ends, instead of FINISHED or FAILED."""
        self._monitor: SystemMonitor | None = None
        self._run_folder: Path | None = None

    # The run

    def describe(self, name: str | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Sets name and tags of the run; before anything is logged, the run is created with them."""
        tags = dict(tags or {})
        if self._outbox is None:
            address = self.address
            self.address = replace(address, name=address.name or name, tags={**address.tags, **tags})
        elif name is not None and self.address.name is None and self.address.run_id is None:
            tags["mlflow.runName"] = name
        if (self._outbox is not None or self.address.run_id is not None) and tags:
            self.log_tags(tags)

    def adopt(self, path: Path) -> None:
        """Takes over what an earlier process of the run could not deliver, as soon as anything is logged.

        Not at once, because the rank is known only after the Trainer has set up.
        """
        self._left = path

    @property
    def outbox(self) -> Outbox:
        """The queue of undelivered records."""
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
        logger.warning("sending %d records that an earlier process could not deliver", len(records))

    @property
    def store(self) -> RunStore:
        """The run in MLflow."""
        assert self.outbox is not None, "made together"
        assert self._store is not None, "made together"
        return self._store

    @property
    def run_id(self) -> str | None:
        """The run's id, after waiting for the store; None if the store does not answer, or on other ranks than the first."""
        if getattr(rank_zero_only, "rank", None) not in (None, 0):
            return None
        self.outbox.opened(START_SECONDS)
        return self.store.run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """An MLflow client for the store; an object that does nothing on other ranks than the first, and without a store.

        Lightning asks every rank for it, and two ranks must not create a new sqlite store at the same time.
        """
        if not self.outbox.opened(START_SECONDS):
            return no_experiment()
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
        """Writes `mlflow_run.json` into the run's folder, for a process that resumes the run."""
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
        write_run_file(self._run_folder, record)

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
        """Copies a directory into the artifacts, with its contents at the time of delivery."""
        self._put("directory", directory=str(directory.absolute()), path=path)

    @rank_zero_only
    def log_table(self, columns: Mapping[str, Sequence[Any]], path: str) -> None:
        """Writes a table, given as a list of values for each column."""
        self._put("table", columns={name: list(values) for name, values in columns.items()}, path=path)

    @rank_zero_only
    def log_trace(self, trace: Trace) -> None:
        """Writes an episode as a trace of the run."""
        self._put("trace", trace=trace.to_record())

    @rank_zero_only
    def log_dataset(self, dataset: DatasetRecord) -> None:
        """Records data that the run trains on or is tested on."""
        self._put("dataset", **vars(dataset))

    @rank_zero_only
    def register_model(self, path: str, tags: Mapping[str, str]) -> None:
        """Registers a checkpoint among the artifacts as a version of a model."""
        if self.settings.register_models and self.model_name is not None:
            description = "Checkpoints of memgen; `memgen test --checkpoint models:/NAME/VERSION` loads one."
            self._put("model", name=self.model_name, path=path, tags=dict(tags), description=description)

    def _put(self, kind: str, **fields: Any) -> None:
        self.outbox.put(kind, **fields)
        self._ended = None

    # Beginning and end

    @rank_zero_only
    def watch_system(self) -> None:
        """Starts to log system metrics."""
        if self.settings.system_seconds > 0 and self._monitor is None:
            self._monitor = SystemMonitor(self._log_system, self.settings.system_seconds)
            self._monitor.start()

    def _log_system(self, values: Mapping[str, float]) -> None:
        self.outbox.put("metrics", values=dict(values), step=0, time=_milliseconds())

    @rank_zero_only
    def end_as(self, status: str) -> None:
        """Sets the status with which the run ends, instead of FINISHED or FAILED: SCHEDULED (to be continued) or KILLED."""
        self.ends_as = status

    @override
    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Ends the run, and waits for undelivered records, but not longer than `flush_seconds`."""
        if self._outbox is None:
            return
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None
        if self._ended is not None:  # Lightning may call this twice for a failed run.
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
    """A metric name that MLflow accepts, with a section (`train/` by default) for its charts."""
    key = re.sub(r"[^\w/. -]", "_", key)
    return key if "/" in key else f"train/{key}"


def run_loggers(loggers: Iterable[Logger]) -> list[RunLogger]:
    """The RunLoggers among a Trainer's loggers."""
    return [found for found in loggers if isinstance(found, RunLogger)]


def run_id_of(loggers: Iterable[Logger]) -> str | None:
    """Id of a Trainer's MLflow run; None if there is none, the store does not answer, or on other ranks than the first."""
    return next((found.run_id for found in run_loggers(loggers)), None)


def pause_runs(loggers: Iterable[Logger]) -> None:
    """Marks runs as to be continued by another process, which a cluster will start."""
    for found in run_loggers(loggers):
        found.end_as("SCHEDULED")


def open_parent(
    name: str, family: Family, loggers: RunLogger | None = None, tags: Mapping[str, str] | None = None
) -> RunLogger:
    """Opens a run that others join as children, by naming it in the environment variable `MEMGEN_PARENT_RUN`.

    Args:
        name: name of the run.
        family: what its children are.
        loggers: logger to use; default: `run_logger()`.
        tags: further tags.
    """
    parent = loggers or run_logger(system_seconds=0)
    parent.describe(name, {FAMILY_TAG: family, "stage": family, **(tags or {}), **git_revision()})
    return parent


def log_checkpoint(
    loggers: Iterable[Logger],
    directory: Path,
    name: str = "checkpoint",
    scores: Mapping[str, float] | None = None,
) -> None:
    """Copies a checkpoint directory into the run's artifacts, and registers it as a version of the run's model.

    Args:
        loggers: the Trainer's loggers; those for other stores are ignored.
        directory: an adapter-only checkpoint.
        name: folder below the run's artifacts.
        scores: metrics to choose a version by.

    Raises:
        FileNotFoundError: if there is no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no checkpoint directory")
    for found in run_loggers(loggers):
        found.log_directory(directory, name)
        found.register_model(name, {key: f"{value:.6g}" for key, value in (scores or {}).items()})


def log_best(loggers: Iterable[Logger], monitor: str, mode: str, value: float, step: int) -> None:
    """Logs the metric that chose the best checkpoint and its value, as metric `best/...`, which parent runs show."""
    for found in run_loggers(loggers):
        found.log_tags({MONITOR_TAG: monitor, MODE_TAG: mode})
        found.log_metrics({best_key(monitor): value}, step)


def _milliseconds() -> int:
    return int(time.time() * 1000)
