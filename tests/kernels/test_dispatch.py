"""Which implementation runs, and what is refused before either does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
import torch

import memgen.kernels as kernels
from memgen.kernels import dispatch, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_kernel_runs_on_cuda_and_the_reference_elsewhere(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: True)
    dispatch._triton_for_cuda.cache_clear()
    assert kernels.chosen(CPU) == "reference"
    assert kernels.chosen(CUDA) == "triton"
    dispatch._triton_for_cuda.cache_clear()


def test_cuda_without_triton_runs_the_reference_and_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    dispatch._triton_for_cuda.cache_clear()
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert kernels.chosen(CUDA) == "reference"
    dispatch._triton_for_cuda.cache_clear()


def test_the_switch_forces_either_in_every_thread_and_nests(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: True)
    seen = []
    with kernels.forced("triton"):
        # Autograd recomputes checkpointed segments in its own threads.
        thread = threading.Thread(target=lambda: seen.append(kernels.chosen(CPU)))
        thread.start()
        thread.join()
        with kernels.forced("reference"):
            seen.append(kernels.chosen(CUDA))
        seen.append(kernels.chosen(CPU))
    assert seen == ["triton", "reference", "triton"]
    assert kernels.chosen(CPU) == "reference"


def test_the_switch_is_released_by_an_error():
    def fail():
        with kernels.forced("reference"):
            raise KeyError("from inside")

    with pytest.raises(KeyError, match="from inside"):
        fail()
    assert dispatch._forced is None


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="got 'cuda'"), kernels.forced("cuda"):
        pass


def test_forcing_triton_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"), kernels.forced("triton"):
        pass


def test_compiled_kernels_refuse_tensors_on_the_cpu():
    class JITFunction: ...

    class InterpretedFunction: ...

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        dispatch.require_runnable(JITFunction(), CPU)
    dispatch.require_runnable(JITFunction(), CUDA)
    dispatch.require_runnable(InterpretedFunction(), CPU)


def test_a_kernel_compiled_for_a_gpu_is_not_run_on_the_cpu():
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    code = (
        "import torch, memgen.kernels as k; z = torch.zeros(1, dtype=torch.int64);"
        "f = k.forced('triton'); f.__enter__(); k.interleave(torch.ones(1, 2), z, torch.ones(1, 2), z)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert "the Triton kernels run on CUDA, but the tensors are on cpu" in ran.stderr


def test_using_the_reference_imports_no_triton():
    code = (
        "import sys, torch, memgen.kernels as k; z = torch.zeros(1, dtype=torch.int64);"
        "k.interleave(torch.ones(1, 2), z, torch.ones(1, 2), z); k.linear_logprob(torch.ones(1, 2), torch.ones(3, 2), z);"
        "print('triton' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


# What is refused

TABLE, LATENTS, LINE = torch.ones(4, 2), torch.ones(3, 2), torch.zeros(5, dtype=torch.int64)

REFUSED = {
    "a table to be trained": (
        lambda: kernels.interleave(TABLE.clone().requires_grad_(), LINE, LATENTS, LINE),
        "table requires",
    ),
    "other hidden sizes": (lambda: kernels.interleave(TABLE, LINE, torch.ones(3, 5), LINE), r"\(3, 5\)"),
    "sources of another length": (
        lambda: kernels.interleave(TABLE, LINE, LATENTS, LINE[:2]),
        r"\(5,\) and \(2,\)",
    ),
    "tokens that are no integers": (
        lambda: kernels.interleave(TABLE, LINE.float(), LATENTS, LINE),
        "tokens must be int32",
    ),
    "a weight to be trained": (
        lambda: kernels.linear_logprob(LATENTS, TABLE.clone().requires_grad_(), LINE[:3]),
        "weight requires",
    ),
    "a bias to be trained": (
        lambda: kernels.linear_logprob(LATENTS, TABLE, LINE[:3], torch.ones(4, requires_grad=True)),
        "bias requires",
    ),
    "targets of other rows": (lambda: kernels.linear_logprob(LATENTS, TABLE, LINE), "one target"),
    "a weight of another hidden size": (
        lambda: kernels.linear_logprob(LATENTS, torch.ones(4, 3), LINE),
        r"rows, 3",
    ),
    "an empty chunk": (lambda: kernels.linear_logprob(LATENTS, TABLE, LINE[:3], chunk=0), "got 0"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_trainable_table_serves_where_no_gradient_is_asked_for():
    with torch.no_grad():
        packed = kernels.interleave(TABLE.clone().requires_grad_(), LINE, LATENTS, LINE)
    assert torch.equal(packed, reference.interleave(TABLE, LINE, LATENTS, LINE))
