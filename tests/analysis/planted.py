"""A reasoner that repeats what it read last, and weavers with known functions: what an analysis has to find.

Attention and MLP of the reasoner add nothing, so the token behind a block of latents is the one whose embedding the last
latent is. A planted weaver looks at the prompt and writes such an embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch

from memgen.data import EnvironmentData
from memgen.environments.base import Environment, Example, Reward
from memgen.generation.rollout import EpisodeSettings
from memgen.generation.sampling import GenerationSettings
from memgen.lab.saving import save_backbone
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.weaver import WeaverConfig
from memgen.training.checkpoint import save_checkpoint
from tiny import byte_tokenizer, tiny_causal_lm

TASKS = {"#": "X", "@": "Y"}
"""A mark in the prompt, and the letter that the task asks for."""


class Marks(Environment):
    """Two tasks in turn: to write one letter or the other.

    Args:
        items: of the test split.
        wanted: the letter of each task.
    """

    name = "marks"

    def __init__(self, items: int = 96, wanted: dict[str, str] | None = None) -> None:
        self.items, self.wanted = items, wanted or TASKS

    def examples(self, split):
        marks = list(self.wanted)
        return [
            Example(
                f"{split}-{i}",
                f"{mark} {i}",
                self.wanted[mark],
                self.wanted[mark],
                meta={"task": f"task {mark}"},
            )
            for i in range(self.items)
            for mark in [marks[i % len(marks)]]
        ]

    def messages(self, example):
        return [{"role": "user", "content": example.question}]

    def reward(self, example, answer):
        return Reward(float(answer.startswith(example.answer)), {"has_answer": float(answer.strip() != "")})


def repeating_base(folder: Path) -> Path:
    """The reasoner, saved."""
    model = tiny_causal_lm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    folder.mkdir()
    save_backbone(model, byte_tokenizer(), folder)
    return folder


def config(base: Path, latents: int = 2, cap: int = 0) -> MemGenConfig:
    return MemGenConfig(
        backbone=BackboneConfig(name=str(base), dtype="float32"),
        weaver=WeaverConfig(
            lora=LoraSettings(r=4, alpha=8, dropout=0.0), prompt_latents=latents, inference_latents=latents
        ),
        boundaries=BoundaryConfig(delimiters=(",", "X"), max_inference_insertions=cap),
    )


def checkpoint(base: Path, folder: Path, settings: MemGenConfig) -> Path:
    model = MemGenModel.build(
        settings, byte_tokenizer(), lambda name: name, load_tokenizer=lambda name: byte_tokenizer()
    )
    save_checkpoint(model, settings, folder, with_trigger=False)
    return folder


def data(base: Path, environment: Environment | None = None) -> EnvironmentData:
    return EnvironmentData(
        environment or Marks(), tokenizer=str(base), chat_template="chatml", val_batch_size=48
    )


def settings() -> dict:
    return {
        "generation": GenerationSettings(max_new_tokens=2),
        "episodes": EpisodeSettings(),
        "environment": {},
        "resolve_asset": lambda name: name,
    }


def planted_weave(letters: dict[str, str], noise: float = 0.1, offsets: int = 0):
    """A `Weaver.weave` that writes the embedding of a letter for each prompt.

    Args:
        letters: the letter for each mark in a prompt.
        noise: norm of Gaussian noise on it, relative to the embedding's.
        offsets: number of directions without a function, of which each block has one.
    """
    generator = torch.Generator().manual_seed(7)

    def weave(self, states, counts, kinds, rows, cache, texts=None):
        embedding = self.backbone.embedding
        encode = byte_tokenizer().encode
        found = []
        for part, kind in zip(states.split(list(counts)), kinds, strict=True):
            seen = [
                letter
                for mark, letter in letters.items()
                if bool((part == embedding[encode(mark)[0]]).all(dim=1).any())
            ]
            # Behind a delimiter the prompt is not read again.
            letter = (seen or list(letters.values()))[0]
            vector = embedding[encode(letter)[0]].detach()
            size, length = self.config.latents(kind), vector.norm()
            block = vector + noise * length / vector.shape[0] ** 0.5 * torch.randn(
                size, vector.shape[0], generator=generator
            )
            if offsets:
                # Orthogonal to all letters' embeddings is not possible; to this one suffices.
                direction = torch.zeros_like(vector)
                direction[int(torch.randint(offsets, (1,), generator=generator))] = 1.0
                direction -= direction @ vector / length**2 * vector
                block = block + 0.5 * length * direction
            found.append(block)
        return torch.cat(found)

    return weave
