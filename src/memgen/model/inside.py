"""What the end of a text is inside of: a number, a currency amount, a calculator annotation, a bracket, a code fence.

The text so far decides, character by character, because a boundary is judged when the next token is not known. So the end
of "It costs 3." is inside a number, which may go on; whether it did is known too late. Each kind is a rule that takes a
state (0: outside), the three characters before and the next character to the next state:

- `number`: behind a digit, or behind one "." or "," that follows a digit: 1,234.5
- `currency`: from a currency symbol to the end of the number behind it, one space between them allowed: $ 1,234.50. A symbol
  behind its number comes too late; `number` covers it.
- `calculator`: from "<<" to ">>" or the end of the line (GSM8K's annotations): <<48/2=24>>
- `bracket`: where more of "([{" were opened than of ")]}" closed, whatever their kind, as in [0, 1). One that is never closed
  ends at an empty line, so that ":(" does not silence the rest of an answer.
- `code_fence`: between three or more backticks and the next three.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import final

_Rule = Callable[[int, str, str], int]


def _number(state: int, before: str, char: str) -> int:
    return int(char.isdigit() or (char in ".," and before[-1:].isdigit()))


def _currency(state: int, before: str, char: str) -> int:
    if unicodedata.category(char) == "Sc":
        return 1
    goes_on = _number(state, before, char) or (char == " " and _is_symbol(before[-1:]))
    return int(state and goes_on)


def _is_symbol(char: str) -> bool:
    return bool(char) and unicodedata.category(char) == "Sc"


def _calculator(state: int, before: str, char: str) -> int:
    if char == "\n" or before[-1:] + char == ">>":
        return 0
    return 1 if before[-1:] + char == "<<" else state


def _bracket(state: int, before: str, char: str) -> int:
    if before[-1:] + char == "\n\n":
        return 0
    return max(0, state + (char in "([{") - (char in ")]}"))


def _code_fence(state: int, before: str, char: str) -> int:
    third = char == "`" and before[-2:] == "``" and before[-3:] != "```"
    return 1 - state if third else state


_RULES: dict[str, _Rule] = {
    "number": _number,
    "currency": _currency,
    "calculator": _calculator,
    "bracket": _bracket,
    "code_fence": _code_fence,
}
KINDS = tuple(_RULES)
"""What the end of a text may be inside of."""


@final
class TextReader:
    """Reads a text piece by piece, each character once; how it is cut into pieces does not matter.

    Args:
        kinds: what to look for, of `KINDS`.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._states = dict.fromkeys(kinds, 0)
        self._before = ""

    def read(self, text: str) -> None:
        """Reads on."""
        for char in text:
            for kind, state in self._states.items():
                self._states[kind] = _RULES[kind](state, self._before, char)
            self._before = (self._before + char)[-3:]

    @property
    def inside(self) -> str | None:
        """The first of the kinds that the end of the text is inside of; None: of none."""
        return next((kind for kind, state in self._states.items() if state), None)
