"""Triton's interpreter, for tests that compute a whole model with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def whole_reductions() -> Iterator[None]:
    """Inside, the interpreter takes the sum and the maximum of a row at once.

    It does so for Triton's own functions, and calls those of our kernels once per element: nine tenths of a rollout. What
    ours compute is the matter of tests/kernels/test_triton.py. Compiled kernels are left as they are.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language import standard

    from memgen.kernels import triton_logprob

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_logprob, "_add", standard._sum_combine)
        patch.setattr(triton_logprob, "_larger", standard._elementwise_max)
        yield
