"""The policy objectives once more, in plain Python numbers and loops: written from the papers' formulas, not from ours.

What a loss holds constant (the paper's stop-gradient) is read from `frozen`, so that a difference quotient in the
log-probabilities gives the gradient that the paper means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memgen.objectives.policy_losses import StepTotals
from memgen.objectives.policy_settings import PolicySettings

Rows = list[list[float]]


@dataclass
class Case:
    """One micro-batch of an optimizer step, as lists of lists (E, N)."""

    logprobs: Rows
    old: Rows
    advantages: list[float]
    mask: list[list[bool]]
    reference: Rows | None = None
    exact_kl: Rows | None = None
    entropy: Rows | None = None
    rollout: Rows | None = None
    focus: list[list[bool]] | None = None


def plain_loss(case: Case, settings: PolicySettings, totals: StepTotals, frozen: Rows | None = None) -> float:
    """The loss of one micro-batch. `frozen`: log-probabilities for what is held constant; default: the case's own."""
    frozen = case.logprobs if frozen is None else frozen
    focus = case.focus if case.focus is not None else plain_focus(case, settings.top_entropy)
    sums, counts = [], []
    for e, marks in enumerate(case.mask):
        places = [t for t, mark in enumerate(marks) if mark]
        total = 0.0
        for t in places:
            weight = correction_weight(case, e, t, places, settings)
            if focus[e][t]:
                total += weight * surrogate(case, e, t, places, settings, frozen)
            if settings.kl > 0:
                total -= settings.kl * divergence(case, e, t, settings)
            if settings.entropy_bonus > 0:
                total += settings.entropy_bonus * case.entropy[e][t]
        sums.append(total)
        counts.append(len(places))
    if settings.loss in ("grpo", "gspo", "sapo"):
        means = [total / count for total, count in zip(sums, counts, strict=True) if count > 0]
        return -sum(means) / totals.episodes * totals.micro_batches
    if settings.loss == "bnpo":
        return -sum(sums) / sum(counts) if sum(counts) else 0.0
    if settings.loss == "dr_grpo":
        return -sum(sums) / (totals.episodes * totals.max_tokens) * totals.micro_batches
    return -sum(sums) / totals.tokens * totals.micro_batches if totals.tokens else 0.0


def surrogate(case: Case, e: int, t: int, places: list[int], settings: PolicySettings, frozen: Rows) -> float:
    advantage = case.advantages[e]
    logp = case.logprobs[e][t]
    if settings.loss == "reinforce":
        return advantage * logp
    if settings.loss == "cispo":
        return min(math.exp(frozen[e][t] - case.old[e][t]), settings.cispo_max) * advantage * logp
    ratio = math.exp(logp - case.old[e][t])
    if settings.loss == "sapo":
        tau = settings.sapo_tau_positive if advantage > 0 else settings.sapo_tau_negative
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    if settings.loss == "gspo":
        ratio = math.exp(sum(case.logprobs[e][s] - case.old[e][s] for s in places) / len(places))
    high = settings.clip_low if settings.clip_high is None else settings.clip_high
    clipped = min(max(ratio, 1 - settings.clip_low), 1 + high)
    if settings.delta is not None:
        ratio = min(ratio, settings.delta)
    return min(ratio * advantage, clipped * advantage)


def divergence(case: Case, e: int, t: int, settings: PolicySettings) -> float:
    if case.exact_kl is not None:
        value = case.exact_kl[e][t]
    else:
        d = case.logprobs[e][t] - case.reference[e][t]
        if settings.kl_estimator == "k1":
            value = d
        elif settings.kl_estimator == "k2":
            value = d * d / 2
        else:
            d = max(-20.0, min(20.0, d))
            value = min(math.exp(-d) + d - 1, 10.0)
    return value * math.exp(case.logprobs[e][t] - case.old[e][t]) if settings.kl_weighted else value


def correction_weight(case: Case, e: int, t: int, places: list[int], settings: PolicySettings) -> float:
    if settings.correction == "none":
        return 1.0
    over = places if settings.correction.startswith("sequence") else [t]
    weight = math.exp(sum(case.old[e][s] - case.rollout[e][s] for s in over))
    if settings.correction.endswith("truncate"):
        return min(weight, settings.correction_max)
    return weight if settings.correction_min <= weight <= settings.correction_max else 0.0


def plain_focus(case: Case, share: float) -> list[list[bool]]:
    if share == 1.0:
        return case.mask
    values = sorted(
        (case.entropy[e][t] for e, marks in enumerate(case.mask) for t, mark in enumerate(marks) if mark),
        reverse=True,
    )
    if not values:
        return case.mask
    threshold = values[max(1, round(share * len(values))) - 1]
    return [
        [mark and case.entropy[e][t] >= threshold for t, mark in enumerate(marks)]
        for e, marks in enumerate(case.mask)
    ]


def difference_quotient(case: Case, field: str, settings: PolicySettings, totals: StepTotals) -> Rows:
    """Central differences of the loss in every entry of a field, with what is frozen left where it is."""
    frozen = [list(row) for row in case.logprobs]
    focus = case.focus if case.focus is not None else plain_focus(case, settings.top_entropy)
    held = Case(**{**vars(case), "focus": focus})
    rows: Rows = getattr(held, field)
    step = 1e-5
    gradient = []
    for e, row in enumerate(rows):
        gradient.append([])
        for t, value in enumerate(row):
            if not case.mask[e][t]:
                gradient[e].append(0.0)
                continue
            row[t] = value + step
            above = plain_loss(held, settings, totals, frozen)
            row[t] = value - step
            below = plain_loss(held, settings, totals, frozen)
            row[t] = value
            gradient[e].append((above - below) / (2 * step))
    return gradient
