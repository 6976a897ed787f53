"""Trains two steps on one or two ranks and writes what each step did: `two_ranks_worker.py RANKS BASE OUT TARGETS`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.weaver import WeaverConfig
from memgen.tracking.metrics import AnswerMetrics
from memgen.training.optimizer import OptimizerSettings
from memgen.types import Trajectory
from sft_runs import MIXED, Gradients, Letters, make_data, make_stage, make_trainer
from tiny import random_rows, tiny_memgen


class Counts(Callback):
    """Supervised tokens of this rank's micro-batches, and validation's measures at the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.measures: dict[str, float] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens.append(batch.tokens.supervised_tokens)

    def on_validation_end(self, trainer, pl_module):
        found = trainer.callback_metrics.items()
        self.measures = {name: float(value) for name, value in found if name.startswith("val/")}


def answers(rank: int, ranks: int, share: list[int]) -> dict[str, float]:
    """Answer metrics of six answers: all on one rank, or `share` of them on each of two."""
    model = tiny_memgen()
    generation = generate(model, random_rows([3, 5, 4, 6, 2, 7]), GenerationSettings(max_new_tokens=6))
    answered = [
        Trajectory(str(i), (turn,), i / 5, {"even": 1.0} if i % 2 == 0 else {"odd": i / 10})
        for i, turn in enumerate(generation.turns)
    ]
    first = sum(share[:rank]) if ranks > 1 else 0
    metric = AnswerMetrics(WeaverConfig())
    for i in range(first, first + (share[rank] if ranks > 1 else 6)):
        metric.update([answered[i]])
    return {name: float(value) for name, value in metric.compute().items()}


def main(ranks: int, base: Path, out: Path, targets: list[str], accumulate: int, val: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gradients, counts = Gradients(), Counts()
    strategy = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    trainer = make_trainer(
        out.parent,
        devices=ranks,
        strategy=strategy,
        max_steps=3,
        callbacks=[gradients, counts],
        accumulate_grad_batches=accumulate,
        limit_val_batches=1.0,
        val_check_interval=1.0,
    )
    stage = make_stage(base, curriculum=MIXED, optimizer=OptimizerSettings(lr=1e-3, warmup_ratio=0.0))
    data = make_data(base, Letters(targets, val=val), batch_size=4 // (ranks * accumulate))
    trainer.fit(stage, data)
    if val < ranks:
        (tested,) = trainer.test(stage, data)
        assert tested["test/answer_tokens"] > 0
        predicted = trainer.predict(stage, data)
        assert sum(map(len, predicted)) == (1 if trainer.global_rank == 0 else 0)
    shared = [answers(trainer.global_rank, ranks, share) for share in ([4, 2], [6, 0], [0, 6])]
    result = {
        "gradients": gradients.steps,
        "parameters": {n: p.detach() for n, p in stage.memgen.weaver.own_parameters().items()},
        "tokens": counts.tokens,
        "measures": counts.measures,
        "answers": shared,
    }
    torch.save(result, f"{out}.{trainer.global_rank}")


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        json.loads(sys.argv[4]),
        int(sys.argv[5]),
        int(sys.argv[6]),
    )
