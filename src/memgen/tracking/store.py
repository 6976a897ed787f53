"""Writes queued records to MLflow. Called from the delivery thread; mlflow is imported when it is needed.

Each kind of record has a method `_send_<kind>`. Records may come twice (an attempt that failed half-way, a killed process),
so every method is idempotent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from memgen.tracking.address import absolute_uri, sqlite_file
from memgen.tracking.delivery import Record, RefusedError
from memgen.tracking.family import summarise_children
from memgen.tracking.traces import Trace, write_trace

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SECONDS = 5.0
"""How long another writer may keep a sqlite store locked."""
PARAMETERS = 100
"""Most parameters that MLflow accepts in one call."""
METRICS = 1000
"""Most metric values that MLflow accepts in one call."""
TABLES_TAG = "mlflow.loggedArtifacts"
SYSTEM = "system/"
"""Section of metrics whose step is the number of seconds since the run began."""
FINAL_ERRORS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "FEATURE_DISABLED",
    "NOT_IMPLEMENTED",
}
"""MLflow's error codes for which another attempt is useless."""
QUICK = {
    # The outbox tries again; MLflow would block a call for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # A lost trace must be noticed.
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The run logger prints it once.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class RunAddress:
    """Address of a run.

    Attributes:
        uri: MLflow's tracking URI; a relative sqlite path becomes absolute.
        experiment: name of the experiment.
        artifacts: URI for the artifacts of a new experiment; None: the store decides.
        run_id: id of an existing run; None: a new run.
        name: name of a new run; None: MLflow makes one up.
        tags: tags of the run.
    """

    uri: str
    experiment: str
    artifacts: str | None = None
    run_id: str | None = None
    name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", absolute_uri(self.uri))


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


@final
class RunStore:
    """A run in MLflow, as recipient of an outbox (see `delivery.Recipient`)."""

    def __init__(self, address: RunAddress) -> None:
        for name, value in QUICK.items():
            os.environ.setdefault(name, value)
        self.address = address
        self.run_id = address.run_id or None
        self.experiment_id: str | None = None
        self.started: int | None = None
        """Start of the run, in milliseconds since 1970."""
        self.logged: Mapping[str, int] = {}
        """Last logged step of each metric of a resumed run, when it was opened."""
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """An MLflow client, which threads may share."""
        if self._client is None:
            from mlflow import MlflowClient

            # MLflow prints the traceback of an error of the database that it raises as well; the outbox names it in a line.
            logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)
            self._client = MlflowClient(self.address.uri)
        return self._client

    def open(self) -> None:
        """Creates the run, or finds the one to continue."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        self._require_answer()
        client, address = self.client, self.address
        if self.run_id is not None:
            try:
                run = client.get_run(self.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.run_id = None
            else:
                if address.run_id is not None:
                    self.logged = {metric.key: metric.step for metric in run.to_proto().data.metrics}
                client.update_run(self.run_id, status="RUNNING")
        if self.run_id is None:
            # Adds user and program, as MLflow's own API does.
            tags = resolve_tags(dict(address.tags))
            run = client.create_run(self._experiment(), tags=tags, run_name=address.name)
            if not run.info.run_id:
                raise ConnectionError("it answers without the id of a run: is it a server of MLflow?")
            self.run_id = run.info.run_id
        self.experiment_id = run.info.experiment_id
        self.started = run.info.start_time

    def _require_answer(self) -> None:
        """Fails at once, and in one line, where MLflow would try for a minute or write to a file that is gone.

        Raises:
            ConnectionError: if the sqlite file was there and is gone, cannot be read, stays locked, or has tables that this
                MLflow does not know.
        """
        path = sqlite_file(self.address.uri)
        if path is None:
            return
        if not path.exists():
            if self.run_id is not None:
                raise ConnectionError(f"{path} is gone")
            return
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as database:
                database.execute("BEGIN IMMEDIATE")
                version = _schema(database)
                database.rollback()
        except sqlite3.Error as error:
            raise ConnectionError(f"{path}: {error}") from error
        if version is not None and not any(_migrations().glob(f"{version}_*.py")):
            raise ConnectionError(f"{path} has tables of version {version}, which this MLflow does not know")

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        client, address = self.client, self.address
        found = client.get_experiment_by_name(address.experiment)
        if found is None:
            try:
                created: str = client.create_experiment(
                    address.experiment, artifact_location=address.artifacts
                )
            except MlflowException as error:
                # Another process has created it meanwhile.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(address.experiment)
            else:
                return created
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        identifier: str = found.experiment_id
        return identifier

    def send(self, records: Sequence[Record]) -> None:
        """Delivers records of one kind."""
        from mlflow.exceptions import MlflowException

        kind = records[0]["kind"]
        method = getattr(self, f"_send_{kind}", None)
        if method is None:
            raise RefusedError(f"records of kind {kind} are not supported")
        self._require_answer()
        try:
            method(records)
        except MlflowException as error:
            if error.error_code in FINAL_ERRORS:
                raise RefusedError(error.message.splitlines()[0]) from error
            raise
        except FileNotFoundError as error:
            raise RefusedError(f"{error.filename} no longer exists") from error

    def answers(self) -> bool:
        """Whether the store answers a simple request."""
        try:
            self._require_answer()
            self.client.get_run(self.run_id)
        except Exception:  # noqa: BLE001 - any failure means no
            return False
        return True

    def header(self) -> Record:
        """The address, with the run's id once it is known."""
        return {**asdict(self.address), "run_id": self.run_id}

    # Kinds of records

    def _send_metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        rows = [
            Metric(key=key, value=value, timestamp=record["time"], step=self._step(key, record))
            for record in records
            for key, value in record["values"].items()
            # A resumed run repeats steps that are logged already.
            if key.startswith(SYSTEM) or record["step"] > self.logged.get(key, -1)
        ]
        for begin in range(0, len(rows), METRICS):
            self.client.log_batch(self.run_id, metrics=rows[begin : begin + METRICS])

    def _step(self, key: str, record: Record) -> int:
        if key.startswith(SYSTEM) and self.started is not None:
            return max(0, (int(record["time"]) - self.started) // 1000)
        step: int = record["step"]
        return step

    def _send_parameters(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Param

        # A resumed run keeps its parameters: MLflow refuses to change one.
        present = self.client.get_run(self.run_id).data.params
        values = {key: value for record in records for key, value in record["values"].items()}
        new = [Param(key, value) for key, value in values.items() if key not in present]
        for begin in range(0, len(new), PARAMETERS):
            self.client.log_batch(self.run_id, params=new[begin : begin + PARAMETERS])

    def _send_tags(self, records: Sequence[Record]) -> None:
        from mlflow.entities import RunTag

        values = {key: value for record in records for key, value in record["values"].items()}
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def _send_text(self, records: Sequence[Record]) -> None:
        for record in records:
            self.client.log_text(self.run_id, record["text"], record["path"])

    def _send_directory(self, records: Sequence[Record]) -> None:
        for record in records:
            if not Path(record["directory"]).is_dir():
                raise FileNotFoundError(2, "gone", record["directory"])
            self.client.log_artifacts(self.run_id, record["directory"], artifact_path=record["path"])

    def _send_table(self, records: Sequence[Record]) -> None:
        # MLflow's own log_table needs pandas, and appends, so a repeated delivery would double the rows.
        for record in records:
            columns = record["columns"]
            table = {
                "columns": list(columns),
                "data": [list(row) for row in zip(*columns.values(), strict=True)],
            }
            self.client.log_text(self.run_id, json.dumps(table, ensure_ascii=False), record["path"])
        # This tag tells MLflow's pages which artifacts are tables.
        known = json.loads(self.client.get_run(self.run_id).data.tags.get(TABLES_TAG, "[]"))
        new = [{"path": record["path"], "type": "table"} for record in records]
        self.client.set_tag(
            self.run_id, TABLES_TAG, json.dumps(known + [item for item in new if item not in known])
        )

    def _send_dataset(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for record in records:
            dataset = Dataset(
                name=record["name"],
                digest=record["digest"],
                source_type=record["source_type"],
                source=record["source"],
                schema=record["schema"],
                profile=record["profile"],
            )
            tags = [InputTag("mlflow.data.context", record["context"])]
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def _send_model(self, records: Sequence[Record]) -> None:
        from mlflow.exceptions import MlflowException

        for record in records:
            name = record["name"]
            with contextlib.suppress(MlflowException):  # It exists already; otherwise the next call fails.
                self.client.create_registered_model(name, description=record["description"])
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/{record['path']}"
            known = self.client.search_model_versions(f"name='{name}' and run_id='{self.run_id}'")
            if any(version.source == source for version in known):
                continue
            self.client.create_model_version(
                name, source, run_id=self.run_id, tags=record["tags"], await_creation_for=0
            )

    def _send_trace(self, records: Sequence[Record]) -> None:
        assert self.experiment_id is not None, "known since the run was opened"
        assert self.run_id is not None, "likewise"
        # Fails at once if the store is down; the trace exporter would hide that.
        self.client.get_run(self.run_id)
        for record in records:
            write_trace(
                self.client,
                self.address.uri,
                self.experiment_id,
                self.run_id,
                Trace.from_record(record["trace"]),
            )

    def _send_parent(self, records: Sequence[Record]) -> None:
        for parent in {record["parent"] for record in records}:
            summarise_children(self.client, parent)

    def _send_status(self, records: Sequence[Record]) -> None:
        status = records[-1]["status"]
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status)


def _schema(database: sqlite3.Connection) -> str | None:
    """Version of MLflow's tables in a database; None if it has none."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        return None
    row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def _migrations() -> Path:
    """The folder of MLflow's migrations, a file for each version of its tables."""
    import mlflow

    return Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"


def client_of(uri: str) -> MlflowClient:
    """An MLflow client for a store, with the settings of this module."""
    return RunStore(RunAddress(uri, "")).client


def deliver(header: Mapping[str, Any], records: Sequence[Record]) -> tuple[str, list[str]]:
    """Sends the records of an outbox that a process has left behind, now.

    Args:
        header: header of the outbox.
        records: its records.

    Returns:
        The run's id, and the reasons for which records were refused, if any were.
    """
    known = {item.name for item in fields(RunAddress)}
    store = RunStore(RunAddress(**{name: value for name, value in header.items() if name in known}))
    store.open()
    refused = []
    for _, group in itertools.groupby(records, key=lambda record: record["kind"]):
        try:
            store.send(list(group))
        except RefusedError as error:
            refused.append(str(error))
    assert store.run_id is not None, "open"
    return store.run_id, refused
