"""One policy, one number: how a token's log-probability is computed does not depend on why somebody asks for it."""

from __future__ import annotations

import pytest
import torch

from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings, sample
from memgen.model.memgen import MemGenModel
from memgen.types import Generation
from tiny import random_batch, tiny_memgen
from tolerance import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TEMPERATURES = pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])


def uneven_norms(model: MemGenModel, dtype: torch.dtype) -> MemGenModel:
    """Norm weights far from 1, as real models have them, and frozen weights in a type; what is trained is float32."""
    generator = torch.Generator().manual_seed(3)
    for base in model.bases():
        for name, parameter in base.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.2, 1.8, generator=generator)
            if "lora_" not in name:
                parameter.data = parameter.data.to(dtype)
    model.train_only(model.weaver)
    return model


@TEMPERATURES
@DTYPES
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "modules"])
@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_old_reference_and_update_passes_are_equal_bit_for_bit(reads, direct, dtype, temperature):
    model = uneven_norms(tiny_memgen(reads=reads), dtype)
    for base in model.bases():
        base.compute_directly(direct)
    batch, plan = random_batch([20, 9, 15, 12], [6, 4, 8, 5], [[6, 9, 14], [4], [8, 12], []])
    with torch.no_grad():
        old = model.label_scores(batch, plan, temperature=temperature)
    found = {"with gradient": model.label_scores(batch, plan, temperature=temperature)}
    found["with entropy"] = model.label_scores(batch, plan, temperature=temperature, entropy=True)
    model.use_checkpointing(True)
    found["recomputed"] = model.label_scores(batch, plan, temperature=temperature)
    for name, scores in found.items():
        assert scores.logprobs.requires_grad, name
        assert torch.equal(scores.woven.hidden, old.woven.hidden), name
        assert torch.equal(scores.logprobs, old.logprobs), name


@DTYPES
def test_a_mixed_precision_pass_with_gradient_equals_one_without(dtype):
    model = uneven_norms(tiny_memgen(), dtype)
    batch, plan = random_batch([20, 9], [6, 4], [[6, 9, 14], [4]])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            old = model.label_scores(batch, plan, temperature=0.7)
        new = model.label_scores(batch, plan, temperature=0.7)
    assert torch.equal(new.logprobs, old.logprobs)


@TEMPERATURES
@DTYPES
@torch.no_grad()
def test_a_token_is_sampled_under_the_number_that_it_is_scored_with(dtype, temperature):
    reasoner = uneven_norms(tiny_memgen(), dtype).reasoner
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, reasoner.backbone.hidden_size, generator=generator).to(dtype)
    settings = GenerationSettings(temperature=temperature)
    drawn = sample(reasoner.logits(hidden), settings, torch.rand(9, generator=generator, dtype=torch.float64))
    scored, _ = reasoner.logprobs(hidden, drawn.tokens, temperature=temperature)
    assert torch.equal(scored, drawn.logprobs)
    # Not the logits of states that were divided: a lower type rounds those.
    exact = (reasoner.logits(hidden).double() / temperature).log_softmax(-1)
    expected = exact.gather(1, drawn.tokens[:, None])[:, 0]
    assert_close("logprobs", scored, expected.float(), dtype=torch.float32)


def recorded(generation: Generation) -> torch.Tensor:
    """The rollout's own log-probabilities, answer by answer."""
    return torch.tensor([p for turn in generation.turns for p in turn.logprobs])


@TEMPERATURES
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "modules"])
def test_a_rollouts_numbers_are_the_updates(direct, temperature):
    model = uneven_norms(tiny_memgen(), torch.float32)
    for base in model.bases():
        base.compute_directly(direct)
    settings = GenerationSettings(max_new_tokens=10, temperature=temperature, group_size=2, seed=4)
    generation = generate(model, [list(range(40, 52)), [97, 98, 99]], settings)
    scores = model.label_scores(generation.as_batch(), generation.plan, temperature=temperature)
    assert_close("logprobs", scores.logprobs, recorded(generation))


@torch.no_grad()
def test_in_low_precision_a_rollout_is_no_further_from_the_update_than_either_from_float32():
    """What remains is the blocking of matrix products and attention: one token at a time against all at once."""
    settings = GenerationSettings(max_new_tokens=24, temperature=0.7, group_size=4, seed=4)
    low, exact = (uneven_norms(tiny_memgen(), dtype) for dtype in (torch.bfloat16, torch.float32))
    for a, b in zip(exact.bases(), low.bases(), strict=True):
        for (_, ours), (_, theirs) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            ours.data = theirs.data.to(ours.dtype)
    generation = generate(low, [list(range(40, 52)), [97, 98, 99]], settings)
    rollout = recorded(generation)
    update, reference = (
        model.label_scores(generation.as_batch(), generation.plan, temperature=0.7).logprobs
        for model in (low, exact)
    )
    between, own = (update - rollout).norm(), (update - reference).norm()
    assert between <= 1.5 * own
