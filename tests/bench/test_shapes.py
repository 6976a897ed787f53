"""Models to measure."""

from __future__ import annotations

import pytest
import torch

from memgen.bench.generation import Decoding, DecodingWorkload, delimiter_rate
from memgen.bench.shapes import SHAPES, ModelSettings, find_shape, plain_model, random_ids, twin, weight_bytes


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown model 'huge'; choose among: small, medium, qwen2\.5-1\.5b"
    ):
        find_shape("huge")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Embedding (tied), layers and norms of a Qwen2 with biases on queries, keys and values.
    [("small", 4_002_048), ("medium", 27_804_160)],
)
def test_shapes_have_the_parameters_of_their_architecture(name, parameters):
    model = plain_model(ModelSettings(model=name))
    shape = SHAPES[name]
    size = shape.hidden // shape.heads * shape.kv_heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * size + 3 * shape.hidden * shape.feed_forward
    layer += 3 * shape.hidden + 2 * size
    assert parameters == shape.vocabulary * shape.hidden + shape.layers * layer + shape.hidden
    assert weight_bytes(model) == 4 * parameters


def test_both_sides_hold_one_copy_of_the_weights():
    plain = plain_model(ModelSettings(model="tiny"))
    other = twin(plain)
    assert other is not plain
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_without_memory_our_engine_writes_what_hugging_face_writes():
    settings = ModelSettings(model="tiny")
    decoding, work = Decoding(settings), DecodingWorkload(batch=3, prompt=7, new=20)
    ours = decoding.ours(work, decoding.models["never"])
    theirs = decoding.huggingface(work)
    assert ours.lengths == [20] * 3
    assert ours.answers() == theirs[:, 7:].tolist()


def test_greedy_text_of_random_weights_is_varied_and_has_delimiters():
    settings = ModelSettings(model="small")
    decoding, work = Decoding(settings), DecodingWorkload(batch=4, prompt=16, new=64)
    generation = decoding.ours(work, decoding.models["always"])
    assert all(len(set(row)) > 48 for row in generation.answers())
    assert 0.02 < delimiter_rate(generation, settings) < 0.12
    assert not any(turn.finished for turn in generation.turns)


def test_prompts_differ_between_rows_and_repeat_with_a_seed():
    settings = ModelSettings(model="tiny")
    rows = random_ids(3, 8, settings)
    assert rows == random_ids(3, 8, settings)
    assert len({tuple(row) for row in rows}) == 3
    assert rows != random_ids(3, 8, ModelSettings(model="tiny", seed=1))


def test_cache_bytes_of_a_position():
    # Keys and values, 28 layers, 2 heads of 128, two bytes.
    assert SHAPES["qwen2.5-1.5b"].cache_bytes(torch.bfloat16) == 2 * 28 * 2 * 128 * 2
