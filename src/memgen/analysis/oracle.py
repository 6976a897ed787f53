"""Does a trigger have anything to learn? What policies over boundaries gain on each item, and on all items alike.

The optimum of each item is chosen with the item's reward at hand, among many policies: it is an upper bound of what a trigger
can reach, and what chance gives to the best of many is in it. A policy shared by all items is chosen on one half of them and
scored on the other, so it is no bound but a result.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from memgen.analysis.interventions import Condition
from memgen.analysis.playing import FEWEST_ITEMS, Answers, Player
from memgen.analysis.policies import ALWAYS, NEVER, Explorer, Policy, Trace
from memgen.results.statistics import Interval, Share, mean_interval, paired_test, share
from memgen.tracking.metrics import SUCCESS
from memgen.types import Decision

logger = logging.getLogger(__name__)

FOLDER = "oracle"
"""Folder of what was found, below the folder of runs."""
SMALLEST_BUDGET = 3
LEVEL = 0.05
"""p-value up to which a difference counts."""
OPTIMUM, TRIGGER = "upper bound: best policy of each item", "trained trigger"


@dataclass(frozen=True)
class OracleSettings:
    """What is tried."""

    budget: int = 16
    """Decoded policies per item, never and always among them."""
    seed: int = 0
    """Of the items' halves."""

    def __post_init__(self) -> None:
        if self.budget < SMALLEST_BUDGET:
            raise ValueError(
                f"--budget must be at least {SMALLEST_BUDGET} (never, always, and one boundary alone), got {self.budget}"
            )


@dataclass(frozen=True)
class Score:
    """A way of deciding on some items.

    Attributes:
        name: of it.
        accuracy: share of answers with a total reward of at least 1.
        insertions: mean number of invocations per answer.
    """

    name: str
    accuracy: Interval
    insertions: float


@dataclass(frozen=True)
class Difference:
    """The accuracy of one way of deciding less that of another, on the same items.

    Attributes:
        of: name of the one.
        against: name of the other.
        difference: with its interval.
        p_value: two-sided, McNemar's exact test.
    """

    of: str
    against: str
    difference: Interval
    p_value: float


@dataclass(frozen=True)
class SharedPolicy:
    """A policy whose outcome is known on all items.

    Attributes:
        name: of it.
        chosen_on: accuracy on the half of the items on which the best one is chosen.
        scored_on: accuracy on the other half.
        accuracy: on all items.
        insertions: mean number of invocations per answer.
    """

    name: str
    chosen_on: float
    scored_on: float
    accuracy: float
    insertions: float


@dataclass(frozen=True)
class ItemFound:
    """One item.

    Attributes:
        index: of the item.
        id: of the item.
        never: whether it is solved without memory.
        always: whether it is solved with memory at every boundary.
        boundaries: without memory.
        decoded: policies.
        best: name of the policy that solves it with the fewest insertions, of those decoded; None if none does.
    """

    index: int
    id: str
    never: bool
    always: bool
    boundaries: int
    decoded: int
    best: str | None


@dataclass(frozen=True)
class Oracle:
    """Everything that was found.

    Attributes:
        settings: what was tried.
        environment: its name.
        items: number of items that count.
        faulted: number of items that do not, because the environment failed in one of their episodes.
        decoded: number of decoded policies, all items together.
        tried_singly: number of items on which every policy of one boundary was tried.
        tried_in_pairs: number of items on which every policy of one or two boundaries was tried.
        boundaries: mean number of boundaries of an episode without memory.
        never: without memory.
        always: with memory at every boundary.
        rescued: of the failures of `never` and of `always`, those that some policy solves.
        broken: of the successes of `never`, those that some insertion breaks; of those of `always`, that some omission does.
        policies: those shared by all items, the best on the first half first.
        shared: the best of them on one half of the items, scored on the other.
        shared_gain: against the better of never and always, on that other half.
        optimum: the upper bound: the best policy of each item, of the fewest insertions.
        optimum_gain: against the better of never and always.
        trigger: the checkpoint's trained trigger, decided greedily; None if it has none.
        trigger_gain: against the better of never and always.
        trigger_loss: against the upper bound.
        details: item by item.
        headline: the verdict.
        sentences: the rest of it.
    """

    settings: OracleSettings
    environment: str
    items: int
    faulted: int
    decoded: int
    tried_singly: int
    tried_in_pairs: int
    boundaries: float
    never: Score
    always: Score
    rescued: Mapping[str, Share]
    broken: Mapping[str, Share]
    policies: tuple[SharedPolicy, ...]
    shared: Score
    shared_gain: Difference
    optimum: Score
    optimum_gain: Difference
    trigger: Score | None
    trigger_gain: Difference | None
    trigger_loss: Difference | None
    details: tuple[ItemFound, ...]
    headline: str = ""
    sentences: tuple[str, ...] = ()


def explore(player: Player, trainer: Trainer, settings: OracleSettings, *, has_trigger: bool) -> Oracle:
    """Tries policies on every item. What was played before is not played again.

    Args:
        player: plays the items, greedily.
        trainer: of one process.
        settings: what is tried.
        has_trigger: whether the model has a trained trigger, which is played too.

    Raises:
        ValueError: if there are too few items or no boundaries, or the folder has answers of other policies.
    """
    explorers: dict[int, Explorer] = {}
    items: Answers = {}
    faulted: set[int] = set()
    for place in range(settings.budget):
        wanted = {index: explorer.next() for index, explorer in explorers.items() if index not in faulted}
        chosen = {index: policy for index, policy in wanted.items() if policy is not None}
        if explorers and not chosen:
            break
        answers = _play(player, trainer, place, chosen)
        if not explorers:
            items, explorers = answers, {index: Explorer() for index in sorted(answers)}
            chosen = dict.fromkeys(explorers, NEVER)
        for index, policy in chosen.items():
            if answers[index]["fault"] is not None:
                faulted.add(index)
                continue
            trace = _trace(answers[index])
            if not trace.follows(policy):
                raise ValueError(
                    f"{player.folder} has answers to item {index} under another policy than {policy.name!r}; remove it, or "
                    "choose another folder (--out DIR)"
                )
            explorers[index].traces[policy] = trace
        logger.info("policy %d of %d: %d items", place + 1, settings.budget, len(chosen))
    trigger = None
    if has_trigger:
        answers = player.play(trainer, [Condition(TRIGGER)])[TRIGGER]
        faulted |= {index for index, answer in answers.items() if answer["fault"] is not None}
        trigger = {index: _trace(answer) for index, answer in answers.items()}
    counted = {index: explorer for index, explorer in explorers.items() if index not in faulted}
    if len(counted) < FEWEST_ITEMS:
        raise ValueError(
            f"the environment failed on {len(faulted)} of {len(explorers)} items, and {len(counted)} are too few: what is "
            f"chosen on one half is scored on the other, which needs {FEWEST_ITEMS}"
        )
    return summarise(counted, items, trigger, settings, player.data.environment.name, len(faulted))


def _play(player: Player, trainer: Trainer, place: int, chosen: Mapping[int, Policy]) -> Answers:
    """Plays the policy of each item; without any, `never` of all items."""

    def decide(index: int, boundary: int) -> bool:
        return chosen.get(index, NEVER).invokes(boundary)

    condition = Condition(f"policy {place + 1}", decide=decide)
    return player.play(trainer, [condition], list(chosen) or None)[condition.name]


def _trace(answer: Mapping[str, Any]) -> Trace:
    decisions = tuple(decision == Decision.INVOKE for decision in answer["decisions"])
    return Trace(decisions, answer["reward"] >= SUCCESS, answer["reward"])


# Numbers


def summarise(
    explorers: Mapping[int, Explorer],
    items: Mapping[int, Mapping[str, Any]],
    trigger: Mapping[int, Trace] | None,
    settings: OracleSettings,
    environment: str,
    faulted: int = 0,
) -> Oracle:
    """The numbers and the verdict.

    Args:
        explorers: what was decoded for each item.
        items: `id` and `task` of each, at least.
        trigger: what became of each item under the trained trigger; None: there is none.
        settings: what was tried.
        environment: its name.
        faulted: number of items that are not among them because their environment failed.

    Raises:
        ValueError: if no item has a boundary.
    """
    order = sorted(explorers)
    never, always = (_outcomes(explorers, policy, order) for policy in (NEVER, ALWAYS))
    assert never is not None, "never is the first policy"
    assert always is not None, "always is the second"
    if not any(trace.decisions for trace in never):
        raise ValueError(
            "no episode has a boundary, so a trigger has nothing to decide; set model.memgen.weaver.prompt_latents, or "
            "inference_latents with model.memgen.boundaries.delimiters that occur in the answers"
        )
    choosing = _chosen_half(order, items, settings.seed)
    shared = _shared(explorers, order, choosing)
    best = [_best(explorers[index]) for index in order]
    optimum = [policy_trace[1] for policy_trace in best]
    fixed = max(("always", always), ("never", never), key=lambda pair: sum(t.right for t in pair[1]))
    scoring = [number for number, index in enumerate(order) if index not in choosing]
    chosen = shared[0]
    chosen_traces = _outcomes(explorers, chosen[0], order)
    assert chosen_traces is not None, "the outcome of a shared policy is known on all items"
    # The better of the two is chosen where the shared policy is.
    rival = next(name for name in (entry[0] for entry in shared) if name in (NEVER, ALWAYS))
    rival_traces = always if rival == ALWAYS else never
    ours = None if trigger is None else [trigger[index] for index in order]
    found = Oracle(
        settings=settings,
        environment=environment,
        items=len(order),
        faulted=faulted,
        decoded=sum(len(explorer.traces) for explorer in explorers.values()),
        tried_singly=sum(explorer.tried_singly for explorer in explorers.values()),
        tried_in_pairs=sum(explorer.next() is None for explorer in explorers.values()),
        boundaries=float(np.mean([len(trace.decisions) for trace in never])),
        never=_score(NEVER.name, never),
        always=_score(ALWAYS.name, always),
        rescued={
            "never": _among(never, optimum, right=False),
            "always": _among(always, optimum, right=False),
        },
        broken={
            "never": _broken(explorers, order, never, invoked=True),
            "always": _broken(explorers, order, always, invoked=False),
        },
        policies=tuple(entry[1] for entry in shared),
        shared=_score(chosen[0].name, [chosen_traces[number] for number in scoring]),
        shared_gain=_difference(
            (chosen[0].name, [chosen_traces[number] for number in scoring]),
            (rival.name, [rival_traces[number] for number in scoring]),
        ),
        optimum=_score(OPTIMUM, optimum),
        optimum_gain=_difference((OPTIMUM, optimum), fixed),
        trigger=None if ours is None else _score(TRIGGER, ours),
        trigger_gain=None if ours is None else _difference((TRIGGER, ours), fixed),
        trigger_loss=None if ours is None else _difference((TRIGGER, ours), (OPTIMUM, optimum)),
        details=tuple(
            ItemFound(
                index=index,
                id=str(items[index]["id"]),
                never=never[number].right,
                always=always[number].right,
                boundaries=len(never[number].decisions),
                decoded=len(explorers[index].traces),
                best=best[number][0].name if best[number][1].right else None,
            )
            for number, index in enumerate(order)
        ),
    )
    headline, *sentences = verdict(found)
    return dataclasses.replace(found, headline=headline, sentences=tuple(sentences))


def _outcomes(explorers: Mapping[int, Explorer], policy: Policy, order: Sequence[int]) -> list[Trace] | None:
    """What becomes of every item under a policy; None if it is not known of one."""
    found = []
    for index in order:
        trace = explorers[index].outcome(policy)
        if trace is None:
            return None
        found.append(trace)
    return found


def _chosen_half(order: Sequence[int], items: Mapping[int, Mapping[str, Any]], seed: int) -> set[int]:
    """Half of the items of each task; the larger half of an odd number goes where there are fewer."""
    random = np.random.default_rng(seed)
    halves: tuple[set[int], set[int]] = (set(), set())
    for task in sorted({str(items[index]["task"]) for index in order}):
        own = random.permutation([index for index in order if str(items[index]["task"]) == task]).tolist()
        first, second = sorted(halves, key=len)
        first.update(own[::2])
        second.update(own[1::2])
    return halves[0]


def _shared(
    explorers: Mapping[int, Explorer], order: Sequence[int], choosing: set[int]
) -> list[tuple[Policy, SharedPolicy]]:
    """The policies whose outcome is known on all items, the best on the first half first, by fewest insertions if equal."""
    tried = dict.fromkeys(policy for index in order for policy in explorers[index].traces)
    found = []
    for policy in tried:
        traces = _outcomes(explorers, policy, order)
        if traces is None:
            continue
        right = [trace.right for trace in traces]
        first = [r for r, index in zip(right, order, strict=True) if index in choosing]
        second = [r for r, index in zip(right, order, strict=True) if index not in choosing]
        shared = SharedPolicy(
            name=policy.name,
            chosen_on=float(np.mean(first)),
            scored_on=float(np.mean(second)),
            accuracy=float(np.mean(right)),
            insertions=float(np.mean([trace.insertions for trace in traces])),
        )
        found.append((policy, shared))
    return sorted(found, key=lambda entry: (-entry[1].chosen_on, entry[1].insertions))


def _best(explorer: Explorer) -> tuple[Policy, Trace]:
    """The policy of the item's optimum: right if any is, and then of the fewest insertions."""
    return min(explorer.traces.items(), key=lambda entry: (not entry[1].right, entry[1].insertions))


def _among(before: Sequence[Trace], after: Sequence[Trace], *, right: bool) -> Share:
    """Of the items that were right (or wrong) before, the share of those that are not so afterwards."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.right == right]
    return share(sum(a.right != b.right for a, b in pairs), len(pairs))


def _broken(
    explorers: Mapping[int, Explorer], order: Sequence[int], before: Sequence[Trace], *, invoked: bool
) -> Share:
    """Of the successes, those that fail under some policy with an insertion, or with an omission."""
    own = [index for index, trace in zip(order, before, strict=True) if trace.right]
    fails = [
        any(not trace.right and invoked in trace.decisions for trace in explorers[index].traces.values())
        for index in own
    ]
    return share(sum(fails), len(own))


def _score(name: str, traces: Sequence[Trace]) -> Score:
    accuracy = mean_interval([float(trace.right) for trace in traces])
    return Score(name, accuracy, float(np.mean([trace.insertions for trace in traces])))


def _difference(one: tuple[str, Sequence[Trace]], other: tuple[str, Sequence[Trace]]) -> Difference:
    first, second = ([float(trace.right) for trace in traces] for _, traces in (other, one))
    difference = mean_interval([b - a for a, b in zip(first, second, strict=True)])
    return Difference(one[0], other[0], difference, paired_test(first, second).p_value)


# Verdict


def verdict(found: Oracle) -> list[str]:
    """What follows from the numbers, the most important first."""
    fixed = found.optimum_gain.against
    gain = found.optimum_gain.difference
    sentences = []
    if gain.mean == 0:
        sentences.append(
            f"A trigger has nothing to gain in accuracy: no policy tried solves an item that {fixed!r} does not."
        )
    else:
        sentences.append(
            f"A trigger has at most {_points(gain)} to gain over {fixed!r}: the best policy of each item among those tried "
            f"(upper bound) solves {_percent(found.optimum.accuracy.mean)}, {fixed!r} "
            f"{_percent(found.optimum.accuracy.mean - gain.mean)}."
        )
    sentences += [_rule(found), _items(found), _insertions(found), _coverage(found), _trained(found)]
    return sentences


def _rule(found: Oracle) -> str:
    gain, name = found.shared_gain, found.shared.name
    if gain.of == gain.against:
        return f"Of the policies that are the same for all items, none was better than {name!r} on the half they were chosen on."
    measured = (
        f"{name!r}, the best policy shared by all items on one half of them, solves {_percent(found.shared.accuracy.mean)} "
        f"of the other half, {_points(gain.difference, signed=True)} against {gain.against!r}, p = {gain.p_value:.2g}"
    )
    if gain.p_value <= LEVEL and gain.difference.mean > 0:
        return f"A rule gains without training: {measured}."
    return f"No rule shared by all items gains measurably: {measured}."


def _items(found: Oracle) -> str:
    return (
        f"Some policy solves {_of(found.rescued['never'])} failures without memory and {_of(found.rescued['always'])} failures "
        f"with memory everywhere; some insertion breaks {_of(found.broken['never'])} successes without memory, and some "
        f"omission {_of(found.broken['always'])} successes with memory everywhere."
    )


def _insertions(found: Oracle) -> str:
    return (
        f"'always' inserts {found.always.insertions:.2f} blocks per answer; the upper bound is reached with "
        f"{found.optimum.insertions:.2f}."
    )


def _coverage(found: Oracle) -> str:
    return (
        f"Tried on {found.items} items: every boundary alone and left out on {found.tried_singly} of them, every pair too on "
        f"{found.tried_in_pairs}; more than two chosen boundaries on none, so a policy beyond those tried may gain more."
    )


def _trained(found: Oracle) -> str:
    if found.trigger is None or found.trigger_gain is None or found.trigger_loss is None:
        return "The checkpoint has no trained trigger to compare."
    gain, loss = found.trigger_gain, found.trigger_loss
    text = (
        f"The trained trigger solves {_percent(found.trigger.accuracy.mean)} with {found.trigger.insertions:.2f} insertions: "
        f"{_points(gain.difference, signed=True)} against {gain.against!r}, p = {gain.p_value:.2g}, and "
        f"{_points(loss.difference, signed=True)} against the upper bound"
    )
    bound = found.optimum_gain.difference.mean
    return (
        f"{text}; that is {gain.difference.mean / bound:.0%} of what there is to gain."
        if bound
        else f"{text}."
    )


def _points(interval: Interval, *, signed: bool = False) -> str:
    form = "+.1f" if signed else ".1f"
    text = f"{100 * interval.mean:{form}} points"
    if interval.low is None or interval.high is None:
        return text
    return f"{text} (95 % interval {100 * interval.low:{form}} to {100 * interval.high:{form}})"


def _percent(share_right: float) -> str:
    return f"{100 * share_right:.1f} %"


def _of(found: Share) -> str:
    return f"{found.count} of {found.total}"
