"""Threads: one for a tiny model, unless somebody has said it, and it is said once."""

from __future__ import annotations

import logging

import pytest
import torch

from memgen.training import threads
from memgen.training.stage import build_model
from sft_runs import make_data, make_stage, save_tiny
from tiny import tiny_memgen

SAID = "one CPU thread instead of 2"


@pytest.fixture
def two_threads(monkeypatch):
    """A process in which nobody has said how many, with two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_before", None)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_a_tiny_model_gets_one_thread_which_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="memgen"):
        for _ in range(3):
            threads.choose_threads(tiny_memgen())
    assert torch.get_num_threads() == 1
    assert [SAID in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.usefixtures("two_threads")
def test_what_the_environment_says_is_left_alone(monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with caplog.at_level(logging.INFO, logger="memgen"):
        threads.choose_threads(tiny_memgen())
    assert torch.get_num_threads() == 2
    assert not caplog.records


@pytest.mark.usefixtures("two_threads")
def test_a_larger_model_keeps_the_threads_and_gets_them_back(monkeypatch):
    small = tiny_memgen()
    monkeypatch.setattr(threads, "TINY", 10)
    threads.choose_threads(small)
    assert torch.get_num_threads() == 2
    monkeypatch.undo()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads.choose_threads(small)
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "TINY", 10)
    threads.choose_threads(small)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_stages_choose_it(tmp_path):
    base = save_tiny(tmp_path)
    stage, data = make_stage(base), make_data(base)
    data.setup("fit")
    build_model(stage.config, data, str, None)
    assert torch.get_num_threads() == 1
