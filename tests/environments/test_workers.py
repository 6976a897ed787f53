from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from environments.corridor import Corridor
from memgen.environments.worlds.workers import WorkerEnvironment


@pytest.fixture
def corridors():
    made = []

    def make(workers=2, **settings):
        made.append(WorkerEnvironment(Corridor(), workers=workers, **{"step_timeout_s": 30.0} | settings))
        return made[-1]

    yield make
    for environment in made:
        environment.close()


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(running(pid) for pid in pids):
        time.sleep(0.05)
    return not any(running(pid) for pid in pids)


def begin(environment, count, **meta):
    examples = [
        dataclasses.replace(e, meta={**e.meta, **meta}) for e in environment.examples("train")[:count]
    ]
    episodes = [environment.episode() for _ in examples]
    return episodes, environment.reset_all(episodes, examples)


def play(environment, count=10):
    """Everything that can be seen of `count` episodes in which each walks until it is over."""
    episodes, observations = begin(environment, count)
    seen = [[observation] for observation in observations]
    live = list(range(count))
    while live:
        steps = environment.step_all([episodes[i] for i in live], ["right"] * len(live))
        for i, step in zip(live, steps, strict=True):
            seen[i].append(step)
        live = [i for i, step in zip(live, steps, strict=True) if not step.done]
    return seen, [episode.reward() for episode in episodes]


def test_one_worker_eight_workers_and_none_give_the_same_episodes(corridors):
    plain = play(Corridor())
    assert play(corridors(workers=1)) == plain
    assert play(corridors(workers=8)) == plain
    assert all(reward.total == 1.0 for reward in plain[1])


def test_what_needs_no_process_is_the_environments_own_and_starts_none(corridors):
    environment, plain = corridors(), Corridor()
    assert (environment.name, environment.max_turns, environment.stop_texts) == ("corridor", 8, ("\n",))
    assert environment.examples("val") == plain.examples("val")
    assert environment.messages(plain.examples("val")[0]) == plain.messages(plain.examples("val")[0])
    assert environment.worker_pids == ()


def test_episodes_share_the_workers_evenly_and_step_side_by_side(corridors):
    environment = corridors(workers=4)
    episodes, _ = begin(environment, 8)
    pids = [step.observation for step in environment.step_all(episodes, ["pid"] * 8)]
    assert sorted(pids.count(pid) for pid in set(pids)) == [2, 2, 2, 2]
    started = time.monotonic()
    environment.step_all(episodes, ["sleep"] * 8)
    assert time.monotonic() - started < 8 * 0.5 - 1.0


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("crash", "by signal SIGKILL"),
        ("exit", "with exit status 3; it said: the roof falls in"),
        ("hang", "did not answer within 1 s"),
        ("spin", "did not answer within 1 s"),
    ],
)
def test_a_lost_worker_marks_its_episodes_and_the_batch_goes_on(corridors, action, reason):
    environment = corridors(workers=2, step_timeout_s=1.0)
    episodes, _ = begin(environment, 4)
    before = environment.worker_pids
    steps = environment.step_all(episodes, ["right", "right", action, "right"])
    assert [step.fault is None for step in steps] == [True, True, False, True]
    assert reason in steps[2].fault
    assert steps[2].done
    # The first episode is in the lost worker too: its step was answered, its next one cannot be.
    steps = environment.step_all(episodes, ["right"] * 4)
    assert [step.fault is None for step in steps] == [False, True, False, True]
    assert "lost" in steps[0].fault
    assert steps[3].observation.startswith("You are at 2")
    assert episodes[0].reward().parts == {"place": 1.0}
    # A new item begins in the worker's successor.
    assert environment.reset_all(episodes[:1], environment.examples("val")[:1])[0].text == "A corridor of 1."
    assert environment.step_all(episodes[:1], ["right"])[0].done
    assert len(set(environment.worker_pids) - set(before)) == 1
    assert gone(set(before) - set(environment.worker_pids))


def test_a_worker_that_is_killed_from_outside_between_two_steps_is_noticed(corridors):
    environment = corridors(workers=2)
    episodes, _ = begin(environment, 2)
    os.kill(environment.worker_pids[0], signal.SIGKILL)
    steps = environment.step_all(episodes, ["right"] * 2)
    assert [step.fault is None for step in steps] == [False, True]
    _, observations = begin(environment, 4)
    assert all(observation.text for observation in observations)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_schedulers_warning_is_not_for_the_workers(corridors, number):
    environment = corridors(workers=1)
    episodes, _ = begin(environment, 2)
    os.kill(environment.worker_pids[0], number)
    steps = environment.step_all(episodes, ["right"] * 2)
    assert [step.fault for step in steps] == [None, None]


@pytest.mark.parametrize(
    ("how", "reason"),
    [("crash", "SIGKILL"), ("hang", "within 1 s"), ("broken", "ZeroDivisionError: no length")],
)
def test_an_episode_that_cannot_begin_says_so_at_its_first_step(corridors, how, reason):
    environment = corridors(workers=2, reset_timeout_s=1.0)
    examples = environment.examples("train")[:4]
    examples[2] = dataclasses.replace(examples[2], meta={**examples[2].meta, "reset": how})
    episodes = [environment.episode() for _ in examples]
    observations = environment.reset_all(episodes, examples)
    assert [bool(observation.text) for observation in observations] == [True, True, False, True]
    steps = environment.step_all(episodes, ["right"] * 4)
    assert reason in steps[2].fault
    assert [steps[1].fault, steps[3].fault] == [None, None]
    # The first episode's worker was lost over the third's beginning; an exception costs nobody else.
    assert (steps[0].fault is None) == (how == "broken")


def test_missing_data_stops_the_run_with_the_environments_own_error(corridors):
    environment = corridors()
    with pytest.raises(FileNotFoundError, match="there is no corridor"):
        begin(environment, 1, reset="missing")
    assert begin(environment, 1)[1][0].text == "A corridor of 1."


def test_an_exception_in_a_step_marks_that_episode_only(corridors):
    environment = corridors(workers=1)
    episodes, _ = begin(environment, 3)
    steps = environment.step_all(episodes, ["right", "raise", "right"])
    assert "the environment raised KeyError: 'lamp'" in steps[1].fault
    assert [steps[0].fault, steps[2].fault] == [None, None]
    assert environment.step_all(episodes, ["right"] * 3)[2].fault is None


def test_a_fault_is_no_score(corridors):
    environment = corridors()
    example = environment.examples("test")[0]
    assert environment.reward(example, "right").total == 1.0
    assert environment.reward(example, "left").total == 0.0
    with pytest.raises(RuntimeError, match=r"corridor, item test-0: the worker ended by signal SIGKILL"):
        environment.reward(example, "crash")


def test_reference_conversations_are_played_side_by_side_in_the_workers(corridors):
    environment = corridors(workers=3)
    examples = environment.examples("train")
    turns = environment.conversations(examples[:6])
    first = [next(turns) for _ in range(3)]
    assert len({turns[1]["content"] for turns in first}) == 3  # One process each.
    assert str(os.getpid()) not in {turns[1]["content"] for turns in first}
    with pytest.raises(ValueError, match="nobody knows the way"):
        next(turns)
    others = environment.conversations(examples[5:])
    assert next(others)[2]["content"] == "right " * 2
    with pytest.raises(RuntimeError, match="SIGKILL"):
        next(others)
    assert environment.conversation(examples[7])[2]["content"] == "right " * 4


def test_what_an_environment_prints_does_no_harm(corridors):
    environment = corridors(workers=1)
    episodes, _ = begin(environment, 1)
    for _ in range(3):
        assert environment.step_all(episodes, ["chatter"])[0].fault is None


def test_closing_ends_the_workers_and_what_they_started(corridors):
    environment = corridors(workers=2)
    episodes, _ = begin(environment, 2)
    children = [int(step.observation) for step in environment.step_all(episodes, ["child"] * 2)]
    pids = environment.worker_pids
    assert all(running(pid) for pid in (*pids, *children))
    environment.close()
    assert gone((*pids, *children))
    assert all(
        "closed" in s.fault or "ended" in s.fault for s in environment.step_all(episodes, ["right"] * 2)
    )
    assert play(environment, 2) == play(Corridor(), 2)


def test_an_environment_that_nobody_holds_takes_its_workers_along():
    environment = WorkerEnvironment(Corridor(), workers=1)
    episodes, _ = begin(environment, 1)
    pids = environment.worker_pids
    del environment, episodes
    gc.collect()
    assert gone(pids)


def test_episodes_that_are_closed_or_dropped_are_closed_in_their_workers(corridors):
    environment = corridors(workers=2)
    for _ in range(3):
        episodes, _ = begin(environment, 2)
        episodes[0].close()
        del episodes
        gc.collect()
    episodes, _ = begin(environment, 4)
    assert [s.observation for s in environment.step_all(episodes, ["open episodes"] * 4)] == ["2"] * 4


def test_an_interrupt_ends_the_batch_and_its_workers(corridors):
    environment = corridors(workers=2)
    episodes, _ = begin(environment, 2)
    pids = environment.worker_pids
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        environment.step_all(episodes, ["hang", "spin"])
    assert gone(pids)
    assert play(environment, 2) == play(Corridor(), 2)


def test_settings_or_answers_that_cannot_be_pickled_are_named(corridors):
    environment = corridors(workers=1)
    episodes, _ = begin(environment, 1)
    assert "cannot pickle" in environment.step_all(episodes, ["lock"])[0].fault.lower()
    environment.environment.starts = lambda: None
    environment.close()
    with pytest.raises(RuntimeError, match="cannot be sent to a worker process"):
        begin(environment, 1)


@pytest.mark.parametrize("action", ["pid", "spin"])
def test_no_worker_outlives_a_parent_that_is_killed(tmp_path, action):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from environments.corridor import Corridor\n"
        "from memgen.environments.worlds.workers import WorkerEnvironment\n"
        "environment = WorkerEnvironment(Corridor(), workers=2)\n"
        "episodes = [environment.episode(), environment.episode()]\n"
        "environment.reset_all(episodes, environment.examples('train')[:2])\n"
        "child = environment.step_all(episodes, ['child', 'right'])[0].observation\n"
        "print(*environment.worker_pids, child, flush=True)\n"
        f"environment.step_all(episodes, ['{action}', '{action}'])\n"
        "sys.stdin.read()\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        assert all(running(pid) for pid in pids)
        parent.kill()
    assert gone(pids)


def test_a_copy_has_workers_of_its_own(corridors):
    environment = corridors(workers=1)
    begin(environment, 1)
    copy = pickle.loads(pickle.dumps(environment))
    try:
        assert copy.worker_pids == ()
        assert play(copy, 2) == play(Corridor(), 2)
        assert set(copy.worker_pids).isdisjoint(environment.worker_pids)
    finally:
        copy.close()


def test_an_environment_that_a_worker_cannot_load_is_named(monkeypatch):
    environment = WorkerEnvironment(Corridor(), workers=1)
    monkeypatch.setattr(Corridor, "__reduce__", lambda self: (os.listdir, ("/nowhere",)))
    with pytest.raises(RuntimeError, match=r"could not be loaded there \(FileNotFoundError"):
        begin(environment, 1)
    assert environment.worker_pids == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"step_timeout_s": 0.0}, "step_timeout_s must be a positive number of seconds, got 0.0"),
        ({"reset_timeout_s": float("inf")}, "reset_timeout_s"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WorkerEnvironment(Corridor(), **settings)
