"""ALFWorld (arXiv 2010.03768): household tasks in text, of the official game files. Needs the extra `alfworld`.

The prompt and the form of actions are AgentBench's THOUGHT/ACTION, for those of MemGen's paper are not known. As in
the field: train on `train`, choose on `valid_seen`, report success on `valid_unseen`; an action that is not possible
is answered by "Nothing happens."; the opening banner and the location numbers ("You arrive at loc 12.") are not
shown. Differs from alfworld's own AlfredTWEnv: (1) one game per episode, chosen by the item, so that a group of
rollouts plays the same game; (2) the planner is asked once per game, not at every step, and only for the expert's
trajectories, which are kept on disk; (3) `put X in/on Y` and `move X to Y`, which the grammars 2.1.1 and 2.1.2 call
the same action, are both understood.

Use it inside `memgen.environments.worlds.workers.WorkerEnvironment`: a step takes 20 to 170 ms, a reset 0.3 to 3 s, and the
planner is compiled code, of which a crash should cost an episode only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import platformdirs

from memgen.environments.base import (
    Episode,
    Example,
    InteractiveEnvironment,
    Message,
    Observation,
    Reward,
    Split,
    Step,
)
from memgen.environments.worlds.thought_action import FORMAT, action_turn, parse_action
from memgen.files import write_whole

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
"""The six kinds of tasks."""

PROMPT = (
    "You are in a household and have a task to fulfil. First you are told what you see and what the task is; then "
    "you act, turn by turn.\n"
    f"{FORMAT} "
    'If it is "Nothing happens.", the action was not possible: try another one.'
)
"""The system message."""

_INSTALL = (
    "ALFWorld games need the packages alfworld and textworld; install them by: pip install 'memgen[alfworld]'"
)
_TASK = re.compile(r'"task":\s*\[\s*\{\s*"rhs":\s*"Your task is to: ([^"]*)"')
_BANNER = re.compile(r"^\s*-= Welcome to TextWorld, ALFRED! =-\s*")
_ARRIVAL = re.compile(r"^You arrive at loc \S+\. ")
_INVALID = "Nothing happens."
_PUT = re.compile(r"(?:put|place|move) (.+?) (?:in/on|in|on|into|onto|to) (.+)", re.IGNORECASE)
_MAX_PLANS = 2
"""Where a game brings its own walkthrough, that is tried before the planner."""


@dataclass(frozen=True)
class _Scene:
    """What the game says, before it becomes a message."""

    text: str
    admissible: tuple[str, ...]
    won: bool


@dataclass(frozen=True)
class ExpertTrajectory:
    """How the planner wins a game.

    Attributes:
        opening: what the game says first.
        commands: what the expert does.
        scenes: what the game answers, to each.
    """

    opening: _Scene
    commands: tuple[str, ...]
    scenes: tuple[_Scene, ...]


@final
class AlfWorld(InteractiveEnvironment):
    """Find it, clean it, put it there: text in, text out; reward 1 for success within the turns."""

    name = "alfworld"

    def __init__(
        self,
        path: str = "$ALFWORLD_DATA/json_2.1.1",
        train_folder: str = "train",
        val_folder: str = "valid_seen",
        test_folder: str = "valid_unseen",
        task_types: tuple[str, ...] = TASK_TYPES,
        max_turns: int = 30,
        admissible_actions: bool = True,
        prompt: str = PROMPT,
        expert_folder: str = "",
    ) -> None:
        """Reads nothing yet.

        Args:
            path: directory of the splits' folders, as `alfworld-download` makes it. `$ALFWORLD_DATA` is
                `~/.cache/alfworld` unless it is set.
            train_folder: folder of the games to train on.
            val_folder: folder of the games to choose settings on; the same rooms as in training.
            test_folder: folder of the games to report; rooms that are not in training.
            task_types: kinds of tasks that are kept.
            max_turns: turns of the agent after which an episode is cut.
            admissible_actions: whether every observation lists the actions that are possible.
            prompt: the system message.
            expert_folder: where the expert's trajectories are kept. Empty: below `MEMGEN_HOME`, or the platform's
                cache directory.

        Raises:
            ValueError: if a task type is unknown or `max_turns` is below 1.
        """
        unknown = [task for task in task_types if task not in TASK_TYPES]
        if unknown or not task_types:
            raise ValueError(f"task_types must be some of {', '.join(TASK_TYPES)}, got {list(task_types)}")
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        self.path = path
        self.folders: dict[Split, str] = {"train": train_folder, "val": val_folder, "test": test_folder}
        self.task_types = tuple(task_types)
        self.max_turns = max_turns
        self.admissible_actions = admissible_actions
        self.prompt = prompt
        self.expert_folder = expert_folder
        self._read: dict[Split, list[Example]] = {}
        self._idle: list[_Game] = []

    def __getstate__(self) -> dict[str, Any]:
        """The settings; items and games are read where they are used."""
        return {**self.__dict__, "_read": {}, "_idle": []}

    def examples(self, split: Split) -> list[Example]:
        """The solvable games of a split, by name.

        Raises:
            FileNotFoundError: if the folder is absent or has no games.
            ValueError: if a game file is broken.
        """
        if split not in self._read:
            self._read[split] = list(self._games(split))
        return list(self._read[split])

    def messages(self, example: Example) -> list[Message]:
        """The system message. The task is part of the first observation."""
        return [{"role": "system", "content": self.prompt}]

    def conversation(self, example: Example) -> list[Message]:
        """The planner's trajectory, in the form of an episode. It acts without thoughts.

        Raises:
            ValueError: if the planner does not win the game.
            ImportError: if the trajectory is not on disk and the extra is missing.
        """
        expert = self.expert(example)
        turns: list[Message] = [
            *self.messages(example),
            {"role": "user", "content": self.observation(expert.opening)},
        ]
        for command, scene in zip(expert.commands, expert.scenes, strict=True):
            turns.append({"role": "assistant", "content": action_turn(command)})
            if not scene.won:
                turns.append({"role": "user", "content": self.observation(scene)})
        return turns

    def episode(self) -> AlfWorldEpisode:
        """A new episode."""
        return AlfWorldEpisode(self)

    def observation(self, scene: _Scene) -> str:
        """What the agent is told of a scene."""
        text = _ARRIVAL.sub("", _BANNER.sub("", scene.text)).strip()
        if not self.admissible_actions or scene.won:
            return text
        return f"{text}\nAVAILABLE ACTIONS: {', '.join(scene.admissible)}"

    def expert(self, example: Example) -> ExpertTrajectory:
        """How the planner wins: from disk, or played now and written there.

        Raises:
            ValueError: if it does not win.
            ImportError: if the trajectory is not on disk and the extra is missing.
        """
        data = Path(example.meta["game"]).read_bytes()
        folder = Path(self.expert_folder).expanduser() if self.expert_folder else _cache_folder()
        file = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.json"
        if file.is_file():
            return _trajectory_from(json.loads(file.read_text("utf-8")))
        game = self.borrow()
        trajectory = _win(game, _parsed(data, example.meta["game"]), example.meta["game"])
        self.give_back(game)  # Not after an error, whose simulator may be in any state.
        _write(file, trajectory)
        return trajectory

    def borrow(self) -> _Game:
        """A simulator, used before if possible: each has a copy of the planner that is never unloaded."""
        return self._idle.pop() if self._idle else _Game()

    def give_back(self, game: _Game) -> None:
        """Takes a simulator that is not needed any more."""
        self._idle.append(game)

    def _games(self, split: Split) -> Iterator[Example]:
        data = os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")  # As in the alfworld package.
        root = Path(self.path.replace("$ALFWORLD_DATA", data)).expanduser()
        folder = root / self.folders[split]
        if not folder.is_dir():
            there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
            state = f"it has {', '.join(there)}" if there else "there is no such directory, or it is empty"
            raise FileNotFoundError(
                f"ALFWorld: {root} has no folder {self.folders[split]} with the {split} games ({state}); get the games "
                f"by alfworld-download, or set data.path or the environment's {split}_folder"
            )
        count = 0
        for directory, folders, files in os.walk(folder):
            folders.sort()
            if not {"game.tw-pddl", "traj_data.json"} <= set(files):
                continue
            # As in the field: games with movable receptacles and slicing are left out.
            if "movable" in directory or "Sliced" in directory:
                continue
            game = Path(directory) / "game.tw-pddl"
            example = self._example(game, game.parent.relative_to(root).as_posix())
            if example is not None:
                count += 1
                yield example
        if not count:
            raise FileNotFoundError(
                f"ALFWorld: no solvable game of the chosen task_types lies in {folder}; a game is a folder with "
                "game.tw-pddl and traj_data.json"
            )

    def _example(self, game: Path, identifier: str) -> Example | None:
        data = _parsed(game.read_bytes(), str(game))
        task = _TASK.search(data["grammar"])
        if task is None:
            raise ValueError(f'{game}: the grammar does not say "Your task is to: ..."')
        trajectory = json.loads((game.parent / "traj_data.json").read_bytes())
        kind = trajectory.get("task_type") if isinstance(trajectory, dict) else None
        if kind not in TASK_TYPES:
            raise ValueError(f'{game.parent / "traj_data.json"}: "task_type" is {kind!r}')
        if kind not in self.task_types or not data["solvable"]:
            return None
        return Example(
            id=identifier,
            question=task.group(1).strip(),
            target="",
            answer="",
            meta={"game": str(game), "task_type": kind},
        )


@final
class AlfWorldEpisode(Episode):
    """One game that is being played."""

    def __init__(self, environment: AlfWorld) -> None:
        self._environment = environment
        self._game: _Game | None = None
        self._scene: _Scene | None = None
        self._turns = 0
        self._invalid = 0

    def reset(self, example: Example) -> Observation:
        """Loads a game.

        Raises:
            ImportError: if the extra is missing.
            FileNotFoundError: if the game is.
            ValueError: if the game file is broken.
        """
        if self._game is None:
            self._game = self._environment.borrow()
        file = example.meta["game"]
        self._scene = self._game.load(_parsed(Path(file).read_bytes(), file))
        self._turns = self._invalid = 0
        return Observation(self._environment.observation(self._scene))

    def step(self, action: str) -> Step:
        """Does what the turn's ACTION line says; a turn without one does nothing."""
        assert self._game is not None, "an episode is reset before its first step"
        assert self._scene is not None, "likewise"
        command = parse_action(action)
        known = None if command is None else _admissible(command, self._scene.admissible)
        invalid = known is None
        if known is None:
            self._scene = _Scene(_INVALID, self._scene.admissible, self._scene.won)
        else:
            self._scene = self._game.step(known)
        self._turns += 1
        self._invalid += invalid
        return Step(
            observation=self._environment.observation(self._scene),
            done=self._scene.won,
            parts={"invalid_actions": float(invalid), **self._progress()},
        )

    def reward(self) -> Reward:
        """1 if the task is fulfilled, else 0.

        Parts: success, turns, invalid_actions, and goal_conditions: the share of the goal's facts that hold.
        """
        assert self._scene is not None, "an episode is reset before it is scored"
        success = float(self._scene.won)
        parts = {
            "success": success,
            "turns": float(self._turns),
            "invalid_actions": float(self._invalid),
            **self._progress(),
        }
        return Reward(total=success, parts=parts)

    def close(self) -> None:
        """Gives the simulator back."""
        if self._game is not None:
            self._environment.give_back(self._game)
            self._game = None

    def _progress(self) -> dict[str, float]:
        assert self._game is not None, "an episode is scored before it is closed"
        share = self._game.goal_share()
        return {} if share is None else {"goal_conditions": share}


@final
class _Game:
    """TextWorld's simulator of a PDDL game, with ALFWorld's names of things."""

    def __init__(self) -> None:
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise ImportError(f"{_INSTALL} ({error})") from error
        with _arguments_kept():
            self._pddl = PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))
        self._simulator = AlfredDemangler(self._pddl, shuffle=False)
        self._goal: _Goal | None = None

    def load(self, data: Mapping[str, Any]) -> _Scene:
        with _arguments_kept():
            self._simulator.load(data)
            state = self._simulator.reset()
        self._goal = _Goal.parsed(data["pddl_problem"], self._objects())
        return self._scene(state)

    def step(self, command: str) -> _Scene:
        state, _, _ = self._simulator.step(command)
        return self._scene(state)

    def plan(self) -> tuple[str, ...]:
        """What the planner would do from here; nothing if it finds no way."""
        return tuple(self._pddl._pddl_state.replan(self._pddl._entity_infos))

    def goal_share(self) -> float | None:
        """The share of the goal's changeable facts that hold; None if the goal has a form that is not known."""
        if self._goal is None:
            return None
        facts = self._pddl._pddl_state.facts
        return self._goal.share({(f.name.lower(), *(a.name.lower() for a in f.arguments)) for f in facts})

    def _objects(self) -> dict[str, str]:
        return {o.name.lower(): o.type_name.lower() for o in self._pddl._pddl_state.task.objects}

    @staticmethod
    def _scene(state: Mapping[str, Any]) -> _Scene:
        return _Scene(
            text=str(state["feedback"]),
            admissible=tuple(state["admissible_commands"]),
            won=bool(state["won"]),
        )


@contextlib.contextmanager
def _arguments_kept() -> Iterator[None]:
    """The planner's translator overwrites `sys.argv`, from which other packages start their processes."""
    kept = sys.argv
    try:
        yield
    finally:
        sys.argv = kept


_CHANGEABLE = frozenset({"inreceptacle", "isclean", "ishot", "iscool", "istoggled", "holds", "atlocation"})
"""Predicates that acting changes. The others say what a thing is."""


@dataclass(frozen=True)
class _Choice:
    """`exists` over things, and what must hold of them."""

    variables: tuple[tuple[str, str], ...]
    literals: tuple[tuple[str, ...], ...]


@final
class _Goal:
    """A goal: a conjunction of choices of things. All goals of ALFWorld have this form."""

    def __init__(self, choices: Sequence[_Choice], objects: Mapping[str, str]) -> None:
        self._choices = tuple(choices)
        self._of_type: dict[str, list[str]] = {}
        for name, kind in objects.items():
            self._of_type.setdefault(kind, []).append(name)

    @classmethod
    def parsed(cls, problem: str, objects: Mapping[str, str]) -> _Goal | None:
        """The goal of a PDDL problem; None if it has another form."""
        tokens = re.findall(r"[()]|[^\s()]+", problem[problem.find("(:goal") :].lower())
        tree = _nested(iter(tokens))
        try:
            return cls([_choice(term) for term in _conjuncts(tree[0][1])], objects)
        except (_OtherForm, IndexError):
            return None

    def share(self, facts: set[tuple[str, ...]]) -> float:
        """Facts of the goal that hold, for the best choice of things, as a share of all."""
        met = sum(self._best(choice, 0, {}, facts) or 0 for choice in self._choices)
        total = sum(literal[0] in _CHANGEABLE for choice in self._choices for literal in choice.literals)
        return met / total if total else 0.0

    def _best(
        self, choice: _Choice, chosen: int, binding: dict[str, str], facts: set[tuple[str, ...]]
    ) -> int | None:
        """The most that can hold with the first things chosen; None if they cannot be what they must be."""
        names = {name for name, _ in choice.variables[:chosen]}
        met = 0
        for literal in choice.literals:
            if any(word.startswith("?") and word not in names for word in literal):
                continue
            bound = tuple(binding.get(word, word) for word in literal)
            if bound[0] == "differ":
                if bound[1] == bound[2]:
                    return None
            elif bound[0] in _CHANGEABLE:
                met += bound in facts
            elif bound not in facts:
                return None
        if chosen == len(choice.variables):
            return met
        name, kind = choice.variables[chosen]
        best = [
            self._best(choice, chosen + 1, {**binding, name: thing}, facts)
            for thing in self._of_type.get(kind, ())
        ]
        return max((value for value in best if value is not None), default=None)


class _OtherForm(Exception):
    """A formula that is no conjunction of choices."""


def _nested(tokens: Iterator[str]) -> list[Any]:
    tree: list[Any] = []
    for token in tokens:
        if token == "(":
            tree.append(_nested(tokens))
        elif token == ")":
            break
        else:
            tree.append(token)
    return tree


def _conjuncts(term: Sequence[Any]) -> list[Any]:
    return [inner for part in term[1:] for inner in _conjuncts(part)] if term[0] == "and" else [term]


def _choice(term: Sequence[Any]) -> _Choice:
    """An `exists`, with those inside it brought to the front."""
    if term[0] != "exists":
        raise _OtherForm(str(term[0]))
    variables: list[tuple[str, str]] = []
    names: list[str] = []
    words = iter(term[1])
    for word in words:
        if word == "-":
            kind = next(words)
            variables += [(name, kind) for name in names]
            names = []
        else:
            names.append(word)
    literals: list[tuple[str, ...]] = []
    for part in _conjuncts(term[2]):
        if part[0] == "exists":
            inner = _choice(part)
            variables += inner.variables
            literals += inner.literals
        elif part[0] == "not" and part[1][0] == "=":
            literals.append(("differ", part[1][1], part[1][2]))
        elif all(isinstance(word, str) for word in part) and part[0] not in ("or", "forall", "imply", "="):
            literals.append(tuple(part))
        else:
            raise _OtherForm(str(part[0]))
    return _Choice(tuple(variables), tuple(literals))


def _admissible(command: str, admissible: Sequence[str]) -> str | None:
    """The game's own wording of a command; None if it is not possible now."""
    known = {action.lower(): action for action in admissible}
    found = known.get(command.lower())
    put = _PUT.fullmatch(command)
    if found is None and put is not None:
        thing, place = put.group(1).lower(), put.group(2).lower()
        for wording in (f"put {thing} in/on {place}", f"move {thing} to {place}"):
            found = found or known.get(wording)
    return found


def _win(game: _Game, data: Mapping[str, Any], file: str) -> ExpertTrajectory:
    opening = game.load(data)
    plans = [tuple(data["walkthrough"])] if data.get("walkthrough") else []
    for _ in range(_MAX_PLANS):
        commands = plans.pop() if plans else game.plan()
        scenes = []
        for command in commands:
            scenes.append(game.step(command))
            if scenes[-1].text.strip() == _INVALID or scenes[-1].won:
                break
        if scenes and scenes[-1].won:
            return ExpertTrajectory(opening, commands[: len(scenes)], tuple(scenes))
        opening = game.load(data)
    raise ValueError(f"{file}: the planner does not win this game")


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    try:
        game = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON file: {error}") from error
    for key, kind in (("pddl_domain", str), ("grammar", str), ("pddl_problem", str), ("solvable", bool)):
        if not isinstance(game, dict) or not isinstance(game.get(key), kind):
            message = f'{where}: not a game of ALFWorld: "{key}" is missing or no {kind.__name__}'
            raise ValueError(message)  # noqa: TRY004 - the data is broken, not the call
    return dict(game)


def _cache_folder() -> Path:
    home = os.environ.get("MEMGEN_HOME")
    return (Path(home) if home else Path(platformdirs.user_cache_dir("memgen"))) / "alfworld_experts"


def _write(file: Path, trajectory: ExpertTrajectory) -> None:
    record = {
        "opening": _record(trajectory.opening),
        "commands": trajectory.commands,
        "scenes": [_record(scene) for scene in trajectory.scenes],
    }
    write_whole(file, json.dumps(record))


def _record(scene: _Scene) -> dict[str, Any]:
    return {"text": scene.text, "admissible": scene.admissible, "won": scene.won}


def _scene_from(record: Mapping[str, Any]) -> _Scene:
    return _Scene(text=record["text"], admissible=tuple(record["admissible"]), won=record["won"])


def _trajectory_from(record: Mapping[str, Any]) -> ExpertTrajectory:
    return ExpertTrajectory(
        opening=_scene_from(record["opening"]),
        commands=tuple(record["commands"]),
        scenes=tuple(_scene_from(scene) for scene in record["scenes"]),
    )
