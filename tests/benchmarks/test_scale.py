"""Formulas of memory and messages, against real modules and against recorded runs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import scale_report, scale_runs
from benchmarks.scale import (
    BACKBONES,
    FLOAT32,
    STRATEGIES,
    WeaverSize,
    Workload,
    gathered_weights,
    memory_needs,
    times,
    traffic,
)
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.weaver import Weaver, WeaverConfig

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "docs" / "results" / "scale" / "runs.json"


def small(tied: bool) -> Qwen2ForCausalLM:
    base = replace(scale_runs.BASE, tied=tied)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=base.vocabulary,
            hidden_size=base.hidden,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            num_key_value_heads=base.kv_heads,
            intermediate_size=base.feed_forward,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "with a head"])
def test_the_weights_of_a_shape_are_those_of_the_module(tied):
    model = small(tied)
    base = replace(scale_runs.BASE, tied=tied)
    assert base.weights == sum(p.numel() for p in model.parameters())
    assert base.layer_weights == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize(
    "shape",
    [WeaverSize(), WeaverSize(rank=4, targets=("q_proj", "k_proj", "o_proj", "down_proj"), prompt_latents=0)],
    ids=["two projections", "one bank"],
)
def test_the_trained_weights_are_those_of_a_weaver(shape):
    lora = LoraSettings(r=shape.rank, target_modules=shape.targets)
    config = WeaverConfig(
        lora=lora, prompt_latents=shape.prompt_latents, inference_latents=shape.inference_latents
    )
    weaver = Weaver(Backbone(small(tied=True)), config, scale_runs.BASE.hidden)
    assert shape.trained(scale_runs.BASE) == sum(p.numel() for p in weaver.own_parameters().values())


@pytest.mark.parametrize("name", BACKBONES)
def test_more_ranks_never_need_more_memory_and_only_zero_3_spares_the_base(name):
    base = BACKBONES[name]
    for strategy in STRATEGIES[1:]:
        needs = [memory_needs(base, WeaverSize(), Workload(), strategy, ranks) for ranks in (2, 8, 64, 512)]
        assert all(a.update >= b.update for a, b in pairwise(needs))
        assert (needs[-1].frozen < 2 * base.weights) == (strategy == "zero3")
        assert needs[0].frozen + needs[0].rollout >= 2 * base.weights


def test_a_single_rank_sends_nothing_and_only_zero_3_sends_weights():
    base = BACKBONES["7B"]
    assert traffic(base, WeaverSize(), Workload(), "zero3", 1).total == 0
    for strategy in ("ddp", "zero1", "zero2"):
        moved = traffic(base, WeaverSize(), Workload(), strategy, 8)
        assert moved.weights == moved.rollout == 0
        assert moved.gradients == pytest.approx(2 * 7 / 8 * FLOAT32 * WeaverSize().trained(base))
    assert traffic(base, WeaverSize(), Workload(), "zero3", 8).weights > 2 * base.weights


def test_a_rollout_takes_less_of_a_cycle_the_more_updates_it_serves():
    shares = [
        times(BACKBONES["7B"], WeaverSize(), Workload(iterations=count), "ddp", 8).rollout_share
        for count in (1, 2, 4)
    ]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < shares[0] < 1


@pytest.fixture(scope="module")
def content():
    if not RECORDED.exists():
        pytest.skip(f"{RECORDED} does not exist; run `make bench-scale`")
    return json.loads(RECORDED.read_text())


def test_recorded_runs_held_and_gathered_what_the_formulas_say(content):
    base, weaver = scale_report.shape_of(content)
    seen = set()
    for case in content["cases"]:
        strategy = case["strategy"]
        if case["stage"] != "weaver SFT" or strategy == scale_runs.NUDGED:
            continue
        needs = memory_needs(base, weaver, Workload(), strategy, case["ranks"], FLOAT32)
        for held in case["held_bytes"]:
            assert held["frozen"] == pytest.approx(needs.frozen, rel=1e-3), strategy
            assert held["optimizer"] == pytest.approx(needs.optimizer, rel=1e-3), strategy
        if strategy == "zero3":
            for bytes_of_steps, passes in zip(case["gathered_bytes"], case["passes"], strict=True):
                for gathered, (without, with_gradient) in zip(bytes_of_steps, passes, strict=True):
                    formula = gathered_weights(base, weaver, without, with_gradient, FLOAT32)
                    assert gathered == pytest.approx(formula, rel=1e-3)
        seen.add(strategy)
    assert seen == set(STRATEGIES)


def test_recorded_runs_agree_with_one_process_and_resume_as_if_nothing_had_happened(content):
    assert len(content["cases"]) == len(scale_runs.RUNS) * len(scale_runs.STAGES)
    for case in content["cases"]:
        limit = 1e-5 if case["stage"] == "weaver SFT" else 3e-5
        scale = max(map(abs, case["losses"]))
        assert case["largest_loss_difference"] <= limit * max(1.0, scale), (case["strategy"], case["stage"])
        assert case["resumed_loss_difference"] == 0.0
        assert case["resumed_weight_difference"] == 0.0


def test_every_tensor_that_a_rank_holds_is_counted_once():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(3, 4, bias=False))
    module[1].weight = module[0].weight
    module.requires_grad_(False)
    module.append(torch.nn.Linear(2, 2, bias=False))
    assert scale_runs.held_weights(module) == {"frozen": 48, "trained": 16}
