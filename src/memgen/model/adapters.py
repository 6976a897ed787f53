"""LoRA adapters on a frozen base, switched without touching `requires_grad`.

PEFT makes the layers and names the tensors. Its own switches (`set_adapter`, `disable_adapter`) change
`requires_grad`, which silently drops every LoRA gradient when they are called between forward and backward; so the
switch here only sets which adapter a layer adds, and the stage that trains decides once, by name, what is trainable.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter (paper, Table 2)."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """Scaling numerator: the update is alpha / r * B A."""
    dropout: float = 0.1
    """Dropout on the adapter's input while training."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an adapter."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r must be at least 1, got {self.r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty; name at least one linear layer, e.g. q_proj")


class AdapterSwitch:
    """Adds adapters to a model and says which one, if any, its layers apply.

    Args:
        model: a frozen base; its layers are replaced in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: list[LoraLayer] = []
        self._active: str | None = None

    @property
    def active(self) -> str | None:
        """The adapter that a pass would apply now."""
        return self._active

    def add(self, name: str, settings: LoraSettings) -> None:
        """Injects a new adapter, float32, initialised so that it changes nothing (B = 0).

        Raises:
            ValueError: if a target name belongs to no linear layer, or to the output head: adapters act on hidden states,
                which do not pass it.
        """
        head = self._head
        linear = sorted({path.rsplit(".", 1)[-1] for path, _ in self._linear()})
        heads = {path.rsplit(".", 1)[-1] for path, module in self._model.named_modules() if module is head}
        for target in settings.target_modules:
            if target in heads:
                raise ValueError(
                    f"lora.target_modules has {target}, the output head, which an adapter would never learn through: it is "
                    f"not part of the hidden states that are read; leave it out, or choose from {linear}"
                )
        missing = [target for target in settings.target_modules if target not in linear]
        if missing:
            raise ValueError(f"lora.target_modules {missing} do not exist in this model; it has {linear}")
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.target_modules),
            bias="none",
        )
        with warnings.catch_warnings():
            # Several adapters on one base are what this class is for.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, self._model, adapter_name=name)
        self._layers = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        for path, parameter in self._model.named_parameters():
            if ".lora_" in path:
                parameter.requires_grad_(True)
                if f".{name}." in path:
                    parameter.data = parameter.data.float()
            else:
                parameter.requires_grad_(False)
        self._apply(None)

    @property
    def _head(self) -> nn.Module | None:
        found: nn.Module | None = getattr(self._model, "get_output_embeddings", lambda: None)()
        return found

    def _linear(self) -> Iterator[tuple[str, nn.Module]]:
        """The layers that may get an adapter, by path."""
        for path, module in self._model.named_modules():
            # A layer that another adapter has wrapped counts; what lies inside it does not.
            inside = ".base_layer" in path or ".lora_" in path
            if isinstance(module, nn.Linear | LoraLayer) and module is not self._head and not inside:
                yield path, module

    def size(self, target_modules: Sequence[str]) -> int:
        """Parameters of an adapter of rank 1 on the named layers; one of rank r has r times as many."""
        return sum(
            int(cast(int, module.in_features)) + int(cast(int, module.out_features))
            for path, module in self._linear()
            if path.rsplit(".", 1)[-1] in target_modules
        )

    def _apply(self, name: str | None) -> None:
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self._active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Applies an adapter (None: the bare base) inside the block, and what was applied before after it."""
        before = self._active
        if before == name:
            yield
            return
        self._apply(name)
        try:
            yield
        finally:
            self._apply(before)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of one adapter by their name in the model."""
        return {
            path: cast(nn.Parameter, parameter)
            for path, parameter in self._model.named_parameters()
            if f".{name}." in path and ".lora_" in path
        }

    def train(self, mode: bool) -> None:
        """Switches the adapters' dropout; the base itself always stays in evaluation mode."""
        for layer in self._layers:
            for dropout in cast(nn.ModuleDict, layer.lora_dropout).values():
                dropout.train(mode)

    @torch.no_grad()
    def assert_untouched(self, name: str) -> None:
        """Raises if a new adapter already changes the base (an initialisation that was lost or overwritten).

        Raises:
            RuntimeError: naming the first tensor that is not zero.
        """
        for path, parameter in self.parameters(name).items():
            if ".lora_B." in path and bool((parameter != 0).any()):
                raise RuntimeError(
                    f"the new adapter's {path} is not zero: its initialisation was overwritten"
                )
