"""When ranks agree to stop."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from memgen.running import interrupt
from memgen.running.interrupt import Agreement, Limit, Listener, Wish, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300), ("5:30", 330), ("04:00:00", 14400), ("1-2", 93600), ("1-02:30", 95400), ("2-00:00:01", 172801),
    ],
)  # fmt: skip
def test_durations_are_read_as_slurm_reads_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-5", "1-", "1.5"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is no duration"):
        seconds_of(text)


def test_the_set_limit_goes_before_slurms():
    slurm = {"SLURM_JOB_END_TIME": "1000"}
    assert Limit.find(None, 5, slurm) == Limit(1000.0, 5)
    assert Limit.find(None, 5, {}) is None
    found = Limit.find("10", 5, slurm)
    assert found is not None
    assert 595 < found.end - time.time() <= 600


def test_a_limit_counts_the_steps_and_the_save_that_must_still_fit():
    limit = Limit(time.time() + 100, margin=60)
    assert not limit.reached(step_seconds=5, steps=2, save_seconds=5)
    assert limit.reached(step_seconds=20, steps=2, save_seconds=5)
    assert limit.reached(step_seconds=0, steps=0, save_seconds=41)


class Ranks:
    """Ranks in threads, whose all-reduce waits for all of them, and fails if they do not meet."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=10)
        self.values: list[list[float] | None] = [None] * count
        self.meetings = 0

    def over_ranks(self, rank: int):
        def largest(values):
            self.values[rank] = list(values)
            self.barrier.wait()
            result = [max(column) for column in zip(*self.values, strict=True)]
            self.barrier.wait()
            if rank == 0:
                self.meetings += 1
            return result

        return largest


def run(count: int, steps: int, ask: dict[int, int], seconds: dict[int, float], monkeypatch) -> tuple:
    """Ranks that take steps on clocks of their own until they stop; the step at which each does."""
    ranks = Ranks(count)
    clocks = [0.0] * count
    local = threading.local()
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clocks[local.rank])
    stopped: list[int | None] = [None] * count
    failures = []

    def work(rank: int) -> None:
        local.rank = rank
        listener = Listener()
        agreement = Agreement(ranks.over_ranks(rank), None, listener)
        try:
            for step in range(1, steps + 1):
                clocks[rank] += seconds.get(rank, 0.01)
                if ask.get(rank) == step:
                    listener.ask(Wish.REQUEUE)
                if agreement.after_step(False, 0.0).wish:
                    stopped[rank] = step
                    return
        except threading.BrokenBarrierError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, "the ranks did not meet"
    return stopped, ranks.meetings


def test_ranks_that_notice_at_different_steps_stop_at_the_same_one(monkeypatch):
    stopped, _ = run(3, 5000, {0: 701, 2: 690}, {0: 0.01, 1: 0.02, 2: 0.011}, monkeypatch)
    assert len(set(stopped)) == 1
    assert stopped[0] is not None
    # 5 seconds at the slowest rank's pace, in whole intervals.
    assert 690 <= stopped[0] <= 690 + 250


def test_fast_steps_share_a_meeting_and_slow_ones_have_one_each(monkeypatch):
    _, meetings = run(2, 4000, {}, {0: 0.01, 1: 0.01}, monkeypatch)
    assert meetings <= 4000 / 500 + 10
    _, meetings = run(2, 20, {}, {0: 0.01, 1: 9.0}, monkeypatch)
    # Before the slow rank was known the ranks met after the first step as well.
    assert meetings == 20


def test_the_wish_to_be_continued_goes_before_the_wish_to_leave():
    listener = Listener()
    listener.ask(Wish.REQUEUE)
    listener.ask(Wish.LEAVE)
    assert listener.wish is Wish.REQUEUE


CHILD = """
import os, signal, subprocess, sys, time
from memgen.running.interrupt import LISTENER
LISTENER.listen()
worker = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(2)"], stdout=subprocess.PIPE)
worker.stdout.readline()
os.killpg(0, signal.SIGUSR1)
assert worker.wait() == 0, worker.returncode
assert LISTENER.wish.name == "REQUEUE"
assert not {"torch", "lightning", "numpy"} & set(sys.modules)
"""


def test_programs_that_a_run_has_started_survive_the_signal_and_listening_imports_nothing():
    """SLURM signals all processes of a step."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], start_new_session=True, timeout=60, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
