"""What DeepSpeed and torch do with a small model on each rank: `internals_worker.py RANKS BASE OUT`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch


def main(ranks: int, out: str) -> None:
    rank = os.environ["LOCAL_RANK"]
    os.environ |= {"RANK": rank, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from torch.distributed import distributed_c10d

    from memgen.distributed import deepspeed_internals as internals
    from memgen.distributed.torch_internals import set_group_timeouts

    internals.skip_shared_memory_kernel()
    deepspeed.init_distributed("gloo")
    seen = {}
    for level in (1, 2, 3):
        torch.manual_seed(0)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": level}}
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        config["zero_force_ds_cpu_optimizer"] = False
        module = torch.nn.Linear(3, 3)
        weight = module.weight
        before = weight.detach().clone()
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=torch.optim.AdamW(module.parameters(), lr=0.1), config=config
        )
        kept = {"numel": internals.numel(weight), "shape": list(internals.shape(weight))}
        kept["sharded"] = internals.is_sharded(weight)
        shard = internals.shard_of(engine.optimizer, weight)
        numbers = before.flatten()[shard.first : shard.first + shard.count]
        kept["shard"] = torch.equal(shard.flat.narrow(0, shard.begin, shard.count), numbers)
        kept["range"] = (shard.first, shard.count)
        if level == 3:
            internals.remove_fetch_hooks(engine.optimizer)
            kept["missing"] = [len(internals.missing([weight]))]
            internals.gather([weight])
            kept["missing"].append(len(internals.missing([weight])))
            kept["gathered"] = torch.equal(weight.detach(), before)
            internals.release([weight])
            kept["missing"].append(len(internals.missing([weight])))
        internals.set_weight(weight, before + 1)
        if level == 3:
            internals.gather([weight])
        kept["set"] = torch.equal(weight.detach(), before + 1)
        seen[level] = kept
    set_group_timeouts(timedelta(seconds=77))
    groups = list(distributed_c10d._world.pg_map)
    seen["timeouts"] = [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups
    ]
    torch.save(seen, f"{out}.{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3])
