"""Counts of benchmarks/backbone_costs.py against real models."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks import backbone_costs
from benchmarks.backbone_costs import CONF, CONFIGS, Batch, configuration, costs, kept, training_model
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.weaver import WeaverConfig

NARROW = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SETTINGS = WeaverConfig(
    prompt_latents=3, inference_latents=2, lora=LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=("q_proj", "up_proj"))
)  # fmt: skip


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setitem(CONFIGS, "narrow", NARROW)
    monkeypatch.setattr(backbone_costs, "weaver_settings", lambda name: SETTINGS)
    return costs("narrow", Batch(rows=3, length=20, answer=6))


def test_counts_of_few_rows_and_layers_give_those_of_many(narrow):
    activations, reasoner, weaver = kept(
        configuration("narrow"), SETTINGS, Batch(rows=3, length=20, answer=6)
    )
    assert (narrow.reasoner_positions, narrow.weaver_positions) == (reasoner, weaver)
    assert narrow.activations == activations


def test_weights_are_those_of_the_modules(narrow):
    plain = AutoModelForCausalLM.from_config(configuration("narrow"), dtype=torch.bfloat16)
    assert narrow.weights == sum(parameter.numel() for parameter in plain.parameters())
    model = training_model(Backbone(plain.eval()), SETTINGS)
    assert narrow.trained_weights == sum(p.numel() for p in model.weaver.own_parameters().values())
    assert (narrow.gradients, narrow.optimizer) == (4 * narrow.trained_weights, 8 * narrow.trained_weights)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "narrow"])
def test_every_backbone_has_its_file(name):
    assert yaml.safe_load((CONF / f"{name}.yaml").read_text())["model"]["memgen"]["backbone"]["name"]
