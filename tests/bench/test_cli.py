"""`memgen bench` as a user types it."""

from __future__ import annotations

import json
import os

import pytest

from memgen.bench import generation, kernels, timing
from memgen.bench.kernels import InterleaveSize, LogprobSize
from memgen.cli import main as front_end

TINY = ["--model", "tiny", "--repeats", "1"]


def bench(*arguments):
    return front_end.main(["bench", *map(str, arguments)])


@pytest.mark.usefixtures("_counting")
def test_generation_writes_machine_and_cases(tmp_path, capsys):
    path = tmp_path / "bench.json"
    status = bench(
        "generation", *TINY, "--batch", 1, 3, "--prompt", 6, "--new", 16, "--latents", 2, "--json", path
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "always" in printed
    assert str(path) in printed.replace("\n", "")
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "command", "complete", "cases"}
    assert content["complete"] is True
    assert content["machine"]["threads"] == 1
    assert [(case["batch"], case["memory"]) for case in content["cases"]] == [
        (batch, memory) for batch in (1, 3) for memory in ("never", "always", "trigger")
    ]
    for case in content["cases"]:
        assert case["model"] == "tiny"
        assert (case["wall_ratio"], case["cpu_ratio"]) == (1.0, 1.0)
        assert case["prefills"] == 1
        assert case["plain"]["positions"] == case["batch"] * (6 + 15)
        assert case["plain"]["forwards"] == case["reasoner_forwards"] == 16
        assert {"wall_seconds_min", "cpu_seconds_median", "peak_memory_bytes"} <= case["ours"].keys()
    never, always, trigger = content["cases"][:3]
    assert never["same_text_as_plain"] == 1.0
    assert never["reasoner_positions"] == 6 + 15
    assert never["weaver_positions"] == 0
    assert always["weaver_positions"] >= 6 + 2
    assert trigger["trigger_positions"] > 0


@pytest.mark.usefixtures("_counting")
def test_training_writes_a_case_per_stage(tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = [*TINY, "--length", 150, "--prompt", 20, "--batch", 2, "--points", 3, "--no-memory"]
    assert bench("training", *arguments, "--json", path) == 0
    assert "grpo" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [case["stage"] for case in content["cases"]] == ["sft", "grpo"]
    for case in content["cases"]:
        assert case["wall_ratio"] == 1.0
        assert case["memory_ratio"] is None
        assert case["insertions"] == 2 * 3


@pytest.fixture
def _counting(monkeypatch, meter):
    """No clocks, so that nothing waits for garbage collection before each run."""
    monkeypatch.setattr(timing, "ProcessMeter", lambda device: meter)


@pytest.mark.usefixtures("_counting")
def test_kernels_say_that_triton_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setitem(kernels.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(kernels.LOGPROB_SIZES, "cpu", LogprobSize(16, 8, 32))
    monkeypatch.setitem(
        kernels.INTERLEAVE_SIZES, "cpu", InterleaveSize(rows=2, length=20, hidden=8, vocabulary=32)
    )
    assert bench("kernels", "--repeats", 1) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "linear_logprob" in printed
    assert "the Triton kernels need a CUDA device" in printed


@pytest.mark.usefixtures("_counting")
def test_an_interrupted_run_keeps_its_finished_cases(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    calls = []
    plain = generation.Decoding.huggingface

    def interrupted(self, work, **options):
        calls.append(work.batch)
        if work.batch == 2:
            raise KeyboardInterrupt
        return plain(self, work, **options)

    monkeypatch.setattr(generation.Decoding, "huggingface", interrupted)
    arguments = [*TINY, "--batch", 1, 2, "--prompt", 4, "--new", 6, "--memory", "never"]
    assert bench("generation", *arguments, "--json", path) == front_end.INTERRUPTED
    assert f"kept in {path}: 1" in capsys.readouterr().err
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert [case["batch"] for case in content["cases"]] == [1]
    assert os.listdir(tmp_path) == ["bench.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generation", "--model", "huge"], "unknown model 'huge'; choose among: small, medium"),
        (["generation", "--model", "qwen2.5-1.5b"], "too large to be measured on a CPU"),
        (["generation", "--repeats", "0"], "at least 1, got 1 and 0"),
        (["generation", "--model", "tiny", "--batch", "0"], "batch must be at least 1, got 0"),
        (["generation", "--device", "abacus"], "--device abacus is no device"),
        (["training", "--model", "tiny", "--group-size", "3"], "group must divide batch, got 3 and 8"),
        (["kernels", "--json", "/no/such/folder/x.json"], "/no/such/folder is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        bench("--help")
    assert stop.value.code == 0
    assert "memgen bench generation --model small medium" in capsys.readouterr().out


@pytest.mark.usefixtures("_counting")
def test_threads_are_put_back(tmp_path):
    import torch

    before = torch.get_num_threads()
    arguments = [*TINY, "--batch", 1, "--prompt", 4, "--new", 4, "--memory", "never", "--threads", before + 1]
    assert bench("generation", *arguments) == 0
    assert torch.get_num_threads() == before
