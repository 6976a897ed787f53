"""Types of failure that a rule decides, without a person.

The paper's eight types (arXiv 2509.24704, App. G) were labelled by people, whose number and agreement are not reported.
These five follow from what the environment and the decoder recorded; the first that applies counts.
"""

from __future__ import annotations

from memgen.tracking.metrics import SUCCESS
from memgen.types import Trajectory

CUT_OFF = "cut off"
"""A turn reached `max_new_tokens`."""
INVALID_ACTION = "invalid action"
"""An action, or a tool call, that could not be parsed or carried out."""
WRONG_FORMAT = "wrong format"
"""No answer could be found in the text."""
OUT_OF_TURNS = "out of turns"
"""The episode was truncated, though every turn was finished."""
WRONG_ANSWER = "wrong answer"
"""None of the above."""
TYPES = (CUT_OFF, INVALID_ACTION, WRONG_FORMAT, OUT_OF_TURNS, WRONG_ANSWER)

_INVALID_PARTS = ("invalid", "invalid_actions")
_FORMAT_PARTS = ("has_answer", "answered", "format")
"""Names that this package's environments give such reward components."""


def failure_type(trajectory: Trajectory) -> str | None:
    """The type of a failed episode; None if it succeeded, or if the environment failed."""
    if trajectory.fault is not None or trajectory.reward >= SUCCESS:
        return None
    if not all(turn.finished for turn in trajectory.turns):
        return CUT_OFF
    if any(trajectory.parts.get(name, 0.0) > 0 for name in _INVALID_PARTS):
        return INVALID_ACTION
    if any(trajectory.parts.get(name, 1.0) == 0 for name in _FORMAT_PARTS):
        return WRONG_FORMAT
    return OUT_OF_TURNS if trajectory.truncated else WRONG_ANSWER
