"""Reinforcement stages on a tiny model with a real Trainer, and environments for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memgen.data import EnvironmentData
from memgen.environments.base import (
    Environment,
    Episode,
    Example,
    InteractiveEnvironment,
    Observation,
    Reward,
    Step,
)
from memgen.generation.rollout import EpisodeSettings
from memgen.generation.sampling import GenerationSettings
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.training.optimizer import OptimizerSettings
from memgen.training.trigger_rl import TriggerRL
from memgen.training.weaver_grpo import WeaverGRPO
from tiny import DELIMITERS


class Vowels(Environment):
    """Rewards the share of vowels in an answer's text: every answer to a prompt gets another reward."""

    name = "vowels"

    def __init__(self, items: int = 12) -> None:
        self.items = items

    def examples(self, split):
        count = self.items if split == "train" else 3
        return [Example(id=f"{split}-{i}", question=f"say {i}", target="a", answer="a") for i in range(count)]

    def messages(self, example):
        return [{"role": "user", "content": example.question}]

    def reward(self, example, answer):
        share = sum(c in "aeiou" for c in answer.lower()) / max(1, len(answer))
        return Reward(share, {"vowels": share})


class _Countdown(Episode):
    """Is over after as many turns as the item says; an item may fail on its way."""

    def __init__(self) -> None:
        self.left, self.score, self.closed = 0, 0.0, False

    def reset(self, example):
        self.left, self.fails = int(example.meta["turns"]), example.meta.get("fails")
        self.score, self.steps = 0.0, 0
        return Observation(f"{self.left} to go")

    def step(self, action):
        self.steps += 1
        self.left -= 1
        self.score += sum(c in "aeiou" for c in action.lower())
        if self.fails == self.steps:
            return Step("", done=False, fault="it broke")
        return Step(
            f"{self.left} to go, {len(action)} letters", done=self.left == 0, parts={"letters": len(action)}
        )

    def reward(self):
        return Reward(self.score, {"left": float(self.left)})

    def close(self):
        self.closed = True


class Countdown(InteractiveEnvironment):
    name = "countdown"
    max_turns = 4

    def __init__(self, turns: tuple[int, ...] = (1, 2, 3), fails: dict[int, int] | None = None) -> None:
        self.turns, self.fails = turns, fails or {}
        self.made: list[_Countdown] = []

    def examples(self, split):
        return [
            Example(f"{split}-{i}", f"count {n}", "", "", meta={"turns": n, "fails": self.fails.get(i)})
            for i, n in enumerate(self.turns)
        ]

    def messages(self, example):
        return [{"role": "system", "content": "count"}]

    def episode(self):
        self.made.append(_Countdown())
        return self.made[-1]


def memgen_config(base: Path, trigger: str = "always", **boundaries: Any) -> MemGenConfig:
    lora = LoraSettings(r=4, alpha=8, dropout=0.0)
    return MemGenConfig(
        backbone=BackboneConfig(name=str(base), dtype="float32"),
        weaver=WeaverConfig(lora=lora, prompt_latents=3, inference_latents=2),
        trigger=TriggerConfig(kind=trigger, lora=lora),
        boundaries=BoundaryConfig(delimiters=DELIMITERS, max_inference_insertions=2, **boundaries),
    )


def make_data(base: Path, environment: Environment | None = None, **settings: Any) -> EnvironmentData:
    settings.setdefault("batch_size", 2)
    return EnvironmentData(
        environment or Vowels(),
        tokenizer=str(base),
        chat_template="chatml",
        learn_from="rollouts",
        val_batch_size=2,
        **settings,
    )


def _moved(stage: Any) -> None:
    """Called in set-up: as if weaver and trigger had been trained, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (stage.memgen.weaver, stage.memgen.trigger):
            for parameter in part.own_parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def make_grpo(
    base: Path, *, trigger: str = "always", boundaries: dict[str, Any] | None = None, **settings: Any
) -> WeaverGRPO:
    torch.manual_seed(0)
    settings.setdefault("optimizer", OptimizerSettings(lr=1e-2, warmup_ratio=0.0, final_lr_ratio=1.0))
    settings.setdefault("rollout", GenerationSettings(max_new_tokens=10, temperature=1.0, group_size=4))
    settings.setdefault("generation", GenerationSettings(max_new_tokens=8))
    settings.setdefault("episodes", EpisodeSettings())
    return _prepared(WeaverGRPO(memgen_config(base, trigger, **(boundaries or {})), **settings))


def make_trigger(
    base: Path, *, trigger: str = "tokens", boundaries: dict[str, Any] | None = None, **settings: Any
) -> TriggerRL:
    torch.manual_seed(0)
    settings.setdefault("optimizer", OptimizerSettings(lr=1e-2, warmup_ratio=0.0, final_lr_ratio=1.0))
    settings.setdefault(
        "rollout",
        GenerationSettings(max_new_tokens=10, temperature=1.0, group_size=4, sample_decisions=True),
    )
    settings.setdefault("generation", GenerationSettings(max_new_tokens=8))
    settings.setdefault("allow_untrained_weaver", True)
    return _prepared(TriggerRL(memgen_config(base, trigger, **(boundaries or {})), **settings))


def _prepared(stage: Any) -> Any:
    """A stage whose new tensors are moved away from their initial values once the model is built."""
    original = stage.setup

    def setup(stage_name: str = "", **kwargs: Any) -> None:
        new = not hasattr(stage, "memgen")
        original(kwargs.get("stage", stage_name))
        if new:
            _moved(stage)

    stage.setup = setup
    return stage
