"""The whole pipeline on the embedded default, one seed, from nothing: what `make demo` runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_trains_every_stage_to_beat_its_controls_on_held_out_items(tmp_path):
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    environment = {
        **os.environ,
        "MEMGEN_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "memgen.cli.main", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memgen ui" in done.stdout
    report = json.loads((tmp_path / "runs" / "demo.json").read_text())
    assert report["split"] == "test"
    assert report["items"] >= 500
    conditions = report["conditions"]
    exact = {name.strip(): condition["exact"] for name, condition in conditions.items()}
    assert exact["weaver SFT, all boundaries"] >= 0.95
    # Latents are about the item: those of another one do not help, and the price list cannot be guessed.
    assert exact["latents of another item"] < 0.3
    assert exact["reasoner alone"] < 0.1
    assert exact["untrained latents"] < 0.1
    assert report["constant_completion"]["exact"] < 0.05
    # Reinforcement learns what supervision had left.
    assert exact["and then weaver GRPO"] >= exact["half-trained weaver"] + 0.3
    # A weaver that is always on harms other tasks; the trigger keeps what it is good for and leaves them alone.
    trigger, alone, always = (
        conditions[name]
        for name in ("weaver SFT and trigger RL", "reasoner alone", "weaver SFT, all boundaries")
    )
    assert trigger["exact"] >= 0.97 * always["exact"]
    assert trigger["insertions_per_answer"] <= 1.2
    assert trigger["others"]["exact"] >= alone["others"]["exact"] - 0.02
    assert always["others"]["exact"] < alone["others"]["exact"] - 0.3
