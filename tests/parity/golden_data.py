"""Reads the inputs and outputs of the released code, and builds our model on its weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from switches import Switches
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.training.checkpoint import released_names
from memgen.types import TokenBatch

ROOT = Path(os.environ.get("MEMGEN_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
VARIANTS = sorted(p.name for p in ROOT.glob("*") if (p / "config.json").is_file()) if ROOT.is_dir() else []


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(ROOT)


def left_aligned(ids: Tensor, attention_mask: Tensor, supervised: Tensor | None = None) -> TokenBatch:
    """The rows of a released batch, padded on any side (left-padded prompt + right-padded answer too), as ours."""
    real = attention_mask.bool()
    marks = torch.zeros_like(real) if supervised is None else supervised
    return TokenBatch.from_rows(
        [row[keep].tolist() for row, keep in zip(ids, real, strict=True)],
        [row[keep].tolist() for row, keep in zip(marks, real, strict=True)],
    )


@dataclass(frozen=True)
class Golden:
    variant: str
    config: dict[str, Any]
    switches: Switches = field(default_factory=Switches)

    @property
    def path(self) -> Path:
        return ROOT / self.variant

    def case(self, name: str) -> dict[str, Tensor]:
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"{self.variant} has no case {name}")
        return load_file(path)

    def language_model(self, part: str) -> Qwen2ForCausalLM:
        identical = self.config["bases_identical"]
        sizes, common = self.config[part], self.config["qwen2_common"]
        config = Qwen2Config(
            **sizes,
            max_position_embeddings=common["max_position_embeddings"],
            tie_word_embeddings=common["tie_word_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": common["rope_theta"]},
            rms_norm_eps=common["rms_norm_eps"],
            hidden_act=common["hidden_act"],
            eos_token_id=self.config["eos_token_id"],
        )
        model = Qwen2ForCausalLM(config)
        weights = load_file(self.path / f"base_{'reasoner' if identical else part}.safetensors")
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"}
        assert not unexpected
        model.tie_weights()
        return model

    def base(self, part: str) -> Backbone:
        return Backbone(self.language_model(part), f"golden:{part}")

    def memgen_config(self, trigger: str = "tokens", cap: int | None = None) -> MemGenConfig:
        lora = self.config["lora"]
        settings = LoraSettings(
            r=lora["r"],
            alpha=lora["lora_alpha"],
            dropout=lora["lora_dropout"],
            target_modules=tuple(lora["target_modules"]),
        )
        return MemGenConfig(
            weaver=WeaverConfig(
                lora=settings,
                prompt_latents=self.config["prompt_latents_len"],
                inference_latents=self.config["inference_latents_len"],
            ),
            trigger=TriggerConfig(kind=trigger, lora=settings),
            boundaries=BoundaryConfig(
                delimiters=tuple(self.config["delimiters"]),
                max_inference_insertions=self.config["max_inference_aug_num"] if cap is None else cap,
            ),
        )

    def memgen(
        self, trigger: str = "tokens", cap: int | None = None, *, with_weights: bool = True
    ) -> MemGenModel:
        shared = self.config["bases_identical"]
        model = MemGenModel.assemble(
            self.memgen_config(trigger, cap),
            self.base("reasoner"),
            tokenizer(),
            weaver_base=None if shared else self.base("weaver"),
            trigger_base=None if shared or trigger != "tokens" else self.base("trigger"),
        )
        if with_weights:
            weights = load_file(self.path / "memgen.safetensors")
            names = released_names(model)
            assert set(names) <= set(weights)
            with torch.no_grad():
                for name, parameter in names.items():
                    parameter.copy_(weights[name])
        return self.switches.apply(model).eval()


def golden(variant: str, switches: Switches | None = None) -> Golden:
    config = json.loads((ROOT / variant / "config.json").read_text())
    return Golden(variant, config, switches or Switches(direct=True))
