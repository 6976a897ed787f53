"""What a piece of work allocates."""

from __future__ import annotations

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
