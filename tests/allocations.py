"""What a piece of work allocates."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The largest memory that any operation asks for, forward or backward, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.where = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or leaf.untyped_storage().data_ptr() in given:
                continue  # A view, or in place: nothing is allocated.
            elements = leaf.untyped_storage().nbytes() // 4
            if elements > self.elements:
                self.elements, self.where = elements, f"{func} -> {tuple(leaf.shape)}"
        return result


class Held(TorchDispatchMode):
    """The bytes that operations have allocated inside and that something still holds, autograd's graph too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in filter(is_tensor, tree_leaves(result)):
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self._alive:
                continue
            self.bytes += size
            self._alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
        return result

    def _gone(self, key: int, size: int) -> None:
        self.bytes -= size
        del self._alive[key]


def is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)
