"""One step of weaver GRPO with a focus, on one or two ranks, and what was in it: `focus_ranks_worker.py RANKS BASE OUT`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from memgen.objectives.policy_settings import PolicySettings
from rl_runs import Vowels, make_data, make_grpo
from sft_runs import make_trainer
from training_records import Recorded


def main(ranks: int, base: Path, out: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    recorded = Recorded()
    trainer = make_trainer(
        out.parent,
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        max_steps=1,
        callbacks=[recorded],
    )
    stage = make_grpo(base, policy=PolicySettings(loss="dapo", top_entropy=0.3))
    trainer.fit(stage, make_data(base, Vowels(), batch_size=4 // ranks))
    (part,) = recorded.micro_batches
    focus = {
        f"{trajectory.example} {index % 4}": part.focus[index][: trajectory.tokens].tolist()
        for index, trajectory in enumerate(part.trajectories)
    }
    result = {
        "focus": focus,
        "focused": int(part.focus.sum()),
        "tokens": sum(t.tokens for t in part.trajectories),
        "gradient": recorded.steps[0],
    }
    torch.save(result, f"{out}.{trainer.global_rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
