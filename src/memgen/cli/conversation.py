"""`memgen generate --interactive`: a conversation with an agent at a terminal.

Every turn is answered from the texts of the turns before it, as `Agent.stream` answers messages: latents of earlier answers
are not in it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from memgen.cli.generate import print_answer, report_byte_tokens, unescaped

if TYPE_CHECKING:
    from memgen.api.agent import Agent
    from memgen.environments.base import Message


def converse(
    agent: Agent, earlier: Sequence[Message], first: str | None, settings: Mapping[str, Any], mark: str
) -> None:
    """Reads lines and answers them until the input ends.

    What cannot be answered is said, and the conversation goes on without it.

    Args:
        agent: who answers.
        earlier: messages before the first turn, in every conversation.
        first: the first turn; None: it is read.
        settings: of `Agent.stream`.
        mark: written where latents were inserted.
    """
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` then has a line editor
    _say("Ctrl-C ends an answer, an empty line begins a new conversation, Ctrl-D ends the session")
    messages, line = list(earlier), first
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "") if line is None else line
            if line.strip():
                messages += _turn(agent, messages, unescaped(line), settings, mark)
            elif len(messages) > len(earlier):
                messages = list(earlier)
                _say("a new conversation")
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print(flush=True)
        line = None


def _turn(
    agent: Agent, messages: Sequence[Message], text: str, settings: Mapping[str, Any], mark: str
) -> list[Message]:
    """Answers a turn.

    Returns:
        The messages by which the conversation is longer: none if there was no answer.
    """
    question: Message = {"role": "user", "content": text}
    try:
        report_byte_tokens(agent, text)
        with _interruptible() as interrupted:
            pieces = agent.stream([*messages, question], **settings)
            written = print_answer(pieces, mark, lambda: bool(interrupted))
    except ValueError as error:
        _say(f"not answered: {error}")
        return []
    if not written.strip():
        _say("nothing was written, so the conversation goes on without this turn")
        return []
    return [question, {"role": "assistant", "content": written}]


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C puts a signal's number into the list; nothing else happens, so no pass of the model is left halfway."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(f"[{text}]", file=sys.stderr)
