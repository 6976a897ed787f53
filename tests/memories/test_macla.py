"""MACLA: reliability, utility, preconditions, capacity."""

from __future__ import annotations

import json

import pytest
from scipy.stats import beta as beta_distribution

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.macla import MACLA, MACLASettings, distinguishing, entropy, expected_utility


@pytest.fixture
def memory(tmp_path):
    with MACLA(tmp_path / "memory.sqlite", embedder=WordEmbedder()) as opened:
        yield opened


def procedures(memory):
    return memory.store.items("procedure")


def test_the_entropy_is_that_of_the_beta_distribution():
    assert entropy(1, 1) == 0
    assert entropy(8, 2) == pytest.approx(-0.795, abs=5e-4)
    for alpha, beta in ((1, 2), (3, 1), (16, 40)):
        assert entropy(alpha, beta) == pytest.approx(
            float(beta_distribution(alpha, beta).entropy()), abs=1e-9
        )


def test_the_utility_weighs_relevance_risk_and_what_is_unknown():
    assert expected_utility(0.8, 0.2, 8, 2) == pytest.approx(0.5405, abs=5e-5)
    assert expected_utility(0.8, 0.2, 1, 1) == pytest.approx(0.350, abs=5e-5)


def test_one_goal_is_one_procedure_that_counts_outcomes_once(memory):
    memory.write(experience("buy 3 figs", ["wait"], reward=0.0))
    memory.write(experience("buy 5 figs", ["go shop", "pay"]))
    report = memory.write(experience("buy 7 figs", ["run"]))
    (item,) = procedures(memory)
    assert (item.data["alpha"], item.data["beta"]) == (3, 2)
    assert item.data["actions"] == ["go shop", "pay"], "the first that succeeded"
    assert (report.method, report.added, report.changed) == ("macla/df", 1, 1)
    memory.write(experience("sell all nuts", ["shout"]))
    assert [(i.data["alpha"], i.data["beta"]) for i in procedures(memory)] == [(3, 2), (2, 1)]
    assert (
        memory.read("sell all nuts")[0].text
        == "Goal: sell all nuts\n1. shout\n(worked 1 times, failed 0 times)"
    )


def test_a_segmented_episode_counts_once_for_a_procedure(tmp_path):
    part = {"goal": "open the door", "before": ["has key"], "actions": ["turn key"], "after": "door is open"}
    parts = [part, part, {**part, "goal": "take a fig"}]
    scribe = ScriptedScribe(lambda prompt: json.dumps(parts))
    with MACLA(tmp_path / "memory.sqlite", embedder=WordEmbedder(), scribe=scribe) as memory:
        assert memory.write(experience("get a fig")).calls == 1
        assert [(i.data["alpha"], i.data["beta"]) for i in procedures(memory)] == [(2, 1), (2, 1)]
        assert memory.read("open the door")[0].text == (
            "Goal: open the door\nWhen: has key\n1. turn key\nThen: door is open\n(worked 1 times, failed 0 times)"
        )
        parts[:] = [{"goal": "open"}]
        assert memory.write(experience("get a nut")).method == "macla/df"


def test_preconditions_are_refined_from_three_successes_and_three_failures(memory):
    for number in range(3):
        memory.write(experience(f"fetch {number} figs please now by day", reward=1.0))
        memory.write(experience(f"fetch {number} figs please now by night", reward=0.0))
        (item,) = procedures(memory)
        known = (item.data["before"], item.data["negated"])
        assert known == ((["day"], ["night"]) if number == 2 else ([], []))
    assert "When: day, not night" in memory.read("fetch 9 figs please now by day")[0].text


def test_a_word_of_most_successes_and_no_failure_distinguishes():
    assert distinguishing(["a b", "a c", "a d"], ["d e"]) == ["a"]
    assert distinguishing(["a b", "a b", "c"], ["x"]) == ["a", "b"]


def test_at_most_fifteen_contexts_of_each_outcome_are_kept(memory):
    for number in range(18):
        memory.write(experience(f"buy {number} figs", reward=0.0))
    assert len(memory.store.links("failure")) == memory.store.count("context") == 15
    assert procedures(memory)[0].data["beta"] == 19


def test_the_201st_procedure_displaces_the_least_worthy(tmp_path):
    with MACLA(tmp_path / "memory.sqlite", MACLASettings(capacity=200), embedder=WordEmbedder()) as memory:
        with memory.store.transaction({}):
            memory.store.advance()
            for number in range(200):
                data = {
                    "goal": "g",
                    "before": [],
                    "negated": [],
                    "actions": ["a"],
                    "after": "",
                    "alpha": 2,
                    "beta": 1,
                }
                strength = 0.1 if number == 77 else 2 / 3
                memory.store.add(
                    "procedure", f"old {number}", key=f"old{number}", strength=strength, data=data
                )
        report = memory.write(experience("something quite new"))
        assert len(procedures(memory)) == 200
        assert report.removed == 1
        assert "old 77" not in {item.text for item in procedures(memory)}


def test_a_pruned_procedure_takes_its_contexts_along(tmp_path):
    with MACLA(tmp_path / "memory.sqlite", MACLASettings(capacity=1), embedder=WordEmbedder()) as memory:
        memory.write(experience("buy figs", reward=0.0))
        memory.write(experience("sell nuts"))
        assert [item.data["goal"] for item in procedures(memory)] == ["sell nuts"]
        assert [item.text for item in memory.store.items("context")] == ["sell nuts"]


def test_nothing_is_read_below_the_least_utility(memory):
    memory.write(experience("buy figs"))
    assert len(memory.read("buy figs")) == 1
    assert memory.read("quite another thing") == []
    for _ in range(3):
        memory.write(experience("sell nuts", reward=0.0))
    assert memory.read("sell nuts") == [], "all that was like it failed"
    assert len(memory.read("buy figs", ReadState(k=5))) == 1


def test_bm25_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"macla compares cosines with constants, .*give an embedder"):
        MACLA(tmp_path / "memory.sqlite")
    assert not (tmp_path / "memory.sqlite").exists()
