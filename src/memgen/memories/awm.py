"""AWM: routines that successes have in common (Agent Workflow Memory, arXiv 2409.07429).

    WRITE  a success only:
           rule variant  keep its steps, values replaced by slots, unless the task's template or the abstract actions are known
           LM variant    keep it; the scribe induces the routines of the group anew from all successes, one per template
    READ   no search: all routines of the group, in the system message

A routine has a description and at least two steps (state, reason, action). The rule variant is published, and about as good as
the LM's (WebArena 35.6 and 35.5, Mind2Web 43.4 and 45.1, by a secondary source), so it is no fallback but a method of its own,
`awm_rule`, and the fallback of the other. Online is the default; `when: finish` is the paper's offline induction, one call per group.
Success is what the environment says, or with `judge: scribe` what the scribe says. Differs from the released code
(zorazrw/agent-workflow-memory): its optional search through routines, which puts the worst first, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, Step, steps, template, transcript
from memgen.memories.judge import judged
from memgen.memories.scribe import Nonsense
from memgen.memories.store import Item

FEWEST_STEPS = 2
"""Of a routine."""


@dataclass(frozen=True)
class AWMSettings:
    """Constants of AWM."""

    judge: Literal["environment", "scribe"] = "environment"
    """Who says whether an episode was a success."""
    when: Literal["write", "finish"] = "write"
    """Whether routines are induced at each success (online) or once, from all of them (offline)."""
    answer_tokens: int = 2048
    """Limit of the scribe's routines."""
    refused: tuple[str, ...] = ("nothing happens", "invalid action", "not possible")
    """Beginnings of an observation that say that the step before it had no effect; such steps are dropped."""

    def __post_init__(self) -> None:
        if self.judge not in ("environment", "scribe") or self.when not in ("write", "finish"):
            raise ValueError(
                f"judge must be environment or scribe and when write or finish, got {self.judge!r} and {self.when!r}"
            )


def abstract_steps(experience: Experience, refused: Sequence[str] = ()) -> list[str]:
    """The actions with slots in place of values: numbers, quoted texts, and words that the task names, in order of appearance.

    Args:
        experience: the episode.
        refused: as in `AWMSettings`.
    """
    named = set(re.findall(r"\w+", experience.task.lower()))
    slots: dict[str, str] = {}
    taken = [step.action for step in steps(experience) if _has_effect(step, refused)]
    return [_abstract(action, named, slots) for action in taken]


def _has_effect(step: Step, refused: Sequence[str]) -> bool:
    return bool(step.action) and not step.result.lower().startswith(tuple(text.lower() for text in refused))


def _abstract(action: str, named: set[str], slots: dict[str, str]) -> str:
    verb, gap, rest = template(action).partition(" ")

    def slot(word: re.Match[str]) -> str:
        if word[0].lower() not in named or word[0].startswith("{"):
            return word[0]
        return slots.setdefault(word[0].lower(), f"{{{chr(ord('a') + len(slots) % 26)}}}")

    # The verb stays, also where the task names it.
    return verb + gap + re.sub(r"\{\w+\}|\w+", slot, rest)


class _AWM(TextMemory[AWMSettings]):
    """What both variants share."""

    place = "system"
    constants = AWMSettings

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        return [self.passage(item) for item in self.store.items("routine", group=state.group)[: state.k]]

    def induce_by_rule(self, experience: Experience) -> None:
        """Keeps an episode as a routine, if it is one and is new."""
        actions = abstract_steps(experience, self.settings.refused)
        task = template(experience.task)
        if len(actions) < FEWEST_STEPS:
            return
        for known in self.store.items("routine", group=experience.group):
            if known.data.get("template") == task or known.data.get("actions") == actions:
                return
        listed = "\n".join(f"{number}. {action}" for number, action in enumerate(actions, start=1))
        data = {"template": task, "actions": actions}
        self.store.add("routine", f"Routine: {task}\n{listed}", group=experience.group, data=data)


@final
class AWMRule(_AWM):
    """Routines by rule: the published variant without a language model."""

    method = "awm_rule"
    asks = False

    @override
    def learn(self, experience: Experience) -> None:
        if experience.succeeded:
            self.induce_by_rule(experience)


@final
class AWM(_AWM):
    """Routines by the scribe."""

    method = "awm"

    @override
    def learn(self, experience: Experience) -> None:
        if not (judged(self, experience) if self.settings.judge == "scribe" else experience.succeeded):
            return
        if self.scribe is None:
            self.induce_by_rule(experience)
            return
        key = template(experience.task)
        known = [item.data["template"] for item in self.store.items("success", group=experience.group)]
        if key in known:  # one per template
            return
        self.store.add("success", transcript(experience), group=experience.group, data={"template": key})
        if self.settings.when == "write" and not self._induce(experience.group):
            self.induce_by_rule(experience)

    @override
    def conclude(self) -> None:
        if self.settings.when == "finish":
            for group in dict.fromkeys(item.group for item in self.store.items("success")):
                self._induce(group)

    def _induce(self, group: str) -> bool:
        """Replaces the routines of a group by those that the scribe sees; False if it gave none that can be used."""
        successes = self.store.items("success", group=group)
        shown = "\n\n".join(item.text for item in successes)
        routines = self.ask("routines", f"{_ROUTINES}\n\n{shown}", self.settings.answer_tokens, routines_in)
        if routines is None:
            return False
        old: list[Item] = self.store.items("routine", group=group)
        kept = {item.text for item in old} & set(routines)
        for item in old:
            if item.text not in kept:
                self.store.remove(item)
        for routine in routines:
            if routine not in kept:
                self.store.add("routine", routine, group=group)
        return True


_ROUTINES = (
    "Here are tasks that an agent has solved. Extract the routines that they share and that help with other tasks: parts of at "
    f"least {FEWEST_STEPS} steps. Replace values that belong to one task by names in braces, such as {{item}}. Write each as\n"
    "Routine: <what it achieves>\n1. <state> / <reason> / <action>\n2. ...\nwith an empty line between routines."
)
_STEP = re.compile(r"^\s*\d+[.)]\s*\S", re.MULTILINE)


def routines_in(answer: str) -> list[str]:
    """The routines of a scribe's answer, each with a description and at least two steps.

    Raises:
        Nonsense: if there is none.
    """
    blocks = [block.strip() for block in re.split(r"(?m)^(?=\W*Routine:)", answer)]
    found = [
        re.split(r"\n\s*\n", block)[0].lstrip("#*- ")
        for block in blocks
        if "Routine:" in block[:20] and len(_STEP.findall(re.split(r"\n\s*\n", block)[0])) >= FEWEST_STEPS
    ]
    if not found:
        raise Nonsense(f"there is no routine of {FEWEST_STEPS} steps in {answer!r:.80}")
    return list(dict.fromkeys(found))
