r"""A small house as a task of several turns: bring one thing to where another thing is kept.

The rooms in which things are kept are fixed by a world seed; no prompt and no pretraining text tells them. A room shows
what lies in it, so an agent without memory can search, but there are ten rooms and only six turns. An agent that has
learnt where things are kept needs four: go there, take, go to the other thing's room, put.

    user       task : bring fig to nut .
               hall : oat , ham .
    assistant  go yard
    user       yard : fig .
    assistant  take fig
    user       hold fig .
    ...

Examples are split by the unordered pair of things: where each is kept occurs in training, the pairs of the other
splits do not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import final

from typing_extensions import override

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
from memgen.lab.world import ITEMS, ROOMS, World, split_of

MAX_TURNS = 6
"""Two more than the longest optimal episode, so that a search may succeed by luck."""


@dataclass
class House:
    """The state of an episode.

    Attributes:
        homes: the room in which each thing was at the beginning.
        thing: the thing to bring.
        goal: the thing to whose room it is brought.
        here: the room that the agent is in.
        held: the thing it holds, if any.
        rooms: where each thing that is not held lies now.
    """

    homes: Mapping[str, str]
    thing: str
    goal: str
    here: str
    held: str | None = None
    rooms: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.rooms = dict(self.homes)

    @property
    def task(self) -> str:
        """The task, and the things in the first room."""
        return f"task : bring {self.thing} to {self.goal} .\n{self.look()}"

    @property
    def solved(self) -> bool:
        """Whether the thing lies in the room where the goal is kept."""
        return self.rooms.get(self.thing) == self.homes[self.goal]

    def look(self) -> str:
        """The things in this room."""
        things = [item for item in ITEMS if self.rooms.get(item) == self.here]
        return f"{self.here} : {' , '.join(things or ['nothing'])} .\n"

    def admissible(self) -> list[str]:
        """Every action that is possible now."""
        if self.held is None:
            others = [f"take {item}" for item in ITEMS if self.rooms.get(item) == self.here]
        else:
            others = [f"put {self.held}"]
        return [*others, *(f"go {room}" for room in ROOMS if room != self.here)]

    def act(self, action: str) -> str | None:
        """Changes the state and returns the observation; None if the action is not possible now."""
        action = " ".join(action.split())
        if action not in self.admissible():
            return None
        verb, _, what = action.partition(" ")
        if verb == "take":
            self.held = what
            del self.rooms[what]
            return f"hold {what} .\n"
        if verb == "put":
            self.held = None
            self.rooms[what] = self.here
        else:
            self.here = what
        return self.look()

    def best_action(self, known: Mapping[str, str]) -> str | None:
        """The next action of an agent that knows where some things are; None if it has to search."""
        if self.held not in (None, self.thing):
            return f"put {self.held}"
        sought, verb = (self.thing, "take") if self.held is None else (self.goal, "put")
        if sought not in known:
            return None
        return f"{verb} {self.thing}" if known[sought] == self.here else f"go {known[sought]}"


def optimal_actions(example: Example) -> list[str]:
    """The shortest way to success, for an agent that knows where everything is kept: three or four actions."""
    house = _house(example)
    actions: list[str] = []
    while not house.solved:
        action = house.best_action(house.homes)
        assert action is not None, "everything is known"
        house.act(action)
        actions.append(action)
    return actions


@final
class TextWorld(InteractiveEnvironment):
    """Tasks in a house in which things are kept in fixed rooms, learnt from experience only.

    Args:
        world_seed: decides where things are kept.
        max_turns: actions after which an episode is truncated.
        train_size: examples to train on.
        val_size: examples to choose settings on.
        test_size: examples to report.

    Raises:
        ValueError: if a number is below 1.
    """

    name = "lab_text_world"

    def __init__(
        self,
        world_seed: int = 0,
        max_turns: int = MAX_TURNS,
        train_size: int = 1200,
        val_size: int = 160,
        test_size: int = 500,
    ) -> None:
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for key, value in (
            *((f"{split}_size", size) for split, size in self.sizes.items()),
            ("max_turns", max_turns),
        ):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        self.world = World(world_seed)
        self.max_turns = max_turns

    @override
    def examples(self, split: Split) -> Sequence[Example]:
        """The first examples of a split, shuffled the same way in every run.

        Raises:
            ValueError: if the split has fewer.
        """
        houses = self._houses(split)
        size = self.sizes[split]
        if size > len(houses):
            raise ValueError(
                f"{split}_size asks for {size} tasks, but the split has {len(houses)} in this world; set it lower"
            )
        return [self._example(house, f"{split}-{index}") for index, house in enumerate(houses[:size])]

    def _houses(self, split: Split) -> list[House]:
        homes = self.world.homes()
        pairs = [
            (thing, goal)
            for thing, goal in permutations(ITEMS, 2)
            if homes[thing] != homes[goal] and split_of("bring " + " ".join(sorted((thing, goal)))) == split
        ]
        houses = [House(homes, thing, goal, here) for thing, goal in pairs for here in ROOMS]
        random.Random(f"text world {split}").shuffle(houses)
        return houses

    def _example(self, house: House, identifier: str) -> Example:
        meta = {
            "task": "text_world",
            "homes": house.homes,
            "thing": house.thing,
            "goal": house.goal,
            "start": house.here,
            "admissible": tuple(house.admissible()),
        }
        example = Example(id=identifier, question=house.task, target="", answer="", meta=meta)
        actions = optimal_actions(example)
        return Example(
            id=identifier, question=house.task, target=actions[0], answer=" / ".join(actions), meta=meta
        )

    @override
    def messages(self, example: Example) -> list[Message]:
        """The task and the first room as the user's one message."""
        return [{"role": "user", "content": example.question}]

    @override
    def conversation(self, example: Example) -> list[Message]:
        """The optimal episode."""
        messages = self.messages(example)
        house = _house(example)
        for action in optimal_actions(example):
            messages.append({"role": "assistant", "content": action})
            seen = house.act(action)
            assert seen is not None, "an optimal action is possible"
            if not house.solved:
                messages.append({"role": "user", "content": seen})
        return messages

    @override
    def episode(self) -> TextWorldEpisode:
        return TextWorldEpisode(self.max_turns)


@final
class TextWorldEpisode(Episode):
    """One run through the house.

    Args:
        max_turns: actions after which it is over.
    """

    def __init__(self, max_turns: int = MAX_TURNS) -> None:
        self.max_turns = max_turns
        self.turns = 0
        self.invalid = 0
        self._state: House | None = None

    @property
    def house(self) -> House:
        """The state.

        Raises:
            RuntimeError: before the first `reset`.
        """
        if self._state is None:
            raise RuntimeError("an episode has to be reset with an example first")
        return self._state

    @property
    def done(self) -> bool:
        """Whether the task is solved or the turns are used up."""
        return self.house.solved or self.turns >= self.max_turns

    @override
    def reset(self, example: Example) -> Observation:
        self._state = _house(example)
        self.turns = self.invalid = 0
        return Observation("")  # the prompt shows the first room

    @override
    def step(self, action: str) -> Step:
        """An action that is not possible is answered with "nothing ." and counts as a turn.

        Raises:
            RuntimeError: if the episode is over.
        """
        if self.done:
            raise RuntimeError("the episode is over; reset it")
        self.turns += 1
        seen = self.house.act(action)
        if seen is None:
            self.invalid += 1
            seen = "nothing .\n"
        parts = {"invalid": float(self.invalid), "success": float(self.house.solved)}
        return Step(observation=seen, done=self.done, parts=parts)

    @override
    def reward(self) -> Reward:
        """1 if the task is solved, else 0. Parts: `success`, `turns`, `invalid` (actions that were not possible)."""
        success = float(self.house.solved)
        return Reward(
            total=success,
            parts={"success": success, "turns": float(self.turns), "invalid": float(self.invalid)},
        )

    def admissible(self) -> list[str]:
        """Every action that is possible now."""
        return self.house.admissible()


def _house(example: Example) -> House:
    meta = example.meta
    return House(meta["homes"], meta["thing"], meta["goal"], meta["start"])
