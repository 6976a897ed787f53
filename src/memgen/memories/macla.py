"""MACLA: procedures whose reliability is a Beta distribution, chosen by expected utility (arXiv 2512.18950).

    WRITE  the scribe cuts the episode into procedures (1 call): goal, preconditions, actions, postcondition
           a goal whose cosine with a known one is above 0.85 is that procedure's, else it is a new one
           alpha += 1 for a success, beta += 1 for a failure; the task is kept as a context of it, the newest 15 of each
           with 3 successes and 3 failures its preconditions gain what only successes show, and negate what only failures show
           above 200 procedures the lowest 0.5 reliability + 0.3 frequency + 0.2 recency goes
    READ   the procedure of the highest expected utility; none below 0.1

    EU = relevance p - 0.5 risk (1 - p) + 0.1 H(Beta(alpha, beta)),  p = alpha / (alpha + beta)

Relevance is the cosine of the query and the goal, risk the share of failures among the contexts that are like the query, H the
differential entropy. Where the paper leaves something open, this is ours: "like the query" is a cosine above 0.7; a word is shown by
one outcome only if at least half of its contexts have it and none of the other's; frequency and recency are scaled by the most used
and by the clock. Differs from the released code (S-Forouzandeh/MACLA-LLM-Agents): H is the entropy, where theirs is the
variance; an episode counts once for a procedure; contexts are texts, where theirs are keyed by a random hash; no label of a test is
fed back. Meta-procedures, by which theirs never selects, are left out. Without a scribe the episode is one procedure, its goal the
task's template.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, steps, template, transcript
from memgen.memories.scribe import Nonsense, json_in, text_of, texts_of
from memgen.memories.store import Item

OUTCOMES = ("failure", "success")
"""Relations of a procedure to its contexts."""


@dataclass(frozen=True)
class MACLASettings:
    """Constants of MACLA."""

    k: int = 1
    """Procedures that are read."""
    merge_above: float = 0.85
    """Cosine of two goals above which they are one procedure's."""
    capacity: int = 200
    """Procedures that are kept."""
    contexts: int = 15
    """Contexts of each outcome that a procedure keeps."""
    refine_after: int = 3
    """Successes and failures from which preconditions are refined."""
    like_above: float = 0.7
    """Cosine above which a context is like the query."""
    risk_weight: float = 0.5
    """Of risk in the utility."""
    entropy_weight: float = 0.1
    """Of what is not known yet in the utility."""
    least_utility: float = 0.1
    """Below it a procedure is not read."""

    def __post_init__(self) -> None:
        for name in ("k", "capacity", "contexts", "refine_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def entropy(alpha: float, beta: float) -> float:
    """Differential entropy of Beta(alpha, beta): 0 for the uniform distribution, negative for what is known better."""
    special = importlib.import_module("scipy.special")
    psi, total = special.digamma, alpha + beta
    parts = (alpha - 1) * psi(alpha) + (beta - 1) * psi(beta) - (total - 2) * psi(total)
    return float(special.betaln(alpha, beta) - parts)


def expected_utility(
    relevance: float,
    risk: float,
    alpha: float,
    beta: float,
    risk_weight: float = 0.5,
    entropy_weight: float = 0.1,
) -> float:
    """What a procedure promises.

    Args:
        relevance: cosine of the query and its goal.
        risk: share of failures in contexts like the query.
        alpha: 1 and its successes.
        beta: 1 and its failures.
        risk_weight: of risk.
        entropy_weight: of the entropy.
    """
    p = alpha / (alpha + beta)
    return relevance * p - risk_weight * risk * (1 - p) + entropy_weight * entropy(alpha, beta)


def distinguishing(shown: Sequence[str], others: Sequence[str]) -> list[str]:
    """Words that at least half of some texts have and none of the others, in alphabetical order."""
    words = [set(re.findall(r"\w+", text.lower())) for text in shown]
    foreign = {word for text in others for word in re.findall(r"\w+", text.lower())}
    return sorted(
        w for w in set().union(*words) - foreign if 2 * sum(w in text for text in words) >= len(words)
    )


@dataclass(frozen=True)
class Procedure:
    """A part of an episode that has a goal of its own."""

    goal: str
    """What it achieves."""
    before: tuple[str, ...]
    """Preconditions."""
    actions: tuple[str, ...]
    """What is done."""
    after: str
    """What is so behind it; empty if unknown."""


@final
class MACLA(TextMemory[MACLASettings]):
    """Procedures that have proved themselves."""

    method = "macla"
    place = "before_task"
    constants = MACLASettings

    @override
    def needs_vectors(self) -> bool:
        return True

    @override
    def learn(self, experience: Experience) -> None:
        procedures = self.ask("procedures", f"{_SEGMENT}\n\n{transcript(experience)}", 1000, procedures_in)
        credited: set[int] = set()
        for procedure in procedures or [_whole(experience)]:
            if not procedure.actions:
                continue
            nearest = self.search(procedure.goal, 1, "procedure")
            known = nearest[0].item if nearest and nearest[0].score > self.settings.merge_above else None
            item = known or self._add(procedure)
            if item.number not in credited:
                credited.add(item.number)
                self._credit(item, procedure, experience)
        self._prune()

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        goals, contexts = self.store.relevance(query, "procedure"), self.store.relevance(query, "context")
        self.retrievals += 1
        like: dict[str, defaultdict[int, int]] = {}
        for outcome in OUTCOMES:
            like[outcome] = defaultdict(int)
            for procedure, context in self.store.links(outcome):
                like[outcome][procedure] += contexts[context] > self.settings.like_above
        ranked = []
        for item in self.store.items("procedure"):
            failures, successes = (like[outcome][item.number] for outcome in OUTCOMES)
            risk = failures / (failures + successes) if failures else 0.0
            utility = expected_utility(
                goals[item.number],
                risk,
                item.data["alpha"],
                item.data["beta"],
                self.settings.risk_weight,
                self.settings.entropy_weight,
            )
            if utility >= self.settings.least_utility:
                ranked.append((utility, item))
        ranked.sort(key=lambda pair: -pair[0])
        return [self.passage(item) for _, item in ranked[: state.k or self.settings.k]]

    def _add(self, procedure: Procedure) -> Item:
        data = {
            "goal": procedure.goal,
            "before": list(procedure.before),
            "negated": [],
            "actions": list(procedure.actions),
            "after": procedure.after,
            "alpha": 1,
            "beta": 1,
        }
        item = self.store.item(
            self.store.add("procedure", _shown(data), key=procedure.goal, strength=0.5, data=data)
        )
        assert item is not None, "it was added just now"
        return item

    def _credit(self, item: Item, procedure: Procedure, experience: Experience) -> None:
        """Counts an outcome once, keeps its context, and refines the preconditions."""
        data: dict[str, Any] = dict(item.data)
        if experience.succeeded and data["alpha"] == 1:
            data["actions"] = list(procedure.actions)  # the first that succeeded
        data["alpha" if experience.succeeded else "beta"] += 1
        outcome = OUTCOMES[experience.succeeded]
        context = self.store.add("context", experience.task, key=experience.task)
        self.store.link(item.number, context, outcome)
        for old in self.store.linked(item.number, outcome)[: -self.settings.contexts]:
            self.store.remove(old)
        failures, successes = ([c.text for c in self.store.linked(item.number, name)] for name in OUTCOMES)
        if min(len(failures), len(successes)) >= self.settings.refine_after:
            gained = [word for word in distinguishing(successes, failures) if word not in data["before"]]
            data["before"] = [*data["before"], *gained]
            data["negated"] = distinguishing(failures, successes)
        reliability = data["alpha"] / (data["alpha"] + data["beta"])
        self.store.update(item, text=_shown(data), data=data, strength=reliability, accessed=self.store.tick)

    def _prune(self) -> None:
        procedures = self.store.items("procedure")
        most = max((_uses(item) for item in procedures), default=1)

        def worth(item: Item) -> float:
            return 0.5 * item.strength + 0.3 * _uses(item) / most + 0.2 * item.accessed / self.store.tick

        excess = len(procedures) - self.settings.capacity
        for item in sorted(procedures, key=worth)[: max(0, excess)]:
            for outcome in OUTCOMES:
                for context in self.store.linked(item.number, outcome):
                    self.store.remove(context)
            self.store.remove(item)


_SEGMENT = (
    "Cut this episode into procedures: parts that have a goal of their own and are of use in other tasks. Answer with a JSON list: "
    '[{"goal": "what it achieves", "before": ["what must be so"], "actions": ["what is done"], "after": "what is so then"}]'
)


def procedures_in(answer: str) -> list[Procedure]:
    """The procedures of a scribe's answer.

    Raises:
        Nonsense: if there is none, or one of another form.
    """
    found = json_in(answer)
    if not isinstance(found, list) or not found:
        raise Nonsense(f"expected a JSON list of procedures, got {found!r:.80}")
    return [
        Procedure(
            text_of(fields, "goal"),
            tuple(texts_of(fields, "before")),
            tuple(texts_of(fields, "actions")),
            text_of(fields, "after"),
        )
        for fields in found
    ]


def _whole(experience: Experience) -> Procedure:
    """The fallback's procedure: the episode."""
    taken = steps(experience)
    return Procedure(
        template(experience.task), (), tuple(step.action for step in taken), taken[-1].result if taken else ""
    )


def _uses(item: Item) -> int:
    return int(item.data["alpha"] + item.data["beta"] - 2)


def _shown(data: dict[str, Any]) -> str:
    when = [*data["before"], *(f"not {word}" for word in data["negated"])]
    lines = [f"Goal: {data['goal']}"]
    lines += [f"When: {', '.join(when)}"] if when else []
    lines += [f"{number}. {action}" for number, action in enumerate(data["actions"], start=1)]
    lines += [f"Then: {data['after']}"] if data["after"] else []
    done = f"worked {data['alpha'] - 1} times, failed {data['beta'] - 1} times"
    return "\n".join([*lines, f"({done})"])
