"""ExpRecent and ExpRAG: earlier tasks as examples."""

from __future__ import annotations

import pytest

from experiences import TableEmbedder, WordEmbedder, experience
from memgen.memories.base import ReadState
from memgen.memories.exp_rag import ExpRAG, ExpRAGSettings
from memgen.memories.exp_recent import ExpRecent, ExpRecentSettings


@pytest.mark.parametrize("kind", [ExpRecent, ExpRAG])
def test_a_task_is_written_when_it_is_over_and_never_read_before(tmp_path, kind):
    with kind(tmp_path / "memory.sqlite") as memory:
        for number in range(6):
            read = " ".join(passage.text for passage in memory.read(f"task {number}"))
            assert f"Task: task {number}\n" not in read
            report = memory.write(experience(f"task {number}", ["go", "take"], reward=number % 2))
            assert (report.method, report.tick, report.added, report.calls) == (
                memory.method,
                number + 1,
                1,
                0,
            )
        assert memory.store.count("task") == 6


def test_the_last_w_tasks_are_read_newest_first(tmp_path):
    with ExpRecent(tmp_path / "memory.sqlite", ExpRecentSettings(window=3)) as memory:
        for number in range(5):
            memory.write(experience(f"task {number}", reward=0.0))
        assert [p.text.split("\n")[0] for p in memory.read("any")] == [
            "Task: task 4",
            "Task: task 3",
            "Task: task 2",
        ]
        assert len(memory.read("any", ReadState(k=1))) == 1


def test_four_of_ten_come_in_the_order_of_their_cosines(tmp_path):
    cosines = {f"task {n}": (n * 7 % 10) / 10 for n in range(10)}
    with ExpRAG(tmp_path / "memory.sqlite", embedder=TableEmbedder(cosines)) as memory:
        for task in cosines:
            memory.write(experience(task))
        nearest = sorted(cosines, key=lambda task: -cosines[task])[:4]
        assert [p.text.split("\n")[0].removeprefix("Task: ") for p in memory.read("query")] == nearest
        assert memory.retrievals == 1


@pytest.mark.parametrize("embedder", [None, WordEmbedder()], ids=["bm25", "vectors"])
def test_the_similar_task_is_first_with_its_output_and_feedback(tmp_path, embedder):
    with ExpRAG(tmp_path / "memory.sqlite", embedder=embedder) as memory:
        memory.write(
            experience("bring fig to nut", ["go yard", "take fig"], observations=["yard : fig"], reward=0.5)
        )
        memory.write(experience("count the apples", ["3"]))
        (first, *_) = memory.read("bring oat to fig")
        assert first.text == (
            "Task: bring fig to nut\nOutput: go yard\ntake fig\nFeedback: failure (reward 0.5)"
        )


def test_passages_fit_into_the_budget_whole(tmp_path):
    with ExpRecent(tmp_path / "memory.sqlite", count_tokens=lambda text: len(text.split())) as memory:
        memory.write(experience("short"))
        memory.write(experience("long " * 50))
        lengths = [len(p.text.split()) for p in memory.read("any")]
        assert lengths[0] > 50 > lengths[1]
        assert [len(p.text.split()) for p in memory.read("any", ReadState(budget=lengths[1]))] == lengths[1:]
        assert memory.read("any", ReadState(budget=1)) == []


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ExpRecentSettings(window=0)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ExpRAGSettings(k=0)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        ReadState(budget=0)
    with pytest.raises(ValueError, match="reward must be a finite number, got nan"):
        experience("task", reward=float("nan"))
    with pytest.raises(ValueError, match="needs an id and a task"):
        experience(" ", id="1")
