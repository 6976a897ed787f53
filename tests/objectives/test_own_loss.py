"""A policy loss of a user's own, chosen by its import path: it is in no table and edits no file of the package."""

from __future__ import annotations

import pytest
import torch

from memgen.objectives.policy_gradient import TokenScores, policy_loss, read_stats
from memgen.objectives.policy_losses import (
    LOSSES,
    PolicyBatch,
    PolicyTerms,
    StepTotals,
    loss_function,
    mean_over_step_tokens,
)
from memgen.objectives.policy_settings import PolicySettings
from tolerance import assert_close


def quadratic(batch: PolicyBatch, settings: PolicySettings) -> PolicyTerms:
    """The unclipped surrogate less a quadratic penalty on the log-ratio."""
    surrogate = batch.ratio * batch.advantages - settings.clip_low * batch.log_ratio.square()
    return PolicyTerms(surrogate, batch.ratio, mean_over_step_tokens)


MINE = f"{__name__}.quadratic"


def test_a_loss_is_found_by_its_import_path_and_computed_like_the_others():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, torch.nan]], requires_grad=True)
    old = torch.tensor([[-1.1, -1.8], [-0.5, torch.nan]])
    result = policy_loss(
        TokenScores(logprobs, mask, reference_logprobs=old),
        old,
        torch.tensor([1.0, -2.0]),
        PolicySettings(loss=MINE, clip_low=0.3, kl=0.1, kl_estimator="k1"),
        StepTotals(tokens=6, episodes=4, micro_batches=2),
    )
    terms = [(0.1, 1.0), (-0.2, 1.0), (0.0, -2.0)]
    gains = [torch.tensor(d).exp() * a - 0.3 * d * d - 0.1 * d for d, a in terms]
    assert_close("loss", result.loss, -torch.stack(gains).sum() * 2 / 6)
    result.loss.backward()
    assert float(logprobs.grad[1, 1]) == 0.0
    assert read_stats(result.stats)["clip_high"] == 0.0


def test_a_name_that_is_no_loss_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"policy\.loss must be one of grpo, .*or the import path .*, got grop"
    ):
        loss_function("grop")
    with pytest.raises(ValueError, match=r"policy\.loss is memgen\.nowhere\.loss, which cannot be imported"):
        loss_function("memgen.nowhere.loss")
    with pytest.raises(ValueError, match=r"math\.pi, which is no function but a float"):
        loss_function("math.pi")


def test_every_named_loss_is_the_function_of_its_name():
    assert all(loss_function(name) is function for name, function in LOSSES.items())
    assert [function.__name__ for function in LOSSES.values()] == list(LOSSES)
