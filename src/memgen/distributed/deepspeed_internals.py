"""Everything of DeepSpeed's private state that this package uses. tests/distributed/test_internals.py says what each must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """The part of a weight whose optimizer state this rank keeps."""

    flat: Tensor
    """The rank's flat float32 weights, which the optimizer updates."""
    begin: int
    """Index into `flat` where the shard begins."""
    first: int
    """Index into the flattened weight of the shard's first number."""
    count: int
    """Numbers in the shard."""


def skip_shared_memory_kernel() -> None:
    """Keeps DeepSpeed from compiling its collectives over shared memory for a minute, which only inference uses."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def remove_fetch_hooks(optimizer: Any) -> None:
    """Removes the hooks by which ZeRO-3 gathers and releases weights around each submodule."""
    getattr(optimizer, "parameter_offload", optimizer)._remove_module_hooks()


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps a parameter in shards."""
    return hasattr(parameter, "ds_id")


def numel(parameter: nn.Parameter) -> int:
    """Numbers in the whole parameter."""
    return int(cast(Any, parameter).ds_numel) if is_sharded(parameter) else parameter.numel()


def shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return cast(torch.Size, cast(Any, parameter).ds_shape) if is_sharded(parameter) else parameter.shape


def missing(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those of some sharded parameters that are not gathered now."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [p for p in parameters if cast(Any, p).ds_status == ZeroParamStatus.NOT_AVAILABLE]


def gather(parameters: Sequence[nn.Parameter]) -> None:
    """Gathers sharded parameters until `release`. All ranks must call it with the same ones."""
    absent: list[Any] = list(missing(parameters))
    if absent:
        absent[0].all_gather_coalesced(absent).wait()


def release(parameters: Sequence[nn.Parameter]) -> None:
    """Frees gathered parameters down to this rank's shard."""
    cast(Any, parameters[0]).partition(param_list=list(parameters))


def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets what the next pass reads of a parameter, whole or this rank's shard.

    Args:
        parameter: any.
        value: the whole weight.
    """
    if not is_sharded(parameter):
        parameter.data.copy_(value)
        return
    if parameter.data.numel():  # gathered now
        parameter.data.copy_(value)
    first, count = _range(parameter)
    own: Tensor = cast(Any, parameter).ds_tensor
    own.narrow(0, 0, count).copy_(value.reshape(-1).narrow(0, first, count))


def shard_of(optimizer: Any, parameter: nn.Parameter) -> Shard | None:
    """This rank's shard of a trained parameter, if it has one.

    Args:
        optimizer: DeepSpeed's.
        parameter: one that it trains.
    """
    if is_sharded(parameter):
        group, begin, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first, count = _range(parameter)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return Shard(flat, begin, first, count) if count else None
    mapping = cast(Any, parameter)._hp_mapping
    if mapping is None:
        return None
    inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Shard(flat, int(inside.start), int(outside.start), int(outside.numel))


def _range(parameter: Any) -> tuple[int, int]:
    """First number and count of this rank's shard under ZeRO-3. The last shards may be padded or empty."""
    size = parameter.partition_numel()
    first = min(size * torch.distributed.get_rank(), parameter.ds_numel)
    return first, min(size, parameter.ds_numel - first)
