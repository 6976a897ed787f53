"""The loss of a policy-gradient step: a loss function's surrogate with everything that all of them share.

The surrogate of `memgen.objectives.policy_losses`, corrected for the rollout's engine, on the tokens in focus, less the
KL divergence from a reference, plus an entropy bonus; then added up as the loss function says. Everything is a function
of tensors and one frozen record of settings.
"""

# E episodes, N tokens of the longest episode (all of its turns, one behind the other)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memgen.objectives.policy_losses import (
    LOG_RATIO_LIMIT,
    PolicyBatch,
    PolicyTerms,
    StepTotals,
    loss_function,
)
from memgen.objectives.policy_settings import KLEstimator, PolicySettings

K3_LIMIT = 10.0
"""The k3 estimate of one token is held below this (verl)."""


@dataclass(frozen=True)
class TokenScores:
    """The policy in training at the tokens of a micro-batch.

    Values outside the mask are never read: they may be anything, NaN included.

    Attributes:
        logprobs: log-probability of each token, float32 (E, N), with its graph.
        mask: True at the tokens to train, bool (E, N).
        entropy: of the policy at each, (E, N); with its graph if there is an entropy bonus.
        rollout_logprobs: as recorded when the tokens were sampled, (E, N); needed for a correction.
        reference_logprobs: under the reference policy, (E, N); needed if `kl` is above 0 and not computed exactly.
        exact_kl: KL divergence from the reference at each token, (E, N), where it can be computed (a trigger's
            decisions), with its graph; used in place of the estimate.
    """

    logprobs: Float[Tensor, "episodes tokens"]
    mask: Bool[Tensor, "episodes tokens"]
    entropy: Float[Tensor, "episodes tokens"] | None = None
    rollout_logprobs: Float[Tensor, "episodes tokens"] | None = None
    reference_logprobs: Float[Tensor, "episodes tokens"] | None = None
    exact_kl: Float[Tensor, "episodes tokens"] | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """A micro-batch's loss and its statistics.

    Attributes:
        loss: scalar; the sum over all micro-batches of a step, divided by `StepTotals.micro_batches`, is the step's loss.
        stats: detached scalars, to be reduced over micro-batches or ranks and read by `read_stats`. Those whose name ends
            in `_min` or `_max` are extremes, all others are sums; `tokens` is the count of most of them.
    """

    loss: Float[Tensor, ""]
    stats: dict[str, Tensor]


def policy_loss(
    scores: TokenScores,
    old_logprobs: Float[Tensor, "episodes tokens"],
    advantages: Float[Tensor, " episodes"],
    settings: PolicySettings,
    totals: StepTotals,
    focus: Bool[Tensor, "episodes tokens"] | None = None,
) -> PolicyLoss:
    """The loss of one micro-batch of an optimizer step.

    An episode whose mask is empty contributes exactly 0; the loss stays connected to the graph of the log-probabilities
    even if all masks are empty, so that every rank has a backward pass.

    Args:
        scores: the policy in training at each token.
        old_logprobs: under the policy that the ratio is taken against (`logprobs.detach()` at the first update).
        advantages: of each episode.
        settings: the objective.
        totals: of the whole optimizer step.
        focus: True at tokens whose surrogate is trained: those of highest entropy of the whole step (see
            `entropy_threshold`). Needed if `settings.top_entropy` is below 1; default: all.

    Raises:
        ValueError: if the settings need scores that are missing, or name an unknown loss.
    """
    _check_inputs(scores, settings, focus)
    mask = scores.mask
    batch = PolicyBatch.build(scores.logprobs, old_logprobs, advantages, mask)
    terms = loss_function(settings.loss)(batch, settings)
    weight = _correction(batch, scores.rollout_logprobs, settings)  # (E, N)
    focus = mask if focus is None else focus & mask
    surrogate = terms.surrogate * weight * focus  # (E, N)
    divergence = _divergence(batch, scores, settings)

    objective = surrogate
    if settings.kl > 0 and divergence is not None:
        weighted = divergence * batch.ratio if settings.kl_weighted else divergence
        objective = objective - settings.kl * weighted
    if settings.entropy_bonus > 0 and scores.entropy is not None:
        objective = objective + settings.entropy_bonus * torch.where(mask, scores.entropy, 0.0)
    loss = -terms.aggregate(torch.where(mask, objective, 0.0), batch.counts, totals)
    with torch.no_grad():
        stats = _surrogate_stats(batch, terms, weight, focus, surrogate)
        stats |= _score_stats(batch, scores, divergence)
    return PolicyLoss(loss=loss, stats={name: value.detach() for name, value in stats.items()})


def kl_penalty(
    logprobs: Float[Tensor, "*shape"], reference: Float[Tensor, "*shape"], estimator: KLEstimator
) -> Float[Tensor, "*shape"]:
    """Estimates KL(policy || reference) at tokens that the policy sampled (Schulman, "Approximating KL divergence").

    With d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = e^-d + d - 1 with d held in +-20 and the result
    below 10. As a term of a loss, k2 alone has the gradient of the KL on policy; that of k1 is 0 on average, that
    of k3 is biased, and small where the policy left the reference's support. Times the ratio (`kl_weighted`), k1
    and k3 have it too.

    Args:
        logprobs: of the policy.
        reference: of the reference policy.
        estimator: k1, k2 or k3.
    """
    d = logprobs - reference.detach()
    match estimator:
        case "k1":
            return d
        case "k2":
            return 0.5 * d.square()
        case "k3":
            d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            # expm1 keeps the small differences that exp(-d) - 1 would round away.
            return (torch.expm1(-d) + d).clamp(max=K3_LIMIT)


def entropy_threshold(entropy: Float[Tensor, " tokens"], share: float) -> Float[Tensor, ""]:
    """The least entropy among the given share of tokens, those of highest entropy (arXiv:2506.01939).

    Give it the tokens of a whole optimizer step: a threshold of each micro-batch's own would choose other tokens
    whenever micro-batches or ranks change.

    Args:
        entropy: entropy of the policy at each token that counts.
        share: how many to keep, in (0, 1].

    Returns:
        At least one token, and all tokens at the threshold, reach it; infinite without any token.

    Raises:
        ValueError: if the share is not in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}; set top_entropy")
    if entropy.numel() == 0:
        return entropy.new_full((), math.inf)
    keep = max(1, round(share * entropy.numel()))
    threshold: Tensor = entropy.topk(keep).values[-1]
    return threshold


def read_stats(stats: dict[str, Tensor]) -> dict[str, float]:
    """Means per token, shares of tokens and extremes from reduced stats; `tokens` and `episodes` stay counts.

    Without a token only the counts are returned.
    """
    values = {name: float(value) for name, value in stats.items()}
    tokens = values["tokens"]
    counts = {name: values[name] for name in ("tokens", "episodes")}
    if tokens == 0:
        return counts
    return counts | {
        name: value if name.endswith(("_min", "_max")) else value / tokens
        for name, value in values.items()
        if name not in counts
    }


def _divergence(batch: PolicyBatch, scores: TokenScores, settings: PolicySettings) -> Tensor | None:
    """KL divergence from the reference at each token, exact or estimated; None without a reference."""
    if scores.exact_kl is not None:
        return torch.where(batch.mask, scores.exact_kl, 0.0)
    if scores.reference_logprobs is None:
        return None
    reference = torch.where(batch.mask, scores.reference_logprobs, 0.0)
    return kl_penalty(batch.logprobs, reference, settings.kl_estimator)


def _correction(batch: PolicyBatch, rollout_logprobs: Tensor | None, settings: PolicySettings) -> Tensor:
    """Weight of each token for the difference between the rollout's engine and the training's."""
    old = batch.old_logprobs
    if settings.correction == "none" or rollout_logprobs is None:
        return torch.ones_like(old)
    level, _, rule = settings.correction.partition("_")
    log_weight = old - torch.where(batch.mask, rollout_logprobs.detach(), 0.0)
    if level == "sequence":
        log_weight = log_weight.sum(dim=1, keepdim=True).expand_as(old)
    weight = log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if rule == "truncate":
        return weight.clamp(max=settings.correction_max)
    kept = (weight >= settings.correction_min) & (weight <= settings.correction_max)
    return torch.where(kept, weight, 0.0)


def _surrogate_stats(
    batch: PolicyBatch, terms: PolicyTerms, weight: Tensor, focus: Tensor, surrogate: Tensor
) -> dict[str, Tensor]:
    """Counts, sums and extremes of the ratio and the surrogate over the masked tokens."""
    mask, ratio = batch.mask, terms.ratio
    nowhere = torch.zeros_like(mask)
    low, high, bounded, capped = (
        nowhere if where is None else where
        for where in (terms.clipped_low, terms.clipped_high, terms.bounded, terms.capped)
    )

    def count(where: Tensor) -> Tensor:
        return (where & mask).sum().to(ratio.dtype)

    moves = (batch.advantages != 0) & (weight > 0) & focus & ~(low | high | bounded)
    return {
        "tokens": count(mask),
        "episodes": mask.any(dim=1).sum().to(ratio.dtype),
        "focused": count(focus),
        "active": count(moves),
        "ratio": torch.where(mask, ratio, 0.0).sum(),
        "ratio_min": _extreme(ratio, mask, "min"),
        "ratio_max": _extreme(ratio, mask, "max"),
        "clip_low": count(low),
        "clip_high": count(high),
        "clip_bound": count(bounded | capped),
        "correction": torch.where(mask, weight, 0.0).sum(),
        "surrogate": torch.where(mask, surrogate, 0.0).sum(),
    }


def _score_stats(batch: PolicyBatch, scores: TokenScores, divergence: Tensor | None) -> dict[str, Tensor]:
    """Sums and extremes of the differences from other policies, and of the entropy."""
    stats = {}
    if divergence is not None:
        stats["kl"] = divergence.sum()
    if scores.reference_logprobs is not None:
        reference = torch.where(batch.mask, scores.reference_logprobs, 0.0)
        stats["k1"] = kl_penalty(batch.logprobs, reference, "k1").sum()
        stats["k3"] = kl_penalty(batch.logprobs, reference, "k3").sum()
    if scores.entropy is not None:
        stats["entropy"] = torch.where(batch.mask, scores.entropy, 0.0).sum()
    if scores.rollout_logprobs is not None:
        drift = torch.where(batch.mask, batch.logprobs - scores.rollout_logprobs, 0.0).abs()
        stats["drift"] = drift.sum()
        stats["drift_max"] = _extreme(drift, batch.mask, "max")
    return stats


def _extreme(values: Tensor, mask: Tensor, which: Literal["min", "max"]) -> Tensor:
    """Least or largest of the masked values; the infinity that never wins if there is none."""
    nothing = math.inf if which == "min" else -math.inf
    chosen = torch.cat([torch.where(mask, values, nothing).flatten(), values.new_full((1,), nothing)])
    return chosen.amin() if which == "min" else chosen.amax()


def _check_inputs(scores: TokenScores, settings: PolicySettings, focus: Tensor | None) -> None:
    logprobs = scores.logprobs
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log-probabilities must be float32, got {logprobs.dtype}: their differences are lost in fewer bits; "
            "compute the head's log-softmax in float32"
        )
    if settings.kl > 0 and scores.reference_logprobs is None and scores.exact_kl is None:
        raise ValueError(
            f"kl is {settings.kl}, but there are no reference_logprobs; pass them or set kl to 0"
        )
    if settings.correction != "none" and scores.rollout_logprobs is None:
        raise ValueError(
            f"correction is {settings.correction}, but there are no rollout_logprobs; "
            "pass them or set correction to none"
        )
    if settings.top_entropy < 1.0 and focus is None:
        raise ValueError(
            f"top_entropy is {settings.top_entropy}, but there is no focus; pass it or set top_entropy to 1"
        )
    if settings.entropy_bonus > 0:
        if scores.entropy is None:
            raise ValueError(
                f"entropy_bonus is {settings.entropy_bonus}, but there is no entropy; pass it or set it to 0"
            )
        if logprobs.requires_grad and not scores.entropy.requires_grad:
            raise ValueError("entropy_bonus needs the entropy with its graph, got one that is detached")
