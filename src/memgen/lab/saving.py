"""Writes a model and its tokenizer as a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path) -> None:
    """Saves configuration, weights and tokenizer.

    Differs from `model.save_pretrained`: it writes one file, shows no bar, and does not import what that does for other
    cases (deepspeed, several seconds).

    Args:
        model: an output embedding that is the input embedding is not stored twice.
        tokenizer: any; None: there is one in the directory.
        directory: an existing directory.

    Raises:
        OSError: if the disk is full or not writable.
    """
    state = model.state_dict()
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    tensors = {name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}
    try:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"could not write {directory / 'model.safetensors'}: {error}") from error
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
