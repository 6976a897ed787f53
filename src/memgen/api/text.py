"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer writes for the bytes of a character that is not complete."""


@final
class AnswerText:
    """Gives out an answer's text as soon as it is certain.

    Held back are characters whose bytes have not all come, and what may be the beginning of a stop text. Special tokens have no
    text.

    Args:
        tokenizer: the reasoner's.
        stop: texts that end the answer; it ends before the first of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self.given = ""
        """What was given out so far."""
        self.stopped = False
        """Whether a stop text has come."""

    def add(self, token: int) -> str:
        """Takes the next token. Returns the text that became certain with it."""
        self._ids.append(token)
        return self._advance(final=False)

    def end(self) -> str:
        """The rest of the text, once there are no more tokens."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)]
        elif not final:
            text = text[: len(text) - self._held(text)]
        # A decoder may change what it wrote once more tokens come (white space, mostly); that is kept until it agrees.
        if not text.startswith(self.given):
            return ""
        new = text[len(self.given) :]
        self.given = text
        return new

    def _held(self, text: str) -> int:
        """How many characters at the end may still change, or belong to a stop text."""
        incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
        begun = [
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ]
        return max([incomplete, *begun])
