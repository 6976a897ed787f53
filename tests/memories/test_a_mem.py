"""A-MEM: notes, their links, and their neighbours' changes."""

from __future__ import annotations

import json

import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.a_mem import AMem
from memgen.memories.base import ReadState

NOTE = {"keywords": ["fruit"], "tags": ["shopping"], "context": "What fruit costs."}


def answering(links, rewritten=()):
    def answer(prompt):
        if prompt.startswith("Describe"):
            return f"Here: {json.dumps(NOTE)}"
        if prompt.startswith("Which keywords"):
            return '{"keywords": ["fruit", "prices"]}'
        return json.dumps({"links": list(links), "rewritten": list(rewritten)})

    return ScriptedScribe(answer)


@pytest.mark.parametrize("embedder", [None, WordEmbedder()], ids=["bm25", "vectors"])
def test_links_survive_reopening_and_are_read(tmp_path, embedder):
    path = tmp_path / "memory.sqlite"
    with AMem(path, embedder=embedder) as memory:
        memory.write(experience("nuts at noon"))
        memory.write(experience("figs at noon"))
    with AMem(path, embedder=embedder) as memory:
        passages = memory.read("figs", ReadState(k=1))
        assert [p.text.split("\n")[0] for p in passages] == ["Task: figs at noon", "Task: nuts at noon"]


def test_at_most_as_many_linked_notes_are_read_as_were_found(tmp_path):
    with AMem(tmp_path / "memory.sqlite") as memory:
        for number in range(8):
            memory.write(experience(f"task number{number} of many"))
        assert len(memory.read("number7", ReadState(k=1))) == 2
        assert len(memory.read("task", ReadState(k=3))) <= 6


def test_a_write_costs_two_calls_and_a_read_one(tmp_path):
    scribe = answering([1])
    with AMem(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        assert memory.write(experience("buy figs")).calls == 1, "the first note has no neighbours"
        report = memory.write(experience("buy nuts"))
        assert (report.calls, report.method) == (2, "a_mem")
        assert len(memory.read("anything")) == 2, "found by its keywords"
        assert memory.usage.calls == 4
        assert memory.retrievals == 3
        assert memory.store.items("note")[0].text.endswith(
            "Context: What fruit costs.\nKeywords: fruit\nTags: shopping"
        )


def test_a_rewritten_note_is_searched_by_its_new_text(tmp_path):
    scribe = answering(
        [],
        [
            {"number": 1, "context": "All about zebras.", "tags": ["stripes"]},
            {"number": 9, "context": "x", "tags": []},
        ],
    )
    words = WordEmbedder()
    with AMem(tmp_path / "memory.sqlite", embedder=words, scribe=scribe) as memory:
        memory.write(experience("buy figs"))
        before = memory.store.relevance("zebras stripes", "note")[1]
        report = memory.write(experience("buy nuts"))
        assert (report.added, report.changed) == (1, 1)
        first = memory.store.items("note")[0]
        assert "Context: All about zebras." in first.text
        assert before == 0.0
        assert memory.store.relevance("zebras stripes", "note")[1] == pytest.approx(
            float((words.encode([first.key]) @ words.encode(["zebras stripes"]).T)[0, 0])
        )
        assert memory.store.linked(2, "related") == []


def test_keywords_without_a_scribe_tell_a_note_from_the_others(tmp_path):
    with AMem(tmp_path / "memory.sqlite") as memory:
        for fruit in ("figs", "nuts", "figs", "kiwis"):
            memory.write(experience(f"buy {fruit} at the market", [f"pay for {fruit}"]))
        assert memory.store.items("note")[3].data["keywords"][0] == "kiwis"


@pytest.mark.parametrize(
    "answer", ['{"links": "all"}', '{"links": [1], "rewritten": [3]}', '{"links": [true]}', "[1]"]
)
def test_an_answer_of_another_form_is_nonsense(tmp_path, answer):
    scribe = ScriptedScribe(lambda prompt: json.dumps(NOTE) if prompt.startswith("Describe") else answer)
    with AMem(tmp_path / "memory.sqlite", scribe=scribe) as memory:
        memory.write(experience("buy figs"))
        report = memory.write(experience("buy nuts"))
        assert (report.method, report.fallbacks) == ("a_mem/df", 1)
        assert [item.number for item in memory.store.linked(2, "related")] == [1]
