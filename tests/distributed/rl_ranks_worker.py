"""Takes reinforcement steps on one or two ranks and writes what each did: `rl_ranks_worker.py RANKS BASE OUT STAGE`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from memgen.generation.sampling import GenerationSettings
from memgen.objectives.policy_settings import PolicySettings
from memgen.training.micro_batches import UpdateSettings
from memgen.training.trigger_rl import TriggerRL
from memgen.training.weaver_grpo import WeaverGRPO
from rl_runs import Countdown, make_data, make_grpo, make_trigger
from sft_runs import make_trainer
from training_records import Recorded

ROLLOUT = GenerationSettings(max_new_tokens=6, temperature=1.0, group_size=4, sample_decisions=True)


class Unequal(Countdown):
    """Of two items, one ends after its first turn and the other after five."""

    max_turns = 5

    def __init__(self) -> None:
        super().__init__((1, 5))


def rl_stage(kind: str, base: Path) -> WeaverGRPO | TriggerRL:
    """A stage that makes two passes over each rollout, with a reference."""
    loss, make = ("dapo", make_grpo) if kind == "weaver" else ("grpo", make_trigger)
    stage = make(
        base,
        rollout=ROLLOUT,
        policy=PolicySettings(loss=loss, kl=0.02, advantage_scale="batch"),
        update=UpdateSettings(iterations=2),
    )
    if kind == "weaver":
        # Some answers end with their first token.
        original = stage.on_train_start

        def on_train_start() -> None:
            original()
            for token in range(100):
                stage.memgen.reasoner.end_at(token)

        stage.on_train_start = on_train_start
    return stage


def main(ranks: int, base: Path, out: Path, kind: str) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    recorded = Recorded()
    trainer = make_trainer(
        out.parent,
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        max_steps=3,
        callbacks=[recorded],
    )
    stage = rl_stage(kind, base)
    trainer.fit(stage, make_data(base, Unequal(), batch_size=2 // ranks))
    result = {
        "gradients": recorded.steps,
        "turns": [[len(t.turns) for t in part.trajectories] for part in recorded.micro_batches],
        "tokens": [[t.tokens for t in part.trajectories] for part in recorded.micro_batches],
        "metrics": recorded.metrics,
        "parameters": {name: p.detach() for name, p in stage.trained().items()},
    }
    torch.save(result, f"{out}.{trainer.global_rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
