"""The plain-torch operations against their definitions, forward and every gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from memgen.kernels import row_logprob
from memgen.kernels.reference import (
    GPU_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    chunk_rows,
    interleave,
    linear_logprob,
)
from tolerance import assert_close


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# interleave


def interleaved_one_by_one(table, tokens, latents, sources):
    rows = [
        latents[source].to(table.dtype) if source >= 0 else table[token]
        for token, source in zip(tokens.tolist(), sources.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else table.new_zeros(0, table.shape[1])


CASES = {
    "interleaved": [-1, 2, -1, -1, 0, 1, -1],
    "only tokens": [-1, -1, -1],
    "only latents": [2, 1, 0],
    "one latent": [0],
    "one token": [-1],
    "a latent that nobody reads": [-1, 2, -1],
    "a latent read twice": [1, -1, 1, 0],
    "nothing": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sources", CASES.values(), ids=CASES)
def test_weaving_puts_each_latent_at_its_place_and_returns_its_gradient(sources, dtype):
    sources = torch.tensor(sources, dtype=torch.int64)
    table = random(11, 5, dtype=dtype)
    tokens = torch.arange(len(sources)) * 3 % 11
    latents = random(3, 5, seed=1).requires_grad_(True)
    ours = interleave(table, tokens, latents, sources)
    expected = interleaved_one_by_one(table, tokens, latents, sources)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)
    upstream = random(*ours.shape, seed=2, dtype=dtype)
    gradients = [
        torch.autograd.grad(out, latents, upstream, allow_unused=True)[0] if out.requires_grad else None
        for out in (ours, expected)
    ]
    ours_gradient, reference = (torch.zeros_like(latents) if g is None else g for g in gradients)
    assert_close("gradient", ours_gradient, reference, dtype=dtype)


def test_weaving_without_latents_looks_tokens_up():
    table, tokens = random(7, 4), torch.tensor([3, 0, 6])
    assert torch.equal(interleave(table, tokens, table.new_zeros(0, 4), torch.full((3,), -1)), table[tokens])


def test_weaving_leaves_the_table_as_it_was():
    table, latents = random(7, 4), random(2, 4, seed=1)
    before = table.clone()
    interleave(table, torch.tensor([3, 3]), latents, torch.tensor([-1, 1])).add_(1)
    assert torch.equal(table, before)


def test_a_latent_that_many_rows_share_accumulates_in_float32():
    """2,048 contributions of 1: bfloat16 alone would stop at 256."""
    latents = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    table, sources = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.int64)
    interleave(table, sources, latents, sources).sum().backward()
    assert float(latents.grad) == 2048


# linear_logprob


def definition(hidden, weight, targets, bias):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 512])
@pytest.mark.parametrize("labels", [0, 1, 5, 10, 13, 14])
def test_logprobs_and_gradients_equal_log_softmax_for_any_number_of_labels_and_chunk(
    labels, chunk, with_bias
):
    hidden, weight = random(labels, 7, dtype=torch.float64), random(31, 7, seed=1, dtype=torch.float64)
    bias = random(31, seed=2, dtype=torch.float64) if with_bias else None
    targets = torch.arange(labels) * 17 % 31
    upstream = random(labels, seed=3, dtype=torch.float64)
    gradients, outputs = [], []
    for compute in (
        lambda h: linear_logprob(h, weight, targets, bias, chunk=chunk),
        lambda h: definition(h, weight, targets, bias),
    ):
        leaf = hidden.clone().requires_grad_(True)
        out = compute(leaf)
        out.backward(upstream)
        outputs.append(out)
        gradients.append(leaf.grad)
    assert_close("logprobs", *outputs)
    assert_close("gradient", *gradients)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_the_gradient_is_the_derivative(with_bias):
    hidden = random(5, 3, dtype=torch.float64).requires_grad_(True)
    weight = random(7, 3, seed=1, dtype=torch.float64)
    bias = random(7, seed=2, dtype=torch.float64) if with_bias else None
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda h: linear_logprob(h, weight, targets, bias, chunk=2), (hidden,))


def test_logits_too_large_for_exp_give_finite_logprobs_and_gradients():
    hidden = (random(4, 3) * 300).requires_grad_(True)
    weight, targets = random(9, 3, seed=1) * 10, torch.tensor([0, 8, 4, 2])
    out = linear_logprob(hidden, weight, targets)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(hidden.grad.isfinite().all())
    assert_close("logprobs", out, definition(hidden, weight, targets, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_to_float32_as_plain_torch_in_it(dtype):
    hidden, weight = random(64, 32), random(97, 32, seed=1) * 0.3
    targets = torch.arange(64) * 5 % 97
    errors = []
    exact_leaf = hidden.to(dtype).float().requires_grad_(True)
    exact = definition(exact_leaf, weight.to(dtype).float(), targets, None)
    exact.sum().backward()
    for compute in (
        lambda h: linear_logprob(h, weight.to(dtype), targets),
        lambda h: definition(h, weight.to(dtype), targets, None),
    ):
        leaf = hidden.to(dtype).requires_grad_(True)
        out = compute(leaf)
        out.sum().backward()
        errors.append((rmse(out, exact), rmse(leaf.grad, exact_leaf.grad)))
    ours, plain = errors
    assert linear_logprob(hidden.to(dtype), weight.to(dtype), targets).dtype == torch.float32
    assert ours[0] <= plain[0]
    assert ours[1] <= plain[1]


def rmse(ours, reference):
    return float((ours.detach().float() - reference.detach()).square().mean().sqrt())


def test_autocast_changes_no_more_than_its_own_rounding():
    """The backward pass runs outside autocast: it must not mix float32 logits with a bfloat16 normaliser."""
    hidden, weight = random(64, 32), random(97, 32, seed=1)
    targets = torch.arange(64) * 5 % 97
    gradients = {}
    for name, compute in (
        ("ours", lambda h: linear_logprob(h, weight, targets)),
        ("plain", lambda h: definition(h, weight, targets, None)),
        ("exact", None),
    ):
        leaf = hidden.clone().requires_grad_(True)
        if compute is None:
            out = definition(leaf, weight, targets, None)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = compute(leaf)
        out.sum().backward()
        gradients[name] = leaf.grad
    ours, plain = (rmse(gradients[name], gradients["exact"]) for name in ("ours", "plain"))
    assert ours <= plain


def test_only_the_derivative_is_kept_for_the_backward_pass():
    hidden, weight = random(40, 4).requires_grad_(True), random(1000, 4, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_logprob(hidden, weight, torch.zeros(40, dtype=torch.int64), chunk=8)
    assert kept == [hidden.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_logprob_is_the_same_bit_for_bit_whatever_else_is_asked_for(temperature, dtype):
    hidden, weight = random(13, 7, dtype=dtype), random(31, 7, seed=1, dtype=dtype) * 3
    targets = torch.arange(13) * 17 % 31
    plain = linear_logprob(hidden, weight, targets, temperature=temperature)
    own = hidden.clone().requires_grad_(True)
    differentiable = linear_logprob(own, weight, targets, temperature=temperature)
    assert differentiable.requires_grad
    assert torch.equal(differentiable, plain)
    assert torch.equal(
        linear_logprob(own, weight, targets, entropy=True, temperature=temperature).logprobs, plain
    )
    logits = torch.nn.functional.linear(hidden, weight).float()
    before = logits.clone()
    assert torch.equal(row_logprob(logits, targets, temperature), plain)
    assert torch.equal(logits, before)


# entropy


def definition_of_entropy(hidden, weight, bias):
    logprobs = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("read", ["logprobs", "entropies", "both"])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_the_gradients_of_logprob_and_entropy_are_their_derivatives(chunk, read, temperature):
    hidden = random(5, 3, dtype=torch.float64).requires_grad_(True)
    weight, bias = random(7, 3, seed=1, dtype=torch.float64), random(7, seed=2, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3, 1])

    def compute(leaf):
        out = linear_logprob(leaf, weight, targets, bias, entropy=True, chunk=chunk, temperature=temperature)
        expected = definition(leaf / temperature, weight, targets, bias / temperature)
        assert_close("logprobs", out.logprobs, expected)
        return {"logprobs": out.logprobs, "entropies": out.entropies, "both": tuple(out)}[read]

    assert torch.autograd.gradcheck(compute, (hidden,))


def test_entropies_equal_their_definition_and_leave_the_logprobs_as_they_were():
    hidden, weight, targets = random(9, 5), random(31, 5, seed=1) * 4, torch.arange(9)
    out = linear_logprob(hidden, weight, targets, entropy=True)
    assert_close("entropies", out.entropies, definition_of_entropy(hidden.double(), weight.double(), None))
    assert_close("logprobs", out.logprobs, linear_logprob(hidden, weight, targets))


def test_a_class_that_is_ruled_out_changes_nothing_for_the_others():
    hidden, weight, targets = (
        random(4, 3).requires_grad_(True),
        random(9, 3, seed=1),
        torch.tensor([0, 7, 4, 2]),
    )
    bias = torch.zeros(9)
    bias[8] = -torch.inf
    gradients = []
    for classes in (9, 8):
        out = linear_logprob(hidden, weight[:classes], targets, bias[:classes], entropy=True)
        gradients.append((*out, *torch.autograd.grad(out.logprobs.sum() + out.entropies.sum(), hidden)))
    for name, ours, expected in zip(("logprobs", "entropies", "gradient"), *gradients, strict=True):
        assert_close(name, ours, expected)


# chunks


@pytest.mark.parametrize("vocabulary", [42, 4096, 151_936, 1_000_000])
def test_a_chunk_of_logits_fits_its_bytes(vocabulary):
    weight = torch.empty(vocabulary, 4, device="meta")
    assert chunk_rows(weight) * vocabulary * 4 <= GPU_CHUNK_BYTES
    weight = torch.empty(1, 4).expand(vocabulary, 4)
    assert 1 <= chunk_rows(weight) * vocabulary * 4 <= MAX_CHUNK_BYTES


def test_a_vocabulary_too_large_for_a_chunk_goes_row_by_row():
    assert chunk_rows(torch.empty(1, 1).expand(MAX_CHUNK_BYTES, 1)) == 1


PEAK = """
import resource
import torch
from memgen.kernels import linear_logprob
rows, vocabulary, hidden = 2048, 151_936, 8
torch.set_num_threads(1)
weight = torch.randn(vocabulary, hidden)
states = torch.randn(rows, hidden, requires_grad=True)
targets = torch.arange(rows)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
linear_logprob(states, weight, targets).sum().backward()
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_an_update_over_a_large_vocabulary_needs_a_fraction_of_its_logits_memory():
    """The logits of these rows alone would take 1.2 GB. More rows repeat what a chunk takes."""
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= 2**29
