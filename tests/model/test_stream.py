"""A row's interleaved tokens and latents, against a list built by hand."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.model.stream import Stream


def built(tokens: list[int], points: list[int], sizes: list[int], first: int = 0) -> Stream:
    blocks, total = [], first
    for size in sizes:
        blocks.append(np.arange(total, total + size))
        total += size
    kinds = [i % 2 for i in range(len(points))]
    return Stream(np.asarray(tokens, dtype=np.int64), list(zip(points, kinds, strict=True)), blocks)


def interleaved(
    tokens: list[int], points: list[int], sizes: list[int], first: int = 0
) -> list[tuple[str, int]]:
    """("token", id) and ("latent", index) in the order in which they are read."""
    stream, latent = [], first
    for i in range(len(tokens) + 1):
        for point, size in zip(points, sizes, strict=True):
            if point == i:
                stream += [("latent", latent + k) for k in range(size)]
                latent += size
        if i < len(tokens):
            stream.append(("token", tokens[i]))
    return stream


@given(st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_a_stream_is_the_tokens_with_each_insertions_latents_before_its_point(seed):
    draw = random.Random(seed)
    tokens = [draw.randint(0, 99) for _ in range(draw.randint(1, 12))]
    points = sorted(draw.sample(range(1, len(tokens) + 1), draw.randint(0, min(4, len(tokens)))))
    sizes, first = [draw.randint(1, 3) for _ in points], draw.randint(0, 5)
    stream, expected = built(tokens, points, sizes, first), interleaved(tokens, points, sizes, first)
    assert stream.length == len(expected)
    for i, (kind, value) in enumerate(expected):
        assert stream.sources[i] == (value if kind == "latent" else -1)
        assert kind == "latent" or stream.ids[i] == value
    assert [stream.ids[i] for i in stream.token_positions] == tokens
    for number, insertion in enumerate(stream.insertions):
        assert insertion.kind == number % 2
        block = [("latent", int(i)) for i in insertion.latents]
        assert expected[insertion.begin : insertion.begin + len(block)] == block
        # What lies before it is what the weaver reads: all earlier tokens and latents.
        assert insertion.begin == points[number] + sum(sizes[:number])
    for i, place in enumerate(stream.predictors(np.arange(len(tokens)))):
        following = stream.token_positions[i + 1] if i + 1 < len(tokens) else stream.length
        assert place == following - 1


def test_without_insertions_every_token_predicts_the_next():
    stream = built([7, 8, 9], [], [])
    assert stream.predictors(np.arange(3)).tolist() == [0, 1, 2]
    assert stream.insertions == []


def test_the_last_latent_predicts_the_token_behind_it():
    stream = built([7, 8, 9], [1, 3], [2, 3])
    assert stream.predictors(np.arange(3)).tolist() == [2, 3, 7]
    assert stream.length == 8
