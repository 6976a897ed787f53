from __future__ import annotations

import pytest

from counting_meter import TINY, CountingMeter
from memgen.bench import shapes


@pytest.fixture
def meter():
    return CountingMeter()


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
