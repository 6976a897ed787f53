"""The Triton kernels against the plain-torch operations: interpreted on a CPU, compiled on a GPU.

Index types, strides and dtypes are drawn together with the plan, so that their combinations are met as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memgen.kernels as kernels
from memgen.kernels import reference
from tolerance import assert_close

VOCABULARY = 13
LOW = [torch.float32, torch.bfloat16, torch.float16]
# (table, latents). Float64 beside bfloat16 is nobody's wish, and Triton's interpreter gets that conversion wrong.
DTYPES = [(table, latents) for table in LOW for latents in LOW] + [(torch.float64, torch.float64)]
# The fixture holds nothing that an example changes.
EXAMPLES = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random(*shape, seed=0, dtype=torch.float32, device="cpu", strided=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = values.to(dtype).to(device)
    return torch.stack([values, values + 9], dim=-1)[..., 0] if strided else values


def both(compute, leaf, upstream):
    """Outputs and the gradient of the leaf, of kernel and reference."""
    results = []
    for implementation in ("triton", "reference"):
        own = leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
        with kernels.forced(implementation):
            outputs = compute(own)
        torch.autograd.backward(outputs, upstream)
        gradient = torch.zeros_like(own) if own.grad is None else own.grad
        results.append((*(output.detach() for output in outputs), gradient))
    return results


def assert_interleaved(ours, expected, dtypes, device):
    """Equal bit by bit. Triton's interpreter alone cuts float32 to bfloat16 off where a GPU rounds."""
    table_dtype, latents_dtype = dtypes
    if device.type == "cpu" and table_dtype == torch.bfloat16 != latents_dtype:
        assert_close("packed", ours, expected)
    else:
        assert torch.equal(ours, expected)


# interleave


@pytest.mark.parametrize("hidden", [1, 5, 128, 131])
@pytest.mark.parametrize(
    "sources", [[], [-1, -1], [1, 0], [-1, 2, -1, -1, 0, 1, -1], [2, 2, -1, 2, 0, 2]], ids=str
)
@EXAMPLES
@given(
    dtypes=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    strided=st.booleans(),
)
def test_weaving_and_its_gradient_equal_the_reference(device, hidden, sources, dtypes, index, strided):
    table_dtype, latents_dtype = dtypes
    table = random(VOCABULARY, hidden, dtype=table_dtype, device=device, strided=strided)
    latents = random(4, hidden, seed=1, dtype=latents_dtype, device=device)
    sources = torch.tensor(sources, dtype=index, device=device)
    tokens = torch.arange(len(sources), dtype=index, device=device) * 3 % VOCABULARY
    if strided:
        tokens, sources = (torch.stack([t, t + 99], dim=-1)[..., 0] for t in (tokens, sources))
    upstream = random(len(sources), hidden, seed=2, dtype=table_dtype, device=device, strided=strided)
    if not (sources >= 0).any():
        with kernels.forced("triton"):
            assert torch.equal(kernels.interleave(table, tokens, latents, sources), table[tokens])
        return

    def compute(own):
        leaf = torch.stack([own, own], dim=-1)[..., 1] if strided else own
        return (kernels.interleave(table, tokens, leaf, sources),)

    ours, expected = both(compute, latents, (upstream,))
    assert_interleaved(ours[0], expected[0], dtypes, device)
    assert_close("gradient", ours[1], expected[1])


def test_a_latent_that_many_places_share_accumulates_in_float32(device):
    """2,048 contributions of 1: bfloat16 alone would stop at 256."""
    latents = torch.zeros(1, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    sources = torch.zeros(2048, dtype=torch.int64, device=device)
    with kernels.forced("triton"):
        kernels.interleave(torch.zeros_like(latents.detach()), sources, latents, sources).sum().backward()
    assert float(latents.grad) == 2048


# linear_logprob


@pytest.mark.parametrize("vocabulary", [1, 31, 256])
@EXAMPLES
@given(
    labels=st.integers(0, 6),
    chunk=st.sampled_from([1, 4, None]),
    with_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    strided=st.booleans(),
    temperature=st.sampled_from([0.7, 1.0, 1.3]),
)
def test_logprobs_entropies_and_gradients_equal_the_reference(
    device, vocabulary, labels, chunk, with_bias, dtype, strided, temperature
):
    hidden = random(labels, 5, dtype=dtype, device=device)
    weight = random(vocabulary, 5, seed=1, dtype=dtype, device=device, strided=strided) * 3
    bias = random(vocabulary, seed=2, dtype=dtype, device=device) if with_bias else None
    targets = torch.arange(labels, device=device) * 17 % vocabulary
    upstream = tuple(random(labels, seed=seed, dtype=dtype, device=device) for seed in (3, 4))
    ours, expected = both(
        lambda own: tuple(
            kernels.linear_logprob(
                own, weight, targets, bias, entropy=True, chunk=chunk, temperature=temperature
            )
        ),
        hidden,
        upstream,
    )
    for name, kernel, plain in zip(("logprobs", "entropies", "gradient"), ours, expected, strict=True):
        assert_close(name, kernel, plain)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_row_of_logits_has_the_logprob_that_a_state_is_scored_with(device, temperature):
    hidden, weight = random(5, 4, device=device), random(37, 4, seed=1, device=device) * 3
    targets = torch.tensor([36, 0, 15, 2, 2], device=device)
    logits = torch.nn.functional.linear(hidden, weight)
    before = logits.clone()
    with kernels.forced("triton"):
        plain = kernels.linear_logprob(hidden, weight, targets, temperature=temperature)
        own = hidden.clone().requires_grad_(True)
        assert torch.equal(kernels.row_logprob(logits, targets, temperature), plain)
        assert torch.equal(logits, before)
        assert torch.equal(kernels.linear_logprob(own, weight, targets, temperature=temperature), plain)
        assert torch.equal(
            kernels.linear_logprob(own, weight, targets, entropy=True, temperature=temperature).logprobs,
            plain,
        )


def test_rows_longer_than_a_block_equal_the_reference(device, monkeypatch):
    from memgen.kernels import triton_logprob

    monkeypatch.setattr(triton_logprob, "_MAX_BLOCK", 16)
    hidden, weight = random(3, 4, device=device), random(37, 4, seed=1, device=device) * 8
    targets = torch.tensor([36, 0, 15], device=device)
    ours, expected = both(
        lambda own: tuple(kernels.linear_logprob(own, weight, targets, entropy=True)),
        hidden,
        (random(3, seed=3, device=device), random(3, seed=4, device=device)),
    )
    for name, kernel, plain in zip(("logprobs", "entropies", "gradient"), ours, expected, strict=True):
        assert_close(name, kernel, plain)


def test_ruled_out_classes_and_huge_logits_give_finite_gradients(device, monkeypatch):
    from memgen.kernels import triton_logprob

    monkeypatch.setattr(triton_logprob, "_MAX_BLOCK", 4)  # whole blocks are ruled out
    hidden, weight = random(4, 3, device=device) * 300, random(11, 3, seed=1, device=device) * 10
    bias = torch.zeros(11, device=device)
    bias[[0, 1, 2, 3, 10]] = -torch.inf
    targets = torch.tensor([5, 9, 4, 7], device=device)
    ours, expected = both(
        lambda own: tuple(kernels.linear_logprob(own, weight, targets, bias, entropy=True)),
        hidden,
        (torch.ones(4, device=device), torch.ones(4, device=device)),
    )
    for name, kernel, plain in zip(("logprobs", "entropies", "gradient"), ours, expected, strict=True):
        assert bool(kernel.isfinite().all())
        # The normaliser is rounded in units of logits of thousands.
        assert_close(name, kernel, plain, factor=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_to_float32_as_plain_torch_in_it(device, dtype):
    hidden, weight = random(24, 32, device=device), random(97, 32, seed=1, device=device) * 0.3
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.arange(24, device=device) * 5 % 97

    def plain(own, own_weight):
        logprobs = torch.nn.functional.linear(own, own_weight).log_softmax(-1)
        return logprobs[torch.arange(24, device=device), targets], -(logprobs.exp() * logprobs).sum(-1)

    def kernel(own, own_weight):
        with kernels.forced("triton"):
            return kernels.linear_logprob(own, own_weight, targets, entropy=True)

    for part in (0, 1):
        results = {}
        for name, compute, convert in (
            ("exact", plain, torch.Tensor.float),
            ("plain", plain, torch.Tensor.clone),
            ("kernel", kernel, torch.Tensor.clone),
        ):
            leaf = convert(hidden).requires_grad_(True)
            out = compute(leaf, convert(weight))[part]
            out.sum().backward()
            results[name] = (out.detach().float(), leaf.grad.float())
        # Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles an error.
        allowance = 2.0 if device.type == "cpu" and dtype == torch.bfloat16 else 1.0
        for exact, ours, theirs in zip(results["exact"], results["kernel"], results["plain"], strict=True):
            assert rmse(ours, exact) <= allowance * rmse(theirs, exact)


def rmse(ours, exact):
    return float((ours - exact).square().mean().sqrt())


# Robustness


def test_kernels_are_interpreted_after_triton_was_imported():
    """Another library may import Triton first: what its own helpers were decorated as must not matter."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = (
        "import triton.language, os; os.environ['TRITON_INTERPRET'] = '1';"
        "import torch, memgen.kernels as k;"
        "z = torch.zeros(2, 1, dtype=torch.int64);"
        "f = k.forced('triton'); f.__enter__();"
        "print(k.linear_logprob(torch.zeros(1, 2), torch.ones(4, 2), z[0], entropy=True).entropies.exp().item(),"
        "k.interleave(torch.ones(1, 2), z[:, 0], torch.zeros(1, 2), z[:, 0] - z.new_tensor([0, 1])).tolist())"
    )
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=without
    )
    assert ran.returncode == 0, ran.stderr
    entropy, rest = ran.stdout.split(maxsplit=1)
    assert float(entropy) == pytest.approx(4.0)
    assert rest.strip() == "[[0.0, 0.0], [1.0, 1.0]]"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """The interpreter takes Python that the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_kernels.py")],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    sizes = dict(line.split() for line in ran.stdout.splitlines())
    assert sizes.keys() == {"interleave", "interleave_bwd", "linear_logprob", "linear_logprob_bwd"}
    assert all(int(size) > 0 for size in sizes.values())


def test_the_reference_is_what_the_public_functions_run_without_a_gpu():
    table, line = random(4, 2), torch.tensor([1, 0])
    assert torch.equal(
        kernels.interleave(table, line, table, line), reference.interleave(table, line, table, line)
    )
