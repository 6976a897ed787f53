"""Trained assets of the lab: each is the checkpoint that `memgen fit` writes for a stage, trained once and kept.

The files of `conf/` have the settings; this file says which of them, from which checkpoint, and when a stage stops. A
training keeps its run below `MEMGEN_HOME`, so one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memgen.conf_files import conf_file
from memgen.files import remove
from memgen.lab.cache import build_once, find_built, memgen_home, recipe_hash

logger = logging.getLogger(__name__)

STDERR = 2
"""File descriptor; in a notebook `sys.stderr` has none."""


@dataclass(frozen=True)
class TrainedAsset:
    """A checkpoint of the lab.

    Attributes:
        stage: the stage file in `conf/` that trains it, without ending.
        overlays: configuration files on top of it, below `conf/`. With none, it is trained on `lab:reasoner`.
        start: the asset that it starts from, or None.
        goes_on: the asset whose training it is the rest of, or None.
        stop_at: share of exact answers on the val split at which training stops; None trains to the end.
        check_every: optimizer steps between two validations while it waits for that.
        minutes: how long it takes on one CPU core, for the message; of the rest of a training, the rest.
    """

    stage: str
    overlays: tuple[str, ...] = ()
    start: str | None = None
    goes_on: str | None = None
    stop_at: float | None = None
    check_every: int = 4
    minutes: int = 1


SMOLLM2_SHOP = ("backbone/smollm2-135m.yaml", "data/lab_english.yaml")
SMOLLM2_MIX = ("backbone/smollm2-135m.yaml", "data/lab_english_mix.yaml")

TRAINED = {
    "weaver_sft_half": TrainedAsset("weaver_sft", stop_at=0.3),
    "weaver_sft": TrainedAsset("weaver_sft"),
    "weaver_grpo": TrainedAsset("weaver_grpo", start="weaver_sft_half", minutes=3),
    "trigger_rl": TrainedAsset("trigger_rl", start="weaver_sft", minutes=2),
    "smollm2_weaver_sft_half": TrainedAsset(
        "weaver_sft", (*SMOLLM2_SHOP, "smollm2/weaver_sft.yaml"), stop_at=0.3, check_every=40, minutes=17
    ),
    "smollm2_weaver_sft": TrainedAsset(
        "weaver_sft",
        (*SMOLLM2_SHOP, "smollm2/weaver_sft.yaml"),
        goes_on="smollm2_weaver_sft_half",
        stop_at=0.98,
        check_every=40,
        minutes=5,
    ),
    "smollm2_weaver_grpo": TrainedAsset(
        "weaver_grpo",
        (*SMOLLM2_SHOP, "smollm2/weaver_grpo.yaml"),
        start="smollm2_weaver_sft_half",
        minutes=16,
    ),
    "smollm2_trigger_rl": TrainedAsset(
        "trigger_rl", (*SMOLLM2_MIX, "smollm2/trigger_rl.yaml"), start="smollm2_weaver_sft", minutes=23
    ),
}
"""By name. Those called half are stopped early, so that reinforcement has something to do: by their score, because the step
at which a weaver has learnt half of the prices varies between seeds. SmolLM2's stops again when all is right."""


def build_trained(name: str, seed: int, base_seed: int, version: int, start: str | None) -> Path:
    """The checkpoint directory of a trained asset, trained first if it is missing.

    Args:
        name: one of `TRAINED`. What it goes on from is built already.
        seed: of the stage's initial weights, data order and sampling.
        base_seed: of the lab's reasoner.
        version: of the recipes.
        start: checkpoint directory of the asset that it starts from, if it starts from one.

    Raises:
        FileNotFoundError: if the stage files are not where the package is, nor below the working directory.
        RuntimeError: if the stage's command fails.
    """
    asset = TRAINED[name]
    files = _files(asset)
    full_name = f"lab:{name}{asset_query(seed, base_seed)}"

    def build(directory: Path) -> None:
        logger.warning(
            "Training %s, once (memgen fit %s); it takes about %d CPU minutes.",
            full_name,
            " ".join(f"--config {file}" for file in files),
            asset.minutes,
        )
        clock, cpu = time.perf_counter(), children_cpu()
        run = _run_folder(name, seed, base_seed, version)
        fit(files, _overrides(asset, seed, base_seed, start), run)
        shutil.copytree(
            run / "best" if (run / "best").is_dir() else run / "last", directory, dirs_exist_ok=True
        )
        logger.warning(
            "Trained %s in %.0f s, %.1f CPU minutes.",
            full_name,
            time.perf_counter() - clock,
            (children_cpu() - cpu) / 60,
        )

    path = build_once(memgen_home(), f"lab-{name}", _recipe(name, seed, base_seed, version), build)
    run = _run_folder(name, seed, base_seed, version)
    if run.exists() and all(other.goes_on != name for other in TRAINED.values()):
        remove(run)
    logger.info("%s is %s", full_name, path)
    return path


def children_cpu() -> float:
    """CPU seconds of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def is_trained(name: str, seed: int, version: int) -> bool:
    """Whether an asset (of base seed 0) is there already, so that naming it trains nothing."""
    return find_built(memgen_home(), f"lab-{name}", _recipe(name, seed, 0, version)) is not None


def _files(asset: TrainedAsset) -> list[Path]:
    return [stage_file(asset.stage), *(conf_file(overlay) for overlay in asset.overlays)]


def _recipe(name: str, seed: int, base_seed: int, version: int) -> dict[str, object]:
    """Everything that decides an asset, as JSON values."""
    asset = TRAINED[name]
    recipe: dict[str, object] = {
        "version": version,
        "asset": name,
        "seed": seed,
        "base_seed": base_seed,
        "stop_at": asset.stop_at,
        "stage": _checksum(stage_file(asset.stage)),
    }
    if asset.overlays:
        recipe["overlays"] = [_checksum(conf_file(overlay)) for overlay in asset.overlays]
        recipe["check_every"] = asset.check_every
        earlier = asset.start or asset.goes_on
        recipe["earlier"] = None if earlier is None else _recipe(earlier, seed, base_seed, version)
    return recipe


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _run_folder(name: str, seed: int, base_seed: int, version: int) -> Path:
    """Where an asset is trained: in the folder of the training that it is the rest of, if it is one."""
    first = TRAINED[name].goes_on or name
    return (
        memgen_home().resolve()
        / "training"
        / f"{first}-{recipe_hash(_recipe(first, seed, base_seed, version))}"
    )


def _overrides(asset: TrainedAsset, seed: int, base_seed: int, start: str | None) -> dict[str, object]:
    """Settings on top of the files."""
    overrides: dict[str, object] = {
        "seed_everything": seed,
        "model.seed": seed,
        "data.seed": seed,
        "trainer.logger": "false",
        "trainer.callbacks.1.every_minutes": 2,
    }
    if not asset.overlays:
        overrides["model.memgen.backbone.name"] = base_name(base_seed)
    if start is not None:
        overrides["model.init_from"] = start
    if asset.stop_at is not None:
        overrides |= stopping_at(asset.stop_at, check_every=asset.check_every)
    return overrides


def stopping_at(score: float, monitor: str = "val/exact_match", check_every: int = 4) -> dict[str, object]:
    """Settings of a stage that stop it at the first validation with this score, each so many optimizer steps apart."""
    return {
        "trainer.val_check_interval": check_every,
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


def fit(files: Sequence[Path], overrides: Mapping[str, object], run: Path | None = None) -> None:
    """Runs `memgen fit` in a process of its own.

    Args:
        files: the stage file and its overlays.
        overrides: values on top of them.
        run: the run's folder, in which it goes on from its last checkpoint if it has one; None: a new one.

    Raises:
        RuntimeError: if it fails.
        KeyboardInterrupt: if it was interrupted.
    """
    configs = [argument for file in files for argument in ("--config", str(file))]
    # Its report goes to stderr, since this process's own stdout may be a pipe.
    kept = [] if run is None else ["--run", str(run)]
    values = [f"--{key}={value}" for key, value in overrides.items()]
    run_memgen("fit", *configs, *kept, *values, stdout=STDERR)


def run_memgen(*arguments: str, stdout: int | None = None) -> None:
    """Runs a command of `memgen` in a process of its own.

    Args:
        arguments: the command and its arguments.
        stdout: file descriptor of where its output goes; None: to this process's.

    Raises:
        RuntimeError: if it fails.
        KeyboardInterrupt: if it was interrupted.
    """
    done = subprocess.run([sys.executable, "-m", "memgen.cli.main", *arguments], stdout=stdout, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(f"memgen {' '.join(arguments)} failed with exit status {done.returncode}")
