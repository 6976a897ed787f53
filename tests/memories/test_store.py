"""The file of a text memory: transactions, search, identity, the log."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from experiences import WordEmbedder, experience
from memgen.memories.exp_rag import ExpRAG, ExpRAGSettings
from memgen.memories.exp_recent import ExpRecent
from memgen.memories.store import Identity, MemoryStore, rebuild

IDENTITY = Identity("test", {}, "bm25", 0)


@pytest.fixture
def store(tmp_path):
    opened = MemoryStore(tmp_path / "memory.sqlite", IDENTITY)
    yield opened
    opened.close()


def changed(store: MemoryStore) -> tuple[int, int, int]:
    """Three items, linked, of which one is changed and one removed again."""
    with store.transaction({"write": "1"}):
        store.advance()
        one, two, three = (
            store.add("note", text, key=f"{text} key", data={"n": 1}) for text in ("a", "b", "c")
        )
        store.link(one, two, "near")
        store.link(one, three, "near")
    with store.transaction({"write": "2"}):
        store.advance()
        store.update(store.item(one), text="A", key="quite another", strength=2.5, accessed=store.tick)
        store.remove(store.item(three))
        store.set_state("since", [1, 2])
    return one, two, three


def test_items_are_found_by_their_keys_as_they_are_now(store):
    one, two, three = changed(store)
    assert [f.item.number for f in store.search("key", 5, "note")] == [two]
    assert [f.item.text for f in store.search("another AND NOT (key*", 5, "note")] == ["A", "b"]
    assert store.search("key", 5, "other kind") == []
    assert store.search("b", 5, "note", leave_out=[two]) == []
    assert [item.number for item in store.linked(one, "near")] == [two]
    assert store.item(three) is None
    assert store.state("since") == [1, 2]
    assert store.tick == 2
    store.contents()  # and the index fits them


def test_groups_are_searched_apart(store):
    with store.transaction({}):
        for group in ("x", "y", "x"):
            store.add("note", group, key="one word", group=group)
    assert [f.item.number for f in store.search("word", 5, "note", group="x")] == [1, 3]
    assert [f.item.number for f in store.search("word", 1, "note", group="y")] == [2]
    assert [item.number for item in store.items("note", "x", newest=1)] == [3]


def test_a_number_is_never_used_twice(store):
    with store.transaction({}):
        store.remove(store.item(store.add("note", "a")))
        assert store.add("note", "b") == 2


@pytest.mark.parametrize("embedder", [None, WordEmbedder()], ids=["bm25", "vectors"])
def test_the_log_rebuilds_the_file(tmp_path, embedder):
    path = tmp_path / "memory.sqlite"
    identity = Identity("test", {"k": 4}, embedder.id if embedder else "bm25", 0)
    store = MemoryStore(path, identity, embedder)
    changed(store)
    assert rebuild(path, tmp_path / "again.sqlite") == 2
    again = MemoryStore(tmp_path / "again.sqlite", identity, embedder)
    assert again.contents() == store.contents()
    assert again.search("key", 5, "note") == store.search("key", 5, "note")
    assert again.search("another", 1, "note") == store.search("another", 1, "note")
    with again.transaction({}), store.transaction({}):
        assert again.add("note", "next") == store.add("note", "next"), "numbers go on as they would have"
    again.close()

    assert rebuild(path, tmp_path / "first.sqlite", until=1) == 1
    first = MemoryStore(tmp_path / "first.sqlite", identity, embedder)
    assert [item.text for item in first.items("note")] == ["a", "b", "c"]
    first.close()
    store.close()


def test_what_raises_inside_a_write_leaves_nothing_of_it(store):
    def write_and_fail():
        with store.transaction({}):
            store.add("note", "a", key="word")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert store.items("note") == []
    assert store.search("word", 1, "note") == []
    assert store.contents()["log"] == []


def test_a_full_disk_leaves_the_file_whole(store):
    with store.transaction({}):
        store.add("note", "a", key="kept")
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    before = store.contents()
    with (
        pytest.raises(OSError, match=r"memory\.sqlite could not be written .*full.* as it was; make room"),
        store.transaction({}),
    ):
        store.add("note", "b" * 100_000, key="lost")
    assert store.contents() == before
    store._connection.execute("PRAGMA max_page_count = 1000000")
    with store.transaction({}):
        store.add("note", "c", key="kept too")
    assert [f.item.text for f in store.search("kept", 5, "note")] == ["a", "c"]


def test_a_file_that_may_not_grow_is_named(tmp_path):
    code = f"""
import resource, signal, sys
from experiences import experience
from memgen.memories.exp_rag import ExpRAG
memory = ExpRAG({str(tmp_path / "memory.sqlite")!r})
memory.write(experience("one"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
try:
    for number in range(1000):
        memory.write(experience(f"task {{number}} " + "x" * 9000))
except OSError as error:
    print(error)
"""
    ran = run(code)
    assert "memory.sqlite could not be written" in ran.stdout, ran.stderr
    with ExpRAG(tmp_path / "memory.sqlite") as memory:
        log = memory.store.contents()["log"]
        assert len(memory.store.items("task")) == len(log) >= 1


def test_a_killed_writer_loses_the_write_under_way_alone(tmp_path):
    path = tmp_path / "memory.sqlite"
    code = f"""
import os, signal
from experiences import experience
from memgen.memories.exp_rag import ExpRAG
memory = ExpRAG({str(path)!r})
for number in range(3):
    memory.write(experience(f"task {{number}}"))
learn = ExpRAG.learn
def killed(self, experience):
    for _ in range(200):
        self.store.add("task", "x" * 50_000, key="word")   # more than the page cache: parts are in the file already
    os.kill(os.getpid(), signal.SIGKILL)
ExpRAG.learn = killed
memory.write(experience("task 3"))
"""
    assert run(code).returncode == -signal.SIGKILL
    with ExpRAG(path) as memory:
        memory.store.contents()
        assert len(memory.store.items("task")) == memory.store.tick == 3
        assert memory.write(experience("task 3")).tick == 4


def run(code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parents[1]), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=120,
        check=False,
    )


# Refusals


def test_another_method_embedder_setting_or_seed_is_refused(tmp_path):
    path = tmp_path / "memory.sqlite"
    ExpRAG(path).close()
    with pytest.raises(
        ValueError, match=r"is a memory of exp_rag, not of exp_recent; choose another file or method"
    ):
        ExpRecent(path)
    with pytest.raises(
        ValueError, match=r"written with the embedder bm25, .* of words; choose another file or embedder"
    ):
        ExpRAG(path, embedder=WordEmbedder())
    with pytest.raises(ValueError, match="written with k 4, not 2; choose"):
        ExpRAG(path, ExpRAGSettings(k=2))
    with pytest.raises(ValueError, match="written with seed 0, not 1"):
        ExpRAG(path, seed=1)
    ExpRAG(path).close()


def test_what_is_no_memory_is_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("this is a text and not a database " * 100)
    with pytest.raises(ValueError, match=r"notes\.txt is no memory file"):
        ExpRAG(text)
    assert text.read_text().startswith("this is a text")
    with pytest.raises(FileNotFoundError, match="no folder"):
        ExpRAG(tmp_path / "nowhere" / "memory.sqlite")
    with pytest.raises(OSError, match="cannot be"):
        ExpRAG(tmp_path)
    path = tmp_path / "memory.sqlite"
    store = MemoryStore(path, IDENTITY)
    store._connection.execute("UPDATE about SET value = '99' WHERE name = 'format'")
    store.close()
    with pytest.raises(ValueError, match="format 99, this version reads format 1"):
        MemoryStore(path, IDENTITY)
    with pytest.raises(FileNotFoundError, match="no memory file"):
        rebuild(tmp_path / "absent.sqlite", path)


def test_a_damaged_file_is_named_and_its_log_makes_it_again(tmp_path):
    path = tmp_path / "memory.sqlite"
    with ExpRAG(path) as memory:
        for number in range(40):
            memory.write(experience(f"task {number} " + "word " * 500))
        contents = memory.store.contents()
        (page,) = memory.store._connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'items'"
        ).fetchone()
        (size,) = memory.store._connection.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with (
        ExpRAG(path) as memory,
        pytest.raises(ValueError, match=r"memory\.sqlite is .*damaged.*rebuild it from its log"),
    ):
        memory.read("task 3")
    assert rebuild(path, tmp_path / "again.sqlite") == 40
    with ExpRAG(tmp_path / "again.sqlite") as memory:
        assert memory.store.contents() == contents


def test_a_copy_that_cannot_be_written_is_named_and_absent(tmp_path, monkeypatch):
    def on_a_full_disk(path):
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA max_page_count = 2")
        return connection

    with ExpRAG(tmp_path / "memory.sqlite") as memory:
        monkeypatch.setattr("memgen.memories.store.connect", on_a_full_disk)
        with pytest.raises(OSError, match=r"copy\.sqlite could not be written .*make room"):
            memory.store.copy_to(tmp_path / "copy.sqlite")
        with pytest.raises(OSError, match=r"again\.sqlite could not be written .*make room"):
            rebuild(tmp_path / "memory.sqlite", tmp_path / "again.sqlite")
    assert {file.name for file in tmp_path.iterdir()} == {"memory.sqlite"}


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no memory file"):
        MemoryStore(path, IDENTITY)
    assert path.read_bytes() == before


def test_two_writers_of_one_file_see_each_other(tmp_path):
    first = ExpRAG(tmp_path / "memory.sqlite", embedder=WordEmbedder())
    second = ExpRAG(tmp_path / "memory.sqlite", embedder=WordEmbedder())
    first.write(experience("buy figs"))
    assert len(second.read("figs")) == 1
    second.write(experience("sell figs"))
    assert len(first.read("figs")) == 2
    first.close()
    second.close()


def test_a_memory_is_read_while_another_process_writes_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("memgen.memories.store.BUSY_SECONDS", 0.05)
    path = tmp_path / "memory.sqlite"
    with ExpRAG(path) as first:
        first.write(experience("buy figs"))
        with first.store.transaction({"slow": True}), ExpRAG(path) as second:
            first.store.add("task", "half", key="figs")
            assert len(second.read("figs")) == 1
            with pytest.raises(OSError, match="another process is writing the memory"):
                second.write(experience("buy nuts"))


def test_a_copy_goes_its_own_way(tmp_path):
    memory = ExpRAG(tmp_path / "memory.sqlite")
    memory.write(experience("one"))
    memory.store.copy_to(tmp_path / "copy.sqlite")
    memory.write(experience("two"))
    with ExpRAG(tmp_path / "copy.sqlite") as copy:
        assert copy.store.count("task") == 1
    assert memory.store.count("task") == 2
    memory.close()


def test_half_a_character_is_written_as_a_question_mark(tmp_path):
    with ExpRAG(tmp_path / "memory.sqlite") as memory:
        memory.write(experience("buy \ud800 figs"))
        assert json.dumps(memory.read("figs \udfff")[0].text).count("buy ? figs") == 1
