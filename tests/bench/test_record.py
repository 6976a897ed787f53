"""The file of figures."""

from __future__ import annotations

import json

import pytest

from memgen.bench.record import Recorder


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_file_is_whole_after_every_case(tmp_path):
    path = tmp_path / "bench.json"
    recorder = Recorder(path, "memgen bench x")
    assert not path.exists()
    recorder.add({"model": "small"})
    first = read(path)
    assert (first["complete"], [case["model"] for case in first["cases"]]) == (False, ["small"])
    recorder.add({"model": "medium"})
    recorder.finish(scaling={"a": 1})
    last = read(path)
    assert (last["complete"], len(last["cases"]), last["scaling"]) == (True, 2, {"a": 1})
    assert {"processor", "torch", "threads", "date", "memory_bytes"} <= last["machine"].keys()
    assert "load_average" in last["cases"][0]


def test_a_failed_write_leaves_the_last_whole_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "bench.json"
    recorder = Recorder(path, "memgen bench x")
    recorder.add({"model": "small"})
    with pytest.raises(TypeError):
        recorder.add({"model": object()})
    assert [case["model"] for case in read(path)["cases"]] == ["small"]
    assert [found.name for found in tmp_path.iterdir()] == ["bench.json"]


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Recorder(tmp_path / "nowhere" / "bench.json", "memgen bench x")
