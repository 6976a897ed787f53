"""The form of an agent's turn in text worlds: an optional `THOUGHT:` line and an `ACTION:` line.

It is the form of AgentBench and AgentInstruct (arXiv 2308.03688, 2310.12823) for ALFWorld. The form that MemGen's
paper used is not known.
"""

from __future__ import annotations

import re

_ACTION = re.compile(r"^[ \t]*ACTION[ \t]*:[ \t]*(.*)$", re.MULTILINE | re.IGNORECASE)

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

    The first `ACTION:` line counts: text after it is the agent's own guess of what happens next. Case of the marker,
    runs of blanks and a final full stop do not matter.

    Args:
        turn: the text of the turn.

    Returns:
        The action, or None if the turn has none.
    """
    found = _ACTION.search(turn)
    if found is None:
        return None
    return " ".join(found.group(1).split()).removesuffix(".").rstrip() or None


def action_turn(action: str) -> str:
    """A turn with an action and no thought, the form of the expert's turns."""
    return f"ACTION: {action}"
