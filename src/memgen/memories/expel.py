"""ExpeL: rules that are voted on, and successes as examples (arXiv 2308.10144).

    WRITE  keep the trial; a failure with trials left: the scribe reflects on it, for the next trial (Reflexion)
           contrast a success with each failure of its task, a failure with each success of its task
           every 8 successes: contrast them among themselves
           each contrast gives at most 4 operations on the rules: ADD, AGREE, EDIT, REMOVE
    READ   the rules, then reflections on the task's own failures, then the nearest successes of other tasks

The votes are in `vote`, a pure function, and those of the released code (LeapLabTHU/ExpeL): ADD 2, AGREE +1, EDIT +1, REMOVE -1
(-3 where the list is overfull), out at 0, the most votes first. Differs from it: (1) an operation goes by its number, and by
its text only where the number is no rule's; (2) the rules are learnt as trials come in, not behind all of them, and the last
successes, fewer than 8, at the end (`finish`); (3) an overfull list is cut to its limit, since the fallback never removes;
(4) rules are always read. Without a scribe a contrast adds one rule, the first action in which success and failure
differ, and nothing is learnt from successes alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, steps, transcript
from memgen.memories.scribe import Nonsense, some_text
from memgen.memories.store import Item

OPERATIONS_PER_CALL = 4
RULE_TOKENS = 600
"""Limit of an answer about rules."""
OVERFULL = 5
"""Rules beyond the limit at which the list counts as overfull."""


@dataclass(frozen=True)
class ExpeLSettings:
    """Constants of ExpeL."""

    max_rules: int = 20
    """Rules beyond which the scribe is told to add no more. The paper's runs have 10, WebShop 8."""
    shots: int = 2
    """Successes that are read (ALFWorld 2, HotpotQA 6)."""
    fetched: int = 4
    """Candidates per shot, of which the shortest of each task is taken."""
    longest: int = 1000
    """Tokens of the longest example."""
    trials: int = 4
    """Trials of a task: behind the last one nothing is reflected upon."""
    chunk: int = 8
    """Successes that are contrasted among themselves."""

    def __post_init__(self) -> None:
        for name in ("max_rules", "shots", "fetched", "longest", "trials", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Rule:
    """A rule and its votes."""

    text: str
    """The rule."""
    votes: int
    """Its votes; at 0 it is gone."""


@dataclass(frozen=True)
class Operation:
    """What the scribe says about the rules."""

    kind: Literal["ADD", "AGREE", "EDIT", "REMOVE"]
    """What to do."""
    text: str
    """The rule, or its new text."""
    number: int | None = None
    """Of the rule, from 1; None for ADD."""


def vote(rules: Sequence[Rule], operations: Sequence[Operation], max_rules: int) -> list[Rule]:
    """Applies operations, REMOVE first, then AGREE, EDIT and ADD.

    An ADD whose text holds a rule is dropped, such an EDIT agrees with that rule; so is whatever names no rule.

    Args:
        rules: by votes, the most first.
        operations: what the scribe says.
        max_rules: the limit, `ExpeLSettings.max_rules`.

    Returns:
        The rules by votes, the most first, those with equal votes in their old order; at most max_rules + 5.
    """
    texts = [rule.text for rule in rules]
    votes = [rule.votes for rule in rules]
    penalty = 3 if len(rules) >= max_rules + OVERFULL else 1
    sound = [sound for operation in operations if (sound := _sound(operation, rules)) is not None]
    for kind in ("REMOVE", "AGREE", "EDIT", "ADD"):
        for operation in sound:
            if operation.kind != kind:
                continue
            if operation.number is None:
                texts.append(operation.text)
                votes.append(2)
                continue
            index = operation.number - 1
            votes[index] += -penalty if kind == "REMOVE" else 1
            if kind == "EDIT":
                texts[index] = operation.text
    kept = [Rule(text, count) for text, count in zip(texts, votes, strict=True) if count > 0]
    return sorted(kept, key=lambda rule: -rule.votes)[: max_rules + OVERFULL]


def _sound(operation: Operation, rules: Sequence[Rule]) -> Operation | None:
    held = next((number for number, rule in enumerate(rules, start=1) if rule.text in operation.text), None)
    if operation.kind == "ADD":
        return None if held else Operation("ADD", operation.text)
    if operation.kind == "EDIT" and held:
        return Operation("AGREE", operation.text, held)
    if operation.number is not None and 1 <= operation.number <= len(rules):
        return operation
    return Operation(operation.kind, operation.text, held) if held else None


@final
class ExpeL(TextMemory[ExpeLSettings]):
    """Rules and examples from trial and error."""

    method = "expel"
    place = "before_task"
    constants = ExpeLSettings

    @property
    def rules(self) -> list[Rule]:
        """The rules by votes, the most first."""
        return [Rule(**rule) for rule in self.store.state("rules", [])]

    @override
    def learn(self, experience: Experience) -> None:
        earlier = self.store.items("trial", group=experience.id)
        trial = self._keep(experience)
        for other in (item for item in earlier if item.data["success"] != experience.succeeded):
            self._contrast(*((trial, other) if experience.succeeded else (other, trial)))
        if experience.succeeded:
            self.store.set_state("waiting", [*self.store.state("waiting", []), trial.number])
            if len(self.store.state("waiting")) == self.settings.chunk:
                self._contrast_successes()
        elif len(earlier) + 1 < self.settings.trials:
            self._reflect(experience)

    def _keep(self, experience: Experience) -> Item:
        """Only successes can be found, as examples."""
        number = self.store.add(
            "trial",
            transcript(experience),
            key=experience.task if experience.succeeded else None,
            group=experience.id,
            data={"success": experience.succeeded, "actions": [step.action for step in steps(experience)]},
        )
        trial = self.store.item(number)
        assert trial is not None, "it was added just now"
        return trial

    @override
    def conclude(self) -> None:
        if self.store.state("waiting"):
            self._contrast_successes()

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        rules = [self.passage(item) for item in self.store.items("rules")]
        own = (
            [self.passage(item) for item in self.store.items("reflection", group=state.task_id)]
            if state.task_id
            else []
        )
        return [*rules, *own, *self._examples(query, state)]

    def _examples(self, query: str, state: ReadState) -> list[Passage]:
        """The nearest successes of other tasks, the shortest of each."""
        shots = state.k or self.settings.shots
        own = (
            [item.number for item in self.store.items("trial", group=state.task_id)] if state.task_id else []
        )
        best: dict[str, Passage] = {}
        for hit in self.search(query, shots * self.settings.fetched, "trial", leave_out=own):
            passage = self.passage(hit.item)
            if self.count_tokens(passage.text) > self.settings.longest:
                continue
            known = best.get(hit.item.group)
            if known is None or len(passage.text) < len(known.text):
                best[hit.item.group] = passage
        return list({passage.text: passage for passage in best.values()}.values())[:shots]

    # Rules

    def _contrast(self, won: Item, lost: Item) -> None:
        prompt = (
            f"{_RULES}\n\nA task that was solved:\n{won.text}\n\nThe same task, not solved:\n{lost.text}\n\n"
            f"Rules so far:\n{self._listed()}\n\n{self._form()}"
        )
        operations = self.ask("rules of a pair", prompt, RULE_TOKENS, operations_in)
        self._vote(_first_difference(won, lost) if operations is None else operations)

    def _contrast_successes(self) -> None:
        waiting = [self.store.item(number) for number in self.store.state("waiting")]
        shown = "\n\n".join(item.text for item in waiting if item is not None)
        prompt = f"{_RULES}\n\nTasks that were solved:\n{shown}\n\nRules so far:\n{self._listed()}\n\n{self._form()}"
        self._vote(self.ask("rules of successes", prompt, RULE_TOKENS, operations_in) or [])
        self.store.set_state("waiting", [])

    def _vote(self, operations: Sequence[Operation]) -> None:
        rules = vote(self.rules, operations[:OPERATIONS_PER_CALL], self.settings.max_rules)
        if rules == self.rules:
            return
        self.store.set_state("rules", [{"text": rule.text, "votes": rule.votes} for rule in rules])
        shown = self.store.items("rules")
        text = "\n".join(f"{number}. {rule.text}" for number, rule in enumerate(rules, start=1))
        if shown and rules:
            self.store.update(shown[0], text=text)
        elif rules:
            self.store.add("rules", text)
        elif shown:
            self.store.remove(shown[0])

    def _listed(self) -> str:
        return "\n".join(f"{n}. {rule.text}" for n, rule in enumerate(self.rules, start=1)) or "(none)"

    def _form(self) -> str:
        full = len(self.rules) >= self.settings.max_rules
        return (
            f"Answer with at most {OPERATIONS_PER_CALL} lines, each one of\n"
            "AGREE <number>: <the rule>\nREMOVE <number>: <the rule>\nEDIT <number>: <its new text>\nADD: <a new rule>\n"
            + ("The list is full: do not ADD, unless you REMOVE what says the same." if full else "")
        )

    def _reflect(self, experience: Experience) -> None:
        prompt = f"{_REFLECTION}\n\n{transcript(experience)}"
        reflection = self.ask("a reflection", prompt, 200, some_text)
        if reflection is not None:
            self.store.add("reflection", reflection, group=experience.id)


_RULES = (
    "An agent solves tasks by trial and error. Compare what follows and edit the list of rules, so that it helps with any task "
    "of this kind: rules are general, short, and say what to do or what to avoid."
)
_REFLECTION = (
    "This attempt at a task failed. Say in a few sentences why, and what to do differently next time."
)
_LINE = re.compile(r"^\W*(ADD|AGREE|EDIT|REMOVE)\s*(\d+)?\s*[:.]\s*(.*\S)\s*$", re.MULTILINE)


def operations_in(answer: str) -> list[Operation]:
    """The operations of a scribe's answer, one a line.

    Raises:
        Nonsense: if there is none.
    """
    found = [
        Operation(
            cast(Literal["ADD", "AGREE", "EDIT", "REMOVE"], kind),
            text,
            int(number) if number and kind != "ADD" else None,
        )
        for kind, number, text in _LINE.findall(answer)
    ]
    if not found:
        raise Nonsense(f"there is no operation in {answer!r:.80}")
    return found


def _first_difference(won: Item, lost: Item) -> list[Operation]:
    """The fallback's rule."""
    right, wrong = won.data["actions"], lost.data["actions"]
    for number, action in enumerate(right):
        other = wrong[number] if number < len(wrong) else None
        if action != other:
            text = f"do: {action}" if other is None else f"do: {action}; not: {other}"
            return [Operation("ADD", (f"after: {right[number - 1]}, " if number else "") + text)]
    return []
