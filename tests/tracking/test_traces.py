"""Episodes as traces, table rows and text with marks; system metrics."""

from __future__ import annotations

import os

import pytest

from memgen.environments.base import Example
from memgen.model.weaver import WeaverConfig
from memgen.tracking.episodes import episode_row, episode_trace, marked_trajectory
from memgen.tracking.system import Measurements, SystemMonitor, parse_gpus
from memgen.tracking.traces import Trace, write_trace
from memgen.types import AgentTurn, Decision, InsertionKind, Trajectory
from tiny import byte_tokenizer

WEAVER = WeaverConfig(prompt_latents=3, inference_latents=2)
EXAMPLE = Example("val-1", "where is the key?", "", "")
ASK, INVOKE, SKIP = Decision.NOT_ASKED, Decision.INVOKE, Decision.SKIP
# mlflow warns about its own code as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")


def turn(
    read: str, said: str, places: list[tuple[int, InsertionKind]], decisions: list[int], seen: str = ""
) -> AgentTurn:
    tokenizer = byte_tokenizer()
    context, tokens = tokenizer.encode(read), tokenizer.encode(said)
    probs = [0.75 if decision != ASK else 0.0 for decision in decisions]
    insertions = [(len(context) + place, int(kind)) for place, kind in places]
    return AgentTurn(context, tokens, [0.0] * len(tokens), decisions, probs, insertions, True, said, seen)


def episode() -> Trajectory:
    first = turn(
        "look", "go, in", [(0, InsertionKind.PROMPT), (3, InsertionKind.INFERENCE)], [1, -1, -1, 1, -1, -1]
    )
    second = turn("lookgo, inseen", "take", [], [0, -1, -1, -1], seen="seen")
    prompt = ({"role": "user", "content": "look"},)
    return Trajectory("val-1", (first, second), 0.5, {"steps": 2.0}, prompt=prompt)


def trace() -> Trace:
    return episode_trace(
        byte_tokenizer(), WEAVER, EXAMPLE, episode(), 1_000_000, 11_000_000, {"split": "val"}
    )


def test_a_trace_has_a_span_for_each_turn_and_each_observation():
    found = trace()
    assert [(span.name, span.kind) for span in found.spans] == [
        ("turn 1", "CHAT_MODEL"),
        ("environment", "TOOL"),
        ("turn 2", "CHAT_MODEL"),
    ]
    first, environment, second = found.spans
    assert first.inputs == {"messages": [{"role": "user", "content": "look"}]}
    assert first.outputs == {
        "choices": [{"message": {"role": "assistant", "content": "⟦3 latents⟧go,⟦2 latents⟧ in"}}]
    }
    assert (environment.inputs, environment.outputs) == ("go, in", "seen")
    assert second.inputs == {"messages": [{"role": "user", "content": "seen"}]}
    assert second.attributes["offered"] == 1
    assert found.root.outputs == {"reward": 0.5, "steps": 2.0, "truncated": False}
    assert found.tags == {"example": "val-1", "split": "val"}
    assert [event.attributes for event in first.events] == [
        {"before_token": 0, "latents": 3, "kind": "prompt", "invoke_probability": 0.75},
        {"before_token": 3, "latents": 2, "kind": "inference", "invoke_probability": 0.75},
    ]


def test_a_batch_s_time_is_shared_out_among_the_turns_by_their_tokens():
    first, environment, second = trace().spans
    assert (first.begin, first.end) == (1_000_000, 7_000_000)
    assert environment.begin == environment.end == second.begin == 7_000_000
    assert second.end == 11_000_000


def test_an_episode_that_the_environment_failed_has_no_reward():
    failed = Trajectory("val-1", (), 0.0, {}, fault="it broke")
    found = episode_trace(byte_tokenizer(), WEAVER, EXAMPLE, failed, 0, 10, {})
    assert found.reward is None
    assert found.root.outputs == {"fault": "it broke", "truncated": False}


def test_a_trace_that_is_sent_twice_is_written_once(logger):
    record = trace()
    assert Trace.from_record(record.to_record()) == record
    for _ in range(2):
        logger.log_trace(record)
    assert logger.outbox.flush(60) == 0
    client = logger.experiment
    (found,) = client.search_traces(locations=[logger.store.experiment_id])
    assert found.info.trace_metadata["mlflow.sourceRun"] == logger.run_id
    assert found.info.tags["split"] == "val"
    assert [span.name for span in found.data.spans] == ["episode", "turn 1", "environment", "turn 2"]
    assert [len(span.events) for span in found.data.spans] == [0, 2, 0, 0]
    assert [(a.name, a.value) for a in found.info.assessments] == [("reward", 0.5)]


def test_the_store_of_a_trace_is_not_left_in_the_environment_for_later_runs(logger):
    logger.log_trace(trace())
    assert logger.outbox.flush(60) == 0
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_trace_that_does_not_arrive_is_noticed(logger, monkeypatch):
    from mlflow.tracing.client import TracingClient

    def broken(*arguments, **settings):
        raise OSError("no")

    assert logger.run_id is not None
    monkeypatch.setattr(TracingClient, "log_spans", broken)
    monkeypatch.setattr(TracingClient, "start_trace", broken)
    store = logger.store
    with pytest.raises(ConnectionError, match="the trace of val-1 did not arrive"):
        write_trace(store.client, store.address.uri, store.experiment_id, store.run_id, trace())


def test_text_is_marked_where_latents_were_inserted():
    sample = marked_trajectory(byte_tokenizer(), WEAVER, EXAMPLE, episode())
    assert [(segment.text, segment.is_insertion) for segment in sample.segments] == [
        ("3 latents", True),
        ("go,", False),
        ("2 latents", True),
        (" in", False),
        ("seen", False),
        ("take", False),
    ]
    assert (sample.prompt, sample.title) == ("where is the key?", "val-1: reward 0.5 (steps 2)")


def test_a_row_of_the_table_has_numbers_and_marked_text():
    sample = marked_trajectory(byte_tokenizer(), WEAVER, EXAMPLE, episode())
    row = episode_row(sample, EXAMPLE, episode())
    assert (row["reward"], row["turns"], row["tokens"], row["insertions"]) == (0.5, 2, 10, 2)
    assert (row["offered"], row["invoked"], row["fault"]) == (3, 2, "")
    assert row["answer"] == "⟦3 latents⟧go,⟦2 latents⟧ inseentake"


def test_the_machine_is_measured_at_least_once():
    seen = []
    monitor = SystemMonitor(seen.append, seconds=60)
    monitor.start()
    monitor.stop()
    assert len(seen) == 1
    assert seen[0].keys() >= Measurements()().keys() - {"system/network_receive_megabytes_per_second"}
    assert (
        0 < seen[0]["system/process_memory_megabytes"] < seen[0]["system/system_memory_usage_megabytes"] * 10
    )


def test_values_that_a_gpu_does_not_report_are_left_out():
    assert parse_gpus("0, 93, 1024, 250.31\n1, 0, 3, [N/A]\n") == {
        "system/gpu_0_utilization_percentage": 93.0,
        "system/gpu_0_memory_usage_megabytes": 1024.0,
        "system/gpu_0_power_usage_watts": 250.31,
        "system/gpu_1_utilization_percentage": 0.0,
        "system/gpu_1_memory_usage_megabytes": 3.0,
    }
