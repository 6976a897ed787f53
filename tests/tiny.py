"""Tiny models made from a config, and a byte-level tokenizer: everything that tests need of a language model."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.types import InsertionKind, InsertionPlan, TokenBatch


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML's special tokens, pad = end of turn (the case that inference of padding gets wrong)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )


def tiny_causal_lm(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random 2-layer Qwen2 over the byte tokenizer, scaled so that greedy text is varied."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "tie_word_embeddings": True,
        "eos_token_id": 258,
        "pad_token_id": 258,
        "bos_token_id": None,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(settings | changes))).eval()


LORA = LoraSettings(r=4, alpha=8, dropout=0.0)
DELIMITERS = tuple(chr(c) for c in range(97, 123))
"""Frequent enough in random text that rows insert at different steps."""


def tiny_memgen(
    seed: int = 0,
    *,
    trigger: str = "always",
    own_bases: bool = False,
    prompt_latents: int = 3,
    inference_latents: int = 2,
    cap: int = 3,
    reads: str = "embeddings",
    lora: LoraSettings = LORA,
    trained: bool = True,
    delimiters: tuple[str, ...] = DELIMITERS,
    probability: float = 0.5,
    double: bool = False,
    source: str = "weaver",
    arguments: dict[str, Any] | None = None,
    external: dict[str, Any] | None = None,
    **backbone: Any,
) -> MemGenModel:
    """A MemGenModel on a tiny base; `trained` moves every new tensor away from its initial value.

    `source` is the kind of what stands in the weaver's place, `arguments` are its own; `external` are settings of what the
    weaver reads besides the stream.
    """
    config = MemGenConfig(
        weaver=WeaverConfig(
            kind=source,
            arguments=arguments or {},
            lora=lora,
            prompt_latents=prompt_latents,
            inference_latents=inference_latents,
            reads=reads,
            query_scale=0.3,
            **(external or {}),
        ),
        trigger=TriggerConfig(kind=trigger, lora=lora, probability=probability),
        boundaries=BoundaryConfig(delimiters=delimiters, max_inference_insertions=cap),
    )
    own = {"hidden_size": 48, "intermediate_size": 40}
    model = MemGenModel.assemble(
        config,
        Backbone(tiny_causal_lm(seed, **backbone), "tiny"),
        byte_tokenizer(),
        weaver_base=Backbone(tiny_causal_lm(seed + 1, **own), "tiny weaver") if own_bases else None,
        trigger_base=Backbone(tiny_causal_lm(seed + 2, **own), "tiny trigger") if own_bases else None,
    )
    if trained:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part in (model.weaver, model.trigger):
                for parameter in part.own_parameters().values():
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    if double:
        for base in model.bases():
            _exact_norms(base)
        model.double()
    return model.eval()


def _exact_norms(base: Backbone) -> None:
    """Hugging Face's norms compute in float32 whatever the type; for comparisons in float64 they must not."""
    for module in list(base.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":
                exact = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                exact.requires_grad_(False)
                setattr(module, name, exact)


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Rows of printable bytes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(65, 91, (length,), generator=generator).tolist() for length in lengths]


def random_batch(
    lengths: list[int], prompts: list[int], points: list[list[int]], seed: int = 0
) -> tuple[TokenBatch, InsertionPlan]:
    """Rows whose tokens behind the prompt are supervised, and a plan; a point at the prompt's end is of its kind."""
    rows = random_rows(lengths, seed)
    marks = [[i >= p for i in range(n)] for n, p in zip(lengths, prompts, strict=True)]
    kinds = [
        [int(InsertionKind.PROMPT if point == p else InsertionKind.INFERENCE) for point in row]
        for row, p in zip(points, prompts, strict=True)
    ]
    return TokenBatch.from_rows(rows, marks), InsertionPlan.from_rows(points, kinds)
