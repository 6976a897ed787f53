from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from memgen.environments.worlds import scienceworld
from memgen.environments.worlds.scienceworld import ScienceWorld
from memgen.environments.worlds.workers import WorkerEnvironment

MISSING = importlib.util.find_spec("scienceworld") is None or shutil.which("java") is None
needs_extra = pytest.mark.skipif(MISSING, reason="the extra scienceworld, or Java, is not installed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_variations": 0}, "max_variations must be at least 1 or null, got 0"),
        ({"max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"training_reward": "fame"}, "training_reward must be score or success, got 'fame'"),
        ({"java_memory_mb": 1}, "java_memory_mb must be at least 128, got 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScienceWorld(**settings)


def test_without_the_extra_the_error_names_the_commands(monkeypatch):
    monkeypatch.setitem(sys.modules, "scienceworld", None)
    with pytest.raises(ImportError, match=r"pip install 'memgen\[scienceworld\]', and apt-get install"):
        ScienceWorld().examples("train")


def test_the_electrical_tasks_keep_their_actions():
    assert scienceworld._allowed("boil", "openDoors,noElectricalAction") == "openDoors,noElectricalAction"
    assert scienceworld._allowed("test-conductivity", "openDoors,noElectricalAction") == "openDoors"


class Simulator:
    """Stands in for the package: an experiment of two steps, whose process is gone after "crash"."""

    def __init__(self):
        self.closed = False

    def load(self, task, variation, simplifications, generateGoldPath=False):
        self.score, self.loaded = 0, (task, variation, simplifications)

    def get_task_names(self):
        return ["boil", "melt"]

    def get_variations_train(self):
        return [0, 1, 2]

    def get_variations_dev(self):
        return [3]

    def get_variations_test(self):
        return [4, 5]

    def get_task_description(self):
        return "Your task is to boil water. "

    def get_possible_actions(self):
        return ["focus on OBJ", "wait"]

    def get_possible_objects(self):
        return ["stove", "water"]

    def get_gold_action_sequence(self):
        return ["focus on water", "boil water", "wait"]

    def reset(self):
        return "This is the kitchen.", {"score": 0}

    def step(self, command):
        if command == "crash":
            raise ConnectionError("the process is gone")
        text = {"focus on water": "You focus.", "boil water": "It boils.", "focus on stove": "Oh no."}.get(
            command
        )
        self.score = {"focus on water": 40, "boil water": 100, "focus on stove": -100}.get(
            command, self.score
        )
        text = text or "No known action matches that input."
        return text, 0, self.score in (100, -100), {"score": self.score}

    def close(self):
        self.closed = True


@pytest.fixture
def simulators(monkeypatch):
    made = []
    monkeypatch.setattr(scienceworld, "_start", lambda memory_mb: made.append(Simulator()) or made[-1])
    monkeypatch.setattr(scienceworld, "_stop", Simulator.close)
    return made


def test_the_packages_variations_are_the_splits(simulators):
    environment = ScienceWorld(max_variations=2)
    assert [e.id for e in environment.examples("train")] == ["boil-0", "boil-1", "melt-0", "melt-1"]
    assert [e.id for e in environment.examples("val")] == ["boil-3", "melt-3"]
    assert [e.id for e in environment.examples("test")] == ["boil-4", "boil-5", "melt-4", "melt-5"]
    assert [s.closed for s in simulators] == [True]
    with pytest.raises(ValueError, match="tasks must be some of boil, melt; got cook"):
        ScienceWorld(tasks=("cook",)).examples("train")


def test_an_episode_shows_the_task_the_actions_and_the_objects_and_is_scored_by_the_package(simulators):
    environment = ScienceWorld(tasks=("boil",))
    episode = environment.episode()
    assert episode.reset(environment.examples("train")[1]).text == (
        "Your task is to boil water.\n\nThis is the kitchen.\n"
        "AVAILABLE ACTIONS: focus on OBJ, wait\nOBJECTS: stove, water"
    )
    assert simulators[-1].loaded == ("boil", 1, "easy")
    assert not episode.step("I had better wait.").done
    assert episode.step("ACTION: fly").parts == {"invalid_actions": 1.0, "score": 0.0}
    assert episode.step("THOUGHT: water!\nACTION: focus on water").parts["score"] == 0.4
    assert episode.reward().total == 0.4
    assert episode.step("ACTION: boil water").done
    assert episode.reward().total == 1.0
    assert episode.reward().parts == {"success": 1.0, "score": 1.0, "turns": 4.0, "invalid_actions": 2.0}


def test_success_can_be_the_reward_and_a_wrong_focus_ends_the_episode_with_nothing(simulators):
    environment = ScienceWorld(training_reward="success", admissible_actions=False)
    episode = environment.episode()
    assert episode.reset(environment.examples("train")[0]).text.endswith("This is the kitchen.")
    episode.step("ACTION: focus on water")
    assert (episode.reward().total, episode.reward().parts["score"]) == (0.0, 0.4)
    assert episode.step("ACTION: focus on stove").done
    assert (episode.reward().total, episode.reward().parts["score"]) == (0.0, 0.0)


def test_the_gold_path_is_the_reference_up_to_the_full_score(simulators):
    environment = ScienceWorld(admissible_actions=False)
    turns = environment.conversation(environment.examples("train")[0])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in turns[2:]] == [
        "ACTION: focus on water",
        "You focus.",
        "ACTION: boil water",
    ]


def test_a_gold_path_that_falls_short_is_no_reference(simulators, monkeypatch):
    monkeypatch.setattr(Simulator, "get_gold_action_sequence", lambda self: ["focus on water"])
    environment = ScienceWorld()
    with pytest.raises(ValueError, match="boil-0: the gold path does not reach the full score"):
        environment.conversation(environment.examples("train")[0])


def test_simulators_are_used_again_unless_they_failed(simulators):
    environment = ScienceWorld()
    example = environment.examples("train")[0]
    for _ in range(2):
        episode = environment.episode()
        episode.reset(example)
        episode.close()
    assert len(simulators) == 2  # One made the list.
    episode = environment.episode()
    episode.reset(example)
    with pytest.raises(ConnectionError):
        episode.step("ACTION: crash")
    assert simulators[1].closed
    episode.reset(example)
    assert len(simulators) == 3
    episode.close()
    environment.close()
    assert all(s.closed for s in simulators)


# The real package.

TASKS = ("find-living-thing", "find-plant", "lifespan-longest-lived")  # Nothing in these is left to chance.


@pytest.fixture
def worlds():
    made = []

    def make(workers=2, **settings):
        inner = ScienceWorld(tasks=TASKS, max_variations=1, **settings)
        made.append(WorkerEnvironment(inner, workers=workers))
        return made[-1]

    yield make
    for environment in made:
        environment.close()


def java_processes(pids):
    """Java processes that these workers started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = rest.split()[:2]
        if name.endswith("(java") and int(parent) in pids and state != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = []
        for pid in pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        if set(states) <= {"Z"}:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.scienceworld
@needs_extra
def test_the_gold_paths_reach_the_full_score_through_our_protocol(worlds):
    environment = worlds()
    examples = environment.examples("train")
    assert [e.id.rpartition("-")[0] for e in examples] == list(TASKS)
    conversations = [environment.conversation(example) for example in examples]
    episodes = [environment.episode() for _ in examples]
    openings = environment.reset_all(episodes, examples)
    assert [o.text for o in openings] == [c[1]["content"] for c in conversations]
    assert "Your task is to find a(n) living thing." in openings[0].text
    for episode, conversation in zip(episodes, conversations, strict=True):
        told = [turn["content"] for turn in conversation[3::2]]
        steps = [episode.step(turn["content"]) for turn in conversation[2::2]]
        assert [step.observation for step in steps[:-1]] == told
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        assert episode.reward().total == 1.0
        assert episode.reward().parts["invalid_actions"] == 0.0
    invalid = environment.reset_all(episodes[:1], examples[:1]) and episodes[0].step("ACTION: fly to mars")
    assert invalid.observation.startswith("No known action matches that input.")
    assert invalid.parts["invalid_actions"] == 1.0


@pytest.mark.scienceworld
@needs_extra
def test_a_lost_java_process_costs_its_episode_only_and_none_is_left(worlds):
    environment = worlds(workers=2)
    examples = environment.examples("train")[:2]
    episodes = [environment.episode() for _ in examples]
    environment.reset_all(episodes, examples)
    pids = environment.worker_pids
    java = {pid: java_processes([pid]) for pid in pids}
    assert [len(found) for found in java.values()] == [1, 1]
    os.kill(java[pids[0]][0], signal.SIGKILL)
    steps = environment.step_all(episodes, ["ACTION: look around"] * 2)
    assert [step.fault is None for step in steps] == [False, True]
    again = [environment.episode() for _ in examples]
    assert all(o.text for o in environment.reset_all(again, examples))
    assert [s.fault for s in environment.step_all(again, ["ACTION: look around"] * 2)] == [None, None]
    java_before = java_processes(pids)
    assert len(java_before) == 3
    environment.close()
    assert gone(java_before)
