"""A decoding step of one token per row in shapes and storage that never change, so that a GPU can record and replay it.

A step of a large batch launches some hundred kernels, and the host, which also has to wait for the tokens, is slower
than the GPU. Here a step is one copy in, one replay of a recorded graph and one copy out. Rows that have finished and
cache slots that no row has reached are computed too, up to the next of a few sizes; masks keep them apart.

A recording holds the addresses of the weights and of the KV cache, so what is to be replayed in a later call of `generate`
is kept with its cache (`take_step`, `keep_step`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memgen.generation.sampling import GenerationSettings, sample
from memgen.model.cache import RowKVCache
from memgen.model.reasoner import Reasoner

# R rows of a step (a bucket's), S slots of each that it reads (a bucket's), B rows of the cache, H hidden size

READ_STEP = 128
"""Slots of a row are read in multiples of this."""
WARM_UP = 8
"""Steps of a size that run before it is recorded. Libraries set themselves up in them, and a recording takes longer than
some steps, so a size that is soon left is not worth one."""
KEPT = 2
"""Steps of a reasoner that are kept with their caches between calls: training and evaluation take turns."""

_Size = tuple[int, int, float, float, int]
"""What a step's operations depend on: R, S, temperature, top_p and top_k."""

_kept: WeakKeyDictionary[Reasoner, list[StaticStep]] = WeakKeyDictionary()
_lock = threading.Lock()


def take_step(reasoner: Reasoner, rows: int, capacity: int, settings: GenerationSettings) -> StaticStep:
    """A step with an empty KV cache of its own: one that an earlier call left, if it fits, with its recordings; else new.

    Args:
        reasoner: the frozen language model.
        rows: that the cache has at least.
        capacity: slots that each has at least.
        settings: how to sample.
    """
    with _lock:
        steps = _kept.get(reasoner, [])
        found = next((step for step in steps if step.serves(reasoner, rows, capacity)), None)
        if found is not None:
            steps.remove(found)
    if found is None:
        cache = RowKVCache(rows, capacity, reasoner.backbone.device)
        return StaticStep(reasoner, cache, settings)
    found.cache.clear()
    found.begin(reasoner, settings)
    return found


def keep_step(step: StaticStep) -> None:
    """Keeps a step for later calls, in place of the one that was used longest ago or whose weights have moved."""
    reasoner = step.end()
    with _lock:
        others = [other for other in _kept.get(reasoner, []) if other.serves(reasoner, 0, 0)]
        _kept[reasoner] = [step, *others][:KEPT]


def _addresses(reasoner: Reasoner) -> list[tuple[str, int, torch.dtype]]:
    """Where the weights lie that it is read with. Other adapters of its base may move."""
    own = f".{reasoner.adapter}."
    return [
        (name, parameter.data_ptr(), parameter.dtype)
        for name, parameter in reasoner.backbone.named_parameters()
        if ".lora_" not in name or (reasoner.adapter is not None and own in name)
    ]


@final
class StaticStep:
    """Feeds each row one token and samples the next.

    What a step reads and writes are these tensors and the cache; the host sees numbers of them only when it copies some.

    Args:
        reasoner: the frozen language model.
        cache: its KV cache, whose first rows are fed.
        settings: how to sample.
    """

    def __init__(self, reasoner: Reasoner, cache: RowKVCache, settings: GenerationSettings) -> None:
        self.cache = cache
        backbone, device = reasoner.backbone, cache.device
        on_gpu = device.type == "cuda"
        # What is written in place in several calls must not belong to the inference mode of one of them.
        with torch.inference_mode(mode=False):
            # Integers below 2^53 are exact in float64, so one tensor, and one copy, holds tokens, positions and random
            # numbers.
            self._host = torch.zeros(3, cache.rows, dtype=torch.float64, pin_memory=on_gpu)
            self.inputs = torch.zeros(3, cache.rows, dtype=torch.float64, device=device)
            """Tokens to feed, their positions and the random numbers to sample with, (3, B)."""
            self.outputs = torch.zeros(2, cache.rows, dtype=torch.float64, device=device)
            """Next tokens and their log-probabilities, (2, B)."""
            self.states = torch.zeros(
                cache.rows, backbone.hidden_size, dtype=backbone.embedding.dtype, device=device
            )
            """The reasoner's last hidden states behind the tokens, (B, H)."""
        self._seen: Counter[_Size] = Counter()
        self._graphs: dict[_Size, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._kept: list[Tensor] = []
        self._weights = _addresses(reasoner)
        self.begin(reasoner, settings)

    def begin(self, reasoner: Reasoner, settings: GenerationSettings) -> None:
        """Puts the step into use for a call of `generate`."""
        self._reasoner: Reasoner | None = reasoner
        self._settings = settings
        self._records = self.cache.device.type == "cuda"

    def end(self) -> Reasoner:
        """Takes it out of use; it does not keep the reasoner alive then. Returns the reasoner."""
        reasoner, self._reasoner = self._reasoner, None
        assert reasoner is not None, "it was in use"
        return reasoner

    def serves(self, reasoner: Reasoner, rows: int, capacity: int) -> bool:
        """Whether so many rows of so many slots fit, and the weights lie where they lay."""
        return (
            rows <= self.cache.rows
            and capacity <= self.cache.capacity
            and self._weights == _addresses(reasoner)
        )

    def run(self, tokens: Sequence[int], uniforms: Sequence[float] | None) -> None:
        """Queues a step; the device is not waited for.

        Args:
            tokens: of the first rows of the cache, which are longer by one afterwards.
            uniforms: a number in [0, 1) per row; None only if greedy.
        """
        rows = range(len(tokens))
        positions = [self.cache.length(row) for row in rows]
        # The cache's other rows are not read: they feed token 0 at position 0.
        self._host.zero_()
        for kind, numbers in enumerate((tokens, positions, uniforms)):
            if numbers is not None:
                self._host[kind, : len(tokens)] = torch.tensor(numbers, dtype=torch.float64)
        self.inputs.copy_(self._host, non_blocking=True)
        self.cache.advance(rows)
        self._step(*self.size(len(tokens), max(positions) + 1))

    def size(self, rows: int, slots: int) -> tuple[int, int]:
        """The sizes (R, S) of the step that serves so many rows with so many slots: the next larger of a few."""
        bucket = 1 << (rows - 1).bit_length()
        return min(bucket, self.cache.rows), min(-(-slots // READ_STEP) * READ_STEP, self.cache.capacity)

    def _step(self, rows: int, slots: int) -> None:
        own = self._settings
        size = (rows, slots, own.temperature, own.top_p, own.top_k)
        self._seen[size] += 1
        if self._records and size not in self._graphs and self._seen[size] > WARM_UP:
            self._record(size)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self.compute(rows, slots)

    def compute(self, rows: int, slots: int) -> None:
        """The step itself: from `inputs` to `outputs` and `states`. Its operations depend on the two sizes alone."""
        reasoner = self._reasoner
        assert reasoner is not None, "it is in use"
        backbone = reasoner.backbone
        tokens, positions = self.inputs[:2, :rows].long().unbind()
        hidden = reasoner.read(backbone.embed(tokens), self.cache.one_each(positions, slots))
        sampled = sample(reasoner.logits(hidden), self._settings, self.inputs[2, :rows])
        self.outputs[0, :rows] = sampled.tokens
        self.outputs[1, :rows] = sampled.logprobs
        self.states[:rows] = hidden

    def _record(self, size: _Size) -> None:
        assert self._reasoner is not None, "it is in use"
        kept = self._reasoner.backbone.recordable()
        if kept is None:
            self._records = False
            return
        self._kept += kept
        graph = torch.cuda.CUDAGraph()
        # Graphs share their memory: none leaves a result in it that another could overwrite. Other threads (a loader
        # that pins its batches, say) may go on with what they do.
        with (
            torch.cuda.device(self.inputs.device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            self.compute(size[0], size[1])
        self._graphs[size] = graph
