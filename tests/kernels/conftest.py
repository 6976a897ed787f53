"""Kernels are interpreted where there is no GPU, and compiled where there is one."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

# Triton looks at this when it sees a kernel, and kernels are imported at their first use: no test runs before this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels of a test run."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled where there is a GPU; the tests marked gpu run them")
    return torch.device(request.param)
