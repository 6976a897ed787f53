"""Rollout, old and update log-probabilities, single process and ZeRO-3: what benchmarks/one_policy.py measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny import byte_tokenizer, tiny_causal_lm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "one_policy.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_single_process_and_layers_gathered_one_by_one_say_the_same_numbers(tmp_path):
    model = tiny_causal_lm()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.2, 1.8)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    out = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, SCRIPT, folder, "--tokens", "8", "--out", out],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=800,
    )
    strategies = json.loads(out.read_text())["strategies"]
    assert strategies["zero3"] == strategies["single"]
    for name, measured in strategies["zero3"].items():
        update = measured["update against old"]
        assert measured["insertions"] > 0, name
        assert (update["ratio_min"], update["ratio_max"], update["k3"]) == (1.0, 1.0, 0.0), name
        assert measured["update against rollout"]["k3"] < 0.01, name
