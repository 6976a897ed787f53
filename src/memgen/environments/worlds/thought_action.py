"""The form of an agent's turn in text worlds: an optional `THOUGHT:` line and an `ACTION:` line.

It is the form of AgentBench and AgentInstruct (arXiv 2308.03688, 2310.12823) for ALFWorld. The form that MemGen's
paper used is not known.
"""

from __future__ import annotations

import re

_MARKS = " \t\r*_`#>"
"""Markdown around a marker or an action."""
_ACTION = re.compile(r"ACTION[ \t*_`]*:(.*)", re.IGNORECASE)
_BEHIND_A_THOUGHT = re.compile(
    r"(?:(?<![A-Za-z])(?P<word>[A-Za-z]{1,8})[ \t]{1,3})?[*_`]{0,3}(?<![A-Za-z])(?:ACTION|Action)[*_`]{0,3}[ \t]?:(?P<action>[^\n]*)"
)
_OF_WHICH = frozenset(
    ["a", "an", "any", "each", "every", "first", "last", "my", "next", "no", "of", "the", "this", "your"]
)
"""Words before it that make `ACTION:` a part of a sentence."""
_LABEL = re.compile(r"(?:THOUGHT|OBSERVATION)[ \t*_`]*:", re.IGNORECASE)

FORMAT = (
    "In every turn, answer in one of these two forms:\n"
    "THOUGHT: what you think\nACTION: your next action\n"
    "or\n"
    "ACTION: your next action\n"
    "One action per turn. After it you are told what happened."
)
"""The part of a prompt that explains the form."""


def parse_action(turn: str) -> str | None:
    """The action of an agent's turn.

    The first line that begins with `ACTION:` counts: text after it is the agent's own guess of what happens next. Without
    one, `ACTION:` behind a thought on the same line. The action may stand on the next line. Case of the marker, runs of
    blanks, Markdown (`**ACTION:** `, a list, backticks), quotes or brackets around the action and a final full stop do not
    matter.

    Args:
        turn: the text of the turn.

    Returns:
        The action, or None if the turn has none.
    """
    lines = turn.split("\n")
    for number, line in enumerate(lines):
        found = _ACTION.match(line.lstrip(_MARKS + "-+0123456789.)"))
        if found is not None:
            return _bare(found[1]) or _on_next_line(lines[number + 1 :])
    for found in _BEHIND_A_THOUGHT.finditer(turn):
        if (found["word"] or "").lower() not in _OF_WHICH:
            return _bare(found["action"])
    return None


def _on_next_line(lines: list[str]) -> str | None:
    line = next((line for line in lines if line.strip(_MARKS)), "")
    return None if _LABEL.match(line.lstrip(_MARKS)) else _bare(line)


def _bare(action: str) -> str | None:
    """An action without blanks, Markdown, quotes, brackets and full stop around it; None if nothing is left."""
    action = " ".join(action.strip(_MARKS).split()).removesuffix(".").strip(_MARKS)
    if len(action) >= 2 and (action[0], action[-1]) in {('"', '"'), ("'", "'"), ("[", "]"), ("“", "”")}:
        action = action[1:-1].strip(_MARKS)
    return action.removesuffix(".").rstrip() or None


def action_turn(action: str) -> str:
    """A turn with an action and no thought, the form of the expert's turns."""
    return f"ACTION: {action}"
