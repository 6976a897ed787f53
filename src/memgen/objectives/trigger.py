"""The trigger's objective: rewards with a penalty on more invocations than success needs (paper, Eq. 8-9).

The paper subtracts lambda * sum_j max(0, d_j - p_bar) from an episode's reward, where p_bar is the mean invocation rate
of the high-reward episodes. The released code has no such term. The paper leaves open, and we decide:

- The penalty enters through the reward, so that advantages see it.
- A rate is invocations by decisions offered (all boundaries at which the trigger was asked). By "activated" positions
  alone, as the text has it, every rate would be 1 and the penalty always 0.
- The median is that of the episodes' rewards in the group (REV, Eq. 19) or in the batch (V2, Eq. 9), and for an even
  number of episodes the average of the middle two: with half of the answers right, the right ones have high reward. The
  lower of the two, which `torch.median` takes, would count every episode then.
- An episode to which no decision was offered has no rate: it counts for the median, not for p_bar. If no high-reward
  episode was offered a decision, nothing is known about what success needs, and p_bar is 1: no penalty.

The surrogate is `policy_loss` of `memgen.objectives.policy_gradient`, with decisions in place of tokens.
"""

# E episodes, M decisions in all

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen.types import Decision


@dataclass(frozen=True)
class TriggerSettings:
    """The trigger's penalty on invocations."""

    penalty: float = 0.1
    """Lambda of Eq. 8: the reward that an invocation costs where success needs none. The paper gives no value.
    0: the plain reward."""
    scope: Literal["group", "batch"] = "group"
    """Episodes that median and mean rate are taken over: the answers to one prompt (REV), or the whole batch (V2)."""
    median: Literal["average", "lower"] = "average"
    """For an even number of episodes: the average of the middle two rewards, or the lower of them."""

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be 0 or more, got {self.penalty}; it must be finite")


@dataclass(frozen=True)
class Shaped:
    """Rewards with their penalty.

    Attributes:
        rewards: reward less penalty of each episode.
        p_bar: mean invocation rate of the high-reward episodes of its scope.
        penalty: subtracted from the reward.
        high: True for high-reward episodes: valid, and at or above the median of their scope.
    """

    rewards: Float[Tensor, " episodes"]
    p_bar: Float[Tensor, " episodes"]
    penalty: Float[Tensor, " episodes"]
    high: Bool[Tensor, " episodes"]


def shaped_rewards(
    rewards: Float[Tensor, " episodes"],
    invocations: Int[Tensor, " episodes"],
    offered: Int[Tensor, " episodes"],
    group: Int[Tensor, " episodes"],
    settings: TriggerSettings,
    valid: Bool[Tensor, " episodes"] | None = None,
) -> Shaped:
    """Rewards with the reward-adaptive penalty (paper, Eq. 8-9; REV, Eq. 19-20).

    Decisions are binary, so the sum of max(0, d_j - p_bar) is (1 - p_bar) times the number of invocations. With the
    batch as scope, give it the episodes of all ranks.

    Args:
        rewards: total reward of each episode.
        invocations: how often the trigger said INVOKE in it.
        offered: how often it was asked.
        group: number of each episode's group (its prompt).
        settings: lambda, scope, median.
        valid: False where an episode counts neither for a median nor for a rate; default: all count. It pays the
            penalty all the same.

    Raises:
        ValueError: if an episode has more invocations than decisions.
    """
    if bool((invocations > offered).any()) or bool((invocations < 0).any()):
        raise ValueError(
            "invocations must be between 0 and the decisions offered, "
            f"got {invocations.tolist()} of {offered.tolist()}"
        )
    kept = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    scope = group if settings.scope == "group" else torch.zeros_like(group)
    rewards = rewards.detach()
    rates = invocations.double() / offered.clamp(min=1)
    high = torch.zeros_like(kept)
    p_bar = torch.ones_like(rewards)
    for number in scope.unique():
        members = (scope == number) & kept
        if bool(members.any()):
            high |= members & (rewards >= _median(rewards[members], settings.median))
        asked = high & (scope == number) & (offered > 0)
        if bool(asked.any()):
            p_bar = torch.where(scope == number, rates[asked].mean().to(rewards.dtype), p_bar)
    penalty = settings.penalty * (1.0 - p_bar) * invocations
    return Shaped(rewards=rewards - penalty, p_bar=p_bar, penalty=penalty, high=high)


def decision_logprobs(
    logits: Float[Tensor, "decisions 2"], decisions: Int[Tensor, " decisions"]
) -> Float[Tensor, " decisions"]:
    """Log-probability of each decision.

    Args:
        logits: SKIP and INVOKE logits.
        decisions: SKIP or INVOKE. They are looked at, so on the host no device is waited for.

    Raises:
        ValueError: if one of them is neither.
    """
    if bool((decisions < Decision.SKIP).any()) or bool((decisions > Decision.INVOKE).any()):
        raise ValueError(
            f"decisions must be SKIP (0) or INVOKE (1), got {sorted(set(decisions.tolist()))}; "
            "select those at which the trigger was asked"
        )
    chosen: Tensor = logits.log_softmax(dim=-1).gather(1, decisions.to(logits.device)[:, None].long())
    return chosen[:, 0]


def decision_entropy(logits: Float[Tensor, "decisions 2"]) -> Float[Tensor, " decisions"]:
    """Entropy of each decision, in nats."""
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def decision_kl(
    logits: Float[Tensor, "decisions 2"], reference_logits: Float[Tensor, "decisions 2"]
) -> Float[Tensor, " decisions"]:
    """KL(trigger || reference) of each decision, exact: both outcomes are known, so nothing has to be estimated."""
    logp, reference = logits.log_softmax(dim=-1), reference_logits.detach().log_softmax(dim=-1)
    return (logp.exp() * (logp - reference)).sum(dim=-1)


def _median(rewards: Tensor, rule: Literal["average", "lower"]) -> Tensor:
    lower = rewards.median()
    if rule == "lower":
        return lower
    # The median of the negated values is the negative of the upper middle one.
    return (lower + -(-rewards).median()) / 2
