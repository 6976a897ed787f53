"""Generative Agents: recency, importance, relevance; reflection."""

from __future__ import annotations

import numpy as np
import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.generative_agents import GenerativeAgents, GenerativeAgentsSettings, scores


def test_the_score_is_the_sum_of_three_scaled_parts():
    total = scores([0, 24, 168], [2, 9, 5], [0.2, 0.1, 0.6])
    assert total == pytest.approx([1.200, 1.801, 1.429], abs=5e-4)


def test_parts_in_which_all_are_equal_decide_nothing():
    assert np.array_equal(scores([3, 3], [5, 5], [0.1, 0.1]), [0, 0])
    assert np.array_equal(scores([3, 3], [5, 6], [0.1, 0.1]), [0, 1])
    assert np.array_equal(scores([5], [1], [0.0]), [0])
    assert scores([], [], []).shape == (0,)


@pytest.mark.parametrize("embedder", [None, WordEmbedder()], ids=["bm25", "vectors"])
def test_what_is_recent_important_and_relevant_is_read_and_renewed(tmp_path, embedder):
    with GenerativeAgents(tmp_path / "memory.sqlite", embedder=embedder) as memory:
        memory.write(experience("buy figs", reward=1.0))
        memory.write(experience("sell nuts", reward=0.0))
        memory.write(experience("count sheep", reward=0.0))
        assert [item.strength for item in memory.store.items("memory")] == [10, 1, 1]
        (first,) = memory.read("figs", ReadState(k=1))
        assert first.id == "1"
        assert [item.accessed for item in memory.store.items("memory")] == [3, 2, 3]
        assert memory.name == "generative_agents/df"


def test_the_recency_is_of_the_last_access_not_of_the_oldest(tmp_path):
    with GenerativeAgents(tmp_path / "memory.sqlite") as memory:
        for number in range(5):
            memory.write(experience(f"alike {number}", reward=0.0))
        assert [int(p.id) for p in memory.read("other")] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(("ratings", "reflects"), [([10] * 15, False), ([10] * 15 + [1], True)])
def test_importance_above_150_leads_to_a_reflection_and_150_does_not(tmp_path, ratings, reflects):
    def answer(prompt: str) -> str:
        if prompt.startswith("How important"):
            return "7" if "insight" in prompt else f"{next(given)}"
        if prompt.startswith("What are"):
            return "1. Why?\n2. When?\n3. Who?\n4. More?"
        return "1. An insight (because of 1, 2)\n2. Another insight (because of 3 and 99)"

    given = iter(ratings)
    scribe = ScriptedScribe(answer)
    with GenerativeAgents(tmp_path / "memory.sqlite", embedder=WordEmbedder(), scribe=scribe) as memory:
        reports = [memory.write(experience(f"task {number}")) for number in range(len(ratings))]
        assert [report.calls for report in reports[:15]] == [1] * 15
        memories = memory.store.items("memory")
        if not reflects:
            assert len(memories) == 15
            return
        # One rating; the questions, three times insights, and one rating for each of two insights.
        assert reports[15].calls == 1 + 1 + 3 + 3 * 2
        assert memory.retrievals == 3
        assert [item.text for item in memories[16:]] == ["An insight", "Another insight"] * 3
        assert len(memory.store.linked(memories[16].number, "evidence")) == 2
        assert len(memory.store.linked(memories[17].number, "evidence")) == 1, "memory 99 was not shown"
        assert memory.store.state("importance") == 0


def test_a_rating_that_is_none_is_the_fallbacks(tmp_path):
    with GenerativeAgents(tmp_path / "memory.sqlite", scribe=ScriptedScribe(lambda prompt: "very")) as memory:
        report = memory.write(experience("buy figs", reward=0.5))
        assert (report.method, report.fallbacks) == ("generative_agents/df", 1)
        assert memory.store.items("memory")[0].strength == 5.5


def test_constants_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 2"):
        GenerativeAgentsSettings(decay=2)
