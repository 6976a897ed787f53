"""Trains a few steps of every stage and writes down exactly what came out, so that two commits can be compared.

    python benchmarks/equality.py --out before.json      # with PYTHONPATH=OLD/src
    python benchmarks/equality.py --out after.json       # with PYTHONPATH=NEW/src
    python benchmarks/equality.py --compare before.json after.json

It uses only `memgen fit` and its configuration, so one copy of it can run any commit: the memgen that Python imports.
Each case is written as soon as it is done, and a case that `--out` already has is not run again. Everything runs on the
CPU in float32; the base model (`--base`) is built once below MEMGEN_HOME.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

STEPS = 20
"""Optimizer steps of each case."""
RUNTIME_METRICS = ("perf/", "epoch")
"""Beginnings of the metrics that differ from run to run."""
MODES = ("single", "ddp", "zero2")
"""One process; two of DDP; two of DeepSpeed's ZeRO-2."""

_ROLLOUT = {"max_new_tokens": 12, "temperature": 1.0, "group_size": 4}
_TRIGGER: dict[str, Any] = {
    "class_path": "memgen.training.trigger_rl.TriggerRL",
    "allow_untrained_weaver": True,
    "objective": {"penalty": 0.2, "scope": "group"},
    "policy": {"loss": "grpo", "kl": 0.02},
    "rollout": {**_ROLLOUT, "sample_decisions": True},
}
STAGES: dict[str, dict[str, Any]] = {
    "weaver_sft": {
        "class_path": "memgen.training.weaver_sft.WeaverSFT",
        "curriculum": {"first": 0.25, "all": 0.25, "random": 0.25, "none": 0.25},
    },
    "weaver_grpo": {
        "class_path": "memgen.training.weaver_grpo.WeaverGRPO",
        "policy": {"loss": "grpo", "kl": 0.02},
        "update": {"minibatches": 2},
        "rollout": _ROLLOUT,
    },
    "trigger_tokens": _TRIGGER,
    "trigger_hidden_states": _TRIGGER,
}
"""Settings of each stage, by the name of its cases."""


def main() -> int:
    """Runs the cases, or compares two results.

    Returns:
        The exit status: 1 if two results differ.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [f"{stage}/{mode}" for mode in MODES for stage in STAGES]
    parser.add_argument("--out", type=Path, help="JSON file of the results; cases that it has are skipped")
    parser.add_argument("--cases", nargs="+", choices=known, default=known, metavar="STAGE/MODE")
    parser.add_argument("--base", default="lab:reasoner", help="base model: a directory or lab:reasoner")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two results")
    arguments = parser.parse_args()
    if arguments.compare:
        found = differences(*(json.loads(path.read_text()) for path in arguments.compare))
        print("\n".join(found) if found else "equal")
        return 1 if found else 0
    if arguments.out is None:
        parser.error("give --out FILE or --compare A B")
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for case in arguments.cases:
        if case not in results:
            results[case] = run(case, arguments.base)
            arguments.out.write_text(json.dumps(results))
        losses = results[case]["metrics"].get("train/loss", [])
        print(f"{case}: {len(losses)} steps, last loss {losses[-1][1] if losses else 'none'}", flush=True)
    return 0


def configuration(stage: str, base: str, root: Path, devices: int) -> dict[str, Any]:
    """The configuration of a case, without its strategy."""
    learns_from = {} if stage == "weaver_sft" else {"learn_from": "rollouts"}
    kind = stage.removeprefix("trigger_") if stage.startswith("trigger_") else "always"
    return {
        "seed_everything": 1,
        "model": {
            "init_from": None,
            "memgen": {
                "backbone": {"name": base, "dtype": "float32"},
                "weaver": {"prompt_latents": 2, "inference_latents": 2, "lora": {"r": 4, "alpha": 8}},
                "trigger": {"kind": kind, "lora": {"r": 4, "alpha": 8}},
                "boundaries": {"delimiters": [",", ".", "\n"], "max_inference_insertions": 2},
            },
            "optimizer": {"lr": 3.0e-3, "warmup_ratio": 0.1, "final_lr_ratio": 0.1},
            "generation": {"max_new_tokens": 12},
            **STAGES[stage],
        },
        "data": {
            "class_path": "memgen.data.EnvironmentData",
            "tokenizer": base,
            "environment": {
                "class_path": "memgen.lab.environment.Lab",
                "init_args": {
                    "tasks": ["open", "add", "rev"],
                    "train_size": 256,
                    "val_size": 8,
                    "test_size": 8,
                },
            },
            "batch_size": 4 // devices,
            "val_batch_size": 4,
            **learns_from,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "precision": "32-true",
            "max_steps": STEPS,
            "max_epochs": -1,
            "gradient_clip_val": 1.0,
            "check_val_every_n_epoch": None,
            "val_check_interval": STEPS // 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(root), "name": "csv", "version": "run"},
            },
            "callbacks": [
                {
                    "class_path": "memgen.training.callbacks.AdapterCheckpoint",
                    "init_args": {
                        "root": str(root / "runs"),
                        "monitor": None,
                        "with_trigger": stage.startswith("trigger_"),
                    },
                }
            ],
        },
    }


def run(case: str, base: str) -> dict[str, Any]:
    """Trains one case in a temporary folder.

    Returns:
        `metrics`: for each name its [step, value] pairs, the value as CSV text that reads back to the same float.
        `files`: sha256 of each safetensors file of the last checkpoint, by its path in the checkpoint.
    """
    stage, mode = case.split("/")
    devices = 1 if mode == "single" else 2
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "case.yaml").write_text(yaml.safe_dump(configuration(stage, base, root, devices)))
        configs = [*_strategy(mode), root / "case.yaml"]
        command = [sys.executable, "-m", "memgen.cli.main", "fit"]
        for path in configs:
            command += ["--config", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        log = root / "log"
        with log.open("w") as file:
            done = subprocess.run(command, cwd=root, env=environment, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise SystemExit(f"{case}: exit status {done.returncode}\n{log.read_text()[-4000:]}")
        checkpoint = root / "runs" / "latest" / "last"
        return {
            "metrics": _metrics(root / "csv" / "run" / "metrics.csv"),
            "files": {
                str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(checkpoint.glob("**/*.safetensors"))
            },
        }


def _strategy(mode: str) -> list[Path]:
    """The commit's own overlay: the strategy's class may be elsewhere in another commit."""
    if mode == "single":
        return []
    found = importlib.util.find_spec("memgen")
    assert found is not None, "memgen must be importable"
    assert found.origin is not None, "memgen has an __init__.py"
    return [Path(found.origin).parents[2] / "conf" / "trainer" / f"{mode}.yaml"]


def _metrics(path: Path) -> dict[str, list[list[Any]]]:
    series: dict[str, list[list[Any]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step" and not name.startswith(RUNTIME_METRICS):
                    series.setdefault(name, []).append([int(row["step"]), value])
    return series


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The first difference of each case that both results have, and the cases that only one has."""
    found = [f"{case}: only in one of the two" for case in sorted(one.keys() ^ other.keys())]
    for case in (case for case in one if case in other):
        a, b = one[case], other[case]
        steps = _first_difference(a["metrics"], b["metrics"])
        if steps is not None:
            found.append(f"{case}: {steps}")
        elif a["files"] != b["files"]:
            found.append(f"{case}: equal metrics, but the checkpoints differ: {a['files']} and {b['files']}")
    return found


def _first_difference(
    one: Mapping[str, Sequence[Sequence[Any]]], other: Mapping[str, Sequence[Sequence[Any]]]
) -> str | None:
    if one.keys() != other.keys():
        return f"metrics of only one: {', '.join(sorted(one.keys() ^ other.keys()))}"
    unequal = [
        (pair[0][0], name, pair[0][1], pair[1][1])
        for name in one
        for pair in zip(one[name], other[name], strict=False)
        if pair[0] != pair[1]
    ]
    if unequal:
        step, name, a, b = min(unequal)
        return f"step {step}: {name} is {a} and {b}"
    lengths = [name for name in one if len(one[name]) != len(other[name])]
    return f"{lengths[0]} has {len(one[lengths[0]])} and {len(other[lengths[0]])} values" if lengths else None


if __name__ == "__main__":
    sys.exit(main())
