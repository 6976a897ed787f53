"""One update of weaver GRPO on long answers over a real vocabulary: prints its peak of memory over the weights, JSON.

Run in a process of its own: `update_memory_worker.py FOLDER ROWS LENGTH VOCABULARY POLICY`, POLICY being settings as
JSON. The update is the stage's own, under
a real Trainer; only the rollout is made up, since decoding so many tokens takes minutes and is not what is measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from memgen.bench.timing import ProcessMeter
from memgen.generation.rollout import Actor, Rollouts
from memgen.generation.sampling import GenerationSettings
from memgen.objectives.policy_settings import PolicySettings
from memgen.training import playing
from memgen.types import AgentTurn, Decision, InsertionKind, Trajectory, WorkCount
from rl_runs import Vowels, make_data, make_grpo
from sft_runs import make_trainer, save_tiny

PROMPT = 24


def written(row: int, length: int, vocabulary: int) -> Trajectory:
    """An answer with four insertions, of which the tokens behind the prompt were written by the agent."""
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
    prompt = torch.randint(vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(99)).tolist()
    new = length - PROMPT
    places = [0, new // 8, new // 4, new // 2]
    turn = AgentTurn(
        context=prompt,
        tokens=ids[PROMPT:],
        logprobs=[-12.0] * new,
        decisions=[int(Decision.INVOKE) if i in places else int(Decision.NOT_ASKED) for i in range(new)],
        invoke_probs=[float(i in places) for i in range(new)],
        insertions=[
            (PROMPT + place, int(InsertionKind.INFERENCE if place else InsertionKind.PROMPT))
            for place in places
        ],
        finished=True,
    )
    return Trajectory(example=f"row-{row}", turns=(turn,), reward=float(row % 2))


class Update(Callback):
    """Measures a training step: the rollout costs nothing here, so it is one update, forward, backward and optimizer."""

    def __init__(self) -> None:
        self.meter = ProcessMeter()
        self.step: dict[str, Any] = {}
        self.before: int | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self.meter.reset_peak()
        self.before = self.meter.held()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        peak = self.meter.peak()
        norms = [float(p.grad.norm()) for p in pl_module.trained().values() if p.grad is not None]
        self.step = {
            "peak_above_weights_bytes": None if peak is None or self.before is None else peak - self.before,
            "tokens": pl_module.buffer.micro_batch(batch.place).totals.tokens,
            "gradient": max(norms),
            "entropy": float(trainer.callback_metrics["train/entropy"]),
        }


def main(folder: Path, rows: int, length: int, vocabulary: int, policy: PolicySettings) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    base = save_tiny(
        folder / "base",
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=1,
        intermediate_size=176,
        num_attention_heads=4,
        max_position_embeddings=length + 64,
        initializer_range=0.02,
    )

    def made_up(actor: Actor, examples: Any, seeds: Any, *, keep_latents: bool) -> Rollouts:
        trajectories = [written(row, length, vocabulary) for row in range(len(seeds))]
        return Rollouts(trajectories, latents=None, work=WorkCount(), seconds=1.0, environment_seconds=0.0)

    playing.rollout = made_up
    stage = make_grpo(
        base,
        rollout=GenerationSettings(max_new_tokens=length, temperature=1.0, group_size=rows),
        policy=policy,
    )
    update = Update()
    # The entropy is computed too: on every step that is logged.
    trainer = make_trainer(folder, max_steps=1, callbacks=[update], log_every_n_steps=1)
    trainer.fit(stage, make_data(base, Vowels(4), batch_size=1))
    sys.stdout.write(json.dumps(update.step) + "\n")


if __name__ == "__main__":
    sizes = [int(argument) for argument in sys.argv[2:5]]
    main(Path(sys.argv[1]), *sizes, policy=PolicySettings(**json.loads(sys.argv[5])))
