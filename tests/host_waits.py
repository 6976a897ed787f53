"""Where the host waits for the device, seen without one.

The device's are the model's weights, what is moved to a device, and what is computed from either.
"""

from __future__ import annotations

import traceback
import weakref
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CALLS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods by which the host reads a tensor; some are no operation on a CPU, so that only their call is seen."""
OPERATIONS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal.default")
"""Operations that give the host a number, or whose result has a shape that depends on values."""

PLAIN = "/kernels/reference.py"
"""The plain-torch operations: on CUDA, Triton kernels take their place."""


class HostWaits:
    """Lists the places in the package at which the host reads what was computed from the device's tensors.

    Args:
        model: whose parameters and buffers are the device's.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.places: list[str] = []
        self.allowed = 0
        self._device: dict[int, weakref.ref] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._device:
            self._device[key] = weakref.ref(storage, lambda _: self._device.pop(key, None))

    def _on_device(self, values) -> bool:
        return any(
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata in self._device
            for leaf in tree_leaves(values)
        )

    def _note(self, name: str) -> None:
        if not self.allowed:
            frames = [f for f in traceback.extract_stack() if not f.filename.endswith("/host_waits.py")]
            ours = [f for f in frames if "/memgen/" in f.filename]
            if ours and ours[-1].filename.endswith(PLAIN):
                return
            where = (ours or [f for f in frames if "/torch/" not in f.filename])[-1]
            self.places.append(f"{name}: {where.filename.rsplit('/', 1)[-1]}:{where.lineno} {where.line}")

    @contextmanager
    def watching(self):
        """Lists what is read inside."""
        with _Calls(self), _Operations(self):
            yield self

    def allow(self, function):
        """A function that may read: its calls are counted by the caller, not listed here."""

        def inside(*args, **kwargs):
            self.allowed += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.allowed -= 1

        return inside


class _Calls(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        to_host = name == "to" and "cpu" in args[1:]
        if (name in CALLS or to_host) and self.waits._on_device(args[:1]):
            self.waits._note(name)
        result = func(*args, **(kwargs or {}))
        if name == "to" and any(isinstance(a, torch.device) for a in (*args, *(kwargs or {}).values())):
            # A copy, as between two devices: what the host keeps of it stays the host's.
            result = result.clone() if result is args[0] else result
            self.waits._add(result)
        return result


class _Operations(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        device = self.waits._on_device((args, kwargs))
        if device:
            name = str(func)
            masks = "aten.index" in name and any(
                getattr(leaf, "dtype", None) == torch.bool for leaf in tree_leaves(args[1:2])
            )
            if masks or "repeat_interleave.Tensor" in name or any(part in name for part in OPERATIONS):
                self.waits._note(name)
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.waits._add(leaf)
        return result
