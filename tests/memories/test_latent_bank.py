"""The file of a latent bank: scores, capacity, renewal, identity, and writers that die."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memgen.memories.latent_bank import BankIdentity, LatentBank, NewBlock
from memgen.memories.store import Identity, MemoryStore

IDENTITY = BankIdentity("tiny", "f" * 64, 3, 64)
QUERY = np.array([1, 0, 0], dtype=np.float32)


def block(number: int, cosine: float = 1.0, kind: str = "prompt", size: int = 2) -> NewBlock:
    """A block whose key has the given cosine with the query."""
    key = np.array([cosine, math.sqrt(1 - cosine**2), 0], dtype=np.float32) * (1 + number)
    return NewBlock(kind, key, np.full((size, 3), number, dtype=np.float32), f"text {number}")


@pytest.fixture
def bank(tmp_path):
    with LatentBank(tmp_path / "bank.sqlite", IDENTITY, begin=True) as opened:
        yield opened


def found(bank: LatentBank, count: int = 1, kind: str = "prompt", size: int = 2, **settings) -> list[int]:
    """What the found blocks are filled with."""
    settings = {"least": 0.7, "decay": 0.05} | settings
    hits = bank.search(QUERY, kind, size, count=count, **settings)
    return [int(bank.latents(hit.number)[0, 0]) for hit in hits]


def later(bank: LatentBank, episodes: int) -> None:
    """Lets a bank grow older: other episodes are written, of another kind of insertion."""
    for number in range(episodes):
        bank.keep(f"other {number}", 1.0, [block(1000 + number, kind="inference")], 100)


@pytest.mark.parametrize(("cosine", "age", "score"), [(0.7, 0, 0.7), (0.9, 10, 0.546), (0.9, 5, 0.701)])
def test_the_score_is_the_cosine_faded_by_age_and_must_reach_the_least(bank, cosine, age, score):
    bank.keep("one", 1.0, [block(7, cosine)], 100)
    later(bank, age)
    (hit,) = bank.search(QUERY, "prompt", 2, count=1, least=0.0, decay=0.05)
    assert hit.score == pytest.approx(score, abs=1e-3)
    assert found(bank) == ([7] if score >= 0.7 else [])
    assert found(bank, decay=0.0) == [7]


def test_the_ninth_block_drops_the_first(bank):
    for number in range(9):
        report = bank.keep(f"episode {number}", 1.0, [block(number)], 8)
    assert (report.added, report.renewed, report.dropped) == (1, 0, 1)
    assert [stored.episode for stored in bank.blocks()] == [f"episode {n}" for n in range(1, 9)]
    assert sorted(found(bank, count=100, decay=0.0)) == list(range(1, 9))


def test_the_best_come_first_of_the_same_kind_and_length(bank):
    bank.keep(
        "a", 1.0, [block(1, 0.8), block(2, 0.95), block(3, 1.0, "inference"), block(4, 1.0, size=5)], 100
    )
    assert found(bank, count=5) == [2, 1]
    assert found(bank, count=1) == [2]
    assert found(bank, kind="inference") == [3]
    assert found(bank, size=5) == [4]
    assert found(bank, size=1) == []
    # Of equal scores the first that was written.
    bank.keep("b", 1.0, [block(5, 0.95)], 100)
    assert found(bank, count=3, decay=0.0) == [2, 5, 1]


def test_centred_keys_lose_the_direction_that_all_share(bank):
    common, own = np.array([0, 0, 100], dtype=np.float32), np.array([0, 1, 0], dtype=np.float32)
    for number, part in enumerate((QUERY, -QUERY, own, -own)):
        latents = np.full((2, 3), number, dtype=np.float32)
        bank.keep(f"episode {number}", 1.0, [NewBlock("prompt", common + part, latents)], 100)
    asked = {"least": 0.9, "decay": 0.0, "count": 9}
    assert len(bank.search(common + QUERY, "prompt", 2, **asked)) == 4
    (hit,) = bank.search(common + QUERY, "prompt", 2, centred=True, **asked)
    assert int(bank.latents(hit.number)[0, 0]) == 0
    assert hit.score == pytest.approx(1.0)
    assert bank.cosines("prompt").min() > 0.99
    assert bank.cosines("prompt", centred=True) == pytest.approx([-1, -1, 0, 0, 0, 0], abs=1e-6)
    # A block that is the mean itself is not found.
    bank.keep("alone", 1.0, [block(9, kind="inference")], 100)
    assert bank.search(QUERY, "inference", 2, centred=True, **asked) == []


def test_it_says_how_alike_the_keys_of_different_episodes_are(bank):
    assert len(bank.cosines("prompt")) == 0
    bank.keep("a", 1.0, [block(1, 1.0), block(2, 0.5)], 100)
    bank.keep("b", 1.0, [block(3, 0.0), block(4, kind="inference")], 100)
    assert bank.cosines("prompt") == pytest.approx([0.0, math.sqrt(0.75)])
    assert len(bank.cosines("prompt", newest=1)) == 0


def test_blocks_come_back_bit_for_bit_after_a_restart(tmp_path):
    exact = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    with LatentBank(tmp_path / "bank.sqlite", IDENTITY, begin=True) as bank:
        bank.keep("a", 0.5, [NewBlock("prompt", QUERY, exact, "the end")], 8)
    with LatentBank(tmp_path / "bank.sqlite", IDENTITY) as bank:
        (hit,) = bank.search(QUERY, "prompt", 4, count=1, least=0.7, decay=0.05)
        assert np.array_equal(bank.latents(hit.number), exact)
        (stored,) = bank.blocks()
        assert (stored.episode, stored.reward, stored.text, bank.tick) == ("a", 0.5, "the end", 1)


def test_a_newer_success_takes_the_place_of_an_older_one_and_a_block_used_again_is_renewed(bank):
    bank.keep("a", 1.0, [block(1), block(2)], 100)
    report = bank.keep("a", 1.0, [block(3)], 100)
    assert (report.added, report.renewed, report.dropped) == (1, 0, 2)
    later(bank, 9)
    assert found(bank) == []
    report = bank.keep("b", 1.0, [block(3), block(4)], 100)
    assert (report.added, report.renewed, report.dropped) == (1, 1, 0)
    assert found(bank, count=5) == [3, 4]
    assert {stored.episode for stored in bank.blocks() if stored.kind == "prompt"} == {"a", "b"}


def test_pruning_removes_by_capacity_age_and_episode_and_gives_room_back(tmp_path):
    path = tmp_path / "bank.sqlite"
    with LatentBank(path, IDENTITY, begin=True) as bank:
        for number in range(6):
            bank.keep(f"episode {number}", 1.0, [block(number, size=2000)], 100)
        size = path.stat().st_size
        assert bank.prune(episode="episode 5") == 1
        assert bank.prune(older_than=3) == 2
        assert bank.prune(capacity=2) == 1
        assert [stored.episode for stored in bank.blocks()] == ["episode 3", "episode 4"]
        assert bank.prune(capacity=2) == 0
        assert path.stat().st_size < size / 2
        assert sorted(found(bank, count=9, size=2000)) == [3, 4]


# Refusals


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (
            BankIdentity("other", "e" * 64, 3, 64),
            r"bank\.sqlite is a latent bank of tiny \(weights f{12}\).* to other ",
        ),
        (BankIdentity("tiny", "f" * 64, 3, 32), r"keys of 64 tokens, not 32; set .*bank\.key_tokens to 64"),
    ],
)
def test_a_bank_of_another_reasoner_or_of_other_keys_is_refused(tmp_path, identity, message):
    with LatentBank(tmp_path / "bank.sqlite", IDENTITY, begin=True) as bank:
        bank.keep("a", 1.0, [block(1)], 8)
    before = (tmp_path / "bank.sqlite").read_bytes()
    with pytest.raises(ValueError, match=message):
        LatentBank(tmp_path / "bank.sqlite", identity, begin=True)
    assert (tmp_path / "bank.sqlite").read_bytes() == before


def test_what_is_no_bank_is_refused_and_left_alone(tmp_path):
    MemoryStore(tmp_path / "memory.sqlite", Identity("test", {}, "bm25", 0)).close()
    (tmp_path / "text.sqlite").write_text("no database, but long enough to look like a file of one" * 40)
    for name in ("memory.sqlite", "text.sqlite"):
        before = (tmp_path / name).read_bytes()
        for identity in (None, IDENTITY):
            with pytest.raises(ValueError, match=rf"{name} is no latent bank.*choose another file"):
                LatentBank(tmp_path / name, identity, begin=True)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no latent bank .*none\.sqlite"):
        LatentBank(tmp_path / "none.sqlite", IDENTITY)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        LatentBank(tmp_path / "nowhere" / "bank.sqlite", IDENTITY, begin=True)


# Writers that die, disks that are full, writers beside each other


def test_a_killed_writer_loses_the_write_under_way_alone(tmp_path):
    path = tmp_path / "bank.sqlite"
    code = f"""
import os, signal
from pathlib import Path
from memories.test_latent_bank import IDENTITY, block
from memgen.memories.latent_bank import LatentBank
bank = LatentBank(Path({str(path)!r}), IDENTITY, begin=True)
for number in range(3):
    bank.keep(f"episode {{number}}", 1.0, [block(number)], 100)
add = bank._add
def killed(new, *rest):
    add(new, *rest)
    if new.latents[0, 0] == 40:
        os.kill(os.getpid(), signal.SIGKILL)
bank._add = killed
bank.keep("episode 0", 1.0, [block(n, size=20_000) for n in range(10, 50)], 4)  # more than the page cache
"""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with LatentBank(path, IDENTITY) as bank:
        assert bank.tick == 3
        assert sorted(found(bank, count=9)) == [0, 1, 2]
        assert bank.keep("episode 3", 1.0, [block(3)], 100).added == 1


def test_a_full_disk_leaves_the_bank_as_it_was(bank):
    bank.keep("a", 1.0, [block(1)], 8)
    (pages,) = bank._connection.execute("PRAGMA page_count").fetchone()
    bank._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(
        OSError, match=r"latent bank .*bank\.sqlite could not be written .*as it was; make room"
    ):
        bank.keep("b", 1.0, [block(2, size=100_000)], 8)
    bank._connection.execute("PRAGMA max_page_count = 1000000")
    assert [stored.episode for stored in bank.blocks()] == ["a"]
    assert bank.tick == 1
    assert bank.keep("c", 1.0, [block(3)], 8).added == 1


def test_two_writers_lose_nothing_and_see_each_other_with_their_own_next_write(tmp_path):
    first, second = (LatentBank(tmp_path / "bank.sqlite", IDENTITY, begin=True) for _ in range(2))
    first.keep("a", 1.0, [block(1, 0.8)], 8)
    assert found(second) == []
    second.keep("b", 1.0, [block(2, 0.9)], 8)
    assert found(second, count=5) == [2, 1]
    assert second.tick == 2
    first.prune(episode="b")
    (hit,) = second.search(QUERY, "prompt", 2, count=1, least=0.7, decay=0.05)
    assert second.latents(hit.number) is None
    first.close()
    second.close()


def test_a_bank_that_another_process_holds_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("memgen.memories.store.BUSY_SECONDS", 0.1)
    with LatentBank(tmp_path / "bank.sqlite", IDENTITY, begin=True) as bank:
        other = sqlite3.connect(tmp_path / "bank.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match=r"another process is writing the latent bank"):
            bank.keep("a", 1.0, [block(1)], 8)
        other.execute("ROLLBACK")
        other.close()
