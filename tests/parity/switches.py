"""The optimisations that can be switched, one by one and together: none may change a result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import memgen.kernels as kernels
from interpreted import whole_reductions
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenModel
from memgen.types import Generation

# Triton looks at this when it sees a kernel, and kernels are imported at their first use: no test runs before this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class Switches:
    """What is switched on.

    Attributes:
        direct: decoders of the plain shape are computed without calling their modules.
        kernels: which implementation of the tensor operations runs.
        recompute: activation checkpointing.
        static: decoding steps in which no row inserts have a fixed shape.
    """

    direct: bool = False
    kernels: kernels.Implementation = "reference"
    recompute: bool = False
    static: bool = False

    @contextmanager
    def kernels_forced(self) -> Iterator[None]:
        """The tensor operations run as chosen inside."""
        if self.kernels == "triton":
            if find_spec("triton") is None:
                pytest.skip("triton is not installed")
            if os.environ.get("TRITON_INTERPRET") != "1":
                pytest.skip("kernels are compiled where there is a GPU; the tests marked gpu run them")
            with kernels.forced("triton"), whole_reductions():
                yield
            return
        with kernels.forced(self.kernels):
            yield

    def apply(self, model: MemGenModel) -> MemGenModel:
        """Sets the switches that belong to a model."""
        model.use_checkpointing(self.recompute)
        for base in model.bases():
            base.compute_directly(self.direct)
        return model

    def generate(
        self,
        model: MemGenModel,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        **options: Any,
    ) -> Generation:
        """Answers with or without steps of a fixed shape."""
        switch = "on" if self.static else "off"
        return generate(model, prompts, replace(settings, static_step=switch), **options)


SWITCHES = {
    "all off": Switches(),
    "direct decoder": Switches(direct=True),
    "recomputation": Switches(recompute=True),
    "static step": Switches(static=True),
    "all on": Switches(direct=True, kernels="triton", recompute=True, static=True),
}
