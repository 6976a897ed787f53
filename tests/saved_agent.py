"""A tiny agent on disk: a base with its tokenizer, and a checkpoint on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memgen.chat import CHATML
from memgen.model.backbone import BackboneConfig
from memgen.training.checkpoint import TextSettings, save_checkpoint
from memgen.types import InsertionKind
from tiny import byte_tokenizer, tiny_causal_lm, tiny_memgen


def save_base(folder: Path) -> Path:
    """The base of `tiny_memgen()`."""
    tiny_causal_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_agent(folder: Path, base: Path, **settings) -> Path:
    """A checkpoint of `tiny_memgen(**settings)` on a saved base."""
    model = tiny_memgen(**settings)
    model.weaver.trained_kinds = set(InsertionKind)
    config = replace(model.config, backbone=BackboneConfig(name=str(base), dtype="float32"))
    text = TextSettings(CHATML, model.reasoner.end_ids)
    learned = settings.get("trigger") in ("tokens", "hidden_states")
    save_checkpoint(model, config, folder, with_trigger=learned, text=text)
    return folder
