"""KV caches whose rows have different lengths. This is the one hard data structure; it keeps three rules.

1. Inputs are packed: a pass feeds T positions of any rows, concatenated, and padding is never fed, so nothing can be
   written past a row's end into another row.
2. A row's keys lie in the order of its positions, from 0: key slot j of a row is its position j, and the mask is
   `slot <= position`.
3. Of what a pass writes, a row keeps as many positions as the caller says: the weaver's queries are read by their own
   pass and not kept.

`RowKVCache` is for generation (preallocated, no gradient), `PackedKVCache` for training (autograd runs through it).
Both return a `View`: everything one pass needs, fixed when the pass begins, so that a recomputation under activation
checkpointing sees exactly what the first computation saw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

# R rows of a pass, Q queries per row (padded), S key slots per row (padded), T packed positions,
# h query heads, g key-value heads, d head size


@dataclass(frozen=True)
class PassSegment:
    """A part of a pass: for each row, how many new positions it feeds."""

    rows: Sequence[int]
    """Rows of the cache; a row appears once per segment."""
    counts: Sequence[int]
    """New positions of each row; they are concatenated in the packed input, in the order of `rows`."""
    keep: Sequence[int] | None = None
    """How many of them the cache keeps, from the front; None keeps all."""
    read: Sequence[int] | None = None
    """For how many of them, counted from the back, the output is needed; None: for all. The others are computed only
    as far as later positions attend to them."""


class View(ABC):
    """One pass over a cache."""

    positions: Tensor
    """Position ids of the packed input, int64 (T,)."""
    limit: int
    """One more than the largest position."""
    read: Tensor | None = None
    """Indices into the packed input whose outputs are needed, int64; None: all."""

    @abstractmethod
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
        """Attention of one layer.

        Args:
            layer: index of the layer.
            query: (1, h, T, d), of the packed input; of its positions `read` alone if `narrowed`.
            key: (1, g, T, d), likewise.
            value: (1, g, T, d), likewise.
            scale: factor on the scores.
            window: sliding window in positions, or None.
            narrowed: see `query`.

        Returns:
            (1, T, h, d), for the queries given.
        """


def upload(values: Sequence[int] | Sequence[float] | np.ndarray, device: torch.device) -> Tensor:
    """Copies host numbers to a device. A GPU is not waited for: the copy is queued behind its work."""
    host = torch.from_numpy(np.asarray(values))
    if device.type == "cuda":
        # An ordinary copy waits until everything before it is done. The pinned block is not reused before it is read.
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class KVCache(ABC):
    """Keys and values of every layer, which a pass reads and extends."""

    @abstractmethod
    def open(self, segments: Sequence[PassSegment]) -> View:
        """Begins a pass that feeds the segments in this order. A later segment sees an earlier one."""

    @abstractmethod
    def length(self, row: int) -> int:
        """Positions that a row keeps."""


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Query i of (R, h, S, d) sees slots up to i of (R, g, S, d)."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
    )


def _grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention of h query heads on g key-value heads.

    The query heads of a group are folded into the query axis: exact, and neither keys nor values are copied.

    Args:
        query: (R, h, Q, d).
        key: (R, g, S, d).
        value: (R, g, S, d).
        mask: what is added to the scores, (R, 1, h/g * Q, S), or None.
        scale: factor on the scores.

    Returns:
        (R, h, Q, d).
    """
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(query.shape)


class _Masks:
    """The mask of a part of a pass: made once, for all layers that see the same window.

    Args:
        positions: of the queries, (R, Q).
        slots: S.
    """

    def __init__(self, positions: Tensor, slots: int) -> None:
        self._positions = positions
        self._slots = slots
        self._made: dict[tuple[int | None, int, torch.dtype], Tensor] = {}

    def get(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a slot, else minus infinity: (R, 1, repeat * Q, S)."""
        key = (window, repeat, dtype)
        if key not in self._made:
            positions = self._positions[:, None, :, None]
            slot = torch.arange(self._slots, device=positions.device)
            hidden = slot > positions
            if window is not None:
                hidden |= slot <= positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask.masked_fill_(hidden, -torch.inf)
            self._made[key] = mask.repeat(1, 1, repeat, 1) if repeat > 1 else mask
        return self._made[key]


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
            # A padded query repeats its row's first: its output is finite and not used.
            index = np.where(real, starts[:, None] + column, starts[:, None])
            self.pad_index = upload(index.reshape(-1), device)
            self.unpad_index = upload(np.flatnonzero(real.reshape(-1)), device)

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


@dataclass(frozen=True)
class _Tail:
    rows: np.ndarray  # indices of the segment's rows of which something is needed
    counts: np.ndarray  # how many positions of each, from the back


class _Narrowed:
    """Gathers which positions of a pass have an output that is needed, if not all have."""

    def __init__(self, segments: Sequence[PassSegment]) -> None:
        self._all = all(segment.read is None for segment in segments)
        self._index: list[np.ndarray] = []
        self._offset = 0
        self.total = 0

    def tail(self, segment: PassSegment) -> _Tail | None:
        """The needed part of the next segment; None if it is empty, or if the whole pass is needed."""
        if self._all:
            return None
        counts = np.asarray(segment.counts)
        read = counts if segment.read is None else np.asarray(segment.read)
        assert bool((read <= counts).all()), "what is needed of a row is part of what is fed"
        ends = self._offset + np.cumsum(counts)
        within = np.arange(read.sum()) - np.repeat(np.cumsum(read) - read, read)
        self._index.append(np.repeat(ends - read, read) + within)
        self._offset += int(counts.sum())
        self.total += int(read.sum())
        rows = np.flatnonzero(read)
        return _Tail(rows, read[rows]) if len(rows) else None

    def index(self, device: torch.device) -> Tensor | None:
        """Packed positions that are needed, or None for all."""
        return None if self._all else upload(np.concatenate(self._index), device)


def _joined(outputs: list[Tensor], query: Tensor) -> Tensor:
    """(1, T, h, d) from the parts of a pass."""
    if not outputs:
        return query.transpose(1, 2)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


# Generation


@dataclass(frozen=True)
class _RowSegment:
    padding: _Padding
    rows: Tensor | slice
    masks: _Masks
    slots: int
    fresh: bool  # the rows were empty: plain causal attention over the pass's own keys
    aligned: bool  # one query per row and every row equally long: no mask needed


def _row_segment(
    rows: Sequence[int],
    starts: np.ndarray,
    counts: np.ndarray,
    offset: int,
    device: torch.device,
    *,
    fresh: bool | None = None,
) -> _RowSegment:
    padding = _Padding(counts.tolist(), offset, device)
    padded = starts[:, None] + np.minimum(np.arange(padding.width), counts[:, None] - 1)
    slots = int((starts + counts).max())
    contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows)))
    return _RowSegment(
        padding=padding,
        rows=slice(rows[0], rows[0] + len(rows)) if contiguous else upload(rows, device),
        masks=_Masks(upload(padded, device), slots),
        slots=slots,
        fresh=bool((starts == 0).all()) if fresh is None else fresh,
        aligned=padding.width == 1 and bool((starts == starts[0]).all()),
    )


@final
class _RowView(View):
    def __init__(self, cache: RowKVCache, segments: Sequence[PassSegment]) -> None:
        self._cache = cache
        cursor = {row: cache.length(row) for segment in segments for row in segment.rows}
        offset = 0
        parts, all_rows, all_positions = [], [], []
        narrowed = _Narrowed(segments)
        tails = []
        for segment in segments:
            starts = np.asarray([cursor[row] for row in segment.rows])
            counts = np.asarray(segment.counts)
            for row, count in zip(segment.rows, segment.counts, strict=True):
                cursor[row] += count
                if cursor[row] > cache.capacity:
                    raise ValueError(
                        f"a row needs {cursor[row]} cache slots but the cache was made for {cache.capacity}"
                    )
            all_rows.append(np.repeat(np.asarray(segment.rows), counts))
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            all_positions.append(np.repeat(starts, counts) + within)
            parts.append(_row_segment(segment.rows, starts, counts, offset, cache.device))
            begin = narrowed.total
            if (tail := narrowed.tail(segment)) is not None:
                rows = [segment.rows[index] for index in tail.rows]
                first = (starts + counts)[tail.rows] - tail.counts
                tails.append(_row_segment(rows, first, tail.counts, begin, cache.device, fresh=False))
            offset += int(counts.sum())
        self._parts, self._tails = parts, tails
        self.read = narrowed.index(cache.device)
        self._rows = upload(np.concatenate(all_rows), cache.device)
        self.positions = upload(np.concatenate(all_positions), cache.device)
        self.limit = max(part.slots for part in parts)
        only = parts[0]
        self._column = (
            only.slots - 1 if len(parts) == 1 and only.aligned and isinstance(only.rows, slice) else None
        )

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
        keys, values = self._cache.buffers(layer, key)
        new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # (T, g, d)
        if self._column is not None:
            keys[self._parts[0].rows, :, self._column] = new_keys
            values[self._parts[0].rows, :, self._column] = new_values
        else:
            keys[self._rows, :, self.positions] = new_keys
            values[self._rows, :, self.positions] = new_values
        repeat = query.shape[1] // key.shape[1]
        outputs = []
        for part in self._tails if narrowed else self._parts:
            padded = part.padding.pad(query)  # (R, h, Q, d)
            if part.fresh and window is None:
                attended = _causal_attention(padded, part.padding.pad(key), part.padding.pad(value), scale)
            else:
                plain = part.aligned and window is None
                attended = _grouped_attention(
                    padded,
                    _rows(keys, part.rows, part.slots),
                    _rows(values, part.rows, part.slots),
                    None if plain else part.masks.get(window, repeat, query.dtype),
                    scale,
                )
            outputs.append(part.padding.unpad(attended))
        return _joined(outputs, query)


def _rows(buffer: Tensor, rows: Tensor | slice, slots: int) -> Tensor:
    """The first slots of some rows, (R, g, slots, d). Copied only where the rows are not contiguous."""
    used = buffer[:, :, :slots]
    return used[rows] if isinstance(rows, slice) else used.index_select(0, rows)


@final
class _OneEach(View):
    """One position for each of a cache's first rows: the same shapes and the same storage in every such pass.

    Args:
        cache: what is read and extended.
        positions: of the rows, (R,); a tensor of the device, whose values may change between passes.
        slots: how many slots of each row are read, S: more than any of the positions.
    """

    def __init__(self, cache: RowKVCache, positions: Tensor, slots: int) -> None:
        self.positions = positions
        self.limit = cache.capacity
        self._cache = cache
        self._count = positions.shape[0]
        self._rows = torch.arange(self._count, device=cache.device)
        self._slots = slots
        self._masks = _Masks(positions[:, None], slots)

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
        assert not narrowed, "every position of this pass is needed"
        keys, values = self._cache.buffers(layer, key)
        keys[self._rows, :, self.positions] = key[0].transpose(0, 1)
        values[self._rows, :, self.positions] = value[0].transpose(0, 1)
        attended = _grouped_attention(
            query[0].transpose(0, 1)[:, :, None],  # (R, h, 1, d)
            keys[: self._count, :, : self._slots],
            values[: self._count, :, : self._slots],
            self._masks.get(window, query.shape[1] // key.shape[1], query.dtype),
            scale,
        )
        return attended[:, :, 0][None]


@final
class RowKVCache(KVCache):
    """Preallocated keys and values, for generation.

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

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._lengths)

    @override
    def length(self, row: int) -> int:
        return self._lengths[row]

    def buffers(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, g, capacity, d); made at the layer's first use, in the type of `like`."""
        if layer not in self._keys:
            _, groups, _, size = like.shape
            shape = (len(self._lengths), groups, self.capacity, size)
            # Not of the inference mode of one call: a cache may be kept for another.
            with torch.inference_mode(mode=False):
                self._keys[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)
                self._values[layer] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self._keys[layer], self._values[layer]

    @override
    def open(self, segments: Sequence[PassSegment]) -> View:
        view = _RowView(self, segments)
        for segment in segments:
            keep = segment.counts if segment.keep is None else segment.keep
            for row, kept in zip(segment.rows, keep, strict=True):
                self._lengths[row] += kept
        return view

    def one_each(self, positions: Tensor, slots: int) -> View:
        """Begins a pass of one position for each of the first rows, which does not depend on values on the host.

        No row becomes longer by it: `advance` says which rows keep the position.

        Args:
            positions: where each row's new position goes, on the device, (R,).
            slots: how many slots of each row are read: more than any of the positions.
        """
        return _OneEach(self, positions, slots)

    def advance(self, rows: Sequence[int]) -> None:
        """Keeps one more position of each row."""
        for row in rows:
            assert self._lengths[row] < self.capacity, "a row has a free slot"
            self._lengths[row] += 1

    def reserve(self, capacity: int) -> None:
        """Makes room for rows of up to `capacity` slots, in new buffers if there is not enough."""
        if capacity <= self.capacity:
            return
        added = max(capacity, 2 * self.capacity) - self.capacity
        self.capacity += added
        for buffers in (self._keys, self._values):
            for layer, old in buffers.items():
                buffers[layer] = torch.cat([old, old.new_zeros(*old.shape[:2], added, old.shape[3])], dim=2)

    def truncate(self, row: int, length: int) -> None:
        """Drops a row's positions from `length` on."""
        assert length <= self._lengths[row], "truncate shortens"
        self._lengths[row] = length

    def clear(self) -> None:
        """Empties all rows and keeps the buffers where they are, without a value that a mask could not hide (NaN)."""
        self._lengths = [0] * len(self._lengths)
        for buffer in (*self._keys.values(), *self._values.values()):
            buffer.zero_()

    def select(self, rows: Sequence[int], capacity: int, into: RowKVCache | None = None) -> RowKVCache:
        """A cache whose first rows are the given ones (repeats allowed), e.g. one prompt for each answer of its group.

        Args:
            rows: of this cache.
            capacity: slots per row.
            into: an empty cache with room for them; None: a new one.
        """
        chosen = RowKVCache(len(rows), capacity, self.device) if into is None else into
        chosen._lengths[: len(rows)] = [self._lengths[row] for row in rows]
        used = max(chosen._lengths, default=0)
        index = upload(rows, self.device)
        for layer in self._keys:
            like = self._keys[layer]
            keys, values = chosen.buffers(layer, like)
            keys[: len(rows), :, :used] = like[:, :, :used].index_select(0, index)
            values[: len(rows), :, :used] = self._values[layer][:, :, :used].index_select(0, index)
        return chosen

    def copy_in(self, row: int, other: RowKVCache, source: int) -> None:
        """Overwrites a row with one of another cache: how a row that was begun elsewhere joins a running batch."""
        length = other._lengths[source]
        assert length <= self.capacity, "there is room for the row"
        self._lengths[row] = length
        for layer, like in other._keys.items():
            keys, values = self.buffers(layer, like)
            keys[row, :, :length] = like[source, :, :length]
            values[row, :, :length] = other._values[layer][source, :, :length]

    def begin_like(self, source: int, targets: Sequence[int]) -> None:
        """Lets empty rows begin with all that a row keeps: a common prompt, which was read once."""
        if not targets:
            return
        assert not any(self._lengths[row] for row in targets), (
            "only an empty row can begin with another's positions"
        )
        length = self._lengths[source]
        rows = upload(targets, self.device)
        for layer in self._keys:
            for buffer in (self._keys[layer], self._values[layer]):
                buffer[rows, :, :length] = buffer[source, :, :length]
        for row in targets:
            self._lengths[row] = length

    def move(self, source: int, target: int) -> None:
        """Overwrites a row with another: how a finished row leaves without copying the batch."""
        length = self._lengths[source]
        self._lengths[target] = length
        for layer in self._keys:
            self._keys[layer][target, :, :length] = self._keys[layer][source, :, :length]
            self._values[layer][target, :, :length] = self._values[layer][source, :, :length]


# Training


class _Square:
    """Moves the packed positions of one segment into (R, S), each to its own slot, and back.

    Causal attention over the square needs no mask, computes only half of it, and so is cheaper than rectangular
    attention with a mask, unless most of its queries are padding.
    """

    def __init__(
        self, where: np.ndarray, real: np.ndarray, slots: int, offset: int, device: torch.device
    ) -> None:
        rows = len(where)
        flat = (np.arange(rows)[:, None] * slots + where)[real]
        # A slot without a query repeats the first: its output is finite and not used.
        index = np.full(rows * slots, offset, dtype=np.int64)
        index[flat] = offset + np.arange(len(flat))
        self.shape = (rows, slots)
        self.pad_index = upload(index, device)
        self.unpad_index = upload(flat, device)

    def pad(self, packed: Tensor) -> Tensor:
        """(1, heads, T, d) -> (R, heads, S, d)."""
        padded: Tensor = packed[0].transpose(0, 1).index_select(0, self.pad_index).unflatten(0, self.shape)
        return padded.transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """(R, heads, S, d) -> (the segment's positions, heads, d)."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.unpad_index)


@dataclass(frozen=True)
class _PackedSegment:
    padding: _Padding
    square: _Square | None
    index: Tensor  # slots of the cache, (R * S,)
    shape: tuple[int, int]  # (R, S)
    masks: _Masks
    fresh: bool  # the rows were empty: plain causal attention over the pass's own keys

    @property
    def mostly_earlier(self) -> bool:
        """Whether most of what it attends to was read by earlier passes, which every such pass would copy."""
        return not self.fresh and 2 * self.padding.width < self.shape[1]


def _packed_segment(
    contexts: Sequence[np.ndarray],
    counts: np.ndarray,
    offset: int,
    device: torch.device,
    *,
    fresh: bool | None = None,
) -> _PackedSegment:
    """The last `counts` positions of each row as queries to all of the row's slots."""
    padding = _Padding(counts.tolist(), offset, device)
    slots = max(len(context) for context in contexts)
    index = np.zeros((len(contexts), slots), dtype=np.int64)
    for row, context in enumerate(contexts):
        index[row, : len(context)] = context
    counts = counts[:, None]
    starts = np.asarray([len(context) for context in contexts])[:, None] - counts
    column = np.arange(padding.width)
    where = starts + np.minimum(column, counts - 1)
    fresh = bool((starts == 0).all()) if fresh is None else fresh
    # Causal attention over the square costs about half of it; a rectangle with a mask costs all of itself.
    square = not fresh and 2 * padding.width >= slots
    return _PackedSegment(
        padding=padding,
        square=_Square(where, column < counts, slots, offset, device) if square else None,
        index=upload(index.reshape(-1), device),
        shape=(len(contexts), slots),
        masks=_Masks(upload(where, device), slots),
        fresh=fresh,
    )


@final
class _PackedView(View):
    def __init__(self, cache: PackedKVCache, chunk: int, segments: Sequence[PassSegment]) -> None:
        self._cache = cache
        self._chunk = chunk
        self._parts: list[_PackedSegment] = []
        self._tails: list[_PackedSegment] = []
        positions = []
        narrowed = _Narrowed(segments)
        offset = 0
        for segment in segments:
            contexts = []
            first = cache.size
            for row, count, kept in zip(
                segment.rows, segment.counts, segment.keep or segment.counts, strict=True
            ):
                new = np.arange(first, first + count)
                first += count
                before = cache.slots(row)
                contexts.append(np.concatenate([before, new]))
                positions.append(np.arange(len(before), len(before) + count))
                cache.extend(row, new[:kept])
            cache.size = first
            counts = np.asarray(segment.counts)
            self._parts.append(_packed_segment(contexts, counts, offset, cache.device))
            begin = narrowed.total
            if (tail := narrowed.tail(segment)) is not None:
                seen = [contexts[row] for row in tail.rows]
                self._tails.append(_packed_segment(seen, tail.counts, begin, cache.device, fresh=False))
            offset += int(counts.sum())
        self.read = narrowed.index(cache.device)
        packed = np.concatenate(positions)
        self.limit = int(packed.max()) + 1
        self.positions = upload(packed, cache.device)

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
        self._cache.keep(layer, self._chunk, key[0].transpose(0, 1), value[0].transpose(0, 1))
        recorded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
        outputs = []
        for part in self._tails if narrowed else self._parts:
            inputs = (part, layer, query, key, value, scale, window)
            if recorded and part.mostly_earlier:
                # Autograd would keep each pass's copy of all earlier keys and values, with many insertions many times
                # what was read. They are gathered again in the backward pass instead.
                outputs.append(
                    checkpoint(self._attend, *inputs, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                outputs.append(self._attend(*inputs))
        return _joined(outputs, query)

    def _attend(
        self,
        part: _PackedSegment,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """The queries of a part, (its positions, h, d)."""
        if part.fresh and window is None:
            padding = part.padding
            attended = _causal_attention(padding.pad(query), padding.pad(key), padding.pad(value), scale)
            return padding.unpad(attended)
        keys, values = self._cache.until(layer, self._chunk, key[0].transpose(0, 1), value[0].transpose(0, 1))
        # Rows, key-value heads, slots, head size
        read_keys = keys.index_select(0, part.index).unflatten(0, part.shape).transpose(1, 2)
        read_values = values.index_select(0, part.index).unflatten(0, part.shape).transpose(1, 2)
        if part.square is not None and window is None:
            attended = _causal_attention(part.square.pad(query), read_keys, read_values, scale)
            return part.square.unpad(attended)
        mask = part.masks.get(window, query.shape[1] // key.shape[1], query.dtype)
        attended = _grouped_attention(part.padding.pad(query), read_keys, read_values, mask, scale)
        return part.padding.unpad(attended)


@final
class PackedKVCache(KVCache):
    """Keys and values of a training forward: the chunks of all passes, flat, with a list of slots per row.

    Gradients flow from a later pass into an earlier one through the stored tensors. A row may begin with slots of
    another row (`share`): a common prefix is read once.
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
    def open(self, segments: Sequence[PassSegment]) -> View:
        view = _PackedView(self, self._passes, segments)
        self._passes += 1
        return view

    def keep(self, layer: int, chunk: int, key: Tensor, value: Tensor) -> None:
        """Keeps a pass's own keys and values, (slots, g, d), at its first computation: a recomputation gives them again."""
        chunks = self._chunks.setdefault(layer, [])
        if len(chunks) == chunk:
            chunks.append((key, value))

    def until(self, layer: int, chunk: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (slots, g, d) before a pass, and its own behind them, whatever was kept since."""
        before = self._chunks[layer][:chunk]
        if not before:
            return key, value
        keys, values = zip(*before, strict=True)
        return torch.cat([*keys, key]), torch.cat([*values, value])


def leaders_of(rows: Iterable[int], shared: Sequence[int], group: Sequence[int]) -> dict[int, int]:
    """For each group, the first of the given rows that shares most: what it shares covers what the others do."""
    leaders: dict[int, int] = {}
    for row in rows:
        if group[row] not in leaders or shared[row] > shared[leaders[group[row]]]:
            leaders[group[row]] = row
    return leaders
