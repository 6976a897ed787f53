"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

LONGEST = (
    "lab/test_pipeline.py",
    "slurm/test_cluster.py",
    "distributed/test_zero.py",
    "running/test_killed.py",
    "training/test_update_memory.py",
    "browser/test_pages.py",
    "netns/test_lost_link.py",
    "test_notebooks.py",
    "training/test_weaver_grpo.py",
    "parity/test_released_code.py",
    "cli/test_conf.py",
    "cli/test_real_stages.py",
    "cli/test_collect.py",
    "distributed/test_two_ranks.py",
)
"""The files that take longest, in this order."""


def pytest_collection_modifyitems(items):
    """Long files begin first, so that at the end no process works at one while the others have nothing left to do."""
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_sessionfinish(session, exitstatus):
    """MEMGEN_NO_SKIPS=1: a skipped test is a failure (for the tests that a machine was chosen to run)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MEMGEN_NO_SKIPS") == "1" and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def lab_home(tmp_path_factory) -> Path:
    """A cache of lab assets, empty at first, for the tests that need real ones; all test processes share it."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "lab_home"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors gain nothing from more threads, and results keep their order of summation, those of fixtures too."""
    torch.set_num_threads(1)
