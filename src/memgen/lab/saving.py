"""Writes a model with tied embeddings and its tokenizer as a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves configuration, weights and tokenizer.

    Differs from `model.save_pretrained`: it writes one file, shows no bar, and does not import what that does for other
    cases (deepspeed, several seconds).

    Args:
        model: its output embedding is its input embedding, and is not stored twice.
        tokenizer: any.
        directory: an existing directory.
    """
    assert model.config.tie_word_embeddings, "the output embedding is left out"
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
