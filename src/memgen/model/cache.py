"""Key-value memories whose rows have different lengths. This is the one hard data structure; it keeps three rules.

1. Inputs are packed: a pass feeds T positions of any rows, one behind the other, and padding is never fed, so
   nothing can be written past a row's end into another row.
2. A row's keys lie in the order of its positions, from 0: key slot j of a row is its position j, and the mask is
   `slot <= position`.
3. What a pass writes counts only as far as the caller keeps it: the weaver's queries are read by their own pass and
   then forgotten.

`RowCache` is for generation (preallocated, no gradient), `PackedStore` for training (autograd runs through it).
Both hand out a `View`: everything one pass needs, fixed when the pass begins, so that a recomputation under
activation checkpointing sees exactly what the first computation saw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

# R rows of a pass, Q queries per row (padded), S key slots per row (padded), T packed positions,
# h query heads, g key-value heads, d head size


@dataclass(frozen=True)
class Segment:
    """A part of a pass: for each row, how many new positions it feeds."""

    rows: Sequence[int]
    """Rows of the memory; a row appears once per segment."""
    counts: Sequence[int]
    """New positions of each row; they lie one behind the other in the packed input, in the order of `rows`."""
    keep: Sequence[int] | None = None
    """How many of them the memory keeps, from the front; None keeps all."""


class View(ABC):
    """One pass over a memory."""

    positions: Tensor
    """Position ids of the packed input, int64 (T,)."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer.
            query: (1, h, T, d), of the packed input.
            key: (1, g, T, d), likewise.
            value: (1, g, T, d), likewise.
            scale: factor on the scores.
            window: sliding window in positions, or None.

        Returns:
            (1, T, h, d).
        """


class Memory(ABC):
    """What a pass reads and extends."""

    @abstractmethod
    def open(self, segments: Sequence[Segment]) -> View:
        """Begins a pass that feeds the segments, one behind the other. A later segment sees an earlier one."""

    @abstractmethod
    def length(self, row: int) -> int:
        """Positions that a row keeps."""


def _grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, causal: bool
) -> Tensor:
    """Attention of h query heads on g key-value heads.

    The query heads of a group are folded into the query axis: exact, and neither keys nor values are copied.

    Args:
        query: (R, h, Q, d).
        key: (R, g, S, d).
        value: (R, g, S, d).
        mask: True where a query sees a slot, (R, Q, S), or None.
        scale: factor on the scores.
        causal: query i sees slots up to i; only without a mask, and where Q = S.

    Returns:
        (R, h, Q, d).
    """
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    repeat = heads // groups
    if causal:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=repeat > 1
        )
    folded = query.reshape(rows, groups, repeat * length, size)
    if mask is not None:
        mask = mask[:, None, None].expand(rows, 1, repeat, length, mask.shape[-1])
        mask = mask.reshape(rows, 1, repeat * length, mask.shape[-1])
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(rows, heads, length, size)


def _visible(positions: Tensor, slots: int, window: int | None) -> Tensor:
    """True where a query at a position (R, Q) sees a slot: (R, Q, S)."""
    slot = torch.arange(slots, device=positions.device)
    visible = slot <= positions[..., None]
    if window is not None:
        visible &= slot > positions[..., None] - window
    return visible


class _Padding:
    """Moves the packed positions of one segment into (R, Q) and back. Rows of equal count need no index."""

    def __init__(self, counts: Sequence[int], offset: int, device: torch.device) -> None:
        self.rows = len(counts)
        self.width = max(counts)
        self.begin, self.end = offset, offset + sum(counts)
        self.uniform = min(counts) == self.width
        if not self.uniform:
            starts = np.cumsum([0, *counts[:-1]])
            column = np.arange(self.width)
            real = column < np.asarray(counts)[:, None]
            # A padded query repeats its row's first: it computes something finite that nobody reads.
            index = np.where(real, starts[:, None] + column, starts[:, None])
            self.pad_index = torch.from_numpy(index.reshape(-1)).to(device)
            self.unpad_index = torch.from_numpy(np.flatnonzero(real.reshape(-1))).to(device)

    def pad(self, packed: Tensor) -> Tensor:
        """(1, heads, T, d) -> (R, heads, Q, d)."""
        part = packed[0, :, self.begin : self.end]
        if not self.uniform:
            part = part.index_select(1, self.pad_index)
        padded: Tensor = part.unflatten(1, (self.rows, self.width)).transpose(0, 1)
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """(R, heads, Q, d) -> (the segment's positions, heads, d)."""
        flat = padded.transpose(1, 2).flatten(0, 1)
        return flat if self.uniform else flat.index_select(0, self.unpad_index)


# Generation


@dataclass(frozen=True)
class _RowSegment:
    padding: _Padding
    rows: Tensor | slice
    positions: Tensor  # (R, Q)
    slots: int
    fresh: bool  # the rows were empty: plain causal attention over the pass's own keys
    aligned: bool  # one query per row and every row equally long: no mask needed


@final
class _RowView(View):
    def __init__(self, cache: RowCache, segments: Sequence[Segment]) -> None:
        self._cache = cache
        cursor = {row: cache.length(row) for segment in segments for row in segment.rows}
        offset = 0
        parts, all_rows, all_positions = [], [], []
        for segment in segments:
            starts = np.asarray([cursor[row] for row in segment.rows])
            counts = np.asarray(segment.counts)
            for row, count in zip(segment.rows, segment.counts, strict=True):
                cursor[row] += count
                if cursor[row] > cache.capacity:
                    raise ValueError(
                        f"a row needs {cursor[row]} cache slots but the cache was made for {cache.capacity}"
                    )
            padding = _Padding(segment.counts, offset, cache.device)
            padded = starts[:, None] + np.minimum(np.arange(padding.width), counts[:, None] - 1)
            all_rows.append(np.repeat(np.asarray(segment.rows), counts))
            all_positions.append(padded[np.arange(padding.width) < counts[:, None]])
            contiguous = list(segment.rows) == list(range(segment.rows[0], segment.rows[0] + len(starts)))
            parts.append(
                _RowSegment(
                    padding=padding,
                    rows=slice(segment.rows[0], segment.rows[0] + len(starts))
                    if contiguous
                    else torch.tensor(list(segment.rows), device=cache.device),
                    positions=torch.from_numpy(padded).to(cache.device),
                    slots=int((starts + counts).max()),
                    fresh=bool((starts == 0).all()),
                    aligned=padding.width == 1 and bool((starts == starts[0]).all()),
                )
            )
            offset = padding.end
        self._parts = parts
        self._rows = torch.from_numpy(np.concatenate(all_rows)).to(cache.device)
        self.positions = torch.from_numpy(np.concatenate(all_positions)).to(cache.device)
        self._end = cursor

    @override
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys, values = self._cache.buffers(layer, key)
        keys[self._rows, :, self.positions] = key[0].transpose(0, 1)
        values[self._rows, :, self.positions] = value[0].transpose(0, 1)
        outputs = []
        for part in self._parts:
            padded = part.padding.pad(query)  # (R, h, Q, d)
            if part.fresh and window is None:
                attended = _grouped_attention(
                    padded, part.padding.pad(key), part.padding.pad(value), None, scale, causal=True
                )
            else:
                plain = part.aligned and window is None
                attended = _grouped_attention(
                    padded,
                    keys[part.rows, :, : part.slots],
                    values[part.rows, :, : part.slots],
                    None if plain else _visible(part.positions, part.slots, window),
                    scale,
                    causal=False,
                )
            outputs.append(part.padding.unpad(attended))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


@final
class RowCache(Memory):
    """Preallocated keys and values, one line per row, for generation.

    Args:
        rows: number of rows.
        capacity: slots per row: the longest stream a row may reach.
        device: where the buffers live.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self._lengths = [0] * rows
        self._keys: dict[int, Tensor] = {}  # layer -> (rows, g, capacity, d)
        self._values: dict[int, Tensor] = {}

    @override
    def length(self, row: int) -> int:
        return self._lengths[row]

    def buffers(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, g, capacity, d); made at the layer's first use, in the type of `like`."""
        if layer not in self._keys:
            _, groups, _, size = like.shape
            shape = (len(self._lengths), groups, self.capacity, size)
            self._keys[layer] = like.new_zeros(shape)
            self._values[layer] = like.new_zeros(shape)
        return self._keys[layer], self._values[layer]

    @override
    def open(self, segments: Sequence[Segment]) -> View:
        view = _RowView(self, segments)
        for segment in segments:
            keep = segment.counts if segment.keep is None else segment.keep
            for row, kept in zip(segment.rows, keep, strict=True):
                self._lengths[row] += kept
        return view

    def truncate(self, row: int, length: int) -> None:
        """Forgets what a row holds from position `length` on."""
        assert length <= self._lengths[row], "truncate shortens"
        self._lengths[row] = length

    def select(self, rows: Sequence[int], capacity: int) -> RowCache:
        """A new cache with the given rows (repeats allowed), e.g. one prompt for each answer of its group."""
        chosen = RowCache(len(rows), capacity, self.device)
        chosen._lengths = [self._lengths[row] for row in rows]
        used = max(chosen._lengths, default=0)
        index = torch.tensor(list(rows), device=self.device)
        for layer in self._keys:
            like = self._keys[layer]
            keys, values = chosen.buffers(layer, like)
            keys[:, :, :used] = like[:, :, :used].index_select(0, index)
            values[:, :, :used] = self._values[layer][:, :, :used].index_select(0, index)
        return chosen

    def move(self, source: int, target: int) -> None:
        """Overwrites a row with another: how a finished row leaves without copying the batch."""
        length = self._lengths[source]
        self._lengths[target] = length
        for layer in self._keys:
            self._keys[layer][target, :, :length] = self._keys[layer][source, :, :length]
            self._values[layer][target, :, :length] = self._values[layer][source, :, :length]


# Training


@final
class _PackedView(View):
    def __init__(self, store: PackedStore, chunk: int, segments: Sequence[Segment]) -> None:
        self._store = store
        self._chunk = chunk
        self._parts: list[tuple[_Padding, Tensor, Tensor, bool]] = []
        positions = []
        offset = 0
        for segment in segments:
            contexts = []
            first = store.size
            for row, count, kept in zip(
                segment.rows, segment.counts, segment.keep or segment.counts, strict=True
            ):
                new = np.arange(first, first + count)
                first += count
                before = store.slots(row)
                contexts.append(np.concatenate([before, new]))
                positions.append(np.arange(len(before), len(before) + count))
                store.extend(row, new[:kept])
            store.size = first
            padding = _Padding(segment.counts, offset, store.device)
            offset = padding.end
            slots = max(len(context) for context in contexts)
            index = np.zeros((len(contexts), slots), dtype=np.int64)
            where = np.zeros((len(contexts), padding.width), dtype=np.int64)
            for line, (context, count) in enumerate(zip(contexts, segment.counts, strict=True)):
                index[line, : len(context)] = context
                start = len(context) - count
                where[line] = start + np.minimum(np.arange(padding.width), count - 1)
            fresh = all(
                len(context) == count for context, count in zip(contexts, segment.counts, strict=True)
            )
            self._parts.append(
                (
                    padding,
                    torch.from_numpy(index).to(store.device),
                    torch.from_numpy(where).to(store.device),
                    fresh,
                )
            )
        self.positions = torch.from_numpy(np.concatenate(positions)).to(store.device)

    @override
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        keys, values = self._store.with_chunk(
            layer, self._chunk, key[0].transpose(0, 1), value[0].transpose(0, 1)
        )
        outputs = []
        for padding, index, where, fresh in self._parts:
            padded = padding.pad(query)
            if fresh and window is None:
                attended = _grouped_attention(
                    padded, padding.pad(key), padding.pad(value), None, scale, causal=True
                )
            else:
                flat, shape = index.reshape(-1), index.shape
                attended = _grouped_attention(
                    padded,
                    keys.index_select(0, flat).unflatten(0, shape).transpose(1, 2),
                    values.index_select(0, flat).unflatten(0, shape).transpose(1, 2),
                    _visible(where, shape[1], window),
                    scale,
                    causal=False,
                )
            outputs.append(padding.unpad(attended))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


@final
class PackedStore(Memory):
    """Keys and values of a training forward: the chunks of all passes, flat, with a list of slots per row.

    Gradients flow from a later pass into an earlier one through the stored tensors. A row may begin with slots of
    another (`share`): a common prefix is read once.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = device
        self.size = 0
        self._slots: list[np.ndarray] = [np.zeros(0, dtype=np.int64) for _ in range(rows)]
        self._shared: dict[int, tuple[int, int]] = {}
        self._chunks: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._passes = 0

    @override
    def length(self, row: int) -> int:
        return len(self.slots(row))

    def slots(self, row: int) -> np.ndarray:
        """Flat index of each position of a row."""
        if row in self._shared:
            source, length = self._shared.pop(row)
            self._slots[row] = self._slots[source][:length]
            assert len(self._slots[row]) == length, "the source of a shared prefix is read before its sharer"
        return self._slots[row]

    def extend(self, row: int, new: np.ndarray) -> None:
        """Adds flat indices behind a row's slots."""
        self._slots[row] = np.concatenate([self._slots[row], new])

    def share(self, row: int, source: int, length: int) -> None:
        """Lets an empty row begin with the first positions of another, as they are when the row is first read."""
        assert len(self._slots[row]) == 0, "only an empty row can begin with another's positions"
        self._shared[row] = (source, length)

    @override
    def open(self, segments: Sequence[Segment]) -> View:
        view = _PackedView(self, self._passes, segments)
        self._passes += 1
        return view

    def with_chunk(self, layer: int, chunk: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (slots, g, d) up to and with a pass's own.

        The pass's own are stored at its first computation only; a recomputation reads its own and the chunks
        before it, as the first computation did.
        """
        chunks = self._chunks.setdefault(layer, [])
        if len(chunks) == chunk:
            chunks.append((key, value))
        before = chunks[:chunk]
        if not before:
            return key, value
        keys, values = zip(*before, strict=True)
        return torch.cat([*keys, key]), torch.cat([*values, value])
