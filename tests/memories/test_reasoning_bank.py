"""ReasoningBank: lessons of both outcomes."""

from __future__ import annotations

import json

import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.reasoning_bank import ReasoningBank, ReasoningBankSettings


def lesson(number):
    return {"title": f"Lesson {number}", "description": "look", "content": "look before you leap"}


def test_an_episode_teaches_three_lessons_at_most(tmp_path):
    scribe = ScriptedScribe(lambda prompt: f"Lessons:\n{json.dumps([lesson(n) for n in range(5)])}")
    with ReasoningBank(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        report = memory.write(experience("buy figs"))
        assert (report.added, report.calls, report.method) == (4, 1, "reasoning_bank")
        assert [p.text for p in memory.read("figs")] == [
            f"Lesson {n}: look\nlook before you leap" for n in range(3)
        ]
        assert memory.place == "system"


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_success_and_failure_are_both_stored_and_asked_for_differently(tmp_path, reward):
    scribe = ScriptedScribe(lambda prompt: json.dumps([lesson(1)]))
    with ReasoningBank(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        memory.write(experience("buy figs", reward=reward))
        assert ("was not solved" in scribe.prompts[0]) == (reward == 0.0)
        assert len(memory.read("figs")) == 1
        assert memory.store.items("task")[0].data == {"success": reward == 1.0}


def test_no_match_gives_nothing(tmp_path):
    with ReasoningBank(tmp_path / "memory.sqlite") as memory:
        assert memory.read("figs") == []
        memory.write(experience("buy figs"))
        assert memory.read("something else") == []


@pytest.mark.parametrize("embedder", [None, WordEmbedder()], ids=["bm25", "vectors"])
def test_the_lessons_of_the_nearest_task_alone_are_read(tmp_path, embedder):
    with ReasoningBank(tmp_path / "memory.sqlite", embedder=embedder) as memory:
        memory.write(experience("buy figs", ["go", "pay"]))
        memory.write(experience("sell figs", ["go", "smile"], reward=0.0))
        assert memory.name == "reasoning_bank/df"
        assert [p.text for p in memory.read("sell figs")] == [
            "An earlier task: sell figs\nLast action: smile. not solved."
        ]
        assert len(memory.read("figs", ReadState(k=2))) == 2


def test_the_judge_costs_a_second_call_and_decides(tmp_path):
    scribe = ScriptedScribe(lambda prompt: "no" if "Solved (yes" in prompt else json.dumps([lesson(1)]))
    with ReasoningBank(
        tmp_path / "memory.sqlite", ReasoningBankSettings(judge="scribe"), scribe=scribe
    ) as memory:
        assert memory.write(experience("buy figs", reward=1.0)).calls == 2
        assert memory.store.items("task")[0].data == {"success": False}


@pytest.mark.parametrize(
    "answer", ["[]", '{"title": "x"}', '[{"title": "x", "description": "", "content": "y"}]', "none"]
)
def test_lessons_of_another_form_are_nonsense(tmp_path, answer):
    with ReasoningBank(tmp_path / "memory.sqlite", scribe=ScriptedScribe(lambda prompt: answer)) as memory:
        report = memory.write(experience("buy figs"))
        assert (report.method, report.fallbacks, report.added) == ("reasoning_bank/df", 1, 2)
