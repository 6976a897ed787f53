"""A served tiny agent."""

from __future__ import annotations

import threading
import time

import pytest

from memgen.generation.continuous import ContinuousBatch
from serving_tiny import serving, tiny_agent


@pytest.fixture(scope="session")
def agent():
    return tiny_agent(trigger="tokens")


@pytest.fixture(scope="session")
def client(agent):
    with serving(agent) as found:
        yield found


@pytest.fixture
def slowly(monkeypatch):
    """Every step of a batch takes at least 20 ms."""
    step = ContinuousBatch.step

    def slow(self):
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(ContinuousBatch, "step", slow)


@pytest.fixture
def gate(monkeypatch):
    """No batch makes a step before this event is set."""
    step, opened = ContinuousBatch.step, threading.Event()

    def waiting(self):
        opened.wait()
        step(self)

    monkeypatch.setattr(ContinuousBatch, "step", waiting)
    yield opened
    opened.set()
