"""Two ranks complete the gradients of three weights in opposite order: `order_worker.py RANKS BASE OUT STAGE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from memgen.distributed.deepspeed_internals import skip_shared_memory_kernel
from memgen.training.stage import zero_loss

SIZE = 50
FACTORS = {"a": 1.0, "b": 10.0, "c": 100.0}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in FACTORS:
            self.register_parameter(name, nn.Parameter(torch.ones(SIZE)))

    def forward(self, order: str, tie: bool) -> torch.Tensor:
        nothing = zero_loss(self.parameters()) if tie else 0.0
        x = torch.ones(SIZE)
        for name in order:
            x = (x + getattr(self, name) * FACTORS[name]) * 1.0
        return x.sum() + nothing


def main(ranks: int, out: Path, stage: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": os.environ["LOCAL_RANK"]}
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    skip_shared_memory_kernel()
    deepspeed.init_distributed("gloo")
    rank = int(os.environ["RANK"])
    found = {}
    for tie in (False, True):
        model = Chain()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True},
            },
        )
        engine.backward(engine("abc" if rank == 0 else "cba", tie))
        found["tied" if tie else "untied"] = {
            name: safe_get_full_grad(getattr(model, name)).clone() for name in FACTORS
        }
    torch.save(found, f"{out}.{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]), int(sys.argv[4]))
