"""Formulas of what a backbone needs on many devices: memory by part, messages of a step, the rollout's share.

`benchmarks.scale_runs` measures the same numbers on small models, and tests compare the two.

Axis letters: N ranks, P weights of the base, T positions of a micro-batch on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "zero1", "zero2", "zero3")

FLOAT32 = 4
GIB = 1 << 30


@dataclass(frozen=True)
class Decoder:
    """A decoder of the common shape: grouped attention, a gated feed-forward part, two norms per layer."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = True
    """As in Qwen2."""

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Width of all keys."""
        return self.kv_heads * self.head_size

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.hidden * self.query + 2 * self.hidden * self.key
        bias = (self.query + 2 * self.key) * self.qkv_bias
        return attention + bias + 3 * self.hidden * self.feed_forward + 2 * self.hidden

    @property
    def other_weights(self) -> int:
        """Embeddings, the head if it is not the embeddings, the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def weights(self) -> int:
        """P."""
        return self.layers * self.layer_weights + self.other_weights

    def lora(self, rank: int, targets: tuple[str, ...]) -> int:
        """Weights of an adapter."""
        sizes = {
            "q_proj": self.hidden + self.query,
            "k_proj": self.hidden + self.key,
            "v_proj": self.hidden + self.key,
            "o_proj": self.query + self.hidden,
            "gate_proj": self.hidden + self.feed_forward,
            "up_proj": self.hidden + self.feed_forward,
            "down_proj": self.feed_forward + self.hidden,
        }
        return self.layers * rank * sum(sizes[target] for target in targets)

    def cache_bytes(self, item: int) -> int:
        """Keys and values of one position."""
        return 2 * self.layers * self.key * item


BACKBONES = {
    "7B": Decoder(3584, 28, 28, 4, 128, 18944, 152064, tied=False),
    "70B": Decoder(8192, 80, 64, 8, 128, 29568, 152064, tied=False),
}
"""Shapes of Qwen2.5-7B and Qwen2.5-72B."""


@dataclass(frozen=True)
class WeaverSize:
    """Size of a weaver."""

    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    prompt_latents: int = 8
    inference_latents: int = 8

    def trained(self, base: Decoder) -> int:
        """Weights of a weaver on a base: adapter, two maps, two banks of queries."""
        maps = 2 * (base.hidden * base.hidden + base.hidden)
        banks = sum(
            count * base.hidden + 2 * base.hidden + 1
            for count in (self.prompt_latents, self.inference_latents)
            if count
        )
        return base.lora(self.rank, self.targets) + maps + banks


@dataclass(frozen=True)
class Workload:
    """Workload of a rank in a micro-batch."""

    rows: int = 8
    """Rows of a micro-batch, or episodes of a rollout, on one rank."""
    length: int = 1024
    """Stream positions of a row, latents included."""
    insertions: int = 3
    """Most insertions of a row: the weaver's passes."""
    new_tokens: int = 512
    """Of an episode, in a rollout."""
    iterations: int = 1
    """Updates per rollout."""

    @property
    def positions(self) -> int:
        """T."""
        return self.rows * self.length


@dataclass(frozen=True)
class Needs:
    """Bytes on one device.

    Attributes:
        frozen: the base between steps.
        gathered: weights that a pass of a training step adds: of ZeRO-3, two layers at most, embeddings and head.
        rollout: weights that a rollout adds: of ZeRO-3, the rest of the base.
        trained: trained weights, with DeepSpeed's second copy.
        gradients: of trained weights, at the end of a backward pass.
        optimizer: AdamW's two moments.
        activations: of a micro-batch whose layers are recomputed.
        cache: keys and values of reasoner and weaver at a rollout's end.
    """

    frozen: float
    gathered: float
    rollout: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    cache: float

    @property
    def update(self) -> float:
        """Everything an update needs at once."""
        return self.frozen + self.gathered + self.trained + self.gradients + self.optimizer + self.activations

    @property
    def decoding(self) -> float:
        """Everything a rollout needs at once."""
        return self.frozen + self.rollout + self.trained + self.optimizer + self.cache


def memory_needs(
    base: Decoder, weaver: WeaverSize, workload: Workload, strategy: Strategy, ranks: int, item: int = 2
) -> Needs:
    """Bytes on one device, by part.

    Args:
        base: the frozen model, which all three components share.
        weaver: the trained weights.
        workload: a micro-batch.
        strategy: how state is partitioned.
        ranks: N.
        item: bytes of a frozen weight, an activation and a cached number.
    """
    trained = FLOAT32 * weaver.trained(base)
    shared = strategy in ("zero1", "zero2", "zero3")
    whole = item * base.weights
    layers = item * base.layers * base.layer_weights
    frozen: float = whole
    gathered = rollout = 0.0
    copies: float = trained
    if shared:
        copies += trained / ranks
    if strategy == "zero3":
        frozen = whole / ranks
        gathered = min(layers, 2 * item * base.layer_weights) + item * base.other_weights
        rollout = whole
        copies += trained / ranks
    # In backward, the inputs of all layers are there, and everything of the one that is recomputed.
    inside = 4 * base.hidden + 2 * base.query + 2 * base.key + 4 * base.feed_forward
    passes = 2  # The reasoner's and the weaver's read about as much.
    return Needs(
        frozen=frozen,
        gathered=gathered,
        rollout=rollout,
        trained=copies,
        gradients=trained + (trained / ranks if shared else 0.0),
        optimizer=2 * trained / (ranks if shared else 1),
        activations=item * workload.positions * (passes * base.layers * base.hidden + inside),
        cache=2 * workload.positions * base.cache_bytes(item),
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in an optimizer step of one micro-batch (a ring sends as much).

    Attributes:
        gradients: reduced, and the updated weights back.
        weights: layers that passes gather (ZeRO-3), and the rest of the base, gathered once per step.
        rollout: the base, gathered once for a rollout (ZeRO-3), per update that it serves.
    """

    gradients: float
    weights: float
    rollout: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights + self.rollout


def passes(insertions: int) -> tuple[int, int]:
    """Passes over the layers in a training forward: without gradient (the prefix), and with (weaver's, reasoner's)."""
    return 1, insertions + 1


def gathered_weights(base: Decoder, weaver: WeaverSize, no_grad: int, grad: int, item: int = 2) -> float:
    """Bytes that ZeRO-3 gathers in a training step: a pass with gradient gathers its layers twice.

    Args:
        base: the frozen model.
        weaver: the trained weights.
        no_grad: passes without gradient.
        grad: passes with gradient.
        item: bytes of a frozen weight.
    """
    layers = item * base.layers * base.layer_weights
    resident = item * base.other_weights + FLOAT32 * weaver.trained(base)
    return (no_grad + 2 * grad) * layers + resident


def traffic(
    base: Decoder, weaver: WeaverSize, workload: Workload, strategy: Strategy, ranks: int, item: int = 2
) -> Traffic:
    """Messages of a step of weaver GRPO with one micro-batch.

    Args:
        base: the frozen model.
        weaver: the trained weights.
        workload: the micro-batch and its rollout.
        strategy: how state is partitioned.
        ranks: N.
        item: bytes of a frozen weight.
    """
    if ranks == 1 or strategy == "single":
        return Traffic(0.0, 0.0, 0.0)
    part = (ranks - 1) / ranks
    gradients = 2 * part * FLOAT32 * weaver.trained(base)
    if strategy != "zero3":
        return Traffic(gradients, 0.0, 0.0)
    # The updated weights come back with the next step's gather.
    weights = part * gathered_weights(base, weaver, *passes(workload.insertions), item)
    return Traffic(gradients / 2, weights, part * item * base.weights / workload.iterations)


@dataclass(frozen=True)
class Device:
    """Speed and size of a device."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Useful operations in large matrix products."""
    bandwidth: float
    """Bytes from its memory, in decoding."""
    network: float
    """Bytes from other devices, each."""


H100 = Device("H100 80 GB, 400 Gbit/s per device", 80e9, 0.4 * 989e12, 0.6 * 3.35e12, 0.8 * 50e9)
"""Two fifths of the peak in training, three fifths of the bandwidth in decoding, four fifths of the network."""


@dataclass(frozen=True)
class Times:
    """Seconds of a rollout and of the updates that it serves, without overlap."""

    decoding: float
    update: float
    messages: float

    @property
    def rollout_share(self) -> float:
        """Decoding in all."""
        return self.decoding / (self.decoding + self.update + self.messages)


def times(
    base: Decoder,
    weaver: WeaverSize,
    workload: Workload,
    strategy: Strategy,
    ranks: int,
    device: Device = H100,
    item: int = 2,
) -> Times:
    """Seconds of a cycle of weaver GRPO on one rank: `rows` episodes, and the updates on them.

    A decoding step reads the base once for all rows and each row's keys and values; an update reads each position
    forward (2 P operations), recomputes it and takes the gradient by its input (the base itself has none). The
    weaver reads what the reasoner reads.
    """
    wide = base.weights - (0 if base.tied else base.vocabulary * base.hidden)
    per_step = max(
        (item * wide + workload.positions / 2 * 2 * base.cache_bytes(item)) / device.bandwidth,
        2 * wide * workload.rows / device.flops,
    )
    weaving = workload.insertions * item * wide / device.bandwidth
    prefill = 2 * 2 * wide * workload.rows * (workload.length - workload.new_tokens) / device.flops
    decoding = workload.new_tokens * per_step + weaving + prefill
    update = workload.iterations * 2 * 6 * wide * workload.positions / device.flops
    moved = traffic(base, weaver, workload, strategy, ranks, item)
    return Times(decoding, update, workload.iterations * moved.total / device.network)
