"""What holds for every text memory: replay, empty memories, stops in mid-write, the example of docs/memories.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiences import ScriptedScribe, WordEmbedder, experience
from memgen.memories.a_mem import AMem
from memgen.memories.awm import AWM, AWMRule, AWMSettings
from memgen.memories.base import ReadState, with_memory
from memgen.memories.exp_rag import ExpRAG
from memgen.memories.exp_recent import ExpRecent
from memgen.memories.expel import ExpeL, ExpeLSettings
from memgen.memories.generative_agents import GenerativeAgents, GenerativeAgentsSettings
from memgen.memories.macla import MACLA, MACLASettings
from memgen.memories.memory_bank import MemoryBank, MemoryBankSettings
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.memories.reasoning_bank import ReasoningBank
from memgen.memories.remem import ReMem
from memgen.memories.store import MemoryStore, rebuild

# Small constants, so that a dozen tasks reach every part.
METHODS = {
    ExpRecent: None,
    ExpRAG: None,
    ReMem: None,
    MemoryBank: MemoryBankSettings(day=3),
    ExpeL: ExpeLSettings(max_rules=2, chunk=2),
    GenerativeAgents: GenerativeAgentsSettings(reflect_above=20),
    AWMRule: None,
    AWM: AWMSettings(judge="scribe"),
    AMem: None,
    MACLA: MACLASettings(capacity=3, contexts=2, refine_after=1),
    ReasoningBank: None,
    RawTrajectories: None,
}
PROMPT = [{"role": "user", "content": "bring fig to nut"}]
ANSWERS = {
    "An agent is about to act": "Refine: 1",
    "An agent solves tasks": "ADD: look around\nAGREE 1: look around\nREMOVE 2: x",
    "This attempt": "try the yard",
    "How important": "9",
    "What are the": "Where?\nWhen?",
    "Which 5 general": "1. Things stay (because of 1, 2)",
    "Here is a task": "yes",
    "Here are tasks": "Routine: fetch\n1. there / needed / go\n2. here / needed / take",
    "Describe": '{"keywords": ["fig"], "tags": ["fruit"], "context": "Fruit."}',
    "Here are a new note": '{"links": [1], "rewritten": [{"number": 1, "context": "Both.", "tags": ["new"]}]}',
    "Which keywords": '{"keywords": ["fig"]}',
    "Cut this": '[{"goal": "bring fig to room", "before": ["free hand"], "actions": ["take fig"], "after": "held"}]',
    "This task": '[{"title": "Look", "description": "first", "content": "then act"}]',
}


def scribe() -> ScriptedScribe:
    """Answers every method's questions well; summaries are any text."""
    return ScriptedScribe(
        lambda prompt: next((a for begin, a in ANSWERS.items() if prompt.startswith(begin)), "A summary.")
    )


@pytest.fixture(params=METHODS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def opened(kind, path, **arguments):
    return kind(path, METHODS[kind], embedder=WordEmbedder(), **arguments)


def live(memory, tasks=12):
    """Reads, refines and writes, task after task, each twice."""
    for number in range(tasks):
        task = f"bring {('fig', 'oat', 'nut')[number % 3]} to room {number // 2}"
        state = ReadState(task_id=f"task {number // 2}", group="house", budget=200, situation=task)
        passages = memory.refine(memory.read(task, state), state)
        assert sum(memory.count_tokens(passage.text) for passage in passages) <= 200
        memory.write(
            experience(
                task,
                ["go yard", f"take {number % 2}"],
                id=f"task {number // 2}",
                group="house",
                reward=number % 2,
            )
        )
    memory.finish()


@pytest.mark.parametrize("with_scribe", [True, False], ids=["scribe", "df"])
def test_replaying_the_log_gives_the_same_memory(tmp_path, kind, with_scribe):
    path, again = tmp_path / "memory.sqlite", tmp_path / "again.sqlite"
    with opened(kind, path, scribe=scribe() if with_scribe else None) as memory:
        live(memory)
        assert memory.fallbacks == 0
        assert (memory.usage.calls > 0) == (with_scribe and kind.asks)
        assert memory.name == kind.method + ("/df" if kind.asks and not with_scribe else "")
        assert memory.read("bring fig to room 1", ReadState(group="house", situation="bring fig"))
        contents = memory.store.contents()
    assert rebuild(path, again) == len(contents["log"])
    with opened(kind, again) as rebuilt:
        assert rebuilt.store.contents() == contents
    # The same tasks give the same memory.
    with opened(kind, tmp_path / "other.sqlite", scribe=scribe() if with_scribe else None) as other:
        live(other)
        other.read("bring fig to room 1", ReadState(group="house", situation="bring fig"))
        assert other.store.contents() == contents


def test_an_empty_memory_leaves_the_prompt_as_it_was(tmp_path, kind):
    with opened(kind, tmp_path / "memory.sqlite") as memory:
        passages = memory.read("bring fig to nut", ReadState(group="house"))
        assert with_memory(PROMPT, memory.refine(passages, ReadState()), memory.place) == PROMPT
        assert memory.store.contents()["log"] == []


def test_a_write_that_fails_at_its_end_leaves_the_memory_as_it_was(tmp_path, kind, monkeypatch):
    with opened(kind, tmp_path / "memory.sqlite", scribe=scribe()) as memory:
        live(memory, tasks=5)
        before = memory.store.contents()

        def broken(self):
            raise KeyboardInterrupt

        monkeypatch.setattr(MemoryStore, "pending", broken)
        with pytest.raises(KeyboardInterrupt):
            memory.write(experience("bring tea", ["go hall", "take tea"], group="house"))
        monkeypatch.undo()
        assert memory.store.contents() == before
        memory.write(experience("bring tea", ["go hall", "take tea"], group="house"))


def test_an_episode_without_actions_is_learnt_from(tmp_path, kind):
    with opened(kind, tmp_path / "memory.sqlite") as memory:
        memory.write(experience("say nothing", [], reward=0.0))
        report = memory.write(experience("say nothing", [], reward=1.0))
        assert report.tick == 2
        memory.read("say nothing")


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs/memories.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/memories.md", "exec"), {})
    assert capsys.readouterr().out.startswith("exp_rag 20 tasks, 20 searches; Task: task : bring")
