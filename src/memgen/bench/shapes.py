"""Models to measure: real architectures with random weights, since cost does not depend on the values of weights.

The weights are scaled so that greedy text is varied: every linear map has a gain of about 1.4, so what a layer adds
outweighs the embedding that came in, and the text does not fall into repeating one token. Delimiters are every
`spacing`-th token id, which makes them 3 to 9 % of a varied text at the default of 16. No token ends an answer, so all
sides of a comparison produce equally many.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.boundary import Boundaries, BoundaryConfig
from memgen.model.memgen import MemGenModel
from memgen.model.reasoner import Reasoner
from memgen.model.trigger import TokenTrigger, Trigger, TriggerConfig
from memgen.model.weaver import Weaver, WeaverConfig

GAIN = 1.4
"""Of every linear map: standard deviation of its weights times the square root of the hidden size."""

CONTEXT = 32768
"""Maximum positions of the models: more than any case needs."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 architecture with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    accelerator_only: bool = False
    """Takes minutes to hours on a CPU."""

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * dtype.itemsize


SHAPES = {
    "small": Shape(hidden=256, layers=4, heads=4, kv_heads=2, feed_forward=704, vocabulary=4096),
    "medium": Shape(hidden=512, layers=8, heads=8, kv_heads=4, feed_forward=1408, vocabulary=8192),
    "qwen2.5-1.5b": Shape(
        hidden=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        feed_forward=8960,
        vocabulary=151936,
        accelerator_only=True,
    ),
}
"""By name."""


def find_shape(name: str) -> Shape:
    """The shape of a name.

    Raises:
        ValueError: if there is none of that name; the message names those that there are.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown model '{name}'; choose among: {', '.join(SHAPES)}")
    return SHAPES[name]


@dataclass(frozen=True)
class ModelSettings:
    """One random model and its weaver."""

    model: str = "small"
    """Name of a shape."""
    device: str = "cpu"
    """Its device."""
    dtype: str = "float32"
    """Type of the frozen weights; trained weights are always float32."""
    seed: int = 0
    """Of weights and prompts."""
    latents: int = 8
    """K, at the end of the prompt and after a delimiter."""
    cap: int = 5
    """Insertions per answer, the one at the end of the prompt not counted."""
    spacing: int = 16
    """Every `spacing`-th token id is a delimiter."""

    @property
    def shape(self) -> Shape:
        """The architecture."""
        return find_shape(self.model)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the frozen weights."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def plain_model(settings: ModelSettings) -> Qwen2ForCausalLM:
    """A random Hugging Face model with its own attention: the baseline."""
    shape = settings.shape
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=GAIN / sqrt(shape.hidden),
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        model: Qwen2ForCausalLM = Qwen2ForCausalLM._from_config(config, dtype=settings.torch_dtype)
    model.eval()
    return model


def twin(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """A copy of the modules that shares their weights, so two sides of a comparison hold them once."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)


def delimiter_table(settings: ModelSettings) -> Boundaries:
    """Boundaries in which every `spacing`-th token id is a delimiter."""
    texts = ["." if token % settings.spacing == 0 else "x" for token in range(settings.shape.vocabulary)]
    return Boundaries(BoundaryConfig(delimiters=(".",), max_inference_insertions=settings.cap), texts)


@dataclass(frozen=True)
class Components:
    """Components of MemGen models on one set of weights."""

    reasoner: Reasoner
    weaver: Weaver
    tokens: TokenTrigger
    boundaries: Boundaries

    def model(self, trigger: Trigger, *, cap: int | None = None) -> MemGenModel:
        """A model with the given trigger, in evaluation mode."""
        boundaries = self.boundaries if cap is None else self.boundaries.capped(cap)
        composed = MemGenModel(self.reasoner, self.weaver, trigger, boundaries)
        return composed.to(self.reasoner.backbone.device).eval()


def memgen_components(plain: Qwen2ForCausalLM, settings: ModelSettings) -> Components:
    """Reasoner, weaver and token trigger on the weights of a plain model."""
    # Without dropout: one side of a comparison would sample it more often than the other.
    lora = LoraSettings(r=16, alpha=32, dropout=0.0, target_modules=("q_proj", "v_proj"))
    backbone = Backbone(twin(plain), f"{settings.model} (random)")
    weaver = Weaver(
        backbone,
        WeaverConfig(lora=lora, prompt_latents=settings.latents, inference_latents=settings.latents),
        backbone.hidden_size,
    )
    tokens = TokenTrigger(backbone, TriggerConfig(kind="tokens", lora=lora))
    _move_from_zero(weaver, settings.seed)
    _move_from_zero(tokens, settings.seed + 1)
    components = Components(Reasoner(backbone, ()), weaver, tokens, delimiter_table(settings))
    for module in (weaver, tokens):
        module.to(settings.device)
    return components


@torch.no_grad()
def _move_from_zero(part: Weaver | TokenTrigger, seed: int) -> None:
    """Adds noise to LoRA's B, which is 0 at first: a trained adapter has an effect, and mixed trigger decisions."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in part.own_parameters().items():
        if ".lora_B." in name:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))


def random_ids(rows: int, length: int, settings: ModelSettings) -> list[list[int]]:
    """Distinct random rows of token ids, the same for a seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids: list[list[int]] = torch.randint(
        settings.shape.vocabulary, (rows, length), generator=generator
    ).tolist()
    return ids


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
