"""One frozen language model, read through one attention function of ours.

Any decoder-only Hugging Face model with rotary (or no) positions serves: its modules run unchanged on packed input,
and its attention, registered under the name "memgen", keeps keys and values in the KV cache that the pass was opened
on. A decoder of the common plain shape is computed without its modules (see decoder.py). The adapter is an argument
of a pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from memgen.model.adapters import AdapterSwitch, LoraSettings
from memgen.model.cache import View
from memgen.model.decoder import Around, DirectDecoder, UnlikeError, direct_decoder, hooked
from memgen.model.proof import Proof

# T packed positions, H hidden size, h query heads, g key-value heads, d head size

logger = logging.getLogger(__name__)

_NAMED = 8
"""Tensors that a message names."""
_ASSUMED_CONTEXT = 2048
"""Positions at which a model is tried out whose configuration does not say how many it has."""
_PROBE_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises that cannot be read the way it was tried."""

_VIEW: ContextVar[View | None] = ContextVar("memgen_view", default=None)


@dataclass(frozen=True)
class BackboneConfig:
    """Which language model, and in which dtype."""

    name: str = "lab:reasoner"
    """A directory, a hub name, a GGUF file, or an asset such as lab:reasoner or lab:smollm2."""
    revision: str | None = None
    """Revision on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the frozen weights. What is trained is always float32."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention that Hugging Face modules call: (1, h, T, d) -> (1, T, h, d)."""
    view = _VIEW.get()
    if view is None:
        raise RuntimeError("a memgen backbone was called outside Backbone.forward")
    if softcap is not None or s_aux is not None:
        raise ValueError("attention with soft capping or sinks is not supported by memgen")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast(int, module.layer_idx)
    # Under autocast the rotary embedding leaves queries and keys in float32 beside values of the lower type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return view.attend(layer, query, key, value, scale, sliding_window), None


AttentionInterface.register("memgen", _attention)


def _decoder_layers(decoder: nn.Module, count: int, name: str) -> nn.ModuleList:
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(
        f"{name} has no list of {count} decoder layers in its {type(decoder).__name__}; it is not supported"
    )


class Backbone(nn.Module):
    """A frozen decoder-only language model with switchable LoRA adapters.

    Args:
        model: a Hugging Face causal language model. It is frozen, put into evaluation mode and read through
            memgen's attention from then on.
        name: what to call it in checkpoints and messages.

    Raises:
        ValueError: if its architecture does something that packed reading would get wrong.
    """

    def __init__(self, model: PreTrainedModel, name: str = "") -> None:
        super().__init__()
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"{name or type(model).__name__} has layers of kind {sorted(kinds)}; memgen reads only attention"
            )
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(config, key, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{name or type(model).__name__} scales its logits ({key}), which memgen does not support"
                )
        if type(model.get_input_embeddings()) is not nn.Embedding:
            raise ValueError(
                f"{name or type(model).__name__} changes its embeddings as it looks them up "
                f"({type(model.get_input_embeddings()).__name__}), which memgen does not support"
            )
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"{name or type(model).__name__} computes attention by itself ({type(model).__name__}), so memgen "
                "cannot keep its rows apart"
            )
        self.name = name
        self.fingerprint = fingerprint(model)
        model.requires_grad_(False)
        model.eval()
        self._varying_rope, self._fixed_until = _varying_rope(config)
        self.model = model
        try:
            proof = Proof.of(model, self.context_length or _ASSUMED_CONTEXT)
            model.set_attn_implementation("memgen")
        except _PROBE_ERRORS as error:
            raise ValueError(f"{self._called} cannot be tried out before it is read: {error}") from error
        self.adapters = AdapterSwitch(model)
        self._recompute = False
        self._direct: DirectDecoder | None = None
        self._directly: bool | None = None
        self._overwrites = False  # whether the decoder changes its input where it lies
        self.around: Around | None = None
        """Computes each layer in the place of the backbone, which calls it with layer, input and computation."""
        self._layers = _decoder_layers(self._decoder, int(config.num_hidden_layers), self._called)
        for layer in self._layers:
            layer.forward = partial(self._layer, layer, layer.forward)
        self._require_proven(proof)

    @property
    def _called(self) -> str:
        return self.name or type(self.model).__name__

    @torch.no_grad()
    def _require_proven(self, proof: Proof) -> None:
        """Refuses a model that says something else through memgen's attention than by itself.

        Raises:
            ValueError: naming the model, and where it differs.
        """
        try:
            view = proof.view()
            embeddings = self.embed(proof.ids)
            before = embeddings.clone()
            hidden = self._through_modules(embeddings, view)
            self._overwrites = not torch.equal(embeddings, before)
            problem = view.incomplete(len(self._layers)) or proof.problem(hidden, self.head)
        except _PROBE_ERRORS as error:
            raise ValueError(f"{self._called} cannot be read by memgen: {error}") from error
        if problem is not None:
            raise ValueError(
                f"{self._called} ({type(self.model).__name__}) {problem}, so memgen does not support it"
            )

    @property
    def _decoder(self) -> nn.Module:
        return cast(nn.Module, self.model.get_decoder())

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings and hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def context_length(self) -> int | None:
        """The longest stream the model can be read with, or None if its configuration does not say."""
        length = getattr(self.model.config, "max_position_embeddings", None)
        known = [int(limit) for limit in (length, self._fixed_until) if limit is not None]
        return min(known, default=None)

    @property
    def device(self) -> torch.device:
        """Where the embedding table lies."""
        return self.embedding.device

    @property
    def embedding(self) -> Float[Tensor, "vocab hidden"]:
        """The input embedding table."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def head(self) -> nn.Linear:
        """The language-model head."""
        return cast(nn.Linear, self.model.get_output_embeddings())

    @torch.no_grad()
    def embedding_scale(self) -> float:
        """What scales hidden states behind the final norm to about the mean norm of token embeddings.

        Raises:
            ValueError: if the decoder has no norm of its own behind its layers.
        """
        norms = [m for m in self._decoder.children() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
        if not norms:
            raise ValueError(
                f"{self._called} has no norm behind its layers, so latents cannot be scaled to its embeddings; set "
                "weaver.map_init to random"
            )
        rows = self._sampled_embeddings()
        hidden = norms[-1](rows).float().norm(dim=-1).mean()
        return float(rows.float().norm(dim=-1).mean() / hidden)

    @torch.no_grad()
    def embedding_norm(self) -> float:
        """Mean norm of token embeddings."""
        return float(self._sampled_embeddings().float().norm(dim=-1).mean())

    def _sampled_embeddings(self) -> Tensor:
        return self.embedding[:: max(1, self.embedding.shape[0] // 1024)]

    def add_adapter(self, name: str, settings: LoraSettings) -> None:
        """Adds a LoRA adapter that a pass may name.

        Raises:
            RuntimeError: if the new adapter changes the base: its initialisation was overwritten (by a sharded one, say).
        """
        self.adapters.add(name, settings)
        self.adapters.assert_untouched(name)
        if self._direct is not None:
            # Its layers were replaced by layers with an adapter.
            self._directly, self._direct = None, None

    def compute_directly(self, enabled: bool) -> None:
        """Whether a decoder of the plain shape is computed without calling its modules. On by default."""
        self._directly, self._direct = None if enabled else False, None

    def use_checkpointing(self, enabled: bool) -> None:
        """Activation checkpointing: layers recompute their activations in the backward pass."""
        self._recompute = enabled

    def train(self, mode: bool = True) -> Backbone:
        """Only the adapters' dropout follows the mode: the base is frozen and stays in evaluation mode."""
        super().train(False)
        self.training = mode
        self.adapters.train(mode)
        return self

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        """Input embeddings of token ids."""
        return cast(Tensor, self.model.get_input_embeddings()(ids))

    def forward(
        self, embeddings: Float[Tensor, "time hidden"], view: View, adapter: str | None = None
    ) -> Float[Tensor, "read hidden"]:
        """Reads packed input embeddings.

        Args:
            embeddings: (T, H), any floating type; cast to the base's.
            view: the pass, opened on a KV cache.
            adapter: adapter to apply, or None for the bare base.

        Returns:
            Hidden states after the final norm, in the base's type, (T, H): of the positions that the pass reads.

        Raises:
            ValueError: if the stream is longer than its rotary positions can be read with.
        """
        embeddings = embeddings.to(self.embedding.dtype)
        if self._fixed_until is not None and view.limit > self._fixed_until:
            raise ValueError(
                f"{self._called} has rotary positions of kind {self._varying_rope}: beyond {self._fixed_until} positions "
                "they depend on the longest row of a pass, which memgen does not support; "
                f"keep streams within {self._fixed_until} positions, got {view.limit}"
            )
        self.probe()
        if (direct := self._computed_directly()) is not None:
            return direct(embeddings, view, adapter, recompute=self._recompute, around=self.around)
        hidden = self._through_modules(embeddings, view, adapter)
        return hidden if view.read is None else hidden.index_select(0, view.read)

    def _computed_directly(self) -> DirectDecoder | None:
        direct = self._direct
        return direct if direct is not None and direct.valid else None

    def recordable(self) -> list[Tensor] | None:
        """What a pass reads besides the weights, if its operations may be recorded and run again without it.

        The caller that records a pass must keep these tensors. None: a decoder that is read through its modules, which
        may look at values on the host, or one that has not been read yet.
        """
        direct = self._computed_directly()
        return None if direct is None else direct.angles()

    def _through_modules(self, embeddings: Tensor, view: View, adapter: str | None = None) -> Tensor:
        embeddings = embeddings.clone() if self._overwrites else embeddings
        with self._pass(view, adapter):
            output = self._decoder(
                inputs_embeds=embeddings[None], position_ids=view.positions[None], use_cache=False
            )
        return cast(Tensor, output.last_hidden_state[0])

    def probe(self) -> None:
        """Finds out, once, whether the decoder can be computed directly. Its weights must be there.

        The first pass does this, unless somebody has hooked into the decoder by then.
        """
        if self._directly is not None or hooked(self._decoder):
            return
        try:
            self._direct = direct_decoder(
                self._decoder,
                self.embedding,
                self._through_modules,
                self.context_length or _ASSUMED_CONTEXT,
                self._fixed_until,
            )
        except UnlikeError as reason:
            logger.info("%s is read through its modules: %s", self._called, reason)
        self._directly = self._direct is not None

    @contextmanager
    def _pass(self, view: View, adapter: str | None) -> Iterator[None]:
        token = _VIEW.set(view)
        try:
            with self.adapters.using(adapter):
                yield
        finally:
            _VIEW.reset(token)

    def _layer(self, layer: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A decoder layer, called by its module."""
        compute = partial(self._recomputed, forward, *args, **kwargs)
        if self.around is None:
            return compute()
        return cast(Tensor, self.around(layer, args[0] if args else kwargs["hidden_states"], compute))

    def _recomputed(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A decoder layer, recomputed in the backward pass under the view and the adapter of its forward pass."""
        if not (self._recompute and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        view, adapter = _VIEW.get(), self.adapters.active
        assert view is not None, "layers run inside Backbone.forward"

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return self._pass(view, adapter), self._pass(view, adapter)

        return cast(Tensor, checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs))


def _varying_rope(config: Any) -> tuple[str | None, int | None]:
    """A kind of rotary positions whose angles depend on the longest row of a pass, and up to how many they do not."""
    found: list[tuple[str, int]] = []

    def look(settings: Any) -> None:
        if not isinstance(settings, dict):
            return
        kind = settings.get("rope_type", settings.get("type"))
        most = getattr(config, "max_position_embeddings", None)
        if kind == "longrope":
            most = settings.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", most
            )
        if kind in ("longrope", "dynamic") and most is not None:
            found.append((kind, int(most)))
        for inner in settings.values():
            look(inner)

    look(getattr(config, "rope_parameters", None))
    look(getattr(config, "rope_scaling", None))
    return min(found, key=lambda pair: pair[1], default=(None, None))


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a base: its configuration and its tensors' names, shapes and a sample of values (SHA-256, hex)."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    # What a save, a library version or a run-time switch changes says nothing about the weights.
    for key in (
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "architectures",
    ):
        config.pop(key, None)
    digest.update(json.dumps(_plain(config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        # bfloat16 holds what every supported type can hold, so the same weights in another type agree.
        digest.update(flat[::step][:64].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if not str(key).startswith("_")}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def load_backbone(config: BackboneConfig, resolve_asset: Callable[[str], str]) -> Backbone:
    """Loads a language model from a directory, the hub, or an asset name.

    Args:
        config: which one.
        resolve_asset: turns an asset name such as lab:reasoner into a directory; other names pass through.

    Raises:
        OSError: if there is no such model, or its files cannot be read.
        ValueError: if the architecture is not supported, or the files lack tensors of the model or have others.
    """
    path = resolve_asset(config.name)
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_is_no_load_report)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (OSError, ValueError, KeyError, SafetensorError, UnpicklingError) as error:
        raise OSError(
            f"the language model {config.name!r} cannot be loaded: {first_line(error)} (model.memgen.backbone.name)"
        ) from error
    finally:
        reports.removeFilter(_is_no_load_report)
    require_all_tensors(config.name, found)
    return Backbone(model, config.name)


def require_all_tensors(name: str, found: Mapping[str, Any]) -> None:
    """Refuses a model some of whose tensors were not in its files and so are random, or the other way round.

    Args:
        name: of the model.
        found: what `from_pretrained` says of its load.

    Raises:
        ValueError: naming the tensors.
    """
    shapes = [
        f"{key} {tuple(stored)} instead of {tuple(needed)}"
        for key, stored, needed in found["mismatched_keys"]
    ]
    problems = [
        f"{what} {', '.join(sorted(keys)[:_NAMED])}{f' and {len(keys) - _NAMED} more' if len(keys) > _NAMED else ''}"
        for what, keys in (
            ("missing:", found["missing_keys"]),
            ("unexpected:", found["unexpected_keys"]),
            ("wrong shape:", shapes),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"the files of the language model {name!r} are not those of its architecture; {'; '.join(problems)}. It would "
            "run with random weights in their place: get the model again, or mend its config.json"
        )


def _is_no_load_report(record: logging.LogRecord) -> bool:
    # A table of what `require_all_tensors` says.
    return "LOAD REPORT" not in record.getMessage()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type's name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
