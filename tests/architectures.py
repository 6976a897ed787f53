"""Tiny random models of the architectures that must be read right."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    CTRLConfig,
    DiffLlamaConfig,
    FalconConfig,
    GemmaConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
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


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Settings of a kind of rotary positions."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


ROPES: dict[str, dict[str, Any]] = {
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "llama3": rope(
        "llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "longrope": rope(
        "longrope",
        factor=4.0,
        original_max_position_embeddings=32,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.5, 2.0, 3.0, 4.0],
    ),
}
WIDE = COMMON | {"num_key_value_heads": 4}
"""Architectures that share no keys."""

PROVEN: dict[str, tuple[PretrainedConfig, str]] = {
    # A configuration changes the settings that it is given.
    **{
        f"llama, {kind}": (LlamaConfig(**COMMON, **copy.deepcopy(settings)), "direct")
        for kind, settings in ROPES.items()
    },
    "phi3, longrope": (
        Phi3Config(**COMMON, original_max_position_embeddings=32, **copy.deepcopy(ROPES["longrope"])),
        "modules",
    ),
    "phi3": (Phi3Config(**COMMON), "modules"),
    "ministral": (MinistralConfig(**COMMON, head_dim=8, sliding_window=7), "direct"),
    "ministral3 that scales no query": (
        Ministral3Config(
            **COMMON,
            head_dim=8,
            **rope("default", original_max_position_embeddings=64, llama_4_scaling_beta=0.0),
        ),
        "direct",
    ),
    "ministral3 whose later queries are scaled": (
        Ministral3Config(
            **COMMON,
            head_dim=8,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                llama_4_scaling_beta=0.3,
            ),
        ),
        "modules",
    ),
    "granite": (GraniteConfig(**COMMON, residual_multiplier=0.5, embedding_multiplier=3.0), "modules"),
    "phi": (PhiConfig(**WIDE), "modules"),
    "gpt2": (GPT2Config(**WIDE), "modules"),
    "gpt_neox": (GPTNeoXConfig(**COMMON), "modules"),
    "olmo": (OlmoConfig(**COMMON), "modules"),
    "olmo2": (Olmo2Config(**COMMON), "modules"),
    "olmo3": (Olmo3Config(**COMMON, sliding_window=7), "modules"),
    "ctrl, which scales its input where it lies": (
        CTRLConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=128),
        "modules",
    ),
    "stablelm": (StableLmConfig(**COMMON), "modules"),
    "starcoder2": (Starcoder2Config(**COMMON, sliding_window=7), "modules"),
    "mixtral": (MixtralConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2), "modules"),
    "qwen3 with experts": (
        Qwen3MoeConfig(**COMMON, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16),
        "modules",
    ),
    "opt": (OPTConfig(**(WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32})), "modules"),
    "nemotron": (NemotronConfig(**COMMON), "modules"),
    "glm4": (Glm4Config(**COMMON, head_dim=8), "modules"),
}
"""Architectures that are read right, and whether directly or by their modules."""

REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "diffllama": (DiffLlamaConfig(**COMMON), "calls attention for its layers"),
    "cohere": (CohereConfig(**COMMON), "scales its logits"),
    "gemma": (GemmaConfig(**COMMON, head_dim=8), "changes its embeddings"),
    "falcon": (FalconConfig(**COMMON), "computes attention by itself"),
    "bert": (BertConfig(**COMMON, is_decoder=True), "has no list of 2 decoder layers"),
    "moe with sinks": (
        GptOssConfig(**COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "soft capping or sinks",
    ),
}
"""Architectures that are refused when they are loaded, and why."""


def random_lm(config: PretrainedConfig) -> PreTrainedModel:
    """A model with large random weights, ready to be evaluated."""
    torch.manual_seed(0)
    # A model's attention is set in its configuration, which the cases share.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def uneven_lm(config: PretrainedConfig) -> PreTrainedModel:
    """As `random_lm`, with norm weights far from 1, as real models have them."""
    model = random_lm(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 1.7, generator=generator)
    return model
