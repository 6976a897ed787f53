"""Trains stages under strategies, one after the other, and writes what each rank did: `zero_worker.py RANKS BASE OUT TASKS`.

Keys of a task: name, kind (sft, weaver, trigger), strategy (single, ddp, zero1, zero2, zero3), and settings.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from rl_ranks_worker import Unequal, rl_stage

import rl_runs
import sft_runs
from memgen.distributed.collectives import over_ranks
from memgen.distributed.zero import ZeroStrategy, whole_weights
from memgen.model import memgen as memgen_module
from memgen.model.backbone import load_backbone
from memgen.training import playing
from memgen.training.callbacks import AdapterCheckpoint
from memgen.training.optimizer import OptimizerSettings
from training_records import SaveAt

TARGETS = [*sft_runs.TARGETS, "abc", "defghij", "k", "l, m"]
"""Half of the answers have no delimiter, so that a rank may insert nothing inside its answers."""


class Watched(Callback):
    """The whole gradient of every optimizer step, losses summed over ranks, and validation's measures."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.turns: list[list[int]] = []
        self.gathers: list[int] = []
        """Gathers of weights during each rollout."""
        self.measures: dict[str, float] = {}
        self.parameters: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer, pl_module):
        played = playing.rollout

        def rollout(*args: Any, **kwargs: Any) -> Any:
            from deepspeed import comm

            count, gather = 0, comm.allgather_fn

            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                return gather(*args, **kwargs)

            comm.allgather_fn = counted
            try:
                return played(*args, **kwargs)
            finally:
                comm.allgather_fn = gather
                self.gathers.append(count)

        playing.rollout = rollout
        self.restore = lambda: setattr(playing, "rollout", played)

    def on_fit_end(self, trainer, pl_module):
        self.restore()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        from deepspeed.utils import safe_get_full_grad

        zero = isinstance(trainer.strategy, ZeroStrategy)
        self.gradients.append(
            {
                name: (safe_get_full_grad(parameter) if zero else parameter.grad).detach().clone()
                for name, parameter in trained(pl_module).items()
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = over_ranks(outputs["loss"].detach().double().reshape(1), "sum")
        self.losses.append(float(loss) / trainer.world_size)
        if hasattr(pl_module, "buffer"):
            part = pl_module.buffer.micro_batch(batch.place)
            self.turns.append([len(trajectory.turns) for trajectory in part.trajectories])

    def on_train_end(self, trainer, pl_module):
        with whole_weights(trainer):
            self.parameters = {name: p.detach().clone() for name, p in trained(pl_module).items()}

    def on_validation_end(self, trainer, pl_module):
        found = trainer.callback_metrics.items()
        self.measures = {name: float(value) for name, value in found if name.startswith("val/")}


def trained(stage: Any) -> dict[str, torch.nn.Parameter]:
    return stage.trained() if hasattr(stage, "trained") else stage.memgen.weaver.own_parameters()


def strategy_of(name: str, **settings: Any) -> Any:
    match name:
        case "single":
            return "auto"
        case "ddp":
            return DDPStrategy(process_group_backend="gloo")
        case _:
            return ZeroStrategy(int(name.removeprefix("zero")), **settings)


def make(task: dict[str, Any], ranks: int, base: Path, **settings: Any) -> tuple[Any, Any]:
    """The stage and its data."""
    if task["kind"] == "sft":
        stage: Any = sft_runs.make_stage(
            base,
            dtype=task.get("dtype", "float32"),
            curriculum=sft_runs.MIXED,
            optimizer=OptimizerSettings(lr=1e-3, warmup_ratio=0.0),
            checkpointing=task.get("recompute", False),
            **settings,
        )
        size = 4 // (ranks * int(task.get("accumulate", 1)))
        return stage, sft_runs.make_data(base, sft_runs.Letters(TARGETS, val=3), batch_size=size)
    return rl_stage(task["kind"], base), rl_runs.make_data(base, Unequal(), batch_size=2 // ranks)


def make_trainer(task: dict[str, Any], ranks: int, out: Path, callbacks: list[Callback]) -> Trainer:
    return sft_runs.make_trainer(
        out.parent,
        devices=ranks,
        strategy=strategy_of(task["strategy"], **task.get("zero", {})),
        max_steps=task.get("steps", 3),
        callbacks=callbacks,
        accumulate_grad_batches=int(task.get("accumulate", 1)),
        limit_val_batches=1.0 if task["kind"] == "sft" else 0,
        val_check_interval=1.0,
        gradient_clip_val=task.get("clip"),
    )


def run(task: dict[str, Any], ranks: int, base: Path, out: Path) -> None:
    """One task: a run, or one that is stopped after `save_at` steps and resumed."""
    saved = None
    if "save_at" in task:
        saved = out.with_suffix(".ckpt")
        stage, data = make(task, ranks, base)
        make_trainer(task, ranks, out, [SaveAt(task["save_at"], saved)]).fit(stage, data)
    watched = Watched()
    adapters = AdapterCheckpoint(f"{out}-run", monitor=None, with_trigger=task["kind"] == "trigger")
    trainer = make_trainer(task, ranks, out, [watched, adapters])
    stage, data = make(task, ranks, base)
    trainer.fit(stage, data, ckpt_path=saved or task.get("resume_from"), weights_only=True)
    result = {
        "gradients": watched.gradients,
        "losses": watched.losses,
        "turns": watched.turns,
        "gathers": watched.gathers,
        "measures": watched.measures,
        "parameters": watched.parameters,
        "dtypes": sorted({str(p.dtype) for p in stage.memgen.parameters()}),
        "run": str(adapters.run),
        "rank": trainer.global_rank,
    }
    if task.get("test"):
        stage, data = make(task, ranks, base, init_from=str(adapters.run / "last"))
        trainer = make_trainer(task, ranks, out, [])
        trainer.test(stage, data, verbose=False)
        result["tested"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save(result, f"{out}.{trainer.global_rank}")


def provoke(task: dict[str, Any], ranks: int, base: Path, out: Path) -> None:
    """Begins a run in which an initialisation is lost, and writes how that is told."""
    stage, data = make(task, ranks, base)
    if task["provoke"] == "built in shares":
        # Hugging Face refuses to load a base there; adapters on a base that was loaded before are made without a word.
        build, loaded = stage.setup, []
        stage.setup = lambda **_: loaded.append(
            load_backbone(stage.config.backbone, str) if not loaded else None
        )
        stage.configure_model = lambda: build("fit")
        memgen_module.load_backbone = lambda *_: loaded[0]
    else:
        begin = DeepSpeedStrategy._initialize_deepspeed_train

        def with_noise(strategy: Any, model: Any) -> None:
            for name, parameter in trained(stage).items():
                if ".lora_B." in name:
                    getattr(parameter, "ds_tensor", parameter.data).normal_()
            begin(strategy, model)

        DeepSpeedStrategy._initialize_deepspeed_train = with_noise
    try:
        make_trainer(task, ranks, out, []).fit(stage, data)
        told = "nothing"
    except RuntimeError as error:
        told = str(error)
    finally:
        if task["provoke"] != "built in shares":
            DeepSpeedStrategy._initialize_deepspeed_train = begin
    torch.save({"told": told}, f"{out}.{os.environ['LOCAL_RANK']}")


def main(ranks: int, base: Path, out: Path, tasks: list[dict[str, Any]]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for task in tasks:
        (provoke if "provoke" in task else run)(
            task, ranks, base, out.with_name(f"{out.name}-{task['name']}")
        )
    # A folder of its own for each task, and this file says that all are done.
    torch.save({}, f"{out}.{os.environ.get('LOCAL_RANK', 0)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
