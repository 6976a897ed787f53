"""A llama-like decoder computed directly: the same operations as its Hugging Face modules, without the modules' calls.

For one token of a small model, calling the modules costs more than the arithmetic; in training, theirs keep more
activations than a frozen model needs. Only architectures of one plain shape are read this way (pre-norm attention with
rotary positions, then a gated feed-forward), and only after a probe: the modules' own forward and this one read the
same input, at positions from the first to the context's last, and must agree in every layer's queries, keys, values
and in the result. Everything else goes through the modules.

Passes with and without gradient, and with and without recomputation, round alike: in every type they give the same
numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from memgen.model.cache import View

# T packed positions, H hidden size, F feed-forward size, h query heads, g key-value heads, d head size

Around = Callable[[nn.Module, Tensor, Callable[[], Any]], Any]
"""Computes a layer: called with the layer's module, its input and the computation, whose result it returns."""


class UnlikeError(Exception):
    """The model is not of the shape that is computed directly; the message says where it differs."""


# Operations of a frozen model: no gradient for weights, and no activation kept that can be computed again


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, rounded once, in the type of x: autocast would leave it in float32."""
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)


class _FrozenNorm(torch.autograd.Function):
    """`_rms_norm` with a gradient by x alone; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = torch.linalg.vecdot(exact, exact)
        inverse = torch.rsqrt(squares.div_(x.shape[-1]).add_(ctx.eps))[..., None]
        scaled = grad.to(inverse.dtype) * weight
        along = torch.linalg.vecdot(scaled, exact)[..., None].mul_(inverse.pow(3)).div_(-x.shape[-1])
        return scaled.mul_(inverse).addcmul_(exact, along).to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up; keeps its two inputs, where the plain expression keeps silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


@final
class _Norm:
    """An RMS norm. Parameters are looked up at each call, in the module's own dictionary: both may be replaced."""

    __slots__ = ("_eps", "_module")

    def __init__(self, module: nn.Module) -> None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or eps is None or len(module._parameters) != 1:
            raise UnlikeError(f"its norm is a {type(module).__name__}")
        self._eps = float(eps)
        self._module: Any = module

    def __call__(self, x: Tensor) -> Tensor:
        weight: Tensor = self._module._parameters["weight"]
        if x.dtype != weight.dtype:  # Autocast: the module's product of the two is of the wider type.
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        if torch.is_grad_enabled() and x.requires_grad:
            normed: Tensor = _FrozenNorm.apply(x, weight, self._eps)
            return normed
        return _rms_norm(x, weight, self._eps)


@final
class _Linear:
    """A linear layer with its adapters, if it has some: PEFT's LoRA layer, computed directly."""

    __slots__ = ("_base", "_lora")

    def __init__(self, parent: nn.Module, name: str) -> None:
        module: Any = getattr(parent, name)
        self._lora: LoraLayer | None = module if isinstance(module, LoraLayer) else None
        base = module.base_layer if self._lora is not None else module
        if type(base) is not nn.Linear:
            raise UnlikeError(f"its {name} is a {type(base).__name__}")
        self._base: Any = base

    def __call__(self, x: Tensor, adapter: str | None) -> Tensor:
        parameters = self._base._parameters
        y: Tensor = F.linear(x, parameters["weight"], parameters["bias"])
        lora = self._lora
        if adapter is None or lora is None or adapter not in lora.lora_A:
            return y
        down, up = lora.lora_A[adapter].weight, lora.lora_B[adapter].weight
        scale = lora.scaling[adapter]
        low = F.linear(lora.lora_dropout[adapter](x.to(down.dtype)), down)
        if low.dtype == up.dtype == y.dtype:
            return torch.addmm(y, low, up.t(), alpha=scale)
        summed: Tensor = y + F.linear(low, up) * scale
        return summed.to(y.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: (T, heads, d), with the sign of the rotation's upper half in `sine`."""
    return torch.addcmul(x * cosine, torch.roll(x, x.shape[-1] // 2, -1), sine)


@dataclass(frozen=True)
class _Layer:
    before: _Norm
    query: _Linear
    key: _Linear
    value: _Linear
    out: _Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    between: _Norm
    gate: _Linear
    up: _Linear
    down: _Linear
    activation: nn.Module
    silu: bool
    head: int  # d
    rotary: bool
    scale: float
    window: int | None


def _hooks(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """The dictionaries of hooks into the calls of a module and of all that is inside it: forward, and backward too."""
    forward: list[Any] = [_module._global_forward_pre_hooks, _module._global_forward_hooks]
    backward: list[Any] = [_module._global_backward_pre_hooks, _module._global_backward_hooks]
    for part in module.modules():
        forward += [part._forward_pre_hooks, part._forward_hooks]
        backward += [part._backward_pre_hooks, part._backward_hooks]
    return forward, backward


def hooked(module: nn.Module) -> bool:
    """Whether a module or one inside it has hooks (a sharding strategy's, say), which run only if it is called."""
    forward, backward = _hooks(module)
    return any(forward) or any(backward)


@final
class DirectDecoder:
    """The direct computation of one decoder.

    Args:
        decoder: the Hugging Face decoder, frozen.
        settings: (scale, window) that its modules pass to the attention of each layer.
        most: positions that its rotary embedding may be asked for; None: any.

    Raises:
        UnlikeError: if the decoder is not of the plain shape.
    """

    def __init__(
        self, decoder: nn.Module, settings: list[tuple[float, int | None]], most: int | None = None
    ) -> None:
        children = {name for name, _ in decoder.named_children()}
        if children != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            raise UnlikeError(f"{type(decoder).__name__} consists of {sorted(children)}")
        modules = cast(nn.ModuleList, decoder.layers)
        self._of: nn.ModuleList = modules
        self._modules = list(modules)
        self._final_norm = _Norm(cast(nn.Module, decoder.norm))
        self._rotary = cast(nn.Module, decoder.rotary_emb)
        self._layers = [_layer(m, *setting) for m, setting in zip(modules, settings, strict=True)]
        # Dictionaries of hooks live as long as their modules, so they also show hooks added later.
        self._forward_hooks, self._backward_hooks = _hooks(decoder)
        self._most = most
        self.tabled = False
        """Whether the angles depend on the position alone, so that a table of them holds."""
        self._table: tuple[Tensor, Tensor] | None = None

    @property
    def valid(self) -> bool:
        """Whether it still is what the modules compute: none was replaced, and no hook waits for a call of theirs."""
        return (
            not any(self._forward_hooks)
            and not (torch.is_grad_enabled() and any(self._backward_hooks))
            and list(self._of) == self._modules
        )

    def angles(self) -> list[Tensor] | None:
        """The table of rotary angles in use; a longer stream makes another. None: each pass computes its own."""
        return None if self._table is None else list(self._table)

    def __call__(
        self,
        embeddings: Float[Tensor, "time hidden"],
        view: View,
        adapter: str | None,
        *,
        recompute: bool,
        around: Around | None = None,
    ) -> Float[Tensor, "read hidden"]:
        """Hidden states after the final norm, at the positions that the pass reads.

        Args:
            embeddings: (T, H), in the base's type.
            view: the pass.
            adapter: adapter to apply, or None.
            recompute: activation checkpointing.
            around: computes each layer in the place of this.
        """
        cosine, sine = self._angles(embeddings, view)
        x = embeddings
        recompute = recompute and torch.is_grad_enabled()
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            read = view.read if index == last else None
            inputs = (layer, index, x, cosine, sine, view, adapter, read)
            compute: Callable[[], Tensor] = (
                partial(checkpoint, _read_layer, *inputs, use_reentrant=False)
                if recompute
                else partial(_read_layer, *inputs)
            )
            x = compute() if around is None else cast(Tensor, around(self._modules[index], x, compute))
        return self._final_norm(x)

    def _angles(self, like: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine at the positions of the pass, (T, 1, d) each."""
        if not self.tabled:
            return self._signed(like, view.positions)
        table = self._table
        if (
            table is None
            or table[0].shape[0] < view.limit
            or table[0].dtype != like.dtype
            or table[0].device != like.device
        ):
            # Longer than asked for, so that an answer that grows does not make a table per step. A table made while
            # a model is evaluated serves training too, where inference tensors are not allowed.
            with torch.inference_mode(mode=False), torch.no_grad():
                length = max(512, 2 * view.limit)
                length = length if self._most is None else min(length, self._most)
                table = self._signed(like, torch.arange(length, device=like.device))
            self._table = table
        return table[0].index_select(0, view.positions), table[1].index_select(0, view.positions)

    def find_table(self, like: Tensor, positions: Tensor) -> None:
        """Finds out whether a table holds: whether angles are the same whatever other positions are in a pass.

        Args:
            like: of the decoder's type and device.
            positions: of a pass, ascending, from the first to the last that are ever asked for.
        """
        few = positions[: max(1, len(positions) // 3)]
        pairs = zip(self._signed(like, few), self._signed(like, positions), strict=True)
        self.tabled = all(torch.equal(alone, among[: len(few)]) for alone, among in pairs)

    def _signed(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self._rotary(torch.empty(0, dtype=like.dtype, device=like.device), positions[None])
        half = sine.shape[-1] // 2
        sine = torch.cat([-sine[..., :half], sine[..., half:]], dim=-1)
        return cosine[0, :, None], sine[0, :, None]


def _read_layer(
    layer: _Layer,
    index: int,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    view: View,
    adapter: str | None,
    read: Tensor | None,
) -> Tensor:
    """One layer. Of the last one, only some outputs may be needed: the other positions give keys and values alone."""
    heads = (-1, layer.head)
    normed = layer.before(x)
    key = layer.key(normed, adapter).view(x.shape[0], *heads)  # (T, g, d)
    value = layer.value(normed, adapter).view(x.shape[0], *heads)
    if layer.key_norm is not None:
        key = layer.key_norm(key)
    if layer.rotary:
        key = _rotate(key, cosine, sine)
    if read is not None:
        x, normed = x.index_select(0, read), normed.index_select(0, read)
        cosine, sine = cosine.index_select(0, read), sine.index_select(0, read)
    query = layer.query(normed, adapter).unflatten(-1, heads)  # (T, h, d)
    if layer.query_norm is not None:
        query = layer.query_norm(query)
    if layer.rotary:
        query = _rotate(query, cosine, sine)
    attended = view.attend(
        index,
        # Under autocast the rotary embedding leaves queries and keys in float32 beside values of the lower type.
        query.to(value.dtype).transpose(0, 1)[None],
        key.to(value.dtype).transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        layer.scale,
        layer.window,
        narrowed=read is not None,
    )
    x = x + layer.out(attended[0].flatten(1), adapter)
    normed = layer.between(x)
    gate, up = layer.gate(normed, adapter), layer.up(normed, adapter)
    return x + layer.down(_gated(layer, gate, up), adapter)


def _gated(layer: _Layer, gate: Tensor, up: Tensor) -> Tensor:
    if not layer.silu:
        return cast(Tensor, layer.activation(gate) * up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return cast(Tensor, _GatedSilu.apply(gate, up))
    return F.silu(gate, inplace=True).mul_(up)


# Which decoders


def _layer(module: nn.Module, scale: float, window: int | None) -> _Layer:
    def expect(part: nn.Module, needed: set[str], optional: frozenset[str] = frozenset()) -> None:
        found = {name for name, _ in part.named_children()}
        if not needed <= found <= needed | optional:
            raise UnlikeError(f"a {type(part).__name__} consists of {sorted(found)}")

    expect(module, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention, mlp = cast(nn.Module, module.self_attn), cast(nn.Module, module.mlp)
    norms = frozenset({"q_norm", "k_norm"})
    expect(attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, norms)
    expect(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    normed = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    if len(normed) == 1:
        raise UnlikeError(f"it has {normed[0]} alone")
    activation = cast(nn.Module, mlp.act_fn)
    return _Layer(
        before=_Norm(cast(nn.Module, module.input_layernorm)),
        query=_Linear(attention, "q_proj"),
        key=_Linear(attention, "k_proj"),
        value=_Linear(attention, "v_proj"),
        out=_Linear(attention, "o_proj"),
        query_norm=_Norm(cast(nn.Module, attention.q_norm)) if normed else None,
        key_norm=_Norm(cast(nn.Module, attention.k_norm)) if normed else None,
        between=_Norm(cast(nn.Module, module.post_attention_layernorm)),
        gate=_Linear(mlp, "gate_proj"),
        up=_Linear(mlp, "up_proj"),
        down=_Linear(mlp, "down_proj"),
        activation=activation,
        silu=type(activation).__name__ in ("SiLU", "SiLUActivation"),
        head=int(cast(int, attention.head_dim)),
        rotary=bool(getattr(attention, "use_rope", True)),
        scale=scale,
        window=window,
    )


@final
class ProbeView(View):
    """A pass that keeps nothing and mixes no positions, but remembers what each layer's attention was given."""

    def __init__(self, positions: Tensor, limit: int) -> None:
        self.positions = positions
        self.limit = limit
        self.settings: list[tuple[float, int | None]] = []
        self.inputs: list[Tensor] = []

    @override
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        *,
        narrowed: bool = False,
    ) -> Tensor:
        if layer != len(self.settings):
            raise UnlikeError(f"layer {layer} was read as number {len(self.settings)}")
        self.settings.append((scale, window))
        self.inputs += [query, key, value]
        repeat = query.shape[1] // key.shape[1]
        mixed = query + (key + 2 * value).repeat_interleave(repeat, dim=1)
        return mixed.transpose(1, 2)


PROBE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative error that the two computations may differ by (norms are float32 inside); lower types: 5e-2."""


def probe_positions(end: int) -> list[int]:
    """Positions at which computations are compared: the first, some between, the last before `end`; with jumps."""
    wanted = [0, 1, 2, 5, 45, end // 8, end // 4, end // 2, 3 * end // 4, end - 2, end - 1]
    return sorted({position for position in wanted if 0 <= position < end})


@torch.no_grad()
def direct_decoder(
    decoder: nn.Module,
    table: Tensor,
    modules: Callable[[Tensor, View], Tensor],
    end: int,
    most: int | None = None,
) -> DirectDecoder:
    """The direct computation of a decoder, compared with its modules' own.

    Args:
        decoder: the Hugging Face decoder.
        table: its token embeddings, (V, H), some of which are the probe's input.
        modules: reads a pass through the decoder's own forward.
        end: one more than the last position that is compared: the context's length.
        most: see `DirectDecoder`.

    Raises:
        UnlikeError: if it has another shape, or the two results differ.
    """
    positions = torch.tensor(probe_positions(end), device=table.device)
    embeddings = table[torch.arange(len(positions), device=table.device) % table.shape[0]].detach()
    theirs, ours = ProbeView(positions, end), ProbeView(positions, end)
    reference = modules(embeddings, theirs)
    direct = DirectDecoder(decoder, theirs.settings, most)
    try:
        result = direct(embeddings, ours, None, recompute=False)
        direct.find_table(embeddings, positions)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnlikeError(f"computed directly, {type(decoder).__name__} fails: {error}") from error
    tolerance = PROBE_TOLERANCE.get(embeddings.dtype, 5e-2)
    for place, (a, b) in enumerate(zip([*ours.inputs, result], [*theirs.inputs, reference], strict=True)):
        difference = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
        if not difference <= tolerance:
            raise UnlikeError(
                f"computed directly, {type(decoder).__name__} differs by {difference:.2g} in layer {place // 3}"
            )
    return direct
