"""ScienceWorld (arXiv 2203.07540): school experiments in text. Needs the extra `scienceworld` and Java.

The prompt and the form of actions are those of `memgen.environments.worlds.alfworld`. As in the field: the package's own
train, dev and test variations of its 30 tasks, its "easy" simplifications, its score (0 to 100, here 0 to 1) as the
reward. Differs from the package: (1) only the environment's `max_turns` limits an episode, because after the package's
own step limit the score silently stops changing; (2) the actions offered are templates and objects, because the list
of valid actions has a thousand entries and more.

A simulator is a Java process of 250 to 750 MB (`java_memory_mb`) that takes seconds to start, so it is reused after an
episode ends. Use the environment inside `memgen.environments.worlds.workers.WorkerEnvironment`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

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

PROMPT = (
    "You are in a house with a workshop, a foundry and a garden, and have an experiment to do. First you are told the "
    "task and what you see; then you act, turn by turn.\n"
    f"{FORMAT} "
    'If it is "No known action matches that input.", the action was not possible: try another one. In the '
    "available actions, put the name of an object for each OBJ. If you are asked which of several you mean, answer "
    "with its number."
)
"""The system message."""

_INSTALL = (
    "ScienceWorld needs the package scienceworld and Java 8 or later; install them by: pip install "
    "'memgen[scienceworld]', and apt-get install default-jre-headless (conda install openjdk)"
)
_INVALID = "No known action matches that input."
_NO_LIMIT = 1_000_000

RewardName = Literal["score", "success"]


@final
class ScienceWorld(InteractiveEnvironment):
    """Boil, grow, find, measure: text in, text out; the reward is the share of the task's score."""

    name = "scienceworld"

    def __init__(
        self,
        tasks: tuple[str, ...] = (),
        max_variations: int | None = None,
        simplifications: str = "easy",
        max_turns: int = 100,
        admissible_actions: bool = True,
        training_reward: RewardName = "score",
        java_memory_mb: int = 512,
        prompt: str = PROMPT,
    ) -> None:
        """Starts nothing yet.

        Args:
            tasks: names of tasks, such as boil or find-plant. Empty: all 30.
            max_variations: how many variations of each task and split, from the first. null: all.
            simplifications: the package's, separated by commas; "easy" is all of them, "" none.
            max_turns: turns of the agent after which an episode is truncated.
            admissible_actions: whether every observation lists the action templates and the objects in sight.
            training_reward: the total: "score", the share of the task's score; or "success", 1 for the full score.
            java_memory_mb: heap that a simulator may use.
            prompt: the system message.

        Raises:
            ValueError: if a setting is not usable.
        """
        if max_variations is not None and max_variations < 1:
            raise ValueError(f"max_variations must be at least 1 or null, got {max_variations}")
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        if training_reward not in ("score", "success"):
            raise ValueError(f"training_reward must be score or success, got {training_reward!r}")
        if java_memory_mb < 128:
            raise ValueError(f"java_memory_mb must be at least 128, got {java_memory_mb}")
        self.tasks = tuple(tasks)
        self.max_variations = max_variations
        self.simplifications = simplifications
        self.max_turns = max_turns
        self.admissible_actions = admissible_actions
        self.training_reward: RewardName = training_reward
        self.java_memory_mb = java_memory_mb
        self.prompt = prompt
        self._read: dict[Split, list[Example]] = {}
        self._idle: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """The settings; simulators stay in their process."""
        return {**self.__dict__, "_idle": []}

    def examples(self, split: Split) -> list[Example]:
        """The variations of the tasks, in the package's order.

        Raises:
            ImportError: if the package or Java is missing.
            ValueError: if a task or a simplification is unknown.
        """
        if not self._read:
            self._read = self._listed()
        return list(self._read[split])

    def messages(self, example: Example) -> list[Message]:
        """The system message. The task is part of the first observation."""
        return [{"role": "system", "content": self.prompt}]

    def conversation(self, example: Example) -> list[Message]:
        """The package's gold path, in the form of an episode.

        Raises:
            ImportError: if the package or Java is missing.
            ValueError: if the gold path does not reach the full score.
        """
        simulator = self.borrow()
        score = 0
        try:
            self._load(simulator, example, gold=True)
            commands = list(simulator.get_gold_action_sequence())
            turns = self.messages(example)
            turns.append({"role": "user", "content": self.opening(simulator)})
            for command in commands:
                text, _, done, infos = simulator.step(command)
                turns.append({"role": "assistant", "content": action_turn(command)})
                if done:
                    score = int(infos["score"])
                    break
                turns.append({"role": "user", "content": self.observation(simulator, text)})
        except Exception:
            self.discard(simulator)
            raise
        self.give_back(simulator)
        if score < 100:
            raise ValueError(
                f"{example.id}: the gold path does not reach the full score; leave out this variation"
            )
        return turns

    def episode(self) -> ScienceWorldEpisode:
        """A new episode."""
        return ScienceWorldEpisode(self)

    def opening(self, simulator: Any) -> str:
        """Begins a loaded variation; the first text that the agent sees."""
        text, _ = simulator.reset()
        return self.observation(simulator, f"{simulator.get_task_description().strip()}\n\n{text}")

    def observation(self, simulator: Any, text: str) -> str:
        """The text that the agent sees after a step."""
        text = text.strip()
        if not self.admissible_actions:
            return text
        actions = ", ".join(simulator.get_possible_actions())
        objects = ", ".join(simulator.get_possible_objects())
        return f"{text}\nAVAILABLE ACTIONS: {actions}\nOBJECTS: {objects}"

    def begin(self, simulator: Any, example: Example) -> str:
        """Loads a variation and begins it; the first text that the agent sees."""
        self._load(simulator, example, gold=False)
        return self.opening(simulator)

    def borrow(self) -> Any:
        """A simulator, reused if possible.

        Raises:
            ImportError: if the package or Java is missing.
        """
        return self._idle.pop() if self._idle else _start(self.java_memory_mb)

    def give_back(self, simulator: Any) -> None:
        """Keeps a simulator for the next `borrow`."""
        self._idle.append(simulator)

    def discard(self, simulator: Any) -> None:
        """Ends a simulator that failed, so that no other episode gets it."""
        _stop(simulator)

    def close(self) -> None:
        """Ends the simulators that no episode uses."""
        while self._idle:
            _stop(self._idle.pop())

    def _load(self, simulator: Any, example: Example, gold: bool) -> None:
        meta = example.meta
        simulator.load(meta["task"], meta["variation"], meta["simplifications"], generateGoldPath=gold)

    def _listed(self) -> dict[Split, list[Example]]:
        simulator = self.borrow()
        try:
            known = list(simulator.get_task_names())
            unknown = [task for task in self.tasks if task not in known]
            if unknown:
                raise ValueError(f"tasks must be some of {', '.join(known)}; got {', '.join(unknown)}")
            splits: dict[Split, list[Example]] = {"train": [], "val": [], "test": []}
            for task in self.tasks or known:
                simulator.load(task, 0, _allowed(task, self.simplifications))
                variations: dict[Split, Sequence[int]] = {
                    "train": simulator.get_variations_train(),
                    "val": simulator.get_variations_dev(),
                    "test": simulator.get_variations_test(),
                }
                for split, numbers in variations.items():
                    splits[split] += [
                        self._example(task, int(number)) for number in list(numbers)[: self.max_variations]
                    ]
            return splits
        finally:
            # The process that lists the items often plays no episode.
            _stop(simulator)

    def _example(self, task: str, variation: int) -> Example:
        # The task description is known only after loading the variation, which takes minutes for all 7,207.
        return Example(
            id=f"{task}-{variation}",
            question=f"{task}, variation {variation}",
            target="",
            answer="",
            meta={
                "task": task,
                "variation": variation,
                "simplifications": _allowed(task, self.simplifications),
            },
        )


@final
class ScienceWorldEpisode(Episode):
    """An episode: one variation."""

    def __init__(self, environment: ScienceWorld) -> None:
        self._environment = environment
        self._simulator: Any = None
        self._score = 0
        self._done = False
        self._turns = 0
        self._invalid = 0

    def reset(self, example: Example) -> Observation:
        """Loads a variation.

        Raises:
            ImportError: if the package or Java is missing.
        """
        if self._simulator is None:
            self._simulator = self._environment.borrow()
        self._score = self._turns = self._invalid = 0
        self._done = False
        with self._discarding():
            return Observation(self._environment.begin(self._simulator, example))

    def step(self, action: str) -> Step:
        """Executes the turn's ACTION line; a turn without one does nothing."""
        assert self._simulator is not None, "an episode is reset before its first step"
        command = parse_action(action)
        text = _INVALID
        with self._discarding():
            if command is not None:
                text, _, self._done, infos = self._simulator.step(command)
                self._score = int(infos["score"])
            observation = self._environment.observation(self._simulator, text)
        invalid = text.strip().startswith(_INVALID)
        self._turns += 1
        self._invalid += invalid
        return Step(
            observation=observation,
            done=self._done,
            parts={"invalid_actions": float(invalid), "score": max(0, self._score) / 100},
        )

    def reward(self) -> Reward:
        """The share of the task's score, or whether it is full. A wrong focus, -100 in the package, gives 0.

        Parts: success, score, turns, invalid_actions.
        """
        parts = {
            "success": float(self._score >= 100),
            "score": max(0, self._score) / 100,
            "turns": float(self._turns),
            "invalid_actions": float(self._invalid),
        }
        return Reward(total=parts[self._environment.training_reward], parts=parts)

    def close(self) -> None:
        """Gives the simulator back."""
        if self._simulator is not None:
            self._environment.give_back(self._simulator)
            self._simulator = None

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        """Discards the simulator if the block raises."""
        try:
            yield
        except Exception:
            self._environment.discard(self._simulator)
            self._simulator = None
            raise


def _allowed(task: str, simplifications: str) -> str:
    """The simplifications that a task allows: the package refuses electrical tasks without electrical actions."""
    if "power-component" not in task and "conductivity" not in task:
        return simplifications
    return ",".join(s for s in simplifications.split(",") if s != "noElectricalAction")


def _start(memory_mb: int) -> Any:
    """A new simulator."""
    try:
        from scienceworld import ScienceWorldEnv
    except ImportError as error:
        raise ImportError(f"{_INSTALL} ({error})") from error
    if shutil.which("java") is None:
        raise ImportError(f"{_INSTALL} (there is no command java)")
    # The package has no setting for it; the Java process takes it from its environment.
    options = os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["JAVA_TOOL_OPTIONS"] = f"{options or ''} -Xmx{memory_mb}m".strip()
    try:
        return ScienceWorldEnv(envStepLimit=_NO_LIMIT)
    finally:
        if options is None:
            del os.environ["JAVA_TOOL_OPTIONS"]
        else:
            os.environ["JAVA_TOOL_OPTIONS"] = options


def _stop(simulator: Any) -> None:
    """Ends a simulator, running or not, and what its own `close` leaves behind: the process, its pipe, a folder."""
    with contextlib.suppress(Exception):  # py4j raises various errors if the process has ended.
        simulator.close()
    process = simulator._gateway.java_process
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(timeout=10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    simulator._obj_tree_tempdir.cleanup()
