"""AWM: routines, by rule and by a language model."""

from __future__ import annotations

import pytest

from experiences import ScriptedScribe, experience
from memgen.memories.awm import AWM, AWMRule, AWMSettings, abstract_steps, routines_in
from memgen.memories.base import ReadState
from memgen.memories.scribe import Nonsense

LM_ANSWER = "Sure.\n\nRoutine: fetch something\n1. at home / it is there / go {room}\n2. - / - / take {item}\n\nRoutine: short\n1. x"


def routines(memory, group=""):
    return [passage.text for passage in memory.read("anything", ReadState(group=group))]


def test_values_become_slots():
    episode = experience(
        "bring fig to nut for 3.50", ["go yard", "take fig", 'say "hello you"', "go 12", "put fig", "nut fig"]
    )
    assert abstract_steps(episode) == [
        "go yard",
        "take {a}",
        "say {text}",
        "go {number}",
        "put {a}",
        "nut {a}",
    ]


def test_the_same_abstract_actions_make_one_routine(tmp_path):
    with AWMRule(tmp_path / "memory.sqlite") as memory:
        assert memory.write(experience("bring fig to nut", ["go yard", "take fig"])).added == 1
        assert memory.write(experience("bring oat to nut now", ["go yard", "take oat"])).added == 0
        assert memory.write(experience("bring oat to ham", ["go hall", "take oat"])).added == 1
        assert routines(memory)[0] == "Routine: bring fig to nut\n1. go yard\n2. take {a}"
        assert memory.name == "awm_rule"


def test_tasks_of_one_template_make_one_routine(tmp_path):
    with AWMRule(tmp_path / "memory.sqlite") as memory:
        memory.write(experience("buy 3 figs", ["go shop", "pay 30"]))
        assert memory.write(experience("buy 14 figs", ["go bank", "pay 20"])).added == 0
        assert routines(memory) == ["Routine: buy {number} figs\n1. go shop\n2. pay {number}"]


def test_one_step_makes_no_routine_and_steps_without_effect_do_not_count(tmp_path):
    with AWMRule(tmp_path / "memory.sqlite") as memory:
        memory.write(experience("one", ["go"]))
        memory.write(experience("two", ["go", "fly"], observations=["ok", "Nothing happens."]))
        assert routines(memory) == []
        memory.write(
            experience("three", ["go", "fly", "run"], observations=["ok", "Nothing happens.", "there"])
        )
        assert routines(memory) == ["Routine: three\n1. go\n2. run"]


@pytest.mark.parametrize("kind", [AWMRule, AWM])
def test_a_failure_changes_nothing(tmp_path, kind):
    with kind(tmp_path / "memory.sqlite") as memory:
        report = memory.write(experience("task", ["a", "b"], reward=0.5))
        assert (report.added, report.changed, report.removed) == (0, 0, 0)


def test_a_group_reads_its_own_routines_whole(tmp_path):
    with AWMRule(tmp_path / "memory.sqlite") as memory:
        for group in ("shop", "map"):
            for number in range(3):
                memory.write(
                    experience(f"{group} {'x' * number}", [f"do {number}", f"go {group}"], group=group)
                )
        assert len(routines(memory, "shop")) == len(routines(memory, "map")) == 1
        memory.write(experience("shop other", ["look", "go"], group="shop"))
        assert len(routines(memory, "shop")) == 2
        assert routines(memory, "nowhere") == []


def test_the_scribe_replaces_a_groups_routines_at_each_success(tmp_path):
    scribe = ScriptedScribe(lambda prompt: LM_ANSWER.replace("something", f"{prompt.count('Task:')} things"))
    with AWM(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        assert memory.write(experience("bring fig", ["go yard", "take fig"])).calls == 1
        assert len(routines(memory)) == 1, "what has a single step is none"
        assert routines(memory)[0].startswith("Routine: fetch 1 things\n1. at home")
        report = memory.write(experience("bring oat", ["go hall", "take oat"]))
        assert (report.calls, report.removed, report.method) == (1, 1, "awm")
        assert routines(memory)[0].startswith("Routine: fetch 2 things")
        assert memory.write(experience("bring oat", ["go", "take"])).calls == 0, "one per template"


def test_offline_routines_cost_one_call_per_group(tmp_path):
    scribe = ScriptedScribe(lambda prompt: LM_ANSWER)
    with AWM(tmp_path / "memory.sqlite", AWMSettings(when="finish"), scribe=scribe) as memory:
        for number in range(6):
            memory.write(
                experience(
                    f"task {'abc'[number // 2]} {number % 2 * 'x'}", ["a", "b"], group="xy"[number % 2]
                )
            )
        assert memory.usage.calls == 0
        assert memory.finish().calls == 2
        assert len(routines(memory, "x")) == len(routines(memory, "y")) == 1


def test_the_scribe_judges_where_it_is_to(tmp_path):
    scribe = ScriptedScribe(lambda prompt: "Yes, it was." if "Solved (yes" in prompt else LM_ANSWER)
    with AWM(tmp_path / "memory.sqlite", AWMSettings(judge="scribe"), scribe=scribe) as memory:
        report = memory.write(experience("task", ["a", "b"], reward=0.0))
        assert (report.calls, len(routines(memory))) == (2, 1)
        assert "Outcome" not in scribe.prompts[0], "the judge does not see the reward"


def test_nonsense_is_replaced_by_the_rule(tmp_path):
    with AWM(tmp_path / "memory.sqlite", scribe=ScriptedScribe(lambda prompt: "None.")) as memory:
        report = memory.write(experience("bring fig", ["go yard", "take fig"]))
        assert (report.method, report.fallbacks) == ("awm/df", 1)
        assert routines(memory) == ["Routine: bring fig\n1. go yard\n2. take {a}"]
    with pytest.raises(Nonsense, match="no routine of 2 steps"):
        routines_in("Routine: short\n1. x")
    with pytest.raises(ValueError, match="judge must be environment or scribe"):
        AWMSettings(judge="me")
