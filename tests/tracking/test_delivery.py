"""The way of a record to a store that may be slow, or down."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise

import pytest

from memgen.tracking import delivery
from memgen.tracking.delivery import Outbox, RefusedError, new_outbox_path, read_outbox


class Store:
    """Takes records, unless it is told not to."""

    def __init__(self, up: bool = True) -> None:
        self.up, self.silent, self.broken, self.refuses = up, threading.Event(), None, None
        self.calls, self.opened = [], 0
        self.silent.set()

    def open(self):
        self._reached()
        self.opened += 1

    def send(self, records):
        self._reached()
        if self.refuses in [record.get("n") for record in records]:
            raise RefusedError("never that")
        if self.broken in [record.get("n") for record in records]:
            raise RuntimeError("internal error")
        self.calls.append([record["n"] for record in records])

    def answers(self):
        return self.up

    def header(self):
        return {"uri": "here", "opened": self.opened}

    def _reached(self):
        self.silent.wait(5)
        if not self.up:
            raise ConnectionError("refused")

    @property
    def received(self):
        return [n for call in self.calls for n in call]


@pytest.fixture
def make(tmp_path):
    return lambda store: Outbox(store, "the store", tmp_path / "outbox" / "records.jsonl")


def test_records_arrive_in_order_and_nothing_is_left(make):
    store = Store()
    outbox = make(store)
    for n in range(500):
        outbox.put("a" if n % 50 else "b", n=n)
    assert outbox.flush(10) == 0
    assert store.received == list(range(500))
    assert not outbox.path.exists()


def test_records_of_a_kind_travel_together(make):
    store = Store()
    store.silent.clear()
    outbox = make(store)
    for n, kind in enumerate("aaabba"):
        outbox.put(kind, n=n)
    store.silent.set()
    assert outbox.flush(10) == 0
    assert store.calls == [[0, 1, 2], [3, 4], [5]]


def test_a_store_that_is_down_costs_the_one_who_logs_nothing(make, caplog):
    store = Store(up=False)
    outbox = make(store)
    begin = time.perf_counter()
    for n in range(1000):
        outbox.put("a", n=n)
    assert time.perf_counter() - begin < 1.0
    assert not outbox.opened(5)
    assert outbox.flush(0.3) == 1000
    header, records = read_outbox_of(outbox)
    assert header == {"uri": "here", "opened": 0}
    assert [record["n"] for record in records] == list(range(1000))
    store.up = True
    outbox.put("a", n=1000)
    assert outbox.flush(10) == 0
    assert store.received == list(range(1001))
    assert not outbox.path.exists()
    said = [record.getMessage() for record in caplog.records]
    assert (
        sum("does not take records (ConnectionError: refused); training goes on" in line for line in said)
        == 1
    )
    assert sum("1000 records could not be delivered to the store within 0.3 s" in line for line in said) == 1
    assert sum(f"memgen deliver {outbox.path}" in line for line in said) == 1
    assert sum("the store answers again;" in line for line in said) == 1


def read_outbox_of(outbox: Outbox):
    """The file of an outbox that is in use, which `read_outbox` refuses."""
    with pytest.raises(BlockingIOError):
        read_outbox(outbox.path)
    first, *rest = outbox.path.read_text().splitlines()
    return json.loads(first), [json.loads(line) for line in rest]


def test_a_store_that_goes_away_and_comes_back_gets_everything_once(make):
    store = Store()
    outbox = make(store)
    for n in range(30):
        if n in (7, 19):
            store.up = False
        if n in (12, 25):
            store.up = True
        outbox.put("a", n=n)
        time.sleep(0.005)
    assert outbox.flush(10) == 0
    assert store.received == list(range(30))


def test_a_store_that_hangs_does_not_hold_the_end_up(make):
    store = Store()
    store.silent.clear()
    outbox = make(store)
    outbox.put("a", n=0)
    begin = time.perf_counter()
    assert outbox.flush(0.2) == 1
    assert outbox.flush(5) == 1, "it has given up, and does not wait again"
    assert time.perf_counter() - begin < 2
    store.silent.set()


def test_what_the_store_refuses_is_set_aside_and_said(make, caplog):
    store = Store()
    store.refuses = 1
    outbox = make(store)
    for n, kind in enumerate("abc"):
        outbox.put(kind, n=n)
    assert outbox.flush(10) == 0
    assert store.received == [0, 2]
    kept = outbox.path.with_suffix(".refused.jsonl")
    assert json.loads(kept.read_text()) == {"kind": "b", "n": 1, "refused": "never that"}
    assert "refuses a record of the kind b (never that)" in caplog.text


def test_one_record_that_breaks_the_store_does_not_block_the_others(make, caplog):
    store = Store()
    store.broken = 1
    outbox = make(store)
    for n, kind in enumerate("abc"):
        outbox.put(kind, n=n)
    assert outbox.flush(10) == 0
    assert store.received == [0, 2]
    assert "internal error" in caplog.text


def test_tries_during_an_outage_say_nothing_about_a_record(make):
    store = Store()
    store.broken = 0
    asked = []

    def answers() -> bool:
        asked.append(True)
        if len(asked) < 2 * delivery.PATIENCE:
            return False
        # It is back between the last try and the question.
        store.broken = None
        return True

    store.answers = answers
    outbox = make(store)
    outbox.put("a", n=0)
    assert outbox.flush(10) == 0
    assert store.received == [0]
    assert len(asked) == 2 * delivery.PATIENCE


def test_what_an_earlier_process_left_comes_first(make, tmp_path):
    store = Store()
    outbox = make(store)
    outbox.adopt([{"kind": "a", "n": 1}, {"kind": "a", "n": 2}])
    outbox.put("a", n=3)
    assert outbox.flush(10) == 0
    assert store.received == [1, 2, 3]


def test_a_killed_process_leaves_a_file_that_can_be_read(tmp_path):
    path = tmp_path / "left.jsonl"
    path.write_text('{"uri": "here"}\n{"kind": "a", "n": 1}\n{"kind": "a", "n"')
    assert read_outbox(path) == ({"uri": "here"}, [{"kind": "a", "n": 1}])


@pytest.mark.parametrize("text", ["", '{"kind": "a"}\n', "x\ny\n"], ids=["empty", "no header", "no json"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other.jsonl.* (no|holds no) record"):
        read_outbox(path)


def test_processes_do_not_share_a_file(tmp_path):
    assert len({new_outbox_path(tmp_path) for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("longest", "expected"), [(60.0, [0.02, 0.04, 0.08, 0.16]), (0.04, [0.02] + [0.04] * 11)]
)
def test_pauses_between_attempts_double_up_to_a_limit(monkeypatch, make, longest, expected):
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE", longest)
    store = Store(up=False)
    attempts = []
    store.open = lambda: attempts.append(time.monotonic()) or store._reached()
    outbox = make(store)
    outbox.put("a", n=0)
    # Without the limit the twelfth pause alone would take 40 s.
    deadline = time.monotonic() + 20
    while len(attempts) <= len(expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    pauses = [after - before for before, after in pairwise(attempts)][: len(expected)]
    assert len(pauses) == len(expected)
    assert all(pause >= least for pause, least in zip(pauses, expected, strict=True))
