"""Policy-gradient objectives of the weaver's and the trigger's reinforcement learning (paper, Eq. 14-16).

One advantage function and one loss, each a function of tensors and one frozen record of settings. A "token" is
whatever the policy chose: an agent token of the weaver's episodes, or a decision of the trigger; everything here
applies to both, with the mask saying where a choice was made.

How it differs from its sources:

- The loss is divided by what the whole optimizer step has (`Window`), for every kind but bnpo, so micro-batches and
  ranks of any size add up to exactly the loss of one big batch.
- A standard deviation is that of the population, without an epsilon (the paper's trigger procedure, and DeepSeekMath);
  TRL takes the unbiased one plus 1e-4. A group without spread has advantage 0 instead.
- The advantage of GRPO is not divided by anything unless asked to (paper, Eq. 15).
- REINFORCE is divided by the step's tokens, not its episodes: another scale, the same direction.
"""

# E episodes, N tokens of the longest episode (all of its turns, one behind the other)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LossKind = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "reinforce", "reinforce_pp"]
KLEstimator = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held within this, so that no exponential overflows (verl). No gradient flows beyond it."""
K3_LIMIT = 10.0
"""The k3 estimate of one token is held below this (verl)."""
EQUAL_REWARDS = 1e-6
"""Rewards that differ by less than this share of the largest are equal: float32 rounding is no signal."""

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "reinforce_pp")
_MEAN_OF_EPISODES = ("grpo", "gspo", "sapo")


@dataclass(frozen=True)
class PolicySettings:
    """What the policy objective is."""

    loss: LossKind = "grpo"
    """grpo: mean over episodes of each episode's mean over tokens. dapo: mean over the step's tokens. bnpo: mean over
    the local batch's tokens. dr_grpo: sum over tokens by episodes x token limit (arXiv:2503.20783). gspo: one ratio
    per episode (2507.18071). cispo: the ratio is a capped constant weight on the log-probability (2506.13585). sapo:
    a soft gate instead of clipping (2511.20347). reinforce: reward times log-probability. reinforce_pp: clipped, with
    advantages normalised over the batch (2501.03262)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - this. In [0, 1]."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + this. None: as `clip_low`. DAPO's clip-higher is 0.28."""
    delta: float | None = None
    """Two-sided clipping (INTELLECT-2): the ratio itself is capped here before the surrogate; above 1 + `clip_high`."""
    dual_clip: float | None = None
    """Bound on the loss where the advantage is negative, in units of the advantage; above 1. The same bound as
    `delta`, under its other name (2012.09847)."""
    cispo_max: float = 5.0
    """Cap of cispo's weight."""
    sapo_tau_positive: float = 1.0
    """Temperature of sapo's gate where the advantage is positive."""
    sapo_tau_negative: float = 1.05
    """Temperature of sapo's gate where the advantage is negative (or 0)."""
    baseline: Literal["group", "batch", "none"] | None = None
    """What is subtracted from a reward: the mean of its group, of the batch, or nothing. None: what the loss's source
    does (reinforce nothing, reinforce_pp the batch's mean, all others the group's)."""
    advantage_scale: Literal["group", "batch", "none"] = "none"
    """Divides the advantage by the standard deviation of its group's rewards, of the batch's, or by nothing (the
    paper's weaver, Dr. GRPO). reinforce_pp always normalises over the batch."""
    leave_one_out: bool = False
    """The group's mean leaves out the episode itself: no bias from its own reward (RLOO)."""
    kl: float = 0.0
    """Weight of the KL divergence from the reference policy. 0: no reference needed."""
    kl_estimator: KLEstimator = "k3"
    """k1: log-ratio. k2: half its square. k3: unbiased and never negative."""
    kl_weighted: bool = False
    """Weighs the KL of a token by its ratio: unbiased off policy, in its gradient too (DeepSeek-V3.2)."""
    entropy_bonus: float = 0.0
    """Weight of the policy's entropy, which is added to the objective."""
    top_entropy: float = 1.0
    """Share of tokens, those of highest entropy, whose surrogate is trained (2506.01939 takes 0.2). 1: all. The
    others still count in every divisor, and have their KL and entropy terms. The stages take the share of a whole
    optimizer step, by the entropies under the weights that rolled out."""
    mask_truncated: bool = False
    """Leaves episodes that were cut at their limit out of the loss."""
    overlong_length: int | None = None
    """Length at which DAPO's soft overlong punishment reaches -1. None: no punishment."""
    overlong_buffer: int | None = None
    """Tokens before `overlong_length` over which the punishment grows from 0."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weighs the surrogate by training over rollout probability, of each token or of the episode: truncated at
    `correction_max`, or set to 0 outside of [`correction_min`, `correction_max`]."""
    correction_max: float = 2.0
    """Largest correction weight."""
    correction_min: float = 0.0
    """Smallest correction weight that a mask keeps."""

    def __post_init__(self) -> None:
        def need(holds: bool, field: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"{field} must be {rule}, got {getattr(self, field)}")

        need(0.0 <= self.clip_low <= 1.0, "clip_low", "in [0, 1]")
        need(self.clip_high is None or self.clip_high >= 0.0, "clip_high", "0 or more, or null")
        need(
            self.delta is None or self.delta > 1.0 + self.upper_clip,
            "delta",
            f"above 1 + clip_high = {1.0 + self.upper_clip:g}",
        )
        need(self.dual_clip is None or self.dual_clip > 1.0, "dual_clip", "above 1")
        for field in ("cispo_max", "sapo_tau_positive", "sapo_tau_negative", "correction_max"):
            need(getattr(self, field) > 0.0, field, "above 0")
        for field in ("kl", "entropy_bonus", "correction_min"):
            need(getattr(self, field) >= 0.0, field, "0 or more")
        need(self.correction_min <= self.correction_max, "correction_min", "at most correction_max")
        need(0.0 < self.top_entropy <= 1.0, "top_entropy", "in (0, 1]")
        if self.delta is not None and self.dual_clip is not None:
            raise ValueError(
                "delta and dual_clip are the same bound under two names; set one of them to null"
            )
        if (self.delta is not None or self.dual_clip is not None) and self.loss not in _CLIPPED:
            raise ValueError(f"delta and dual_clip have no effect on loss {self.loss}; set them to null")
        if self.leave_one_out and self.used_baseline != "group":
            raise ValueError(
                f"leave_one_out needs the group's mean, but the baseline is {self.used_baseline}; "
                "set baseline to group or leave_one_out to false"
            )
        if self.loss == "reinforce_pp" and self.advantage_scale == "group":
            raise ValueError(
                "reinforce_pp normalises over the batch; set advantage_scale to batch or none, got group"
            )
        if (self.overlong_length is None) != (self.overlong_buffer is None):
            raise ValueError(
                "overlong_length and overlong_buffer go together, got "
                f"{self.overlong_length} and {self.overlong_buffer}"
            )
        if self.overlong_length is not None and self.overlong_buffer is not None:
            _check_overlong(self.overlong_length, self.overlong_buffer)

    @property
    def upper_clip(self) -> float:
        """`clip_high`, or what stands for it."""
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def used_baseline(self) -> Literal["group", "batch", "none"]:
        """`baseline`, or what the loss's source uses."""
        if self.baseline is not None:
            return self.baseline
        return {"reinforce": "none", "reinforce_pp": "batch"}.get(self.loss, "group")  # type: ignore[return-value]

    @property
    def negative_bound(self) -> float | None:
        """Largest ratio that counts where the advantage is negative; None: any."""
        return self.delta if self.delta is not None else self.dual_clip


@dataclass(frozen=True)
class Window:
    """What one optimizer step has, over all of its micro-batches and ranks.

    Attributes:
        tokens: trained tokens (True in the masks).
        episodes: episodes that a mean over episodes is taken over. With `mask_truncated`, TRL counts those it leaves
            out as well; count only the others, and the step is as large as without them.
        parts: what the caller's framework divides the sum of losses by: micro-batches per step times ranks.
        max_tokens: most tokens that an episode can have; only dr_grpo reads it.
    """

    tokens: int
    episodes: int
    parts: int = 1
    max_tokens: int = 1

    def __post_init__(self) -> None:
        if min(self.tokens, self.episodes) < 0 or min(self.parts, self.max_tokens) < 1:
            raise ValueError(
                f"a Window needs tokens and episodes of 0 or more, and parts and max_tokens of 1 or more, got {self}"
            )


@dataclass(frozen=True)
class Advantages:
    """What each episode's tokens are multiplied with.

    Attributes:
        values: the advantages, 0 for episodes that are not valid.
        group_mean: mean reward of each episode's group.
        group_std: standard deviation of it (of the population).
        dead: True where an episode's group teaches nothing: equal rewards, or fewer than two valid episodes.
        groups: number of groups with a valid episode.
        dead_groups: how many of them are dead.
    """

    values: Float[Tensor, " episodes"]
    group_mean: Float[Tensor, " episodes"]
    group_std: Float[Tensor, " episodes"]
    dead: Bool[Tensor, " episodes"]
    groups: int
    dead_groups: int

    @property
    def dead_share(self) -> float:
        """Share of groups that teach nothing; 0 if there is no group."""
        return self.dead_groups / self.groups if self.groups else 0.0


@dataclass(frozen=True)
class PolicyLoss:
    """A part's loss and what to report about it.

    Attributes:
        loss: scalar; the sum over all parts of a window, divided by `Window.parts`, is the step's loss.
        stats: detached scalars that `merge_stats` reduces over parts and `read_stats` turns into means. Those whose
            name ends in `_min` or `_max` are extremes, all others are sums; `tokens` is the count of most of them.
    """

    loss: Float[Tensor, ""]
    stats: dict[str, Tensor]


def group_advantages(
    rewards: Float[Tensor, " episodes"],
    group: Int[Tensor, " episodes"],
    settings: PolicySettings,
    valid: Bool[Tensor, " episodes"] | None = None,
) -> Advantages:
    """How much better each episode did than what it is compared with.

    Give it all episodes of a rollout, of every rank: groups may have any size and lie in any order, and batch
    statistics are those of what is given.

    Args:
        rewards: total reward of each episode.
        group: number of each episode's group (its prompt).
        settings: baseline, scale and leave-one-out.
        valid: False where an episode is left out of all means, with advantage 0; default: all are valid.
    """
    kept = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    r = torch.where(kept, rewards.detach(), 0.0).double()
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1 if index.numel() else 0

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(groups).index_add(0, index, values)

    sizes = per_group(kept.double())
    mean = (per_group(r) / sizes.clamp(min=1))[index]
    centred = torch.where(kept, r - mean, 0.0)
    std = (per_group(centred.square()) / sizes.clamp(min=1)).sqrt()[index]
    # Equal rewards are found by their extremes: the mean of equal numbers need not be that number once rounded, and
    # dividing such residues by their own standard deviation would make advantages of 1 out of nothing.
    far = torch.full((groups,), math.inf, dtype=torch.float64, device=r.device)
    top = (-far).scatter_reduce(0, index, torch.where(kept, r, -math.inf), "amax")
    bottom = far.scatter_reduce(0, index, torch.where(kept, r, math.inf), "amin")
    level = torch.maximum(top.abs(), bottom.abs())
    dead_group = (sizes < 2) | (top - bottom <= EQUAL_REWARDS * level)
    dead = dead_group[index]
    std = torch.where(dead, 0.0, std)

    match settings.used_baseline:
        case "group":
            values = torch.where(dead, 0.0, centred)
            if settings.leave_one_out:
                values = values * (sizes / (sizes - 1).clamp(min=1))[index]
        case "batch":
            values = torch.where(kept, r - r.sum() / kept.sum().clamp(min=1), 0.0)
        case "none":
            values = r
    if settings.loss == "reinforce_pp":
        values = _normalised(values, kept)
    elif settings.advantage_scale == "group":
        values = torch.where(dead, 0.0, values / torch.where(dead, 1.0, std))
    elif settings.advantage_scale == "batch":
        spread = _std(r, kept)
        values = torch.where(spread > 0, values / torch.where(spread > 0, spread, 1.0), 0.0)
    present = sizes > 0
    return Advantages(
        values=torch.where(kept, values, 0.0).to(rewards.dtype),
        group_mean=mean.to(rewards.dtype),
        group_std=std.to(rewards.dtype),
        dead=dead,
        groups=int(present.sum()),
        dead_groups=int((dead_group & present).sum()),
    )


def overlong_penalty(
    lengths: Int[Tensor, " episodes"], max_length: int, buffer: int
) -> Float[Tensor, " episodes"]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), to be added to the reward.

    Args:
        lengths: tokens of each episode.
        max_length: length from which on the punishment is -1.
        buffer: it grows from 0 over this many tokens before.
    """
    _check_overlong(max_length, buffer)
    return ((max_length - buffer - lengths).float() / buffer).clamp(-1.0, 0.0)


def trained_mask(
    mask: Bool[Tensor, "episodes tokens"], truncated: Bool[Tensor, " episodes"], settings: PolicySettings
) -> Bool[Tensor, "episodes tokens"]:
    """The mask of the loss: without episodes that were cut at their limit, if the settings say so.

    Args:
        mask: True at agent tokens.
        truncated: True where an episode was cut.
        settings: `mask_truncated`.
    """
    return mask & ~truncated[:, None] if settings.mask_truncated else mask


def top_entropy_mask(
    entropy: Float[Tensor, "episodes tokens"], mask: Bool[Tensor, "episodes tokens"], share: float
) -> Bool[Tensor, "episodes tokens"]:
    """The given share of the masked tokens, those of highest entropy (arXiv:2506.01939).

    The threshold is that of the tokens given, so give it a whole step, or compare with its `entropy_threshold`. At
    least one token is kept if there is any, and all tokens at the threshold are.

    Args:
        entropy: entropy of the policy at each token.
        mask: True at tokens that count.
        share: how many to keep, in (0, 1].
    """
    values = entropy.detach()[mask]
    threshold = entropy_threshold(values, share)
    return mask if share == 1.0 else mask & (entropy.detach() >= threshold)


def entropy_threshold(entropy: Float[Tensor, " tokens"], share: float) -> Float[Tensor, ""]:
    """The least entropy among the given share of tokens, those of highest entropy; infinite without any token.

    Args:
        entropy: entropy of the policy at each token that counts.
        share: how many to keep, in (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}; set top_entropy")
    if entropy.numel() == 0:
        return entropy.new_full((), math.inf)
    keep = max(1, round(share * entropy.numel()))
    threshold: Tensor = entropy.topk(keep).values[-1]
    return threshold


def kl_penalty(
    logprobs: Float[Tensor, "*shape"], reference: Float[Tensor, "*shape"], estimator: KLEstimator
) -> Float[Tensor, "*shape"]:
    """Estimates KL(policy || reference) at tokens that the policy drew (Schulman, "Approximating KL divergence").

    With d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = e^-d + d - 1 with d held in +-20 and the result
    below 10. As a term of a loss, k2 alone has the gradient of the KL on policy; that of k1 is 0 on average, that
    of k3 is biased, and small where the policy left the reference's support. Times the ratio (`kl_weighted`), k1
    and k3 have it too.

    Args:
        logprobs: of the policy.
        reference: of the reference policy.
        estimator: which.
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


def policy_loss(
    logprobs: Float[Tensor, "episodes tokens"],
    old_logprobs: Float[Tensor, "episodes tokens"],
    advantages: Float[Tensor, " episodes"],
    mask: Bool[Tensor, "episodes tokens"],
    settings: PolicySettings,
    window: Window,
    *,
    reference_logprobs: Float[Tensor, "episodes tokens"] | None = None,
    exact_kl: Float[Tensor, "episodes tokens"] | None = None,
    entropy: Float[Tensor, "episodes tokens"] | None = None,
    rollout_logprobs: Float[Tensor, "episodes tokens"] | None = None,
    focus: Bool[Tensor, "episodes tokens"] | None = None,
) -> PolicyLoss:
    """The loss of one part (micro-batch of a rank) of an optimizer step.

    What stands outside of the mask is never read: it may be anything, NaN included. An episode whose mask is empty
    contributes exactly 0; the loss stays connected to the graph of `logprobs` even if all masks are empty, so that
    every rank has a backward pass.

    Args:
        logprobs: log-probability of each token under the policy in training, with its graph.
        old_logprobs: under the policy that the ratio is taken against (`logprobs.detach()` at the first update).
        advantages: of each episode.
        mask: True at the tokens to train.
        settings: what the loss is.
        window: what the whole optimizer step has.
        reference_logprobs: under the reference policy; needed if `settings.kl` is above 0.
        exact_kl: KL divergence from the reference at each token, where it can be computed (a trigger's decisions),
            with its graph; stands in for the estimate, and for `reference_logprobs`.
        entropy: entropy of the policy at each token; with its graph if there is an entropy bonus.
        rollout_logprobs: as recorded when the tokens were drawn; needed for a correction.
        focus: True at tokens whose surrogate is trained: `top_entropy_mask` of the whole step. Default: that of the
            tokens given, if `settings.top_entropy` is below 1.

    Raises:
        ValueError: if the settings need an argument that is missing.
    """
    _check_inputs(logprobs, settings, reference_logprobs, exact_kl, entropy, rollout_logprobs, focus)

    def inside(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0)

    logp, old = inside(logprobs), inside(old_logprobs.detach())  # (E, N)
    counts = mask.sum(dim=1)  # (E,)
    advantage = advantages.detach().to(logp.dtype)[:, None].expand_as(logp)  # (E, N)
    log_ratio = logp - old
    token_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if settings.loss == "gspo":
        # With one advantage per episode this has the gradient of the paper's token-wise form (GSPO-token) as well.
        mean_log_ratio = log_ratio.sum(dim=1) / counts.clamp(min=1)
        ratio = mean_log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()[:, None].expand_as(logp)
    else:
        ratio = token_ratio

    weight = _correction(old.detach(), rollout_logprobs, mask, settings)  # (E, N)
    if focus is None:
        focus = mask if settings.top_entropy == 1.0 else _focus(entropy, mask, settings.top_entropy)
    else:
        focus = focus & mask
    surrogate = _surrogate(ratio, logp, advantage, settings) * weight * focus
    objective = surrogate

    divergence = None
    if exact_kl is not None:
        divergence = inside(exact_kl)
    elif reference_logprobs is not None:
        divergence = kl_penalty(logp, inside(reference_logprobs), settings.kl_estimator)
    if settings.kl > 0 and divergence is not None:
        weighed = divergence * token_ratio if settings.kl_weighted else divergence
        objective = objective - settings.kl * weighed
    if settings.entropy_bonus > 0 and entropy is not None:
        objective = objective + settings.entropy_bonus * inside(entropy)

    loss = -_total(inside(objective), counts, settings, window)
    with torch.no_grad():
        stats = _stats(mask, focus, ratio, advantage, weight, surrogate, divergence, settings)
        if reference_logprobs is not None:
            reference = inside(reference_logprobs)
            stats["k1"] = kl_penalty(logp, reference, "k1").sum()
            stats["k3"] = kl_penalty(logp, reference, "k3").sum()
        if entropy is not None:
            stats["entropy"] = inside(entropy).sum()
        if rollout_logprobs is not None:
            drift = inside(logprobs - rollout_logprobs).abs()
            stats["drift"] = drift.sum()
            stats["drift_max"] = _extreme(drift, mask, "max")
    return PolicyLoss(loss=loss, stats={name: value.detach() for name, value in stats.items()})


def merge_stats(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The stats of several parts as those of one: extremes by their names' ends, sums otherwise.

    Raises:
        ValueError: if the parts do not have the same names.
    """
    if not parts:
        return {}
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(f"the parts' stats differ in their names: {[sorted(part) for part in parts]}")
    merged = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        if name.endswith("_min"):
            merged[name] = values.amin()
        elif name.endswith("_max"):
            merged[name] = values.amax()
        else:
            merged[name] = values.sum()
    return merged


def read_stats(stats: dict[str, Tensor]) -> dict[str, float]:
    """Means per token, shares of tokens and extremes from merged stats; `tokens` and `episodes` stay counts.

    Without a token there is nothing to say but the counts.
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


def _surrogate(ratio: Tensor, logp: Tensor, advantage: Tensor, settings: PolicySettings) -> Tensor:
    """What each token adds to the objective, before masks and weights."""
    match settings.loss:
        case "reinforce":
            return advantage * logp
        case "cispo":
            return ratio.detach().clamp(max=settings.cispo_max) * advantage * logp
        case "sapo":
            tau = torch.full_like(ratio, settings.sapo_tau_negative)
            tau = torch.where(advantage > 0, settings.sapo_tau_positive, tau)
            return torch.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantage
        case _:
            clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.upper_clip)
            # Where both are equal, torch.minimum halves the gradient between them: at a ratio of 1 that is the whole.
            lowest = torch.minimum(ratio * advantage, clipped * advantage)
            bound = settings.negative_bound
            if bound is None:
                return lowest
            return torch.where(advantage < 0, torch.maximum(lowest, bound * advantage), lowest)


def _total(objective: Tensor, counts: Tensor, settings: PolicySettings, window: Window) -> Tensor:
    """Adds up what tokens contribute, each kind with its divisor."""
    if settings.loss in _MEAN_OF_EPISODES:
        means = objective.sum(dim=1) / counts.clamp(min=1)
        return means.sum() * (window.parts / max(window.episodes, 1))
    if settings.loss == "bnpo":
        return objective.sum() / counts.sum().clamp(min=1)
    if settings.loss == "dr_grpo":
        return objective.sum() * (window.parts / (max(window.episodes, 1) * window.max_tokens))
    return objective.sum() * (window.parts / max(window.tokens, 1))


def _correction(
    old: Tensor, rollout_logprobs: Tensor | None, mask: Tensor, settings: PolicySettings
) -> Tensor:
    """Weight of each token for the difference between the rollout's engine and the training's."""
    if settings.correction == "none" or rollout_logprobs is None:
        return torch.ones_like(old)
    level, _, rule = settings.correction.partition("_")
    log_weight = old - torch.where(mask, rollout_logprobs.detach(), 0.0)
    if level == "sequence":
        log_weight = log_weight.sum(dim=1, keepdim=True).expand_as(old)
    weight = log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if rule == "truncate":
        return weight.clamp(max=settings.correction_max)
    kept = (weight >= settings.correction_min) & (weight <= settings.correction_max)
    return torch.where(kept, weight, 0.0)


def _stats(
    mask: Tensor,
    focus: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    weight: Tensor,
    surrogate: Tensor,
    divergence: Tensor | None,
    settings: PolicySettings,
) -> dict[str, Tensor]:
    """Sums over the masked tokens, and extremes."""

    def count(where: Tensor) -> Tensor:
        return (where & mask).sum().to(ratio.dtype)

    rises, falls = advantage > 0, advantage < 0
    never = torch.zeros_like(mask)
    low = high = bounded = never
    if settings.loss in _CLIPPED:
        low = falls & (ratio < 1.0 - settings.clip_low)
        high = rises & (ratio > 1.0 + settings.upper_clip)
        if settings.negative_bound is not None:
            bounded = falls & (ratio > settings.negative_bound)
    capped = ratio > settings.cispo_max if settings.loss == "cispo" else never
    moves = (advantage != 0) & (weight > 0) & focus & ~(low | high | bounded)
    stats = {
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
    if divergence is not None:
        stats["kl"] = divergence.sum()
    return stats


def _extreme(values: Tensor, mask: Tensor, which: Literal["min", "max"]) -> Tensor:
    """Least or largest of the masked values; the infinity that never wins if there is none."""
    nothing = math.inf if which == "min" else -math.inf
    chosen = torch.cat([torch.where(mask, values, nothing).flatten(), values.new_full((1,), nothing)])
    return chosen.amin() if which == "min" else chosen.amax()


def _focus(entropy: Tensor | None, mask: Tensor, share: float) -> Tensor:
    assert entropy is not None, "_check_inputs asks for it"
    return top_entropy_mask(entropy, mask, share)


def _check_inputs(
    logprobs: Tensor,
    settings: PolicySettings,
    reference_logprobs: Tensor | None,
    exact_kl: Tensor | None,
    entropy: Tensor | None,
    rollout_logprobs: Tensor | None,
    focus: Tensor | None,
) -> None:
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log-probabilities must be float32, got {logprobs.dtype}: their differences are lost in fewer bits; "
            "compute the head's log-softmax in float32"
        )
    if settings.kl > 0 and reference_logprobs is None and exact_kl is None:
        raise ValueError(
            f"kl is {settings.kl}, but there are no reference_logprobs; pass them or set kl to 0"
        )
    if settings.correction != "none" and rollout_logprobs is None:
        raise ValueError(
            f"correction is {settings.correction}, but there are no rollout_logprobs; "
            "pass them or set correction to none"
        )
    if settings.top_entropy < 1.0 and entropy is None and focus is None:
        raise ValueError(
            f"top_entropy is {settings.top_entropy}, but there is no entropy; pass it or set top_entropy to 1"
        )
    if settings.entropy_bonus > 0:
        if entropy is None:
            raise ValueError(
                f"entropy_bonus is {settings.entropy_bonus}, but there is no entropy; pass it or set it to 0"
            )
        if logprobs.requires_grad and not entropy.requires_grad:
            raise ValueError("entropy_bonus needs the entropy with its graph, got one that is detached")


def _std(values: Tensor, kept: Tensor) -> Tensor:
    """Standard deviation of the kept values (of the population), exactly 0 if they are equal."""
    chosen = values[kept]
    if chosen.numel() < 2 or bool(chosen.amax() - chosen.amin() <= EQUAL_REWARDS * chosen.abs().amax()):
        return values.new_zeros(())
    return chosen.std(correction=0)


def _normalised(values: Tensor, kept: Tensor) -> Tensor:
    """The values less the mean of the kept ones, by their standard deviation; 0 if they are equal."""
    spread = _std(values, kept)
    if spread == 0:
        return torch.zeros_like(values)
    return torch.where(kept, (values - values[kept].mean()) / spread, 0.0)


def _check_overlong(max_length: int, buffer: int) -> None:
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"overlong_buffer must be in (0, overlong_length], got {buffer} with overlong_length {max_length}"
        )
