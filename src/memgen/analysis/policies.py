"""Policies of a trigger over numbered boundaries, tried on one item until the budget is spent.

Decoding is greedy, so an answer is decided by the decisions that it was asked for: a policy that would have taken the same
ones has the same answer, and is not decoded again. So a policy for a boundary that an answer does not have costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final


@dataclass(frozen=True)
class Policy:
    """The same decision at every boundary of an episode, but for some.

    Attributes:
        invokes_elsewhere: the decision at all other boundaries.
        boundaries: those where it decides otherwise, in the order in which a trigger is asked, from 0.
    """

    invokes_elsewhere: bool
    boundaries: tuple[int, ...] = ()

    def invokes(self, boundary: int) -> bool:
        """The decision at a boundary."""
        return (boundary in self.boundaries) != self.invokes_elsewhere

    @property
    def name(self) -> str:
        """In words, boundaries from 1."""
        if not self.boundaries:
            return "always" if self.invokes_elsewhere else "never"
        which = " and ".join(str(boundary + 1) for boundary in self.boundaries)
        listed = f"{'boundary' if len(self.boundaries) == 1 else 'boundaries'} {which}"
        return f"all but {listed}" if self.invokes_elsewhere else f"{listed} alone"


NEVER, ALWAYS = Policy(invokes_elsewhere=False), Policy(invokes_elsewhere=True)


@dataclass(frozen=True)
class Trace:
    """What became of an item under a policy.

    Attributes:
        decisions: True where latents were inserted, at each boundary in turn.
        right: whether the answer counts as correct.
        reward: total reward.
    """

    decisions: tuple[bool, ...]
    right: bool
    reward: float

    @property
    def insertions(self) -> int:
        """Invocations."""
        return sum(self.decisions)

    def follows(self, policy: Policy) -> bool:
        """Whether a policy takes these decisions, so that this is what becomes of the item under it."""
        return all(policy.invokes(number) == decision for number, decision in enumerate(self.decisions))


@final
class Explorer:
    """Chooses the policies to decode for one item: never and always, then one boundary alone or left out, then pairs."""

    def __init__(self) -> None:
        self.traces: dict[Policy, Trace] = {}
        """What was decoded, in this order."""
        self._candidates = self._propose()
        self._next: Policy | None = None

    def next(self) -> Policy | None:
        """The next policy to decode, whose trace then has to be added; None: all have a known outcome."""
        while self._next is None or self.outcome(self._next) is not None:
            self._next = next(self._candidates, None)
            if self._next is None:
                return None
        return self._next

    def outcome(self, policy: Policy) -> Trace | None:
        """What becomes of the item under a policy; None if nothing decoded so far tells."""
        return next((trace for trace in self.traces.values() if trace.follows(policy)), None)

    @property
    def tried_singly(self) -> bool:
        """Whether the outcome of every policy of one boundary is known."""
        never, always = self.outcome(NEVER), self.outcome(ALWAYS)
        if never is None or always is None:
            return False
        return all(self.outcome(policy) is not None for policy in _singles(never, always))

    def _propose(self) -> Iterator[Policy]:
        yield NEVER
        yield ALWAYS
        never, always = self.outcome(NEVER), self.outcome(ALWAYS)
        assert never is not None, "a proposal is decoded before the next one is made"
        assert always is not None, "likewise"
        yield from _singles(never, always)
        alone = [self.outcome(Policy(False, (number,))) for number in range(len(never.decisions))]
        # What was inserted may have made an answer longer, so a pair's second boundary may lie behind those without it.
        most = max((len(trace.decisions) for trace in alone if trace is not None), default=0)
        for second in range(1, most):
            for first in range(min(second, len(alone))):
                yield Policy(False, (first, second))


def _singles(never: Trace, always: Trace) -> Iterator[Policy]:
    for number in range(len(never.decisions)):
        yield Policy(False, (number,))
    for number in range(len(always.decisions)):
        yield Policy(True, (number,))
