"""Settings of the policy-gradient objectives, one frozen record for the weaver's and the trigger's training."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal

KLEstimator = Literal["k1", "k2", "k3"]

_WITHOUT_CLIPPING = ("cispo", "sapo", "reinforce")


@dataclass(frozen=True)
class PolicySettings:
    """The policy objective."""

    loss: str = "grpo"
    """grpo: mean over episodes of each episode's mean over tokens. dapo: mean over the step's tokens. bnpo: mean over
    the local batch's tokens. dr_grpo: sum over tokens by episodes x token limit (arXiv:2503.20783). gspo: one ratio
    per episode (2507.18071). cispo: the ratio is a capped constant weight on the log-probability (2506.13585). sapo:
    a soft gate instead of clipping (2511.20347). reinforce: reward times log-probability. reinforce_pp: clipped, with
    advantages normalised over the batch's tokens (2501.03262); its KL, unlike that of verl's and OpenRLHF's, is not in the
    rewards but a term of the loss, as with all others. Or the import path of a function of your own, as `my_package.my_loss`:
    see `memgen.objectives.policy_losses`."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - this. In [0, 1]."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + this. None: as `clip_low`. DAPO's clip-higher is 0.28."""
    delta: float | None = None
    """Two-sided clipping (INTELLECT-2): the ratio itself is capped here before the surrogate; above 1 + `clip_high`.
    It matters where the advantage is negative, and is the bound that dual-clip PPO calls c (2012.09847)."""
    dual_clip: float | None = None
    """Deprecated name of `delta`; removed in the next release."""
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
    paper's weaver, Dr. GRPO). reinforce_pp always normalises over the batch's tokens."""
    leave_one_out: bool = False
    """The group's mean leaves out the episode itself: no bias from its own reward (RLOO)."""
    kl: float = 0.0
    """Weight of the KL divergence from the reference policy. 0: no reference needed."""
    kl_estimator: KLEstimator = "k3"
    """k1: log-ratio. k2: half its square. k3: unbiased and never negative."""
    kl_weighted: bool = False
    """Weights the KL of a token by its ratio: unbiased off policy, in its gradient too (DeepSeek-V3.2)."""
    entropy_bonus: float = 0.0
    """Weight of the policy's entropy, which is added to the objective."""
    top_entropy: float = 1.0
    """Share of tokens, those of highest entropy, whose surrogate is trained (2506.01939 takes 0.2). 1: all. The
    others still count in every divisor, and have their KL and entropy terms. The stages take the share of a whole
    optimizer step, by the entropies under the weights that rolled out."""
    mask_truncated: bool = False
    """Leaves episodes that were truncated at their limit out of the loss."""
    overlong_length: int | None = None
    """Length at which DAPO's soft overlong punishment reaches -1. None: no punishment."""
    overlong_buffer: int | None = None
    """Tokens before `overlong_length` over which the punishment grows from 0."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """Weights the surrogate by training over rollout probability, of each token or of the episode: truncated at
    `correction_max`, or set to 0 outside of [`correction_min`, `correction_max`]."""
    correction_max: float = 2.0
    """Largest correction weight."""
    correction_min: float = 0.0
    """Smallest correction weight that a mask keeps."""

    def __post_init__(self) -> None:
        self._take_deprecated_names()
        self._check_ranges()
        if self.delta is not None and self.loss in _WITHOUT_CLIPPING:
            raise ValueError(f"delta has no effect on loss {self.loss}; set it to null")
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
            check_overlong(self.overlong_length, self.overlong_buffer)

    def _take_deprecated_names(self) -> None:
        if self.dual_clip is None:
            return
        if self.delta is not None:
            raise ValueError("delta and dual_clip are the same bound under two names; set dual_clip to null")
        if self.dual_clip <= 1.0 + self.upper_clip:
            raise ValueError(
                f"dual_clip is now delta, which must be above 1 + clip_high = {1.0 + self.upper_clip:g}, got "
                f"{self.dual_clip}; set delta to a larger number"
            )
        warnings.warn(
            f"policy.dual_clip is deprecated; set policy.delta to {self.dual_clip} in its place",
            FutureWarning,
            stacklevel=4,
        )
        object.__setattr__(self, "delta", self.dual_clip)
        object.__setattr__(self, "dual_clip", None)

    def _check_ranges(self) -> None:
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
        for field in ("cispo_max", "sapo_tau_positive", "sapo_tau_negative", "correction_max"):
            need(getattr(self, field) > 0.0, field, "above 0")
        for field in ("kl", "entropy_bonus", "correction_min"):
            need(0.0 <= getattr(self, field) < math.inf, field, "0 or more")
        need(self.correction_min <= self.correction_max, "correction_min", "at most correction_max")
        need(0.0 < self.top_entropy <= 1.0, "top_entropy", "in (0, 1]")

    @property
    def upper_clip(self) -> float:
        """`clip_high`, or `clip_low` where it is not set."""
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def used_baseline(self) -> Literal["group", "batch", "none"]:
        """`baseline`, or what the loss's source uses where it is not set."""
        if self.baseline is not None:
            return self.baseline
        return {"reinforce": "none", "reinforce_pp": "batch"}.get(self.loss, "group")  # type: ignore[return-value]


def check_overlong(max_length: int, buffer: int) -> None:
    """Checks the two numbers of the soft overlong punishment.

    Raises:
        ValueError: if the buffer is not in (0, max_length].
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"overlong_buffer must be in (0, overlong_length], got {buffer} with overlong_length {max_length}"
        )
