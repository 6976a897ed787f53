"""DeepSpeed's ZeRO for the three training stages, on CUDA and, for tests, on CPU processes.

The trained weights are few and the frozen ones many, and ranks do not make the same forward passes: episodes differ in
turns, and rows in insertions. So three things differ from Lightning's strategy:

1. *Frozen weights keep their dtype.* A base in bfloat16 stays so; trained weights are float32.
2. *ZeRO-3 shards the decoders' layers*, and a pass gathers one layer at a time, forward and backward. Trained weights,
   embeddings and the head are whole from the beginning of a training step to the optimizer's. Decoding and evaluation
   gather everything once (`whole_weights`) and then run without communication.
3. *Ranks make the same passes in the same order.* Before each pass of a training step all ranks agree which one is next;
   a rank that does not need it makes an empty pass with zero gradient. So a rank with one insertion does not leave a
   rank with three waiting in a collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast, final

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from memgen.distributed import zero_state
from memgen.distributed.collectives import over_ranks
from memgen.distributed.deepspeed_internals import (
    gather,
    is_sharded,
    missing,
    release,
    remove_fetch_hooks,
    skip_shared_memory_kernel,
)
from memgen.distributed.torch_internals import set_group_timeouts
from memgen.model.backbone import Backbone
from memgen.model.cache import PackedKVCache, PassSegment
from memgen.model.memgen import MemGenModel

ADAPTERS = ("weaver", "trigger", None)
"""Adapters that a pass may apply, in the order in which ranks make such passes."""
FINISHED = 1 << 30
"""Sent by a rank that needs no more passes."""


def whole_weights(trainer: Trainer) -> AbstractContextManager[None]:
    """Gathers ZeRO-3 shards for the block. All ranks must enter and leave together.

    Args:
        trainer: with any other strategy this does nothing.
    """
    strategy = trainer.strategy
    return strategy.whole_weights() if isinstance(strategy, ZeroStrategy) else nullcontext()


def require_whole(model: nn.Module) -> None:
    """Refuses a model that was built inside `deepspeed.zero.Init`.

    Its initialisation was then written to empty tensors: LoRA's zeros become noise when the shards are gathered.

    Raises:
        RuntimeError: naming the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or parameter.numel() == 0:
            raise RuntimeError(
                f"the model was built inside deepspeed.zero.Init: {name} holds {parameter.numel()} numbers, so its "
                "initialisation is lost; build it outside (in LightningModule.setup, not in configure_model)"
            )


@final
class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO level 1 (optimizer state in shards), 2 (gradients too) or 3 (weights too).

    Args:
        stage: the ZeRO level, 1, 2 or 3 (DeepSpeed calls it stage).
        offload_optimizer: keep the optimizer's state in host memory, and update it there.
        offload_parameters: with ZeRO-3, keep the shards of the weights in host memory.
        bucket_size: numbers that are reduced in one message.
        timeout: how long a collective waits for another rank before the run ends.
    """

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        bucket_size: int = 20_000_000,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"strategy.stage must be 1, 2 or 3, got {stage}")
        if offload_parameters and stage != 3:
            raise ValueError(
                f"strategy.offload_parameters needs sharded weights; set strategy.stage to 3, got {stage}"
            )
        if not torch.cuda.is_available():
            # DeepSpeed chooses its accelerator when it is imported.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            reduce_bucket_size=bucket_size,
            allgather_bucket_size=bucket_size,
            logging_batch_size_per_gpu=1,
            timeout=timeout,
        )
        assert isinstance(self.config, dict), "made from the arguments"
        if offload_optimizer:
            # Few weights are trained: torch's AdamW on the host suffices, and nothing needs to be compiled.
            self.config["zero_force_ds_cpu_optimizer"] = False
        # `LayerShards` decides what stays whole and what autograd saves of a weight, not the size.
        self.config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
        }
        self.stage = stage
        self.timeout = timeout
        self._shards: LayerShards | None = None
        self._evaluation: ExitStack | None = None
        self._trained: list[nn.Parameter] = []

    # Processes and devices

    @property
    @override
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices of this node's ranks. CPU processes get numbers, which DeepSpeed asks for; torch ignores them."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and all(device.type == "cpu" for device in devices):
            devices = [torch.device("cpu", index) for index in range(len(devices))]
        self._parallel_devices = devices

    @property
    @override
    def precision_plugin(self) -> Precision:
        """Leaves every tensor's dtype as it is."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and plugin.precision != "32-true":
            raise ValueError(
                f"trainer.precision {plugin.precision} would convert the trained weights; set it to 32-true (the dtype "
                "of the frozen ones is model.memgen.backbone.dtype)"
            )
        self._precision_plugin = None if plugin is None else _TypesAsTheyAre()

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        from deepspeed.accelerator import get_accelerator

        if get_accelerator().device_name() != "cpu":
            raise RuntimeError(
                f"trainer.accelerator is cpu, but DeepSpeed has chosen {get_accelerator().device_name()}; set the environment "
                "variable DS_ACCELERATOR=cpu"
            )
        os.environ.setdefault("LOCAL_SIZE", str(self.num_processes))
        skip_shared_memory_kernel()
        super(DeepSpeedStrategy, self).setup_environment()

    # Set-up

    @override
    def init_deepspeed(self) -> None:
        module = self.lightning_module
        assert module is not None, "the Trainer connects it first"
        model = _memgen_of(module)
        before: dict[str, tuple[float, float]] = {}
        if self._shards is None:
            require_whole(model)
            before = _checksums(module)
        else:  # A second run of this Trainer: the weights are sharded already.
            self._shards.remove()
        if self.stage == 3:
            from deepspeed.runtime.zero import Init

            # Weight by weight: the engine would move the whole base to the device before it shards it.
            Init(module=module, config_dict_or_path=self.config)
            module.to(self.root_device)
        super().init_deepspeed()
        # DeepSpeed makes its groups with torch's default, half an hour.
        set_group_timeouts(self.timeout)
        if self.stage == 3:
            # DeepSpeed gathers by submodule, and would wait for ranks that make no such pass.
            remove_fetch_hooks(self.deepspeed_engine.optimizer)
            self._shards = LayerShards(module, model)
            self._shards.install()
        with self.whole_weights():
            _require_equal(before, _checksums(module))
            for base in model.bases():
                # Rollouts decode with whole weights and updates gather them: both take the same computation.
                base.probe()

    @override
    def _init_optimizers(self) -> Any:
        optimizer, schedule = super()._init_optimizers()
        # DeepSpeed replaces them by its shards.
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return optimizer, schedule

    # Lightning's checkpoints: the file of a single process

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None, "the Trainer connects it first"
        context = nullcontext() if self._shards is None else self._shards.resident()
        with context:
            return {
                name: parameter.detach().cpu().clone()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return zero_state.optimizer_state(self.optimizers[0], self._trained)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        super(DeepSpeedStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(checkpoint_path).is_dir():
            raise ValueError(
                f"{checkpoint_path} is a folder of DeepSpeed's own shards; this strategy reads the files that it writes"
            )
        return super(DeepSpeedStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        names = {id(p): name for name, p in cast(Module, self.lightning_module).named_parameters()}
        weights = [checkpoint["state_dict"][names[id(parameter)]] for parameter in self._trained]
        zero_state.load(self.optimizers[0], self._trained, weights=weights)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (state,) = checkpoint["optimizer_states"]
        zero_state.load(self.optimizers[0], self._trained, state=state)

    # Evaluation: gathered once

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gathers ZeRO-3 shards for the block. All ranks must enter and leave together."""
        if self._shards is None:
            yield
            return
        with self._shards.whole():
            yield

    def _begin_evaluation(self) -> None:
        assert self._evaluation is None, "evaluations do not overlap"
        self._evaluation = ExitStack()
        self._evaluation.enter_context(self.whole_weights())

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
        self._evaluation = None

    @override
    def on_validation_start(self) -> None:
        self._begin_evaluation()

    @override
    def on_validation_end(self) -> None:
        self._end_evaluation()

    @override
    def on_test_start(self) -> None:
        self._begin_evaluation()

    @override
    def on_test_end(self) -> None:
        self._end_evaluation()

    @override
    def on_predict_start(self) -> None:
        self._begin_evaluation()

    @override
    def on_predict_end(self) -> None:
        self._end_evaluation()


@final
class _TypesAsTheyAre(DeepSpeedPrecision):
    """Converts nothing: Lightning's plugin would convert the frozen base to float32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    @override
    def convert_module(self, module: Module) -> Module:
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        return data

    @override
    def tensor_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def _memgen_of(module: LightningModule) -> MemGenModel:
    model = getattr(module, "memgen", None)
    if not isinstance(model, MemGenModel):
        raise TypeError(f"ZeroStrategy works with the stages of memgen.training, got {type(module).__name__}")
    return model


def _checksums(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Sum and sum of squares of each trained parameter."""
    return {
        name: (float(parameter.detach().double().sum()), float(parameter.detach().double().square().sum()))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _require_equal(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> None:
    """Refuses weights that the strategy has changed.

    Raises:
        RuntimeError: naming the first.
    """
    for name, sums in before.items():
        if after[name] != sums:
            raise RuntimeError(
                f"{name} has other values than before the strategy sharded it (sum {sums[0]:g}, now "
                f"{after[name][0]:g}): its initialisation is lost, or ranks began with different weights"
            )


# ZeRO-3


@final
class LayerShards:
    """Gathers the layers of all bases one at a time, and keeps the ranks' passes in one order.

    Args:
        module: the stage, after DeepSpeed has sharded its parameters.
        model: the stage's model.
    """

    def __init__(self, module: LightningModule, model: MemGenModel) -> None:
        self._module = module
        self._bases = model.bases()
        self._layers = {
            layer: [p for p in layer.parameters() if not p.requires_grad]
            for base in self._bases
            for layer in base._layers
        }
        shared = {id(p) for parameters in self._layers.values() for p in parameters}
        self._resident = [p for p in module.parameters() if id(p) not in shared]
        self._handles: list[RemovableHandle] = []
        self._whole: dict[int, nn.Parameter] = {}
        """Gathered weights of layers, by the address of their storage."""
        self._outputs: list[Tensor] = []
        self._stepping = False

    def install(self) -> None:
        """Adds the hooks by which passes gather what they need."""
        assert not self._handles, "installed once"
        module = self._module
        self._handles = [
            module.register_forward_pre_hook(self._begin_step),
            module.register_forward_hook(self._end_step),
        ]
        for base in self._bases:
            self._handles += [
                base.register_forward_pre_hook(self._before_pass, with_kwargs=True),
                base.register_forward_hook(self._after_pass),
            ]
            base.around = self._around_layer

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        for base in self._bases:
            base.around = None
        self._handles = []

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers everything for the block, layer by layer, so that at most one layer is in memory twice."""
        from deepspeed.runtime.zero import GatheredParameters

        if not self._handles:  # gathered already
            yield
            return
        self.remove()
        with ExitStack() as stack:
            for parameters in (self._resident, *self._layers.values()):
                absent = missing(parameters)
                if absent:
                    stack.enter_context(GatheredParameters(absent))
            try:
                yield
            finally:
                self.install()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Gathers everything outside of the layers for the block, with it all trained weights."""
        from deepspeed.runtime.zero import GatheredParameters

        absent = missing(self._resident)
        with GatheredParameters(absent) if absent else nullcontext():
            yield

    # A training step

    def _begin_step(self, module: Module, args: Any) -> None:
        gather(self._resident)
        self._outputs = []
        self._stepping = True

    def _end_step(self, module: Module, args: Any, loss: Tensor) -> Tensor:
        """Makes the passes that other ranks still need, and adds all passes to the loss, with weight 0."""
        while (code := _agree(FINISHED)) != FINISHED:
            self._empty_pass(code)
        self._stepping = False
        outputs, self._outputs = self._outputs, []
        return loss + cast(Tensor, _ZeroTerm.apply(*outputs)).to(loss.dtype) if outputs else loss

    def _before_pass(self, base: Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        assert isinstance(base, Backbone), "registered on those"
        if not self._stepping:
            raise RuntimeError(
                "a pass outside of a training step needs whole weights: put it into whole_weights(trainer)"
            )
        embeddings: Tensor = args[0]
        adapter = args[2] if len(args) > 2 else kwargs.get("adapter")
        grad = torch.is_grad_enabled()
        mine = self._code(base, adapter, grad=grad)
        while (code := _agree(mine)) != mine:
            self._empty_pass(code)
        if grad:
            # Layers are gathered again in the backward pass, which other ranks have. And autograd takes what was made
            # last first: an input that is older than the empty passes above would release its layer behind theirs.
            own = (
                embeddings.view_as(embeddings)
                if embeddings.requires_grad
                else embeddings.detach().requires_grad_()
            )
            return (own, *args[1:]), kwargs
        return None

    def _after_pass(self, base: Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._outputs.append(output)

    def _code(self, base: Backbone, adapter: str | None, *, grad: bool) -> int:
        """A number for a kind of pass; the lowest goes first: without gradient, then with the weaver's adapter."""
        index = next(i for i, known in enumerate(self._bases) if known is base)
        return (int(grad) * len(self._bases) + index) * len(ADAPTERS) + ADAPTERS.index(adapter)

    def _empty_pass(self, code: int) -> None:
        """A pass over one position whose output is not used."""
        rest, adapter = divmod(code, len(ADAPTERS))
        grad, index = divmod(rest, len(self._bases))
        base = self._bases[index]
        with torch.set_grad_enabled(bool(grad)):
            embeddings = torch.zeros(
                1, base.hidden_size, device=base.device, dtype=base.embedding.dtype, requires_grad=bool(grad)
            )
            view = PackedKVCache(1, base.device).open([PassSegment(rows=[0], counts=[1])])
            output = base.forward(embeddings, view, ADAPTERS[adapter])
            if grad:
                self._outputs.append(output)

    # A layer

    def _around_layer(self, layer: Module, x: Tensor, compute: Callable[[], Any]) -> Any:
        """Computes a layer while its weights are gathered: now, and in the backward pass."""
        self._fetch(layer)
        if torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(lambda _: self._release(layer))
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                output = compute()
        finally:
            self._release(layer)
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(result, Tensor) and result.requires_grad:
            result.register_hook(lambda _: self._fetch(layer))
        return output

    def _fetch(self, layer: Module) -> None:
        parameters = self._layers[layer]
        gather(parameters)
        self._whole |= {p.untyped_storage().data_ptr(): p for p in parameters}

    def _release(self, layer: Module) -> None:
        parameters = self._layers[layer]
        for parameter in parameters:
            self._whole.pop(parameter.untyped_storage().data_ptr(), None)
        release(parameters)

    def _pack(self, tensor: Tensor) -> Tensor | _Part:
        """What autograd saves of a layer: activations as they are, of a weight only which view it was.

        A linear layer saves its weight, transposed, which would keep the gathered storage alive.
        """
        parameter = self._whole.get(tensor.untyped_storage().data_ptr())
        return tensor if parameter is None else _Part(parameter, tensor)


@final
class _Part:
    """A view of a weight whose storage has been released."""

    __slots__ = ("offset", "parameter", "shape", "strides")

    def __init__(self, parameter: nn.Parameter, view: Tensor) -> None:
        self.parameter = parameter
        self.shape, self.strides = view.shape, view.stride()
        self.offset = view.storage_offset() - parameter.storage_offset()


def _unpack(kept: Tensor | _Part) -> Tensor:
    if not isinstance(kept, _Part):
        return kept
    whole = kept.parameter.detach()
    return whole.as_strided(kept.shape, kept.strides, whole.storage_offset() + kept.offset)


class _ZeroTerm(torch.autograd.Function):
    """Zero loss term with zero gradient to every pass, so every rank runs every backward pass, in the same order."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Float[Tensor, ""]:
        ctx.tensors = [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(s, dtype=d, device=w) for s, d, w in ctx.tensors)


def _agree(code: int) -> int:
    """The pass that is next: the lowest that any rank needs."""
    return int(over_ranks(torch.tensor([code]), "min"))
