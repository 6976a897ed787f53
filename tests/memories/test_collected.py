"""Collected trajectories become experiences."""

from __future__ import annotations

import json

import pytest

from memgen.memories.collected import read_experiences
from memgen.memories.exp_rag import ExpRAG
from memgen.memories.experience import steps, transcript

SHOP = [
    {"role": "system", "content": "you are an agent"},
    {"role": "user", "content": "an example"},
    {"role": "assistant", "content": "its answer"},
    {"role": "user", "content": "find tea"},
    {"role": "assistant", "content": "go left", "agent": True, "insertion_points": [0]},
    {"role": "user", "content": "a shelf"},
    {"role": "assistant", "content": "take tea", "agent": True},
]


def written(path, **changes):
    line = {"id": "train-3", "environment": "shop", "sample": 1, "reward": 0.5, "messages": SHOP, **changes}
    with path.open("a") as file:
        file.write(json.dumps({key: value for key, value in line.items() if value is not None}) + "\n")
    return path


def test_a_trajectory_is_an_experience_without_the_prompts_examples(tmp_path):
    path = written(tmp_path / "c.jsonl")
    written(path, sample=2, reward=1)
    first, second = read_experiences(path)
    assert (first.id, first.task, first.group, first.reward) == ("train-3", "find tea", "shop", 0.5)
    assert (first.succeeded, second.succeeded, second.id) == (False, True, "train-3")
    assert [step.action for step in steps(first)] == ["go left", "take tea"]
    assert "its answer" not in transcript(first)
    assert all(set(message) == {"role", "content"} for message in first.messages)


def test_any_memory_is_written_from_them(tmp_path):
    with ExpRAG(tmp_path / "m.sqlite") as memory:
        for experience in read_experiences(written(tmp_path / "c.jsonl")):
            assert memory.write(experience).added
        assert "take tea" in memory.read("find tea")[0].text


@pytest.mark.parametrize("reward", [None, "1", True])
def test_a_line_without_a_reward_is_named(tmp_path, reward):
    with pytest.raises(ValueError, match=r"trajectory train-3#1 \(line 1\) has no reward"):
        list(read_experiences(written(tmp_path / "c.jsonl", reward=reward)))
