"""The script for a GPU: rehearsed on the CPU, with nothing but what the model itself imports, and cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu

REHEARSAL = ["--device", "cpu", "--tiny"]
ABSENT = (
    "beartype", "datasets", "deepspeed", "jsonargparse", "lightning", "math_verify", "mlflow", "omegaconf",
    "pydantic", "pytorch_lightning", "rich", "scipy", "torchmetrics",
)  # fmt: skip
REHEARSED = """
import sys
for name in {absent}:
    sys.modules[name] = None  # Its import fails.
from benchmarks.gpu import main
print([main(["--part", part, "--out", "{out}", *{given}]) for part in ("decoding", "training", "kernels")])
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "-c", REHEARSED.format(absent=ABSENT, out=out, given=REHEARSAL)],
        capture_output=True,
        text=True,
        check=False,
        cwd=gpu.ROOT,
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout.splitlines()


def read(folder: Path, part: str) -> dict:
    return json.loads((folder / f"{part}.json").read_text())


def test_it_imports_only_what_the_model_does_and_no_case_fails(rehearsed):
    out, printed = rehearsed
    assert printed[-1] == "[0, 0, 0]"
    for part in ("decoding", "training", "kernels"):
        content = read(out, part)
        assert content["complete"]
        assert [case for case in content["cases"] if "error" in case] == []


def test_every_case_of_the_list_is_there(rehearsed):
    out, _ = rehearsed
    ours = {
        (c["batch"], c["memory"], c["static_step"])
        for c in read(out, "decoding")["cases"]
        if c.get("side") == "ours"
    }
    batches = (1, 2)
    assert ours == {(b, m, s) for b in batches for m in ("never", "always") for s in ("on", "off")}
    theirs = {
        (c["batch"], c["cache"]) for c in read(out, "decoding")["cases"] if c.get("side") == "huggingface"
    }
    assert theirs == {(b, c) for b in batches for c in ("growing", "static")}
    training = read(out, "training")["cases"]
    assert [c["case"] for c in training] == [
        "sft ours", "sft plain", "grpo ours", "grpo plain", "grpo step ours",
    ]  # fmt: skip
    assert all("peak_above_weights_bytes" in case for case in training)
    kernels = [c["case"] for c in read(out, "kernels")["cases"]]
    assert kernels[0] == "copy"
    assert len(kernels) == 5


def test_every_case_is_a_line_of_output_too(rehearsed):
    out, printed = rehearsed
    cases = [case for part in ("decoding", "training", "kernels") for case in read(out, part)["cases"]]
    lines = [json.loads(line) for line in printed[:-1]]
    assert lines == [{k: v for k, v in case.items() if k != "load_average"} for case in cases]


def test_the_whole_leaves_a_summary_and_few_files(tmp_path, capfd):
    assert gpu.main(["--out", str(tmp_path), *REHEARSAL, "--parts", "kernels"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"] == {"kernels": "finished"}
    assert summary["cases"] == {"kernels": 5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "summary.json"]
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == summary


def test_without_time_no_part_is_begun_and_old_results_are_gone(tmp_path):
    (tmp_path / "kernels.json").write_text("of another run")
    assert gpu.main(["--out", str(tmp_path), *REHEARSAL, "--parts", "kernels", "--seconds", "0"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"] == {"kernels": "not begun: no time left"}
    assert summary["cases"] == {"kernels": 0}


def test_a_part_whose_time_is_up_ends_with_everything_that_it_started(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.limited([sys.executable, "-c", parent], 0.5) == "cut after 0 s"
    assert gpu.limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == "exit status 3"
    assert gpu.limited([sys.executable, "-c", ""], 60) == "finished"
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_a_case_that_raises_is_recorded_and_the_others_go_on(tmp_path):
    recorder = gpu.Recorder(tmp_path / "decoding.json", "", "cpu")
    session = gpu.Session(gpu.Sizes.of("cpu", tiny=True), recorder, tmp_path / "log")
    session.attempt("first", lambda: {"x": 1 / 0})
    session.attempt("second", lambda: {"x": 2})
    first, second = read(tmp_path, "decoding")["cases"]
    assert first["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in first["traceback"]
    assert second["x"] == 2
    summary = gpu.summarise(tmp_path, {"decoding": "finished"})
    assert summary["failures"] == ["decoding: first: ZeroDivisionError: division by zero"]


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("3 passed, 12 deselected in 4.2s", {"passed": 3}),
        ("1 failed, 2 passed, 1 skipped, 9 warnings in 1s", {"failed": 1, "passed": 2, "skipped": 1}),
        ("2 errors in 0.1s", {"error": 2}),
        ("No module named pytest", {}),
    ],
)
def test_what_pytest_counts_is_read(line, counts):
    assert gpu.counted(f"FAILED tests/a.py::test_x\n{line}\n") == counts


def test_goals_are_those_of_the_issue():
    def case(batch, memory, rate, x_floor):
        return {
            "batch": batch, "memory": memory, "static_step": "on", "tokens_per_second": rate, "x_floor": x_floor,
        }  # fmt: skip

    slow = {"batch": 32, "memory": "always", "static_step": "off", "tokens_per_second": 1, "x_floor": 9}
    cases = [case(32, "never", 100, 1.5), case(32, "always", 90, 2.2), case(1, "never", 10, 1), slow]
    found = {goal["goal"]: (goal["value"], goal["met"]) for goal in gpu.decoding_goals(cases)}
    assert found == {
        "memory on / memory off, batch 32": (0.9, True),
        "time over the floor, memory never, batch 32": (1.5, True),
        "time over the floor, memory always, batch 32": (2.2, False),
    }


def test_full_sizes_on_a_cpu_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "add --tiny" in capsys.readouterr().err


def test_all_parts_together_end_within_eight_minutes():
    assert sum(gpu.LIMITS.values()) <= 480
    assert gpu.SECONDS <= 450
    assert list(gpu.LIMITS) == list(gpu.PARTS)
