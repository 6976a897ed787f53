"""Traces of episodes as JSON records, and their delivery to MLflow."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from memgen.tracking.address import STORE_VARIABLE

if TYPE_CHECKING:
    from mlflow import MlflowClient

IDENTITY_TAG = "memgen.trace"
"""Tag that identifies a trace, so that it is not written twice."""


@dataclass(frozen=True)
class TraceEvent:
    """An event within a span; time in nanoseconds."""

    name: str
    time: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class TraceSpan:
    """A part of an episode; times in nanoseconds."""

    name: str
    kind: str
    begin: int
    end: int
    inputs: Any
    outputs: Any
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[TraceEvent, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Trace of an episode.

    Attributes:
        root: span of the whole episode.
        spans: spans of turns and observations, in order.
        tags: tags to search traces by.
        reward: shown as an assessment; None after an environment error.
        identity: unique identifier.
    """

    root: TraceSpan
    spans: tuple[TraceSpan, ...]
    tags: Mapping[str, str]
    reward: float | None
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    def to_record(self) -> dict[str, Any]:
        """The trace as JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Trace:
        """The trace that `to_record` has written."""
        return cls(
            root=_span(record["root"]),
            spans=tuple(_span(span) for span in record["spans"]),
            tags=record["tags"],
            reward=record["reward"],
            identity=record["identity"],
        )


def _span(record: Mapping[str, Any]) -> TraceSpan:
    return TraceSpan(**{**record, "events": tuple(TraceEvent(**event) for event in record["events"])})


def _send_to(uri: str) -> None:
    """Sets the store of traces, which is global to the process in MLflow.

    `mlflow.set_tracking_uri` also sets an environment variable, which later runs of this process and its subprocesses would
    pick up; it is restored.
    """
    import mlflow

    before = os.environ.get(STORE_VARIABLE)
    mlflow.set_tracking_uri(uri)
    if before is None:
        os.environ.pop(STORE_VARIABLE, None)
    else:
        os.environ[STORE_VARIABLE] = before


def write_trace(client: MlflowClient, uri: str, experiment_id: str, run_id: str, trace: Trace) -> None:
    """Writes a trace into a run, unless it is there already.

    Args:
        client: client of the store.
        uri: URI of the same store.
        experiment_id: id of the run's experiment.
        run_id: id of the run.
        trace: the trace.

    Raises:
        ConnectionError: if it did not arrive.
    """
    import mlflow
    from mlflow.entities import AssessmentSource, SpanEvent

    if mlflow.get_tracking_uri() != uri:
        _send_to(uri)
    known = client.search_traces(
        locations=[experiment_id],
        filter_string=f"tags.`{IDENTITY_TAG}` = '{trace.identity}'",
        include_spans=False,
        max_results=1,
    )
    if known:
        return
    root = mlflow.start_span_no_context(
        trace.root.name,
        span_type=trace.root.kind,
        inputs=trace.root.inputs,
        attributes=dict(trace.root.attributes),
        tags={**trace.tags, IDENTITY_TAG: trace.identity},
        metadata={"mlflow.sourceRun": run_id},
        experiment_id=experiment_id,
        start_time_ns=trace.root.begin,
    )
    for item in trace.spans:
        span = mlflow.start_span_no_context(
            item.name,
            span_type=item.kind,
            parent_span=root,
            inputs=item.inputs,
            attributes=dict(item.attributes),
            start_time_ns=item.begin,
        )
        for event in item.events:
            span.add_event(SpanEvent(event.name, event.time, dict(event.attributes)))
        span.end(outputs=item.outputs, end_time_ns=item.end)
    root.end(outputs=trace.root.outputs, end_time_ns=trace.root.end)
    if not _arrived(client, root.trace_id, len(trace.spans) + 1):
        raise ConnectionError(f"the trace of {trace.tags.get('example')} did not arrive")
    if trace.reward is not None:
        mlflow.log_feedback(
            trace_id=root.trace_id,
            name="reward",
            value=trace.reward,
            source=AssessmentSource(source_type="CODE", source_id="memgen"),
        )


def _arrived(client: MlflowClient, trace_id: str, spans: int) -> bool:
    """Whether the store has the complete trace. MLflow's exporter only logs its failures."""
    from mlflow.exceptions import MlflowException

    try:
        written = client.get_trace(trace_id, display=False)
    except MlflowException:
        return False
    return written is not None and len(written.data.spans) == spans
