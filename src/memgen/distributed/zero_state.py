"""The optimizer state that ZeRO keeps in shards, in the form in which a single process writes it, and back.

So a .ckpt is the same file under every strategy: it holds the trained weights and their moments, whole, and is read
without unpickling objects. DeepSpeed's own checkpoints are folders of shards, for one ZeRO level and one number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memgen.distributed.collectives import over_ranks
from memgen.distributed.deepspeed_internals import Shard, numel, set_weight, shape, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each weight."""


def optimizer_state(zero: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """What `torch.optim.AdamW.state_dict` returns in a single process. All ranks must call it.

    Args:
        zero: DeepSpeed's optimizer.
        parameters: the trained ones, in the order in which the optimizer was given them.
    """
    base: torch.optim.Optimizer = zero.optimizer
    steps = [float(state["step"]) for state in base.state.values() if "step" in state]
    step = int(over_ranks(torch.tensor([max(steps, default=0.0)]), "max"))
    state: dict[int, dict[str, Tensor]] = {}
    if step:
        sizes = [numel(parameter) for parameter in parameters]
        whole = {}
        for moment in MOMENTS:
            buffer = torch.zeros(sum(sizes))
            for parameter, flat in zip(parameters, buffer.split(sizes), strict=True):
                shard = shard_of(zero, parameter)
                if shard is not None:
                    kept = base.state[shard.flat][moment].narrow(0, shard.begin, shard.count)
                    flat.narrow(0, shard.first, shard.count).copy_(kept)
            # Each number is on one rank alone, and 0 on the others.
            whole[moment] = over_ranks(buffer, "sum").split(sizes)
        for index, parameter in enumerate(parameters):
            state[index] = {"step": torch.tensor(float(step))}
            state[index] |= {
                moment: whole[moment][index].view(shape(parameter)).clone() for moment in MOMENTS
            }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
    assert len(groups) == 1, "a stage trains one group"
    groups[0]["params"] = list(range(len(parameters)))
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def load(
    zero: Any,
    parameters: Sequence[nn.Parameter],
    weights: Sequence[Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Puts weights, and an optimizer's state as `optimizer_state` returns it, into this rank's shards.

    Args:
        zero: DeepSpeed's optimizer.
        parameters: the trained ones, in the order in which the optimizer was given them.
        weights: the whole weight of each; None leaves them.
        state: None leaves it.

    Raises:
        ValueError: if the state is of other weights.
    """
    base: torch.optim.Optimizer = zero.optimizer
    for index, parameter in enumerate(parameters):
        shard = shard_of(zero, parameter)
        if weights is not None:
            set_weight(parameter, weights[index])
            if shard is not None:
                _fill(shard.flat, shard, weights[index])
        kept = {} if state is None else state["state"].get(index, {})
        for moment in MOMENTS:
            if moment not in kept:
                continue
            if kept[moment].numel() != numel(parameter):
                raise ValueError(
                    f"the .ckpt's optimizer state does not fit: weight {index} has {numel(parameter)} numbers, its "
                    f"state {kept[moment].numel()}"
                )
            if shard is not None:
                own = base.state[shard.flat]
                own.setdefault("step", torch.tensor(0.0)).fill_(float(kept["step"]))
                _fill(own.setdefault(moment, torch.zeros_like(shard.flat)), shard, kept[moment])
    if state is not None:
        for group, saved in zip(base.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}


def _fill(flat: Tensor, shard: Shard, whole: Tensor) -> None:
    flat.narrow(0, shard.begin, shard.count).copy_(whole.reshape(-1).narrow(0, shard.first, shard.count))
