"""Tiny random models of the architectures that must be read right."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama with a key for each query": LlamaConfig(**(COMMON | {"num_key_value_heads": 4})),
    "llama with one key for all queries": LlamaConfig(**(COMMON | {"num_key_value_heads": 1})),
    "llama with stretched angles": LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2 with a tied head": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2 with a window in some layers": Qwen2Config(
        **COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "qwen3 with a tied head": Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=True),
    "qwen3 with wide heads": Qwen3Config(**COMMON, head_dim=16),
    "smollm3": SmolLM3Config(**COMMON, tie_word_embeddings=False),
    "smollm3 with a tied head and layers without positions": SmolLM3Config(
        **COMMON, tie_word_embeddings=True, no_rope_layers=[1, 0]
    ),
    "mistral with a window": MistralConfig(**COMMON, sliding_window=4),
}


def random_lm(config: PretrainedConfig) -> PreTrainedModel:
    """A model with large random weights, ready to be evaluated."""
    torch.manual_seed(0)
    # A model's attention is set in its configuration, which the cases share.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
