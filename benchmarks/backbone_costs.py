"""What weaver SFT and decoding need on real backbones: memory and forward positions, counted from their configurations alone.

    python -m benchmarks.backbone_costs [--rows 16] [--length 128] [--answer 32] [--json FILE]
    python -m benchmarks.backbone_costs --measure [--checkpointing]    # steps on lab:smollm2 itself, for comparison

Frozen weights are those of the model that transformers builds on the meta device, trained ones those of the weaver in
`conf/backbone/`. What a step keeps for its backward pass is counted in real steps of one and of two rows on models of two and
of three layers of the real widths (random weights, few tokens in the vocabulary): a further layer or row keeps as much as the
last. With checkpointing that is the layers' inputs and what one layer keeps. The backward pass's own temporary tensors and
the allocator's reserve come on top.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks.scale import FLOAT32, Decoder, WeaverSize
from memgen.lab.assets import resolve_asset
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone, BackboneConfig, load_backbone
from memgen.model.boundary import Boundaries, BoundaryConfig
from memgen.model.memgen import MemGenModel
from memgen.model.reasoner import Reasoner
from memgen.model.trigger import ConstantTrigger
from memgen.model.weaver import Weaver, WeaverConfig
from memgen.objectives.sft import token_loss
from memgen.types import InsertionPlan, TokenBatch

CONF = Path(__file__).resolve().parents[1] / "conf" / "backbone"
MIB = 1 << 20
ITEM = 2
"""Bytes of a bfloat16 number: frozen weights, activations and caches."""

CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "smollm3-3b": {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
        "pad_token_id": 128004,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""What of the published config.json decides the counts, by the name of the file in `conf/backbone`."""


@dataclass(frozen=True)
class Batch:
    """Rows of weaver SFT with latents at the prompt's end."""

    rows: int = 16
    length: int = 128
    """Tokens of a row, its answer included."""
    answer: int = 32
    """Supervised tokens of a row."""


@dataclass(frozen=True)
class Costs:
    """Bytes, and positions of one training step.

    Attributes:
        weights: number of frozen weights.
        frozen: the frozen weights in bfloat16.
        trained_weights: number of trained weights.
        trained: the trained weights in float32.
        gradients: theirs.
        optimizer: AdamW's two moments.
        cache: keys and values of 1,000 positions.
        activations: what a step keeps for its backward pass.
        activations_checkpointing: the same with `model.checkpointing: true`.
        reasoner_positions: that a training step reads through the reasoner.
        weaver_positions: that it reads through the weaver.
    """

    weights: int
    frozen: int
    trained_weights: int
    trained: int
    gradients: int
    optimizer: int
    cache: int
    activations: int
    activations_checkpointing: int
    reasoner_positions: int
    weaver_positions: int


def configuration(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a backbone, some of it changed."""
    values = {**CONFIGS[name], **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def weaver_settings(name: str) -> WeaverConfig:
    """The weaver of a file of `conf/backbone`."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())["model"]["memgen"]["weaver"]
    lora = values["lora"]
    return WeaverConfig(
        prompt_latents=values["prompt_latents"],
        inference_latents=values["inference_latents"],
        lora=LoraSettings(
            r=lora["r"], alpha=lora["alpha"], dropout=0.0, target_modules=tuple(lora["target_modules"])
        ),
    )


def training_model(backbone: Backbone, settings: WeaverConfig) -> MemGenModel:
    """A model whose weaver is trained, without dropout, with latents at the end of the prompt alone."""
    weaver = Weaver(backbone, settings, backbone.hidden_size)
    texts = ["."] * backbone.embedding.shape[0]
    boundaries = Boundaries(BoundaryConfig(delimiters=(".",), max_inference_insertions=0), texts)
    model = MemGenModel(Reasoner(backbone, ()), weaver, ConstantTrigger(1.0), boundaries)
    model.train_only(weaver)
    return model


def rows_of(batch: Batch, vocabulary: int) -> tuple[TokenBatch, InsertionPlan]:
    """Random rows and their plan."""
    ids = torch.randint(vocabulary, (batch.rows, batch.length), generator=torch.Generator().manual_seed(0))
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[:, batch.length - batch.answer :] = True
    tokens = TokenBatch(ids=ids, lengths=torch.full((batch.rows,), batch.length), supervised=supervised)
    return tokens, InsertionPlan([[(batch.length - batch.answer, 0)]] * batch.rows)


def kept(config: PretrainedConfig, settings: WeaverConfig, batch: Batch) -> tuple[int, int, int]:
    """Bytes that autograd keeps in a step's forward pass, and the positions that reasoner and weaver read.

    Weights are not counted, and a tensor that several operations keep is counted once.
    """
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = training_model(Backbone(plain), settings)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    tokens, plan = rows_of(batch, config.vocab_size)
    model.label_logprobs(tokens, plan)  # What is found out at the first pass is not the step's.
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # So that no other tensor gets its place.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, woven = model.label_logprobs(tokens, plan)
    return sum(found.values()), woven.work.reasoner_positions, woven.work.weaver_positions


def costs(name: str, batch: Batch) -> Costs:
    """Everything of one backbone.

    Args:
        name: of its file in `conf/backbone`.
        batch: of a training step.
    """
    config, settings = configuration(name), weaver_settings(name)
    with torch.device("meta"):
        frozen = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Decoder(
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
        head, config.intermediate_size, config.vocab_size, config.tie_word_embeddings,
    )  # fmt: skip
    size = WeaverSize(
        settings.lora.r, settings.lora.target_modules, settings.prompt_latents, settings.inference_latents
    )
    trained = size.trained(shape)
    few = {"vocab_size": 512, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    rows = [Batch(count, batch.length, batch.answer) for count in (1, 2)]
    (two, reasoner, weaver), (two_of_two_rows, _, _) = (
        kept(configuration(name, num_hidden_layers=2, **few), settings, count) for count in rows
    )
    three, three_of_two_rows = (
        kept(configuration(name, num_hidden_layers=3, **few), settings, count)[0] for count in rows
    )
    # Of all rows: a model of two layers, and a further layer.
    more = batch.rows - 1
    first = two + more * (two_of_two_rows - two)
    layer = three - two + more * ((three_of_two_rows - two_of_two_rows) - (three - two))
    # In backward: the inputs of all layers of both passes, and what the layer keeps that is recomputed.
    answered = settings.prompt_latents + batch.answer
    inputs = ITEM * config.hidden_size * batch.rows * (weaver + answered) * shape.layers
    return Costs(
        weights=frozen,
        frozen=ITEM * frozen,
        trained_weights=trained,
        trained=FLOAT32 * trained,
        gradients=FLOAT32 * trained,
        optimizer=2 * FLOAT32 * trained,
        cache=1000 * shape.cache_bytes(ITEM),
        activations=first + (shape.layers - 2) * layer,
        activations_checkpointing=inputs + first - layer,
        reasoner_positions=batch.rows * reasoner,
        weaver_positions=batch.rows * weaver,
    )


def measure(batch: Batch, checkpointing: bool, steps: int = 2) -> dict[str, float]:
    """Optimizer steps on lab:smollm2 itself: CPU seconds of one, and this process's peak resident memory."""
    torch.manual_seed(0)
    backbone = load_backbone(BackboneConfig("lab:smollm2", dtype="bfloat16"), resolve_asset)
    model = training_model(backbone, weaver_settings("smollm2-135m"))
    model.use_checkpointing(checkpointing)
    optimizer = torch.optim.AdamW(model.weaver.own_parameters().values(), lr=1e-4)
    tokens, plan = rows_of(batch, backbone.embedding.shape[0])
    seconds = []
    for _ in range(steps):
        begin = time.process_time()
        logprobs, _ = model.label_logprobs(tokens, plan)
        token_loss(logprobs, batch.rows * batch.answer).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_seconds": min(seconds), "peak_resident_mib": peak / MIB}


def table(found: dict[str, Costs]) -> str:
    """Markdown: a row per backbone, MiB."""
    head = (
        "backbone", "frozen weights", "frozen", "trained weights", "trained", "gradients", "AdamW", "activations",
        "with checkpointing", "cache per 1,000 positions", "positions of a step: reasoner", "weaver",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, cost in found.items():
        sizes = [
            f"{value / MIB:,.0f}"
            for value in (
                cost.trained, cost.gradients, cost.optimizer, cost.activations, cost.activations_checkpointing, cost.cache,
            )
        ]  # fmt: skip
        cells = [
            name, f"{cost.weights:,}", f"{cost.frozen / MIB:,.0f}", f"{cost.trained_weights:,}", *sizes,
            f"{cost.reasoner_positions:,}", f"{cost.weaver_positions:,}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, counts (or measures) and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=Batch.rows, help="of a batch")
    parser.add_argument("--length", type=int, default=Batch.length, help="tokens of a row")
    parser.add_argument("--answer", type=int, default=Batch.answer, help="tokens of a row's answer")
    parser.add_argument("--measure", action="store_true", help="measure steps on lab:smollm2 instead")
    parser.add_argument("--checkpointing", action="store_true", help="with --measure: recompute activations")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    batch = Batch(options.rows, options.length, options.answer)
    result: dict[str, Any]
    if options.measure:
        result = measure(batch, options.checkpointing)
        print(json.dumps(result, indent=2))
    else:
        found = {name: costs(name, batch) for name in CONFIGS}
        result = {name: asdict(cost) for name, cost in found.items()}
        print(table(found))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"batch": asdict(batch), **result}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
