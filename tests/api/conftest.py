"""A tiny agent on disk."""

from __future__ import annotations

import pytest

import memgen
from saved_agent import save_agent, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, base):
    """In the folder of a run, with a trained trigger."""
    return save_agent(tmp_path_factory.mktemp("runs") / "weaver_sft" / "1" / "best", base, trigger="tokens")


@pytest.fixture(scope="session")
def agent(checkpoint):
    return memgen.load(checkpoint)
