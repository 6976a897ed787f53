"""Stores for runs: a real sqlite store, made once, because creating its tables takes ten seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memgen.tracking import delivery
from memgen.tracking.run_logger import RunLogger, run_logger


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A database with tables and nothing in them."""
    folder = tmp_path_factory.mktemp("store")
    first = run_logger(root=str(folder), experiment="first", system_seconds=0)
    assert first.experiment.search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _ends_with_the_test(monkeypatch):
    """Deliveries try again at once, and none goes on behind its test."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", 0.05)
    started = []
    start = delivery.Outbox._start
    monkeypatch.setattr(delivery.Outbox, "_start", lambda self: started.append(self) or start(self))
    yield
    for outbox in {id(outbox): outbox for outbox in started}.values():
        outbox.stop()


@pytest.fixture
def root(tmp_path, empty_store, monkeypatch) -> Path:
    """A folder with a store of its own, as `runs` is."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MEMGEN_PARENT_RUN", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def logger(root) -> RunLogger:
    return run_logger(root=str(root), system_seconds=0, flush_seconds=30)
