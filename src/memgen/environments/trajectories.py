"""Recorded conversations of an agent (`memgen collect`) as training data. No episodes are run or scored here.

A line holds `messages`; SFT learns those that the agent wrote (`agent: true`), and those before the first of them are
the prompt. `id`, `sample`, `environment`, `reward` and other columns are for the reader, and for `memgen.memories.collected`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, final

from typing_extensions import override

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.sources import Record, read_file

_ROLES = ("system", "user", "assistant", "tool")


@final
class Trajectories(Environment):
    """The conversations of a file. It has a training split only.

    Args:
        path: JSON lines, packed with gzip or not.
    """

    name = "trajectories"

    def __init__(self, path: str) -> None:
        self.path = path
        self._examples: list[Example] | None = None

    @override
    def examples(self, split: Split) -> Sequence[Example]:
        """The conversations in the order of the file; none for validation and test.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is empty or a line is broken.
        """
        return self._read() if split == "train" else []

    def collected_on(self) -> set[str]:
        """Names of the environments that the conversations were recorded in, as far as the file says."""
        return {str(e.meta["environment"]) for e in self._read() if e.meta["environment"] is not None}

    @override
    def messages(self, example: Example) -> list[Message]:
        """The messages before the agent's first turn."""
        messages: list[Message] = list(example.meta["messages"])
        return messages[: example.meta["prompt"]]

    @override
    def conversation(self, example: Example) -> list[Message]:
        return list(example.meta["messages"])

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        """Not available for recorded conversations.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.path} holds recorded conversations, which cannot score answers; they are a training split only"
        )

    def _read(self) -> list[Example]:
        if self._examples is None:
            file = Path(self.path).expanduser()
            if not file.is_file():
                raise FileNotFoundError(
                    f"there is no file {file} (data.trajectories); memgen collect --out FILE writes one"
                )
            if not file.stat().st_size:
                raise ValueError(
                    f"{file} is empty: nothing was collected; lower --min-reward, or raise --samples"
                )
            self._examples = [_example(record) for record in read_file(file)]
        return self._examples


def _example(record: Record) -> Example:
    messages = [_message(record, message, number) for number, message in enumerate(_messages(record))]
    by_agent = [bool(message.get("agent")) for message in _messages(record)]
    if not any(by_agent):
        raise record.error(
            "messages", 'has no message of the agent ("agent": true), so there is nothing to learn'
        )
    first = by_agent.index(True)
    for number, (message, own) in enumerate(zip(messages, by_agent, strict=True)):
        if own != (message["role"] == "assistant") and (own or number > first):
            raise record.error(
                "messages",
                f"message {number}: from the agent's first message on, the assistant's messages and no others are "
                f'the agent\'s; its role is {message["role"]}, and "agent" is {own}',
            )
    name = record.fields.get("id", record.number)
    return Example(
        id=f"{name}#{record.fields.get('sample', 0)} (line {record.number})",
        question=messages[first - 1]["content"] if first else "",
        target=messages[-1]["content"],
        answer="",
        meta={
            "messages": tuple(messages),
            "prompt": first,
            "item": str(name),
            "sample": record.fields.get("sample", 0),
            "environment": record.fields.get("environment"),
            "reward": record.fields.get("reward"),
        },
    )


def _messages(record: Record) -> list[Mapping[str, Any]]:
    found = record.value("messages")
    if not isinstance(found, list) or not all(isinstance(message, Mapping) for message in found):
        raise record.error("messages", f"is not a list of objects: {found!r:.80}")
    return found


def _message(record: Record, message: Mapping[str, Any], number: int) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or not isinstance(content, str):
        raise record.error(
            "messages",
            f"message {number} needs a role ({', '.join(_ROLES)}) and a content that is text, got {role!r} and "
            f"{content!r:.40}",
        )
    return cast(Message, {"role": role, "content": content})
