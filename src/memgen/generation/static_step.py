"""A decoding step of one token per row in shapes and storage that never change, so that a GPU can record and replay it.

A step of a large batch launches some hundred kernels, and the host, which also has to wait for the tokens, is slower
than the GPU. Here a step is one copy in, one replay of a recorded graph and one copy out. Rows that have finished and
cache slots that no row has reached are computed too, up to the next of a few sizes; masks keep them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import final

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
        self._reasoner = reasoner
        self._cache = cache
        self._settings = settings
        backbone, device = reasoner.backbone, cache.device
        on_gpu = device.type == "cuda"
        # Integers below 2^53 are exact in float64, so one tensor, and one copy, holds tokens, positions and random numbers.
        self._host = torch.zeros(3, cache.rows, dtype=torch.float64, pin_memory=on_gpu)
        self.inputs = torch.zeros(3, cache.rows, dtype=torch.float64, device=device)
        """Tokens to feed, their positions and the random numbers to sample with, (3, B)."""
        self.outputs = torch.zeros(2, cache.rows, dtype=torch.float64, device=device)
        """Next tokens and their log-probabilities, (2, B)."""
        self.states = torch.zeros(
            cache.rows, backbone.hidden_size, dtype=backbone.embedding.dtype, device=device
        )
        """The reasoner's last hidden states behind the tokens, (B, H)."""
        self._records = on_gpu
        self._seen: Counter[tuple[int, int]] = Counter()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._kept: list[Tensor] = []

    def run(self, tokens: Sequence[int], uniforms: Sequence[float] | None) -> None:
        """Queues a step; the device is not waited for.

        Args:
            tokens: of the first rows of the cache, which are longer by one afterwards.
            uniforms: a number in [0, 1) per row; None only if greedy.
        """
        rows = range(len(tokens))
        positions = [self._cache.length(row) for row in rows]
        # The cache's other rows are not read: they feed token 0 at position 0.
        self._host.zero_()
        for kind, numbers in enumerate((tokens, positions, uniforms)):
            if numbers is not None:
                self._host[kind, : len(tokens)] = torch.tensor(numbers, dtype=torch.float64)
        self.inputs.copy_(self._host, non_blocking=True)
        self._cache.advance(rows)
        self._step(*self.size(len(tokens), max(positions) + 1))

    def size(self, rows: int, slots: int) -> tuple[int, int]:
        """The sizes (R, S) of the step that serves so many rows with so many slots: the next larger of a few."""
        bucket = 1 << (rows - 1).bit_length()
        return min(bucket, self._cache.rows), min(-(-slots // READ_STEP) * READ_STEP, self._cache.capacity)

    def _step(self, rows: int, slots: int) -> None:
        size = (rows, slots)
        self._seen[size] += 1
        if self._records and size not in self._graphs and self._seen[size] > WARM_UP:
            self._record(size)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            self.compute(rows, slots)

    def compute(self, rows: int, slots: int) -> None:
        """The step itself: from `inputs` to `outputs` and `states`. Its operations depend on the two sizes alone."""
        backbone = self._reasoner.backbone
        tokens, positions = self.inputs[:2, :rows].long().unbind()
        hidden = self._reasoner.read(backbone.embed(tokens), self._cache.one_each(positions, slots))
        sampled = sample(self._reasoner.logits(hidden), self._settings, self.inputs[2, :rows])
        self.outputs[0, :rows] = sampled.tokens
        self.outputs[1, :rows] = sampled.logprobs
        self.states[:rows] = hidden

    def _record(self, size: tuple[int, int]) -> None:
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
            self.compute(*size)
        self._graphs[size] = graph
