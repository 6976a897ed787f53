"""ExpeL: votes on rules, contrasts, examples."""

from __future__ import annotations

import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.expel import ExpeL, ExpeLSettings, Operation, Rule, operations_in, vote
from memgen.memories.scribe import Nonsense

TWO = [Rule("look first", 3), Rule("buy figs", 2)]


def test_a_new_rule_has_two_votes_and_two_removals_end_it():
    rules = vote([], [Operation("ADD", "look first")], 20)
    assert rules == [Rule("look first", 2)]
    rules = vote(rules, [Operation("REMOVE", "look first", 1)], 20)
    assert rules == [Rule("look first", 1)]
    assert vote(rules, [Operation("REMOVE", "look first", 1)], 20) == []


def test_an_overfull_list_removes_by_three():
    rules = [Rule(f"rule {n}", 4) for n in range(15)]
    assert Rule("rule 14", 1) in vote(rules, [Operation("REMOVE", "", 15)], 10)
    assert Rule("rule 13", 3) in vote(rules[:14], [Operation("REMOVE", "", 14)], 10)


def test_agreeing_and_editing_add_a_vote():
    assert vote(TWO, [Operation("AGREE", "", 2)], 20) == [Rule("look first", 3), Rule("buy figs", 3)]
    assert vote(TWO, [Operation("EDIT", "buy ripe fruit", 2)], 20)[1] == Rule("buy ripe fruit", 3)
    assert vote(TWO, [Operation("AGREE", "", 2)] * 2, 20)[0] == Rule("buy figs", 4), "the most votes first"


def test_what_holds_a_rule_is_no_new_rule():
    assert vote(TWO, [Operation("ADD", "always look first")], 20) == TWO
    assert vote(TWO, [Operation("EDIT", "always look first", 2)], 20)[0] == Rule("look first", 4)


def test_operations_that_name_no_rule_are_dropped_and_a_text_can_name_one():
    assert (
        vote(TWO, [Operation("REMOVE", "x", 7), Operation("AGREE", "x"), Operation("EDIT", "x", 0)], 20)
        == TWO
    )
    assert vote(TWO, [Operation("AGREE", "buy figs", 7)], 20)[1] == Rule("buy figs", 3)


def test_removals_come_first_whatever_the_order_of_the_answer():
    operations = [
        Operation("ADD", "new"),
        Operation("EDIT", "b", 2),
        Operation("REMOVE", "", 1),
        Operation("AGREE", "", 1),
    ]
    assert vote(TWO, operations, 20) == [Rule("look first", 3), Rule("b", 3), Rule("new", 2)]


def test_a_list_is_never_longer_than_its_limit_and_five():
    rules: list[Rule] = []
    for number in range(40):
        rules = vote(rules, [Operation("ADD", f"{number:02}")], 3)
    assert [rule.text for rule in rules] == [f"{number:02}" for number in range(8)]


def test_operations_are_read_line_by_line():
    answer = (
        "Here you are:\n- AGREE 2: buy figs\nADD: sell  nuts \nEDIT 1. look twice\nremove 3: x\nADD 4: more"
    )
    assert operations_in(answer) == [
        Operation("AGREE", "buy figs", 2),
        Operation("ADD", "sell  nuts"),
        Operation("EDIT", "look twice", 1),
        Operation("ADD", "more"),
    ]
    with pytest.raises(Nonsense, match="no operation"):
        operations_in("I agree with all of them")


def test_the_fallbacks_rule_is_the_first_action_that_differs(tmp_path):
    with ExpeL(tmp_path / "memory.sqlite") as memory:
        memory.write(experience("bring fig", ["go yard", "take nut"], reward=0.0))
        assert memory.rules == []
        report = memory.write(experience("bring fig", ["go yard", "take fig"]))
        assert memory.rules == [Rule("after: go yard, do: take fig; not: take nut", 2)]
        assert (report.method, report.calls, report.fallbacks) == ("expel/df", 0, 0)
        assert "1. after: go yard, do: take fig" in memory.read("bring nut")[0].text
        memory.write(experience("bring fig", ["wait"], reward=0.0))
        assert memory.rules[1] == Rule("do: go yard; not: wait", 2)


def test_each_pair_and_each_eight_successes_cost_a_call(tmp_path):
    scribe = ScriptedScribe(lambda prompt: "reflect" if "attempt" in prompt else "ADD: be careful")
    with ExpeL(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        for _ in range(2):
            memory.write(experience("one", ["a"], reward=0.0))
        assert memory.usage.calls == 2, "two reflections"
        assert memory.write(experience("one", ["b"])).calls == 2, "a success with each of two failures"
        assert memory.rules == [Rule("be careful", 2)]
        reports = [memory.write(experience(f"task {number}")) for number in range(10)]
        assert [report.calls for report in reports] == [0] * 6 + [1] + [0] * 3
        assert memory.finish().calls == 1, "the last three"
        assert memory.finish().calls == 0


def test_behind_the_last_trial_nothing_is_reflected_upon(tmp_path):
    scribe = ScriptedScribe(lambda prompt: "try the yard")
    with ExpeL(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        calls = [memory.write(experience("one", ["a"], reward=0.0)).calls for _ in range(4)]
        assert calls == [1, 1, 1, 0]
        assert [p.text for p in memory.read("one", ReadState(task_id="one"))] == ["try the yard"] * 3
        assert memory.read("one", ReadState(task_id="two")) == []


def test_at_most_four_operations_of_a_call_count(tmp_path):
    scribe = ScriptedScribe(lambda prompt: "\n".join(f"ADD: rule {number}" for number in range(9)))
    with ExpeL(tmp_path / "memory.sqlite", ExpeLSettings(trials=1), scribe=scribe) as memory:
        memory.write(experience("one", ["a"], reward=0.0))
        memory.write(experience("one", ["b"]))
        assert len(memory.rules) == 4


@pytest.mark.parametrize("embedder", [None, WordEmbedder()], ids=["bm25", "vectors"])
def test_examples_are_the_shortest_successes_of_other_tasks(tmp_path, embedder):
    with ExpeL(tmp_path / "memory.sqlite", ExpeLSettings(longest=40), embedder=embedder) as memory:
        memory.write(experience("bring fig to nut", ["long way", "take fig"], id="a"))
        memory.write(experience("bring fig to nut", ["take fig"], id="a"))
        memory.write(experience("bring fig to oat", ["x"], id="own"))
        memory.write(experience("bring fig to ham", ["fail"], id="b", reward=0.0))
        memory.write(experience("bring fig to tea", ["talk " * 50], id="c"))
        memory.write(experience("bring egg to tea", ["take egg"], id="d"))
        passages = memory.read("bring fig to oat", ReadState(task_id="own"))
        assert [p.text for p in passages] == [
            "Task: bring fig to nut\nAgent: take fig\nOutcome: success",
            "Task: bring egg to tea\nAgent: take egg\nOutcome: success",
        ]
