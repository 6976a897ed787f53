"""The state of an optimizer that ZeRO keeps in shares, as a single process would write it, and back.

So a .ckpt is the same file under every strategy: it holds what is trained and its running moments, whole, and is read
without unpickling objects. DeepSpeed's own checkpoints are folders of shares, for one stage and one number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memgen.distributed.collectives import over_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each weight."""


@dataclass(frozen=True)
class _Share:
    """What this rank keeps of a weight."""

    flat: Tensor
    """The rank's line of weights, which the optimizer updates."""
    begin: int
    """Where in the line the share begins."""
    first: int
    """The first number of the weight that it holds."""
    count: int
    """How many."""


def optimizer_state(zero: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """What `torch.optim.AdamW.state_dict` returns in a single process. All ranks must call it.

    Args:
        zero: DeepSpeed's optimizer.
        parameters: what is trained, in the order in which the optimizer was given it.
    """
    base: torch.optim.Optimizer = zero.optimizer
    steps = [float(state["step"]) for state in base.state.values() if "step" in state]
    step = int(over_ranks(torch.tensor([max(steps, default=0.0)]), "max"))
    state: dict[int, dict[str, Tensor]] = {}
    if step:
        sizes = [_numel(parameter) for parameter in parameters]
        whole = {}
        for moment in MOMENTS:
            buffer = torch.zeros(sum(sizes))
            for part, share in _parts(zero, parameters, buffer, sizes):
                kept = base.state[share.flat][moment]
                part.copy_(kept.narrow(0, share.begin, share.count))
            # Each number is on one rank alone, and 0 on the others.
            whole[moment] = over_ranks(buffer, "sum").split(sizes)
        for index, parameter in enumerate(parameters):
            state[index] = {"step": torch.tensor(float(step))}
            state[index] |= {
                moment: whole[moment][index].view(_shape(parameter)).clone() for moment in MOMENTS
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
    """Puts weights, and an optimizer's state as `optimizer_state` returns it, into this rank's shares.

    Args:
        zero: DeepSpeed's optimizer.
        parameters: what is trained, in the order in which the optimizer was given it.
        weights: of each; None leaves them.
        state: None leaves it.

    Raises:
        ValueError: if the state is of other weights.
    """
    base: torch.optim.Optimizer = zero.optimizer
    for index, parameter in enumerate(parameters):
        share = _share(zero, parameter)
        if weights is not None:
            _set_weight(parameter, weights[index])
            if share is not None:
                _fill(share.flat, share, weights[index])
        kept = {} if state is None else state["state"].get(index, {})
        for moment in MOMENTS:
            if moment not in kept:
                continue
            if kept[moment].numel() != _numel(parameter):
                raise ValueError(
                    f"the .ckpt's optimizer state does not fit: weight {index} has {_numel(parameter)} numbers, its "
                    f"state {kept[moment].numel()}"
                )
            if share is not None:
                own = base.state[share.flat]
                own.setdefault("step", torch.tensor(0.0)).fill_(float(kept["step"]))
                _fill(own.setdefault(moment, torch.zeros_like(share.flat)), share, kept[moment])
    if state is not None:
        for group, saved in zip(base.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}


def _fill(line: Tensor, share: _Share, whole: Tensor) -> None:
    line.narrow(0, share.begin, share.count).copy_(whole.reshape(-1).narrow(0, share.first, share.count))


def _set_weight(parameter: Any, value: Tensor) -> None:
    """What the next pass reads, before the optimizer has written it."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        return
    if parameter.data.numel():  # It is gathered at the moment.
        parameter.data.copy_(value)
    own = parameter.ds_tensor
    first, count = _range(parameter)
    own.narrow(0, 0, count).copy_(value.reshape(-1).narrow(0, first, count))


def _parts(
    zero: Any, parameters: Sequence[nn.Parameter], buffer: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[Tensor, _Share]]:
    """For each weight of which this rank has a share, its place in a buffer of all weights."""
    for parameter, line in zip(parameters, buffer.split(list(sizes)), strict=True):
        share = _share(zero, parameter)
        if share is not None:
            yield line.narrow(0, share.first, share.count), share


def _share(zero: Any, parameter: Any) -> _Share | None:
    """This rank's share of a weight, if it has one."""
    if hasattr(parameter, "ds_id"):
        group, begin, _ = zero.grad_position[zero.get_param_id(parameter)]
        first, count = _range(parameter)
        flat = zero.fp32_partitioned_groups_flat[group]
        return _Share(flat, begin, first, count) if count else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Share(flat, int(inside.start), int(outside.start), int(outside.numel))


def _range(parameter: Any) -> tuple[int, int]:
    """First number and count of this rank's share of a weight under ZeRO-3. Its last shares may be padded or empty."""
    size = parameter.partition_numel()
    first = min(size * torch.distributed.get_rank(), parameter.ds_numel)
    return first, min(size, parameter.ds_numel - first)


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if hasattr(parameter, "ds_id") else int(parameter.numel())


def _shape(parameter: Any) -> Any:
    return parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape
