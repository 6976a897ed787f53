import random

import pytest


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
