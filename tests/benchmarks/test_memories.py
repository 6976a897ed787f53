"""The benchmark of text memories, on few items."""

from __future__ import annotations

import json
import sys

from benchmarks import memories


def test_reads_and_writes_are_timed_and_written_to_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memories", "--items", "30", "--out", str(tmp_path / "times.json")])
    monkeypatch.setattr(memories, "READS", 5)
    monkeypatch.setattr(memories, "WRITES", 3)
    assert memories.main() == 0
    (result,) = json.loads((tmp_path / "times.json").read_text())
    assert (result["items"], result["embedder"]) == (30, "bm25")
    assert 0 < result["read_ms"]["cpu_p50"] <= result["read_ms"]["cpu_p95"]
    assert result["bytes"] > 0
    assert json.loads(capsys.readouterr().out) == [result]
    monkeypatch.setattr(memories, "TARGET_MS", 0.0)
    assert memories.main() == 1
