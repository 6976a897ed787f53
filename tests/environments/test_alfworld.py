from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from memgen.environments.worlds import alfworld
from memgen.environments.worlds.alfworld import AlfWorld
from memgen.environments.worlds.thought_action import action_turn, parse_action
from memgen.environments.worlds.workers import WorkerEnvironment

SHARED = (
    Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared")) / "data" / "alfworld"
)
GAMES = SHARED / "games_small.tar.xz"
needs_games = pytest.mark.skipif(
    not GAMES.is_file(), reason=f"the ALFWorld games are not in {SHARED} (set MEMGEN_SHARED)"
)
needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None, reason="the extra alfworld is not installed"
)

GOAL = """(:goal (and
  (exists (?lamp - object ?a - agent) (and (objectType ?lamp LampType) (isToggled ?lamp) (atLocation ?a desk)))
  (exists (?r - receptacle) (exists (?o1 - object) (and (objectType ?o1 MugType) (inReceptacle ?o1 ?r)
    (exists (?o2 - object) (and (not (= ?o1 ?o2)) (objectType ?o2 MugType) (inReceptacle ?o2 ?r)))))))))"""


def write_game(
    root: Path, name: str, task="put a mug in shelf.", kind="pick_and_place_simple", **changes
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    grammar = f'grammar :: """{{"task": [{{"rhs": "Your task is to: {task}"}}]}}"""'
    game = {"pddl_domain": "", "grammar": grammar, "pddl_problem": "", "solvable": True} | changes
    (folder / "game.tw-pddl").write_text(json.dumps({k: v for k, v in game.items() if v is not None}))
    (folder / "traj_data.json").write_text(json.dumps({"task_type": kind}))
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "json_2.1.1"
    write_game(root, "train/b-Mug-1/trial_2")
    write_game(root, "train/a-Mug-1/trial_1", task="cool some mug.", kind="pick_cool_then_place_in_recep")
    write_game(root, "train/movable_recep-1/trial_1")
    write_game(root, "train/c-AppleSliced-1/trial_1")
    write_game(root, "train/d-Mug-1/trial_1", solvable=False)
    write_game(root, "valid_seen/a-Mug-2/trial_1")
    write_game(root, "valid_unseen/a-Mug-3/trial_1")
    (root / "train" / "e-Mug-1" / "no_game").mkdir(parents=True)
    return root


def test_each_folder_is_a_split_and_games_are_listed_by_name(root):
    environment = AlfWorld(str(root))
    assert [(e.id, e.question) for e in environment.examples("train")] == [
        ("train/a-Mug-1/trial_1", "cool some mug."),
        ("train/b-Mug-1/trial_2", "put a mug in shelf."),
    ]
    assert [e.id for e in environment.examples("val")] == ["valid_seen/a-Mug-2/trial_1"]
    assert [e.id for e in environment.examples("test")] == ["valid_unseen/a-Mug-3/trial_1"]
    cooling = AlfWorld(str(root), task_types=("pick_cool_then_place_in_recep",))
    assert [e.question for e in cooling.examples("train")] == ["cool some mug."]


def test_the_usual_place_of_the_games_is_the_default(root, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(root.parent))
    assert len(AlfWorld().examples("train")) == 2


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("valid_train", "has no folder valid_train .*it has train, valid_seen, valid_unseen.*train_folder"),
        ("train/e-Mug-1", "no solvable game"),
    ],
)
def test_a_split_without_games_is_an_error_that_says_what_is_there(root, folder, message):
    with pytest.raises(FileNotFoundError, match=message):
        AlfWorld(str(root), train_folder=folder).examples("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grammar": None}, '"grammar" is missing'),
        ({"grammar": "nothing"}, "does not say"),
        ({"solvable": "yes"}, '"solvable" is missing or no bool'),
    ],
)
def test_a_broken_game_is_named(root, changes, message):
    folder = write_game(root, "train/f-Mug-1/trial_1", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        AlfWorld(str(root)).examples("train")
    assert str(folder / "game.tw-pddl") in str(caught.value)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"task_types must be some of .*, got \['cook'\]"):
        AlfWorld(task_types=("cook",))
    with pytest.raises(ValueError, match="max_turns must be at least 1, got 0"):
        AlfWorld(max_turns=0)


@pytest.mark.parametrize(
    ("turn", "action"),
    [
        ("THOUGHT: The mug is cold.\nACTION: go to shelf 1", "go to shelf 1"),
        ("action:  open   fridge 1. \n", "open fridge 1"),
        ("ACTION: look\nYou see a mug.\nACTION: take mug 1 from shelf 1", "look"),
        ("THOUGHT: my ACTION: should be look", None),
        ("go to shelf 1", None),
        ("ACTION:\n", None),
        (action_turn("inventory"), "inventory"),
    ],
)
def test_the_first_action_line_of_a_turn_counts(turn, action):
    assert parse_action(turn) == action


@pytest.mark.parametrize(
    "turn",
    [
        "**ACTION:** go to desk 1",
        "**ACTION**: go to desk 1",
        "- ACTION: `go to desk 1`.",
        "ACTION: **go to desk 1**",
        '### Action: "go to desk 1"',
        "> ACTION: [go to desk 1]",
        "`ACTION: go to desk 1`",
        "ACTION:\n\n`go to desk 1`",
        "THOUGHT: I look around. ACTION: go to desk 1",
        "Thought: I look around. **Action:** go to desk 1\nObservation: a desk",
        "THOUGHT: an ACTION: go away\nACTION: go to desk 1",
    ],
)
def test_an_action_is_found_in_the_forms_in_which_models_write_it(turn):
    assert parse_action(turn) == "go to desk 1"


@pytest.mark.parametrize(
    "turn", ["my next action: go", "ACTION: **", "ACTION:\nTHOUGHT: go to desk 1", "REACTION: go"]
)
def test_what_is_no_action_is_none(turn):
    assert parse_action(turn) is None


@pytest.mark.parametrize("block", [" ", "ACTION", "ACTION: ", "ACTION:\n", "*", "\n", "- "])
def test_finding_an_action_takes_time_in_proportion_to_the_turns_length(block):
    def seconds(number):
        start = time.process_time()
        parse_action(block * number)
        return time.process_time() - start

    short = min(seconds(20_000) for _ in range(2))
    assert min(seconds(40_000) for _ in range(2)) < 3 * short + 0.05


@pytest.mark.parametrize("admissible", ["put mug 1 in/on shelf 1", "move mug 1 to shelf 1"])
@pytest.mark.parametrize(
    "command",
    ["put mug 1 in/on shelf 1", "Put mug 1 on shelf 1", "put mug 1 in shelf 1", "move mug 1 to shelf 1"],
)
def test_both_grammars_words_for_putting_are_understood(command, admissible):
    assert alfworld._admissible(command, ["look", admissible]) == admissible
    assert alfworld._admissible("put mug 2 on shelf 1", ["look", admissible]) is None


def test_the_share_of_the_goal_is_that_of_the_best_choice_of_things():
    objects = {"agent1": "agent", "lamp": "object", "m1": "object", "m2": "object", "m3": "object"}
    goal = alfworld._Goal.parsed(GOAL, {**objects, "shelf": "receptacle", "sink": "receptacle"})
    kinds = {("objecttype", "lamp", "lamptype")} | {("objecttype", m, "mugtype") for m in ("m1", "m2", "m3")}
    assert goal.share(kinds) == 0.0
    assert goal.share({*kinds, ("inreceptacle", "m1", "shelf"), ("inreceptacle", "m2", "sink")}) == 0.25
    both = {*kinds, ("inreceptacle", "m1", "sink"), ("inreceptacle", "m3", "sink")}
    assert goal.share(both) == 0.5
    assert goal.share({*both, ("inreceptacle", "lamp", "sink"), ("istoggled", "m1")}) == 0.5
    assert goal.share({*both, ("istoggled", "lamp"), ("atlocation", "agent1", "desk")}) == 1.0


@pytest.mark.parametrize(
    "goal", ["(:goal (or (a) (b)))", "(:goal (exists (?o - object) (forall (?p - object) (a))))", ""]
)
def test_a_goal_of_another_form_has_no_share(goal):
    assert alfworld._Goal.parsed(goal, {}) is None


def test_a_kept_trajectory_of_the_expert_needs_no_simulator(root, tmp_path):
    environment = AlfWorld(str(root), expert_folder=str(tmp_path / "experts"))
    example = environment.examples("train")[0]
    banner = "-= Welcome to TextWorld, ALFRED! =-\n\nYou see a fridge 1.\n\nYour task is to: cool some mug."
    scenes = [
        {"text": "You arrive at loc 3. The fridge 1 is closed.", "admissible": ["look"], "won": False},
        {"text": "You cool the mug 1.", "admissible": ["look"], "won": True},
    ]
    record = {
        "opening": {"text": banner, "admissible": ["go to fridge 1", "look"], "won": False},
        "commands": ["go to fridge 1", "cool mug 1 with fridge 1"],
        "scenes": scenes,
    }
    trajectory = alfworld._trajectory_from(record)
    digest = alfworld.hashlib.sha256(Path(example.meta["game"]).read_bytes()).hexdigest()[:32]
    alfworld._write(tmp_path / "experts" / f"{digest}.json", trajectory)
    conversation = environment.conversation(example)
    assert [turn["role"] for turn in conversation] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in conversation[1:]] == [
        "You see a fridge 1.\n\nYour task is to: cool some mug.\nAVAILABLE ACTIONS: go to fridge 1, look",
        "ACTION: go to fridge 1",
        "The fridge 1 is closed.\nAVAILABLE ACTIONS: look",
        "ACTION: cool mug 1 with fridge 1",
    ]
    plain = AlfWorld(str(root), expert_folder=str(tmp_path / "experts"), admissible_actions=False)
    assert plain.conversation(example)[3]["content"] == "The fridge 1 is closed."


def test_without_the_extra_the_error_names_the_command(root, tmp_path, monkeypatch):
    for package in ("textworld", "alfworld"):
        monkeypatch.setitem(sys.modules, package, None)
    environment = AlfWorld(str(root), expert_folder=str(tmp_path))
    example = environment.examples("train")[0]
    for use in (environment.conversation, environment.episode().reset):
        with pytest.raises(ImportError, match=r"pip install 'memgen\[alfworld\]'"):
            use(example)


def test_importing_the_environments_imports_no_extra():
    script = (
        "import sys, memgen.environments.worlds.alfworld, memgen.environments.worlds.scienceworld, memgen.environments.worlds.workers\n"
        "assert not {'textworld', 'alfworld', 'scienceworld', 'py4j', 'torch', 'transformers'} & set(sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": path})


# Real games.


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    folder = tmp_path_factory.mktemp("games")
    with tarfile.open(GAMES) as archive:
        archive.extractall(folder, filter="data")
    return folder / "json_2.1.1"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture
def small(games, experts):
    """The small games in `workers` processes."""
    made = []

    def make(workers=2, **settings):
        inner = AlfWorld(str(games), train_folder="valid_train", expert_folder=str(experts), **settings)
        made.append(WorkerEnvironment(inner, workers=workers))
        return made[-1]

    yield make
    for environment in made:
        environment.close()


def play(environment, examples, turns):
    """What each episode shows, and its score, if its agent says `turns`."""
    episodes = [environment.episode() for _ in examples]
    seen = [[o.text] for o in environment.reset_all(episodes, examples)]
    live = list(range(len(examples)))
    while live:
        steps = environment.step_all([episodes[i] for i in live], [turns[i][len(seen[i]) - 1] for i in live])
        for i, step in zip(live, steps, strict=True):
            assert step.fault is None
            seen[i].append(step.observation)
        live = [
            i
            for i, step in zip(live, steps, strict=True)
            if not step.done and len(seen[i]) <= min(environment.max_turns, len(turns[i]))
        ]
    scores = [episode.reward() for episode in episodes]
    for episode in episodes:
        episode.close()
    return seen, scores


def agent_turns(conversation):
    return [turn["content"] for turn in conversation if turn["role"] == "assistant"]


@pytest.mark.alfworld
@needs_games
@needs_extra
def test_the_planner_wins_every_small_game_through_our_protocol(small):
    environment = small(workers=2)
    examples = environment.examples("train")
    conversations = [environment.conversation(example) for example in examples]
    seen, scores = play(environment, examples, [agent_turns(c) for c in conversations])
    assert len(examples) == 12
    for example, conversation, shown, score in zip(examples, conversations, seen, scores, strict=True):
        told = [turn["content"] for turn in conversation if turn["role"] == "user"]
        assert example.question in told[0]
        assert shown[:-1] == told  # What is learned from is what an episode shows.
        assert score.total == 1.0
        assert score.parts == {
            "success": 1.0,
            "turns": float(len(agent_turns(conversation))),
            "invalid_actions": 0.0,
            "goal_conditions": 1.0,
        }
        assert score.parts["turns"] <= environment.max_turns


@pytest.mark.alfworld
@needs_games
@needs_extra
def test_one_worker_and_eight_play_the_same_games(small):
    one, eight = small(workers=1), small(workers=8)
    examples = one.examples("train")[:8]
    turns = [
        ["ACTION: look", "ACTION: go to toilet 1", "nonsense", *agent_turns(one.conversation(example))][:5]
        for example in examples
    ]
    assert play(one, examples, turns) == play(eight, examples, turns)


@pytest.mark.alfworld
@needs_games
@needs_extra
def test_an_impossible_action_changes_nothing_and_is_counted(small):
    environment = small(workers=1, admissible_actions=False)
    example = environment.examples("train")[0]
    episode = environment.episode()
    opening = episode.reset(example).text
    assert opening.startswith("You are in the middle of a room.")
    assert "AVAILABLE ACTIONS" not in opening
    for turn in ("ACTION: fly to the moon", "go to desk 1", "ACTION: take bowl 1 from fridge 9"):
        step = episode.step(turn)
        assert (step.observation, step.done, step.parts["invalid_actions"]) == (
            "Nothing happens.",
            False,
            1.0,
        )
    reward = episode.reward()
    assert (reward.total, reward.parts["turns"], reward.parts["invalid_actions"]) == (0.0, 3.0, 3.0)
    again = agent_turns(environment.conversation(example))
    assert [episode.step(turn).done for turn in again] == [False] * (len(again) - 1) + [True]
    # The same episode can play another game.
    assert episode.reset(environment.examples("train")[3]).text != opening
    assert episode.reward().parts["turns"] == 0.0


@pytest.mark.alfworld
@needs_games
@needs_extra
def test_a_killed_worker_costs_its_game_only(small):
    environment = small(workers=2)
    examples = environment.examples("train")[:2]
    episodes = [environment.episode() for _ in examples]
    environment.reset_all(episodes, examples)
    os.kill(environment.worker_pids[0], signal.SIGKILL)
    steps = environment.step_all(episodes, ["ACTION: look"] * 2)
    assert [step.fault is None for step in steps] == [False, True]
    turns = [agent_turns(environment.conversation(example)) for example in examples]
    assert [score.total for score in play(environment, examples, turns)[1]] == [1.0, 1.0]


@pytest.mark.alfworld
@needs_games
@needs_extra
def test_games_in_the_callers_process_leave_its_arguments_alone(games, tmp_path):
    environment = AlfWorld(str(games), train_folder="valid_train", expert_folder=str(tmp_path))
    arguments = list(sys.argv)
    example = environment.examples("train")[0]
    episode = environment.episode()
    episode.reset(example)
    for turn in agent_turns(environment.conversation(example)):
        step = episode.step(turn)
    assert step.done
    assert sys.argv == arguments
    episode.close()
    pickle.dumps(environment)
