"""MemoryBank: what is recalled is kept, the rest is forgotten."""

from __future__ import annotations

import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.memory_bank import MemoryBank, MemoryBankSettings, retention


@pytest.mark.parametrize(("stability", "kept"), [(1, 0.0067), (2, 0.0821), (3, 0.1889)])
def test_retention_after_five_days_grows_with_stability(stability, kept):
    assert retention(5, stability) == pytest.approx(kept, abs=5e-5)


def test_items_are_kept_with_the_probability_of_their_retention(tmp_path):
    with MemoryBank(tmp_path / "memory.sqlite", MemoryBankSettings(day=1)) as memory:
        with memory.store.transaction({}):
            for number in range(10_000):
                memory.store.add("dialogue", f"item {number}", strength=1.0)
        memory.write(experience("a day later"))
        kept = memory.store.count("dialogue") - 1
        assert kept / 10_000 == pytest.approx(0.368, abs=0.015)
        # Looking again the same day changes nothing.
        before = memory.store.contents()["items"]
        with memory.store.transaction({}):
            memory._end_day()
        dialogues = [row for row in memory.store.contents()["items"] if row[1] == "dialogue"]
        assert dialogues == [row for row in before if row[1] == "dialogue"]


def test_a_recall_makes_an_item_more_stable_and_fresh(tmp_path):
    with MemoryBank(tmp_path / "memory.sqlite", MemoryBankSettings(day=100)) as memory:
        memory.write(experience("buy figs"))
        memory.write(experience("sell nuts"))
        memory.write(experience("count sheep"))
        assert len(memory.read("figs")) == 1
        assert [(i.strength, i.accessed) for i in memory.store.items("dialogue")] == [
            (2.0, 3),
            (1.0, 2),
            (1.0, 3),
        ]


def test_what_is_read_is_what_is_recalled(tmp_path):
    with MemoryBank(tmp_path / "memory.sqlite", embedder=WordEmbedder()) as memory:
        memory.write(experience("buy figs"))
        memory.write(experience("buy figs now"))
        memory.write(experience("buy " + "figs " * 50))
        passages = memory.read("buy figs", ReadState(k=3, budget=60))
        assert [int(p.id) for p in passages] == [1, 2], "by date"
        assert [i.strength for i in memory.store.items("dialogue")] == [2.0, 2.0, 1.0]


def test_a_day_without_a_scribe_is_its_first_and_last_line(tmp_path):
    with MemoryBank(tmp_path / "memory.sqlite", MemoryBankSettings(day=2, forget=False)) as memory:
        memory.write(experience("buy figs"))
        assert memory.store.count("day") == 0
        memory.write(experience("sell nuts", reward=0.0))
        (day,) = memory.store.items("day")
        assert day.text == "[day 1] buy figs\n(failure (reward 0))"
        memory.write(experience("count figs"))
        assert memory.finish().added == 2, "the third day's summary, and the overall one"
        assert [p.title for p in memory.read("figs")] == ["overall", "dialogue", "dialogue"]
        assert [p.text[:7] for p in memory.read("figs")[1:]] == ["[day 1]", "[day 2]"]
        assert memory.finish().added == 2, "again: the day is not over"


def test_a_day_costs_the_scribe_four_calls(tmp_path):
    scribe = ScriptedScribe(lambda prompt: f"about {len(scribe.prompts)}")
    settings = MemoryBankSettings(day=3)
    with MemoryBank(tmp_path / "memory.sqlite", settings, scribe=scribe) as memory:
        reports = [memory.write(experience(f"task {number}")) for number in range(6)]
        assert [report.calls for report in reports] == [0, 0, 4, 0, 0, 4]
        assert reports[2].method == "memory_bank"
        (overall,) = memory.store.items("overall")
        assert overall.text == "about 7\n\nabout 8"
        assert "Day 2: about 5" in scribe.prompts[6]


def test_a_day_without_summary_does_not_forget_what_was_never_stored(tmp_path):
    with MemoryBank(tmp_path / "memory.sqlite") as memory:
        assert memory.finish().added == 0
        assert memory.read("anything") == []
