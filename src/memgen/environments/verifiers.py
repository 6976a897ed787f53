"""Tasksets of verifiers (github.com/PrimeIntellect-ai/verifiers, 0.4), played in process. Needs the extra `verifiers`.

Differs from verifiers' own runs: (1) the agent is ours, which writes one answer to the task's prompt: there is no harness
program, no endpoint that it asks, and no runtime; so tasks that need tools, a container, files or another model (a judge, a
simulated user) are refused; (2) splits are made here, by the hash of a task's prompt, since a taskset has none; (3) a reward that
raises an error is an environment error, not a reward of 0.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast, final

from typing_extensions import override

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.questions import hash_fraction, seeded_key

log = logging.getLogger(__name__)

_INSTALL = "verifiers is not installed; install it by: pip install 'memgen[verifiers]'"


@final
class Verifiers(Environment):
    """Prompt of a verifiers task in, answer out; the reward is the weighted sum of the task's own rewards."""

    name = "verifiers"

    def __init__(
        self,
        taskset: str,
        parameters: Mapping[str, Any] | None = None,
        limit: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        timeout_s: float = 60.0,
    ) -> None:
        """Loads the taskset, and its tasks.

        Args:
            taskset: the id of an installed taskset: a module that exports a `Taskset` in `__all__`.
            parameters: of the taskset's configuration, by name.
            limit: tasks that are taken of it; None: all.
            validation_fraction: share of the tasks set aside for validation.
            test_fraction: share set aside for testing.
            split_seed: which tasks those are.
            timeout_s: seconds that the rewards of one answer may take, as far as they wait (they are not killed).

        Raises:
            ImportError: if verifiers is not installed.
            ValueError: if there is no such taskset, a parameter or a number is not usable, or the tasks need what is not
                offered here; the message says what.
        """
        if importlib.util.find_spec("verifiers") is None:
            raise ImportError(_INSTALL)
        for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if validation_fraction + test_fraction >= 1.0:
            raise ValueError(
                "validation_fraction and test_fraction must leave something to train on, got "
                f"{validation_fraction} and {test_fraction}"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
        self.name = taskset
        self.timeout_s = timeout_s
        self._shares = (test_fraction, test_fraction + validation_fraction)
        self._seed = split_seed
        self._tasks = _tasks(taskset, dict(parameters or {}), limit)

    @override
    def examples(self, split: Split) -> list[Example]:
        """The tasks of a split in the taskset's order. A prompt that occurs twice has both tasks in one split."""
        return [
            Example(
                id=f"task-{index}",
                question=task.data.prompt_text,
                target="",
                answer="",
                meta={"index": index},
            )
            for index, task in enumerate(self._tasks)
            if self._split(task) == split
        ]

    def _split(self, task: Any) -> Split:
        place = hash_fraction(seeded_key(task.data.prompt_text, self._seed, "verifiers"))
        test, val = self._shares
        return "test" if place < test else "val" if place < val else "train"

    @override
    def messages(self, example: Example) -> list[Message]:
        """The task's system prompt and its messages."""
        return _messages(self._tasks[example.meta["index"]].data)

    @override
    def conversation(self, example: Example) -> list[Message]:
        """There is none.

        Raises:
            ValueError: always: tasks of verifiers have rewards and no reference answers.
        """
        raise ValueError(
            f"tasks of verifiers ({self.name}) have no reference answers, which weaver SFT and memgen test --gold need; "
            "train on rewards: weaver GRPO or trigger RL"
        )

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        return self.rewards([example], [answer])[0]

    @override
    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """The tasks' rewards, weighted and added; parts: each of them, unweighted, and the tasks' metrics.

        An answer whose rewards raise an error or do not come in time has a total of NaN, an environment error.
        """

        async def all_scores() -> list[Reward]:
            pairs = zip(examples, answers, strict=True)
            return await asyncio.gather(*(self._score(example, answer) for example, answer in pairs))

        # In a thread: the caller may have an event loop of its own, as notebooks do.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, all_scores()).result()

    async def _score(self, example: Example, answer: str) -> Reward:
        task = self._tasks[example.meta["index"]]
        trace = _trace(task, self.messages(example), answer)
        try:
            await asyncio.wait_for(task.score(trace), self.timeout_s)
        except Exception as error:  # noqa: BLE001 - code of the taskset
            log.warning(
                "the rewards of %s %s failed: %s", self.name, example.id, error or type(error).__name__
            )
            return Reward(math.nan)
        parts = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return Reward(trace.reward, metrics | parts)


def _tasks(taskset: str, parameters: dict[str, Any], limit: int | None) -> list[Any]:
    """The tasks of an installed taskset."""
    from pydantic import ValidationError
    from verifiers.v1 import SingleAgentEnv
    from verifiers.v1.utils import loaders

    try:
        if loaders.environment_class(taskset) is not SingleAgentEnv:
            raise ValueError(f"{taskset} has an environment class of its own, which memgen does not play")
        config = loaders.taskset_config_type(taskset)(id=taskset, **parameters)
        loaded = loaders.load_taskset(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"parameters of {taskset}: {place}: {first['msg']}") from error
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"taskset {taskset!r} cannot be loaded: {error}") from error
    if limit is not None:
        loaded = loaded.take(limit)
    if not loaded.bounded:
        raise ValueError(f"{taskset} has tasks without end; set limit to how many of them to take")
    tasks = list(loaded)
    if not tasks:
        raise ValueError(f"{taskset} has no tasks")
    for task in tasks:
        if reason := _unplayable(task):
            raise ValueError(f"{taskset}, task {task.data.idx}: {reason}, which memgen does not offer to it")
    return tasks


def _unplayable(task: Any) -> str | None:
    """Why a task cannot be played by one answer in this process; None: it can."""
    from verifiers.v1 import Task

    kind = type(task)
    if task.NEEDS_CONTAINER or task.data.image:
        return "it needs a container"
    if kind.toolsets(task.config):
        return "it has tools"
    if kind.setup is not Task.setup or kind.finalize is not Task.finalize:
        return "it prepares a runtime (setup or finalize)"
    if task.config.judges:
        return "it asks another model to judge (judges)"
    if task.hooks("stop"):
        return "it has conditions that stop a conversation of several turns"
    if task.data.prompt is None:
        return "its user opens the conversation (no prompt)"
    hooks = [*task.hooks("reward"), *task.hooks("metric")]
    if not task.hooks("reward"):
        return "it has no reward of its own (rewards of a whole group are not served)"
    for hook in hooks:
        runtime = inspect.signature(hook).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            return f"its {hook.__name__} needs a runtime"
    try:
        _messages(task.data)
    except ValueError as error:
        return str(error)
    return None


def _messages(data: Any) -> list[Message]:
    """A task's messages as texts.

    Raises:
        ValueError: if one has more than text.
    """
    prompt = data.prompt
    found: list[tuple[str, Any]] = [("system", data.system_prompt)] if data.system_prompt else []
    if isinstance(prompt, str):
        found.append(("user", prompt))
    else:
        found += [(message.role, message.content) for message in prompt]
        if any(getattr(message, "tool_calls", None) for message in prompt):
            raise ValueError("its prompt has calls of tools")
    return [cast(Message, {"role": role, "content": _text(content)}) for role, content in found]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = list(content or [])
    if any(part.type != "text" for part in parts):
        raise ValueError("its prompt has more than text")
    return "\n".join(part.text for part in parts)


def _trace(task: Any, messages: Sequence[Message], answer: str) -> Any:
    """What verifiers records of a conversation, for the task's rewards."""
    from verifiers.v1 import (
        AgentConfig,
        AgentInfo,
        AssistantMessage,
        MessageNode,
        SystemMessage,
        Trace,
        TraceTask,
        UserMessage,
    )
    from verifiers.v1.state import state_cls

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    nodes = [
        MessageNode(
            parent=index - 1 if index else None, message=kinds[message["role"]](content=message["content"])
        )
        for index, message in enumerate(messages)
    ]
    parent = len(nodes) - 1 if nodes else None
    nodes.append(MessageNode(parent=parent, sampled=True, message=AssistantMessage(content=answer)))
    data = TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    return Trace(
        task=data,
        state=state_cls(type(task))(),
        agent=AgentInfo(config=AgentConfig()),
        nodes=nodes,
        is_completed=True,
        ok=True,
    )
