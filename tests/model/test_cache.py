"""Memories with rows of different length, against dense attention over each row's own history."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.model.cache import PackedKVCache, PassSegment, RowKVCache
from tolerance import assert_close

HEADS, GROUPS, SIZE = 4, 2, 8
CPU = torch.device("cpu")
SCALE = 0.7


def dense(query, keys, values, position, window):
    """One query (h, d) at a position of a row with keys and values (S, g, d): the definition."""
    first = 0 if window is None else max(0, position - window + 1)
    repeat = HEADS // GROUPS
    keys = keys[first : position + 1].repeat_interleave(repeat, dim=1)
    values = values[first : position + 1].repeat_interleave(repeat, dim=1)
    weights = (torch.einsum("hd,shd->hs", query, keys) * SCALE).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)


class Model:
    """What a memory should hold: every row's keys and values of two layers, kept in full."""

    def __init__(self, memory, rows: int, seed: int) -> None:
        self.memory = memory
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = torch.float32
        self.rows = [[self.empty(), self.empty()] for _ in range(rows)]

    def empty(self):
        shape = (0, GROUPS, SIZE)
        return torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def step(self, segments: list[PassSegment], window: int | None = None) -> None:
        """Feeds a pass through both layers and compares every output and position."""
        view = self.memory.open(segments)
        total = sum(sum(segment.counts) for segment in segments)
        expected_positions = None
        for layer in range(2):
            query, key, value = self.draw(total, HEADS, SIZE), *(self.draw(total, GROUPS, SIZE) for _ in "kv")
            ours = view.attend(layer, *(t.transpose(0, 1)[None] for t in (query, key, value)), SCALE, window)
            assert ours.shape == (1, total, HEADS, SIZE)
            reference, expected_positions = self.reference(layer, segments, query, key, value, window)
            assert_close(f"layer {layer}", ours[0], reference)
            if view.read is not None:
                # The last layer computes what is wanted alone; writing its keys and values again changes nothing.
                packed = [t.transpose(0, 1)[None] for t in (query[view.read], key, value)]
                ours = view.attend(layer, *packed, SCALE, window, narrowed=True)
                assert_close(f"layer {layer}, narrowed", ours[0], reference[view.read])
        assert view.positions.tolist() == expected_positions
        assert view.limit == max(expected_positions) + 1
        assert (None if view.read is None else view.read.tolist()) == wanted(segments)
        for row in range(len(self.rows)):
            assert self.memory.length(row) == len(self.rows[row][0][0])

    def reference(self, layer, segments, query, key, value, window):
        outputs, positions, at = [], [], 0
        for segment in segments:
            kept = segment.counts if segment.keep is None else segment.keep
            for row, count, keep in zip(segment.rows, segment.counts, kept, strict=True):
                old_keys, old_values = self.rows[row][layer]
                begin = len(old_keys)
                keys = torch.cat([old_keys, key[at : at + count]])
                values = torch.cat([old_values, value[at : at + count]])
                for i in range(count):
                    outputs.append(dense(query[at + i], keys, values, begin + i, window))
                    positions.append(begin + i)
                self.rows[row][layer] = (keys[: begin + keep], values[: begin + keep])
                at += count
        return torch.stack(outputs), positions


def wanted(segments: list[PassSegment]) -> list[int] | None:
    """Packed positions whose results are wanted, one by one."""
    if all(segment.read is None for segment in segments):
        return None
    places, at = [], 0
    for segment in segments:
        for count, read in zip(segment.counts, segment.read or segment.counts, strict=True):
            at += count
            places += range(at - read, at)
    return places


def drawn_reads(draw: random.Random, counts: list[int]) -> list[int] | None:
    """Everything, or of each row some of its last positions, none of all rows now and then."""
    match draw.choice(["all", "some", "last", "none"]):
        case "some":
            return [draw.randint(0, count) for count in counts]
        case "last":
            return [1] * len(counts)
        case "none":
            return [0] * len(counts)
    return None


def drawn_segments(draw: random.Random, room: list[int]) -> list[PassSegment]:
    """One segment, or two of which the second may continue rows of the first."""
    segments: list[PassSegment] = []
    room = list(room)
    for _ in range(draw.randint(1, 2)):
        free = [row for row in range(len(room)) if room[row] > 0]
        if not free:
            break
        chosen = draw.sample(free, draw.randint(1, len(free)))
        counts = [draw.randint(1, min(6, room[row])) for row in chosen]
        if not segments and draw.random() < 0.4:
            # What is not kept ends the pass, as the weaver's queries do.
            keep = [draw.randint(0, count) for count in counts]
            return [PassSegment(chosen, counts, keep, read=drawn_reads(draw, counts))]
        for row, count in zip(chosen, counts, strict=True):
            room[row] -= count
        segments.append(PassSegment(chosen, counts, read=drawn_reads(draw, counts)))
    return segments


WINDOWS = st.sampled_from([None, None, 1, 3])


@given(st.integers(0, 10**9), WINDOWS)
@settings(max_examples=120, deadline=None)
def test_a_row_cache_equals_dense_attention_in_any_order_of_reads_cuts_moves_and_selections(seed, window):
    draw = random.Random(seed)
    rows, capacity = draw.randint(1, 4), draw.randint(6, 14)
    model = Model(RowKVCache(rows, capacity, CPU), rows, seed)
    for _ in range(draw.randint(1, 8)):
        lengths = [model.memory.length(row) for row in range(rows)]
        match draw.choice(["feed", "feed", "feed", "truncate", "move", "select"]):
            case "feed":
                segments = drawn_segments(draw, [capacity - length for length in lengths])
                if segments:
                    model.step(segments, window)
            case "truncate":
                row = draw.randrange(rows)
                length = draw.randint(0, lengths[row])
                model.memory.truncate(row, length)
                model.rows[row] = [(keys[:length], values[:length]) for keys, values in model.rows[row]]
            case "move":
                source, target = draw.randrange(rows), draw.randrange(rows)
                model.memory.move(source, target)
                model.rows[target] = list(model.rows[source])
            case "select":
                chosen = [draw.randrange(rows) for _ in range(draw.randint(1, 4))]
                capacity += draw.randint(0, 3)
                rows = len(chosen)
                model.memory = model.memory.select(chosen, capacity)
                model.rows = [list(model.rows[row]) for row in chosen]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_a_row_with_a_long_unread_chunk_stands_beside_a_row_near_its_end(order):
    """Padding the short rows to the long one's width would write past their ends into the next row."""
    model = Model(RowKVCache(3, 20, CPU), 3, seed=1)
    model.step([PassSegment([0, 1, 2], [1, 19, 12])])
    counts = {0: 19, 1: 1, 2: 8}
    model.step([PassSegment(order, [counts[row] for row in order])])
    assert [model.memory.length(row) for row in range(3)] == [20, 20, 20]
    for row in range(3):
        model.memory.truncate(row, 19)
        model.rows[row] = [(keys[:19], values[:19]) for keys, values in model.rows[row]]
    model.step([PassSegment([0, 1, 2], [1, 1, 1])])


def test_a_row_beyond_the_capacity_is_refused_and_the_others_stay_as_they_were():
    model = Model(RowKVCache(2, 5, CPU), 2, seed=2)
    model.step([PassSegment([0, 1], [5, 3])])
    with pytest.raises(ValueError, match="a row needs 6 cache slots but the cache was made for 5"):
        model.memory.open([PassSegment([1, 0], [1, 1])])
    model.step([PassSegment([1], [2])])


def test_what_a_pass_does_not_keep_still_needs_room():
    cache = RowKVCache(1, 5, CPU)
    with pytest.raises(ValueError, match="needs 6 cache slots"):
        cache.open([PassSegment([0], [6], keep=[2])])


def test_queries_are_seen_by_their_own_pass_and_by_no_later_one():
    for memory in (RowKVCache(2, 20, CPU), PackedKVCache(2, CPU)):
        model = Model(memory, 2, seed=3)
        model.step([PassSegment([0, 1], [7, 5], keep=[4, 2])])
        model.step([PassSegment([1, 0], [6, 9], keep=[3, 6])])
        model.step([PassSegment([0, 1], [1, 1])])
        assert [memory.length(row) for row in range(2)] == [11, 6]


def test_lengthening_a_row_by_truncation_is_refused():
    with pytest.raises(AssertionError, match="truncate shortens"):
        RowKVCache(1, 5, CPU).truncate(0, 1)


# Training


@given(st.integers(0, 10**9), WINDOWS)
@settings(max_examples=120, deadline=None)
def test_a_packed_store_equals_dense_attention_in_any_order_of_reads_and_shares(seed, window):
    draw = random.Random(seed)
    rows, common = draw.randint(1, 4), draw.randint(1, 5)
    model = Model(PackedKVCache(rows, CPU), rows, seed)
    model.step([PassSegment([0], [common + 1])], window)
    for row in range(1, rows):
        if draw.random() < 0.5:
            model.memory.share(row, 0, common)
            model.rows[row] = [(keys[:common], values[:common]) for keys, values in model.rows[0]]
    for _ in range(draw.randint(1, 5)):
        model.step(drawn_segments(draw, [12] * rows), window)


def test_a_row_may_share_what_its_leader_reads_in_the_same_pass():
    model = Model(PackedKVCache(2, CPU), 2, seed=4)
    model.memory.share(1, 0, 3)
    view = model.memory.open([PassSegment([0, 1], [5, 2], keep=[5, 2])])
    assert view.positions.tolist() == [0, 1, 2, 3, 4, 3, 4]
    query, key, value = model.draw(7, HEADS, SIZE), model.draw(7, GROUPS, SIZE), model.draw(7, GROUPS, SIZE)
    ours = view.attend(0, *(t.transpose(0, 1)[None] for t in (query, key, value)), SCALE, None)
    order = [0, 1, 2, 5, 6]
    for position in (3, 4):
        expected = dense(query[order[position]], key[order], value[order], position, None)
        assert_close("the sharer", ours[0, order[position]], expected)


def test_a_share_longer_than_its_source_is_an_error():
    store = PackedKVCache(2, CPU)
    store.open([PassSegment([0], [2])])
    store.share(1, 0, 3)
    with pytest.raises(AssertionError, match="the source of a shared prefix is read before its sharer"):
        store.length(1)
    with pytest.raises(AssertionError, match="only an empty row"):
        store.share(0, 1, 1)


def test_gradients_flow_from_a_later_pass_into_an_earlier_one():
    store = PackedKVCache(2, CPU)
    chunks = []

    def attend(segments, count, *, later=False):
        generator = torch.Generator().manual_seed(count)
        tensors = [
            torch.randn(1, heads, count, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
            for heads in (HEADS, GROUPS, GROUPS)
        ]
        chunks.append(tensors)
        return store.open(segments).attend(0, *tensors, SCALE, None)

    attend([PassSegment([0, 1], [3, 2])], 5)
    second = attend([PassSegment([1, 0], [4, 1])], 5 + 0)
    second.square().sum().backward()
    (_, first_key, first_value), (_, key, value) = chunks
    # The definition: row 0 is positions 0..2 of the first pass and the last of the second; row 1 is the rest.
    rows = {0: ([0, 1, 2], [4]), 1: ([3, 4], [0, 1, 2, 3])}
    leaves = [
        t.detach().clone().requires_grad_(True) for t in (chunks[1][0], first_key, first_value, key, value)
    ]
    query, k1, v1, k2, v2 = leaves
    total = 0
    for before, new in rows.values():
        keys = torch.cat([k1[0, :, before], k2[0, :, new]], dim=1).transpose(0, 1)
        values = torch.cat([v1[0, :, before], v2[0, :, new]], dim=1).transpose(0, 1)
        for i, place in enumerate(new):
            total = total + dense(query[0, :, place], keys, values, len(before) + i, None).square().sum()
    total.backward()
    for name, ours, reference in (
        ("first keys", first_key, k1),
        ("first values", first_value, v1),
        ("second keys", key, k2),
        ("second values", value, v2),
        ("queries", chunks[1][0], query),
    ):
        assert_close(name, ours.grad, reference.grad)
        assert float(reference.grad.abs().max()) > 0


def test_a_recomputation_reads_what_the_first_computation_read():
    store = PackedKVCache(1, CPU)
    model = Model(store, 1, seed=5)
    first, second = model.draw(3, 1, HEADS, 2, SIZE), model.draw(3, 1, HEADS, 2, SIZE)
    view = store.open([PassSegment([0], [2])])
    pack = lambda t: (t[0], t[1][:, :GROUPS], t[2][:, :GROUPS])  # noqa: E731
    before = view.attend(0, *pack(first), SCALE, None)
    later = store.open([PassSegment([0], [2])])
    after = later.attend(0, *pack(second), SCALE, None)
    assert torch.equal(view.attend(0, *pack(first), SCALE, None), before)
    assert torch.equal(later.attend(0, *pack(second), SCALE, None), after)
