"""ReMem: what was read is thought over before each action."""

from __future__ import annotations

import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.exp_rag import ExpRAG
from memgen.memories.remem import ReMem, ReMemSettings, Thought, thought_in

HERE = ReadState(situation="buy figs")


def four(memory):
    for number in range(4):
        memory.write(experience(f"buy figs {number}", reward=float(number != 1)))
    return memory.read("buy figs")


def test_listed_numbers_are_dropped_until_the_agent_may_act(tmp_path):
    scribe = ScriptedScribe(["Think: the second failed", "Refine: 2", "Act"])
    with ReMem(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        passages = four(memory)
        assert len(passages) == 4
        kept = memory.refine(passages, HERE)
        assert kept == [passages[0], *passages[2:]]
        assert memory.usage.calls == 3
        assert "Situation: buy figs" in scribe.prompts[0]
        assert "Thought: the second failed" in scribe.prompts[1]
        assert "[2]" not in scribe.prompts[2]


def test_refinement_ends_after_its_rounds(tmp_path):
    scribe = ScriptedScribe(lambda prompt: "Think: hm")
    with ReMem(tmp_path / "memory.sqlite", ReMemSettings(rounds=2), scribe=scribe) as memory:
        passages = four(memory)
        assert memory.refine(passages, HERE) == passages
        assert memory.usage.calls == 2
        assert memory.refine([], HERE) == []
        assert memory.usage.calls == 2


def test_without_a_scribe_failures_go_where_there_is_a_success(tmp_path):
    with ReMem(tmp_path / "memory.sqlite") as memory:
        passages = four(memory)
        assert memory.refine(passages, HERE) == [p for p in passages if "failure" not in p.text]
        failures = [p for p in passages if "failure" in p.text]
        assert memory.refine(failures, HERE) == failures
        assert memory.name == "remem/df"


def test_without_a_scribe_what_is_far_from_the_situation_goes(tmp_path):
    settings = ReMemSettings(least_cosine=0.6)
    with ReMem(tmp_path / "memory.sqlite", settings, embedder=WordEmbedder()) as memory:
        memory.write(experience("buy figs"))
        memory.write(experience("count sheep"))
        passages = memory.read("buy figs")
        assert [p.id for p in passages] == ["1", "2"]
        assert [p.id for p in memory.refine(passages, HERE)] == ["1"]
        assert memory.refine(passages, ReadState()) == passages, "no situation, no cosine"
    with pytest.raises(ValueError, match="remem compares cosines with constants, which BM25"):
        ReMem(tmp_path / "other.sqlite", settings)


def test_nonsense_is_replaced_by_the_rule(tmp_path):
    with ReMem(tmp_path / "memory.sqlite", scribe=ScriptedScribe(lambda prompt: "Well.")) as memory:
        passages = four(memory)
        assert len(memory.refine(passages, HERE)) == 3
        assert memory.fallbacks == 1


def test_other_methods_refine_nothing(tmp_path):
    with ExpRAG(tmp_path / "memory.sqlite") as memory:
        passages = four(memory)
        assert memory.refine(passages, HERE) == passages


def test_answers_are_read():
    assert thought_in("I see.\nrefine: [1] and 3") == Thought("refine", dropped=(1, 3))
    assert thought_in("**Act**: now") == Thought("act")
    for answer in ("", "Let me see", "Refine: all"):
        with pytest.raises(ValueError, match=r"neither Think|no number"):
            thought_in(answer)
