"""What all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_sessionfinish(session, exitstatus):
    """MEMGEN_NO_SKIPS=1: a skipped test is a failure (for the tests that a machine was chosen to run)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MEMGEN_NO_SKIPS") == "1" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from more threads, and results keep their order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
