"""Passages as a reasoner's tokenizer can have them, and passages at random."""

from __future__ import annotations

import pytest

from experiences import experience
from memgen.environments.search.retrieval import Passage
from memgen.lab.environment import Lab
from memgen.lab.text_world import TextWorld
from memgen.lab.tokenizer import lab_tokenizer
from memgen.memories.exp_rag import ExpRAG
from memgen.study.reading import Words, at_random, solved, worked_examples
from tiny import byte_tokenizer

LAB = Words(lab_tokenizer(), known_only=True)
BYTES = Words(byte_tokenizer(), known_only=False)


def test_of_a_passage_a_small_tokenizer_gets_the_words_that_it_has():
    text = "Task: shop : fig , nut .\nOutput: 3 , 4 .\n# 7\nFeedback: failure (reward 0); go yard; nothing."
    assert LAB.plain(text) == "shop : fig , nut .\n3 , 4 .\n# 7\n0 go yard nothing"
    assert LAB.plain("Earlier tasks:") == ""
    assert LAB.count("Earlier tasks:") == 0
    assert LAB.count("shop : fig\nnut") == 5
    assert LAB.shown([Passage("1", "", "Rules."), Passage("2", "", "fig")]) == [Passage("2", "", "fig")]
    assert BYTES.plain(text) == text


@pytest.mark.parametrize(
    "environment", [Lab(test_size=4), TextWorld(test_size=4)], ids=["question", "episodes"]
)
def test_a_worked_example_is_an_item_with_its_solution_as_memories_keep_one(environment):
    example = environment.examples("test")[0]
    text = solved(environment, example).text
    assert text.startswith(f"Task: {example.question.strip()}\nOutput: ")
    said = [m["content"].strip() for m in environment.conversation(example) if m["role"] == "assistant"]
    assert "\n".join(said) in text
    assert "success (reward 1)" in text


def test_worked_examples_are_whole_and_within_the_budget():
    found = worked_examples(Lab(), 5, seed=1, budget=60, words=LAB)
    assert 1 <= len(found) < 5
    assert sum(LAB.count(passage.text) for passage in found) <= 60
    assert worked_examples(Lab(), 5, seed=1, budget=60, words=LAB) == found
    assert worked_examples(Lab(), 5, seed=2, budget=60, words=LAB) != found


@pytest.mark.parametrize("words", [BYTES, LAB], ids=["bytes", "lab"])
def test_random_passages_are_others_of_the_same_length(tmp_path, words):
    with ExpRAG(tmp_path / "memory.sqlite") as memory:
        for thing in ("fig", "nut", "oat", "egg", "pie"):
            memory.write(experience(f"shop : {thing} , tea .", [f"3 , {len(thing)} ."] * len(thing)))
        passages = words.shown(memory.read("shop fig"))
        found = at_random(memory, passages, seed=5, words=words)
        assert at_random(memory, passages, seed=5, words=words) == found
    assert len(found) == len(passages)
    for passage, other in zip(passages, found, strict=True):
        longest = max(words.count(word) for word in passage.text.split()) + 1
        assert 0 <= words.count(passage.text) - words.count(other.text) <= longest
        assert other.text != passage.text


def test_a_memory_with_nothing_else_gives_its_own_words_in_another_order(tmp_path):
    with ExpRAG(tmp_path / "memory.sqlite") as memory:
        memory.write(experience("one two three four five six", ["seven eight nine"]))
        (passage,) = memory.read("one")
        (other,) = at_random(memory, [passage], seed=1, words=BYTES)
    assert sorted(other.text.split()) == sorted(passage.text.split())
    assert other.text != passage.text
