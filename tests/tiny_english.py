"""A random model of two layers for the lab's English tasks, and checkpoints on it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from memgen.chat import load_tokenizer
from memgen.lab.english import EnglishLab
from memgen.lab.saving import save_backbone
from memgen.lab.tiny import tiny_tokenizer
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.training.checkpoint import save_checkpoint

LORA = LoraSettings(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"))


def save_english_base(folder: Path) -> None:
    """Writes the model and a byte-level tokenizer made of the tasks' own text."""
    lab = EnglishLab(("shop", "open", "bill", "copy"))
    text = "\n".join(f"{example.question}\n{example.target}" for example in lab.examples("train")[:80])
    tokenizer = tiny_tokenizer(text, vocab_size=400, max_length=512)
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    folder.mkdir(parents=True)
    save_backbone(Qwen2ForCausalLM(settings), tokenizer, folder)


def save_english_checkpoint(
    base: Path, folder: Path, *, trigger: bool = False, insertions: int = 0, lora: bool = False
) -> None:
    """Writes a random weaver that always invokes, or with it a learned trigger that never does, or LoRA of the reasoner.

    Args:
        base: folder of the model.
        folder: where to.
        trigger: whether there is a learned trigger.
        insertions: most insertions inside an answer.
        lora: whether an adapter of the reasoner stands in the weaver's place.
    """
    count, kind = (0, "lora") if lora else (2, "weaver")
    config = MemGenConfig(
        backbone=BackboneConfig(name=str(base), dtype="bfloat16"),
        weaver=WeaverConfig(kind=kind, prompt_latents=count, inference_latents=count, lora=LORA),
        trigger=TriggerConfig(kind="tokens" if trigger else "always", lora=LORA, initial_invoke_bias=-60.0),
        boundaries=BoundaryConfig(delimiters=(",",), max_inference_insertions=insertions),
    )
    model = MemGenModel.build(config, load_tokenizer(str(base)), str)
    save_checkpoint(model, config, folder, with_trigger=trigger)
