"""The policy losses, one function each (paper, Eq. 14-16, and later work).

A loss function says three things about the tokens of a micro-batch: the ratio, the surrogate, and how tokens add up.
`memgen.objectives.policy_gradient.policy_loss` does the rest, the same for every loss: correction, entropy focus, KL,
entropy bonus and what is logged. A "token" is whatever the policy chose: an agent token of the weaver's episodes, or a
decision of the trigger; the mask says where a choice was made.

To add a loss, write a function here and add it to `LOSSES`, or write it in a module of your own and give its import path:

    def unclipped(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
        return PolicyTerms(batch.ratio * batch.advantages, batch.ratio, mean_over_step_tokens)

    # policy.loss: my_package.unclipped

How the losses differ from their sources:

- Each is divided by the totals of the whole optimizer step (`StepTotals`), for every kind but bnpo, so micro-batches and
  ranks of any size add up to exactly the loss of one big batch.
- REINFORCE is divided by the step's tokens, not its episodes: another scale, the same direction.
"""

# E episodes, N tokens of the longest episode (all of its turns, one behind the other)

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memgen.objectives.policy_settings import PolicySettings

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are held within this, so that no exponential overflows (verl). No gradient flows beyond it."""


@dataclass(frozen=True)
class StepTotals:
    """Totals of one optimizer step, over all of its micro-batches and ranks.

    Attributes:
        tokens: trained tokens (True in the masks).
        episodes: episodes that a mean over episodes is taken over. With `mask_truncated`, TRL counts those it leaves
            out as well; count only the others, and the step is as large as without them.
        micro_batches: of all ranks: what the caller's framework divides the sum of their losses by.
        max_tokens: most tokens that an episode can have; only dr_grpo reads it.
    """

    tokens: int
    episodes: int
    micro_batches: int = 1
    max_tokens: int = 1

    def __post_init__(self) -> None:
        if min(self.tokens, self.episodes) < 0 or min(self.micro_batches, self.max_tokens) < 1:
            raise ValueError(
                "StepTotals needs tokens and episodes of 0 or more, and micro_batches and max_tokens of 1 or more, got "
                f"{self}"
            )


@dataclass(frozen=True)
class PolicyBatch:
    """The tokens of a micro-batch, as a loss function reads them.

    Attributes:
        logprobs: log-probability of each token under the policy in training, with its graph, (E, N); 0 outside the mask.
        old_logprobs: under the policy that the ratio is taken against, (E, N); 0 outside the mask.
        advantages: of each token's episode, (E, N).
        mask: True at the tokens to train, (E, N).
        log_ratio: `logprobs - old_logprobs`, (E, N).
        ratio: its exponential, held within `LOG_RATIO_LIMIT`, (E, N).
    """

    logprobs: Float[Tensor, "episodes tokens"]
    old_logprobs: Float[Tensor, "episodes tokens"]
    advantages: Float[Tensor, "episodes tokens"]
    mask: Bool[Tensor, "episodes tokens"]
    log_ratio: Float[Tensor, "episodes tokens"]
    ratio: Float[Tensor, "episodes tokens"]

    @classmethod
    def build(
        cls,
        logprobs: Float[Tensor, "episodes tokens"],
        old_logprobs: Float[Tensor, "episodes tokens"],
        advantages: Float[Tensor, " episodes"],
        mask: Bool[Tensor, "episodes tokens"],
    ) -> PolicyBatch:
        """Masks the log-probabilities and takes their ratio. Values outside the mask may be anything, NaN included."""
        logp = torch.where(mask, logprobs, 0.0)  # (E, N)
        old = torch.where(mask, old_logprobs.detach(), 0.0)  # (E, N)
        log_ratio = logp - old
        return cls(
            logprobs=logp,
            old_logprobs=old,
            advantages=advantages.detach().to(logp.dtype)[:, None].expand_as(logp),
            mask=mask,
            log_ratio=log_ratio,
            ratio=log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp(),
        )

    @property
    def counts(self) -> Int[Tensor, " episodes"]:
        """Trained tokens of each episode."""
        return self.mask.sum(dim=1)


Aggregation = Callable[[Tensor, Tensor, StepTotals], Tensor]
"""Adds up what tokens contribute, (E, N) and 0 outside the mask, given each episode's trained tokens, (E,)."""


@dataclass(frozen=True)
class PolicyTerms:
    """What a loss function makes of a micro-batch.

    Attributes:
        surrogate: what each token adds to the objective (to be maximised), with its graph, (E, N).
        ratio: the ratio that the surrogate is made of, for the logs, (E, N).
        aggregate: how the tokens' objective becomes one number.
        clipped_low: True where clipping below stops the gradient, for the logs, (E, N); None: nowhere.
        clipped_high: likewise above.
        bounded: True where an upper bound on the ratio (`delta`) stops the gradient; None: nowhere.
        capped: True where the ratio's weight is capped but the gradient flows; None: nowhere.
    """

    surrogate: Float[Tensor, "episodes tokens"]
    ratio: Float[Tensor, "episodes tokens"]
    aggregate: Aggregation
    clipped_low: Bool[Tensor, "episodes tokens"] | None = None
    clipped_high: Bool[Tensor, "episodes tokens"] | None = None
    bounded: Bool[Tensor, "episodes tokens"] | None = None
    capped: Bool[Tensor, "episodes tokens"] | None = None


LossFunction = Callable[[PolicyBatch, PolicySettings], PolicyTerms]


# Ratios


def episode_ratio(batch: PolicyBatch) -> Float[Tensor, "episodes tokens"]:
    """One ratio for all tokens of an episode: the geometric mean of theirs (GSPO)."""
    mean_log_ratio = batch.log_ratio.sum(dim=1) / batch.counts.clamp(min=1)
    ratio = mean_log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()[:, None]
    return ratio.expand_as(batch.log_ratio)


# Aggregations


def mean_over_episodes(objective: Tensor, counts: Tensor, totals: StepTotals) -> Tensor:
    """Mean over the step's episodes of each episode's mean over its tokens."""
    means = objective.sum(dim=1) / counts.clamp(min=1)
    return means.sum() * (totals.micro_batches / max(totals.episodes, 1))


def mean_over_step_tokens(objective: Tensor, counts: Tensor, totals: StepTotals) -> Tensor:
    """Mean over the step's tokens."""
    return objective.sum() * (totals.micro_batches / max(totals.tokens, 1))


def mean_over_local_tokens(objective: Tensor, counts: Tensor, totals: StepTotals) -> Tensor:
    """Mean over the micro-batch's own tokens."""
    return objective.sum() / counts.sum().clamp(min=1)


def sum_over_token_limit(objective: Tensor, counts: Tensor, totals: StepTotals) -> Tensor:
    """Sum over the step's tokens, divided by its episodes times the token limit."""
    return objective.sum() * (totals.micro_batches / (max(totals.episodes, 1) * totals.max_tokens))


# Losses


def grpo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """GRPO (arXiv:2402.03300): clipped, mean over episodes of each episode's mean."""
    return clipped(batch.ratio, batch, settings, mean_over_episodes)


def bnpo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """Clipped, mean over the local tokens (TRL's name and rule)."""
    return clipped(batch.ratio, batch, settings, mean_over_local_tokens)


def dr_grpo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """Dr. GRPO (arXiv:2503.20783): clipped, divided by a constant, so that length has no weight."""
    return clipped(batch.ratio, batch, settings, sum_over_token_limit)


def dapo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """DAPO (arXiv:2503.14476): clipped, mean over the step's tokens."""
    return clipped(batch.ratio, batch, settings, mean_over_step_tokens)


def gspo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """GSPO (arXiv:2507.18071): the ratio is the episode's.

    With one advantage per episode this has the gradient of the paper's token-wise form (GSPO-token) as well.
    """
    return clipped(episode_ratio(batch), batch, settings, mean_over_episodes)


def cispo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """CISPO (arXiv:2506.13585): the capped ratio is a constant weight on the log-probability."""
    weight = batch.ratio.detach().clamp(max=settings.cispo_max)
    return PolicyTerms(
        surrogate=weight * batch.advantages * batch.logprobs,
        ratio=batch.ratio,
        aggregate=mean_over_step_tokens,
        capped=batch.ratio > settings.cispo_max,
    )


def sapo(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """SAPO (arXiv:2511.20347): a soft gate on the ratio, of another temperature for each sign of the advantage."""
    tau = torch.full_like(batch.ratio, settings.sapo_tau_negative)
    tau = torch.where(batch.advantages > 0, settings.sapo_tau_positive, tau)
    gate = torch.sigmoid(tau * (batch.ratio - 1.0)) * (4.0 / tau)
    return PolicyTerms(gate * batch.advantages, batch.ratio, mean_over_episodes)


def reinforce(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """REINFORCE: advantage times log-probability."""
    return PolicyTerms(batch.advantages * batch.logprobs, batch.ratio, mean_over_step_tokens)


def reinforce_pp(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """REINFORCE++ (arXiv:2501.03262): clipped; its advantages are normalised over the batch's tokens."""
    return clipped(batch.ratio, batch, settings, mean_over_step_tokens)


def clipped(
    ratio: Tensor, batch: PolicyBatch, settings: PolicySettings, aggregate: Aggregation
) -> PolicyTerms:
    """PPO's clipped surrogate of a ratio, with `delta` as the bound where the advantage is negative.

    Args:
        ratio: of each token, with its graph, (E, N).
        batch: the micro-batch.
        settings: `clip_low`, `clip_high`, `delta`.
        aggregate: how tokens add up.
    """
    advantages = batch.advantages
    within = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.upper_clip)
    # Where both are equal, torch.minimum halves the gradient between them: at a ratio of 1 that is the whole.
    surrogate = torch.minimum(ratio * advantages, within * advantages)
    rises, falls = advantages > 0, advantages < 0
    bounded = None
    if settings.delta is not None:
        surrogate = torch.where(falls, torch.maximum(surrogate, settings.delta * advantages), surrogate)
        bounded = falls & (ratio > settings.delta)
    return PolicyTerms(
        surrogate=surrogate,
        ratio=ratio,
        aggregate=aggregate,
        clipped_low=falls & (ratio < 1.0 - settings.clip_low),
        clipped_high=rises & (ratio > 1.0 + settings.upper_clip),
        bounded=bounded,
    )


LOSSES: dict[str, LossFunction] = {
    "grpo": grpo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": reinforce,
    "reinforce_pp": reinforce_pp,
}
"""The losses that `policy.loss` may name."""


def loss_function(name: str) -> LossFunction:
    """The loss function of a name.

    Args:
        name: one of `LOSSES`, or the import path of a function.

    Raises:
        ValueError: if it is neither.
    """
    if name in LOSSES:
        return LOSSES[name]
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise ValueError(
            f"policy.loss must be one of {', '.join(LOSSES)}, or the import path of a function, got {name}"
        )
    try:
        found: LossFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy.loss is {name}, which cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(  # noqa: TRY004 - a setting is wrong, not a type
            f"policy.loss is {name}, which is no function but a {type(found).__name__}"
        )
    return found
