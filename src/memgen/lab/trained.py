"""Trained assets of the lab: each is the checkpoint that `memgen fit` writes for a stage, trained once and kept.

A stage file of `conf/` has the settings; this file says which stage, from which checkpoint, and when it stops.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import memgen
from memgen.lab.cache import build_once, memgen_home

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedAsset:
    """A checkpoint of the lab.

    Attributes:
        stage: the stage file in `conf/` that trains it, without ending.
        start: the asset that it starts from, or None.
        stop_at: share of exact answers on the val split at which training stops; None trains to the end.
        minutes: how long it takes on one CPU core, for the message.
    """

    stage: str
    start: str | None = None
    stop_at: float | None = None
    minutes: int = 1


TRAINED = {
    "weaver_sft_half": TrainedAsset("weaver_sft", stop_at=0.3),
    "weaver_sft": TrainedAsset("weaver_sft"),
    "weaver_grpo": TrainedAsset("weaver_grpo", start="weaver_sft_half", minutes=3),
    "trigger_rl": TrainedAsset("trigger_rl", start="weaver_sft", minutes=2),
}
"""By name. `weaver_sft_half` is stopped early, so that reinforcement has something to do: by its score, because the step
at which a weaver has learnt half of the prices varies between seeds."""


def build_trained(name: str, seed: int, base_seed: int, version: int, start: str | None) -> Path:
    """The checkpoint directory of a trained asset, trained first if it is missing.

    Args:
        name: one of `TRAINED`.
        seed: of the stage's initial weights, data order and sampling.
        base_seed: of the reasoner.
        version: of the recipes.
        start: checkpoint directory of the asset that it starts from, if it starts from one.

    Raises:
        FileNotFoundError: if the stage files are not where the package is, nor below the working directory.
        RuntimeError: if the stage's command fails.
    """
    asset = TRAINED[name]
    config = stage_file(asset.stage)
    settings = {
        "version": version,
        "asset": name,
        "seed": seed,
        "base_seed": base_seed,
        "stop_at": asset.stop_at,
        "stage": hashlib.sha256(config.read_bytes()).hexdigest(),
    }
    full_name = f"lab:{name}{asset_query(seed, base_seed)}"

    def build(directory: Path) -> None:
        logger.warning(
            "Training %s, once (memgen fit --config %s); it takes about %d CPU minutes.",
            full_name,
            config,
            asset.minutes,
        )
        clock = time.perf_counter()
        _train(asset, config, seed, base_seed, start, directory)
        logger.warning("Trained %s in %.0f s.", full_name, time.perf_counter() - clock)

    path = build_once(memgen_home(), f"lab-{name}", settings, build)
    logger.info("%s is %s", full_name, path)
    return path


def _train(
    asset: TrainedAsset, config: Path, seed: int, base_seed: int, start: str | None, directory: Path
) -> None:
    """Trains an asset and copies its best checkpoint into a directory."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        overrides: dict[str, object] = {
            "model.memgen.backbone.name": base_name(base_seed),
            "seed_everything": seed,
            "model.seed": seed,
            "data.seed": seed,
            "trainer.logger": "false",
            "trainer.default_root_dir": root,
            "trainer.callbacks.0.root": root / "runs",
        }
        if start is not None:
            overrides["model.init_from"] = start
        if asset.stop_at is not None:
            overrides |= stopping_at(asset.stop_at)
        fit([config], overrides)
        run = root / "runs" / "latest"
        found = run / "best" if (run / "best").is_dir() else run / "last"
        shutil.copytree(found, directory, dirs_exist_ok=True)


def stopping_at(score: float, monitor: str = "val/exact_match") -> dict[str, object]:
    """Settings of a stage that stop it at the first validation with this score; it validates often."""
    return {
        "trainer.val_check_interval": 4,
        "trainer.callbacks.2.class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "trainer.callbacks.2.monitor": monitor,
        "trainer.callbacks.2.mode": "max",
        "trainer.callbacks.2.patience": 1_000_000,
        "trainer.callbacks.2.stopping_threshold": score,
    }


def base_name(base_seed: int) -> str:
    """The asset name of a reasoner."""
    return "lab:reasoner" if base_seed == 0 else f"lab:reasoner?seed={base_seed}"


def asset_query(seed: int, base_seed: int) -> str:
    """The parameters of an asset's name that are not the default."""
    given = [f"{key}={value}" for key, value in (("seed", seed), ("base", base_seed)) if value]
    return f"?{'&'.join(given)}" if given else ""


def stage_file(stage: str) -> Path:
    """A stage's configuration file."""
    return conf_file(f"{stage}.yaml")


def conf_file(name: str) -> Path:
    """A configuration file: of the checkout that the package lies in, or below the working directory.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    path = Path("conf") / name
    for folder in (Path(memgen.__file__).resolve().parents[2], Path.cwd()):
        if (folder / path).is_file():
            return folder / path
    raise FileNotFoundError(
        f"{path} is needed to train an asset of the lab, but it is not below {Path.cwd()}; run the command in the "
        "project's folder"
    )


def fit(files: Sequence[Path], overrides: Mapping[str, object]) -> None:
    """Runs `memgen fit` in a process of its own.

    Args:
        files: the stage file and its overlays.
        overrides: values on top of them.

    Raises:
        RuntimeError: if it fails.
        KeyboardInterrupt: if it was interrupted.
    """
    configs = [argument for file in files for argument in ("--config", str(file))]
    # Its report goes to stderr, since this process's own stdout may be a pipe.
    run_memgen("fit", *configs, *(f"--{key}={value}" for key, value in overrides.items()), stdout=sys.stderr)


def run_memgen(*arguments: str, stdout: TextIO | None = None) -> None:
    """Runs a command of `memgen` in a process of its own.

    Args:
        arguments: the command and its arguments.
        stdout: where its output goes; None: to this process's.

    Raises:
        RuntimeError: if it fails.
        KeyboardInterrupt: if it was interrupted.
    """
    done = subprocess.run([sys.executable, "-m", "memgen.cli.main", *arguments], stdout=stdout, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(f"memgen {' '.join(arguments)} failed with exit status {done.returncode}")
