"""The policy losses against plain Python numbers, and their identities."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memgen.objectives.policy_gradient import (
    PolicyLoss,
    TokenScores,
    entropy_threshold,
    kl_penalty,
    policy_loss,
    read_stats,
)
from memgen.objectives.policy_losses import LOSSES, StepTotals
from memgen.objectives.policy_settings import PolicySettings
from objectives.plain_policy import Case, difference_quotient, plain_focus, plain_loss
from tolerance import assert_close

SPLITTABLE = tuple(loss for loss in LOSSES if loss != "bnpo")


def random_case(seed: int, *, spread: float = 0.6, episodes: int = 5, tokens: int = 6) -> Case:
    """Unequal episodes with gaps in their masks; the second has no token at all."""
    draw = random.Random(seed)

    def rows(low: float, high: float) -> list[list[float]]:
        return [[draw.uniform(low, high) for _ in range(tokens)] for _ in range(episodes)]

    def near(base: list[list[float]], by: float) -> list[list[float]]:
        return [[value + draw.uniform(-by, by) for value in row] for row in base]

    logprobs = rows(-3.0, -0.1)
    old = near(logprobs, spread)
    mask = []
    for _ in range(episodes):
        length = draw.randint(1, tokens)
        mask.append([t < length and (draw.random() < 0.8 or t == 0) for t in range(tokens)])
    mask[1] = [False] * tokens
    return Case(
        logprobs=logprobs,
        old=old,
        advantages=[draw.choice([-1, 1]) * draw.uniform(0.2, 2.0) for _ in range(episodes)],
        mask=mask,
        reference=near(logprobs, 1.0),
        entropy=rows(0.1, 2.0),
        rollout=near(old, 0.5),
    )


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The case as tensors, with NaN wherever nothing may be read."""
    mask = torch.tensor(case.mask)
    made = {}
    for name in ("logprobs", "old", "reference", "exact_kl", "entropy", "rollout"):
        rows = getattr(case, name)
        if rows is not None:
            made[name] = torch.tensor(rows, dtype=dtype).masked_fill(~mask, torch.nan)
    for name in ("logprobs", "entropy", "exact_kl"):
        if name in made:
            made[name].requires_grad_()
    return made | {"mask": mask, "advantages": torch.tensor(case.advantages, dtype=dtype)}


def ours(
    case: Case, settings: PolicySettings, totals: StepTotals, made: dict[str, torch.Tensor]
) -> PolicyLoss:
    """Our loss; with `top_entropy`, on the tokens of highest entropy of the case."""
    focus = case.focus
    if focus is None and settings.top_entropy < 1:
        focus = plain_focus(case, settings.top_entropy)
    return policy_loss(
        TokenScores(
            made["logprobs"],
            made["mask"],
            entropy=made.get("entropy"),
            rollout_logprobs=made.get("rollout"),
            reference_logprobs=made.get("reference"),
            exact_kl=made.get("exact_kl"),
        ),
        made["old"],
        made["advantages"],
        settings,
        totals,
        focus=None if focus is None else torch.tensor(focus),
    )


def whole(case: Case, micro_batches: int = 1) -> StepTotals:
    return StepTotals(
        tokens=sum(map(sum, case.mask)),
        episodes=len(case.mask),
        micro_batches=micro_batches,
        max_tokens=len(case.mask[0]) + 3,
    )


def added_up(stats: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Statistics of several micro-batches as those of one, as `collectives.stats_over_ranks` reduces them."""
    reduce = {"min": torch.amin, "max": torch.amax}
    return {
        name: reduce.get(name.rpartition("_")[2], torch.sum)(torch.stack([one[name] for one in stats]))
        for name in stats[0]
    }


VARIANTS = {
    "plain": {},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.28},
    "delta": {"delta": 1.4},
    "k1": {"kl": 0.3, "kl_estimator": "k1"},
    "k2": {"kl": 0.3, "kl_estimator": "k2"},
    "k3": {"kl": 0.3, "kl_estimator": "k3"},
    "k1 weighted": {"kl": 0.3, "kl_estimator": "k1", "kl_weighted": True},
    "k3 weighted": {"kl": 0.3, "kl_estimator": "k3", "kl_weighted": True},
    "entropy bonus": {"entropy_bonus": 0.2},
    "top entropy": {"top_entropy": 0.3},
    "token_truncate": {"correction": "token_truncate", "correction_max": 1.2},
    "token_mask": {"correction": "token_mask", "correction_max": 1.3, "correction_min": 0.8},
    "sequence_truncate": {"correction": "sequence_truncate", "correction_max": 1.2},
    "sequence_mask": {"correction": "sequence_mask", "correction_max": 1.5},
    "everything": {
        "clip_high": 0.28,
        "kl": 0.1,
        "kl_weighted": True,
        "entropy_bonus": 0.1,
        "top_entropy": 0.5,
        "correction": "token_truncate",
    },
}
COMBINATIONS = [
    pytest.param(loss, options, id=f"{loss}-{name}")
    for loss in LOSSES
    for name, options in VARIANTS.items()
    if not ("delta" in options and loss in ("cispo", "sapo", "reinforce"))
]


@pytest.mark.parametrize(("loss", "options"), COMBINATIONS)
def test_loss_and_gradient_equal_plain_numbers(loss, options):
    settings = PolicySettings(loss=loss, cispo_max=1.3, **options)
    for seed in range(2):
        case = random_case(seed)
        totals = whole(case, micro_batches=3)
        made = tensors(case)
        part = ours(case, settings, totals, made).loss
        assert_close("loss", part, torch.tensor(plain_loss(case, settings, totals), dtype=torch.float64))
        part.backward()
        for field in ("logprobs", "entropy") if settings.entropy_bonus else ("logprobs",):
            expected = torch.tensor(difference_quotient(case, field, settings, totals), dtype=torch.float64)
            # A difference quotient with a step of 1e-5 is good to about 1e-10 times the loss over the step.
            assert_close(f"gradient of {field}", made[field].grad, expected, dtype=torch.float32, factor=0.1)
            assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_equals_plain_numbers(loss):
    settings = PolicySettings(loss=loss, kl=0.1, correction="token_truncate")
    for seed in range(5):
        case = random_case(seed)
        part = ours(case, settings, whole(case), tensors(case, torch.float32)).loss
        assert part.dtype == torch.float32
        assert_close("loss", part, torch.tensor(plain_loss(case, settings, whole(case))), factor=5.0)


def test_the_random_cases_reach_every_branch():
    settings = PolicySettings(loss="grpo", delta=1.3)
    cases = [random_case(seed) for seed in range(2)]
    stats = added_up([ours(case, settings, whole(case), tensors(case)).stats for case in cases])
    assert min(float(stats[name]) for name in ("clip_low", "clip_high", "clip_bound", "active")) > 0
    capped = PolicySettings(loss="cispo", cispo_max=1.3)
    stats = added_up([ours(case, capped, whole(case), tensors(case)).stats for case in cases])
    assert 0 < float(stats["clip_bound"]) < float(stats["tokens"])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_exact_divergence_stands_in_for_the_estimate(estimator):
    case = replace(random_case(3), exact_kl=random_case(4).entropy, reference=None)
    settings = PolicySettings(loss="grpo", kl=0.4, kl_estimator=estimator)
    made = tensors(case)
    part = ours(case, settings, whole(case), made)
    assert_close(
        "loss", part.loss, torch.tensor(plain_loss(case, settings, whole(case)), dtype=torch.float64)
    )
    part.loss.backward()
    expected = torch.tensor(difference_quotient(case, "exact_kl", settings, whole(case)), dtype=torch.float64)
    assert_close("gradient", made["exact_kl"].grad, expected, dtype=torch.float32)
    kl = sum(
        v
        for row, marks in zip(case.exact_kl, case.mask, strict=True)
        for v, m in zip(row, marks, strict=True)
        if m
    )
    assert read_stats(part.stats)["kl"] == pytest.approx(kl / whole(case).tokens)


@pytest.mark.parametrize("loss", SPLITTABLE)
@pytest.mark.parametrize("options", [{}, {"kl": 0.2, "entropy_bonus": 0.1}], ids=["plain", "kl and entropy"])
@pytest.mark.parametrize("sizes", [[1, 4], [2, 1, 2], [1, 1, 1, 1, 1]], ids=str)
def test_micro_batches_and_ranks_add_up_to_the_loss_of_one_batch(loss, options, sizes):
    settings = PolicySettings(loss=loss, **options)
    case = random_case(11)
    made = tensors(case)
    one = ours(case, settings, whole(case), made).loss
    (gradient,) = torch.autograd.grad(one, made["logprobs"])
    totals = whole(case, micro_batches=len(sizes))
    total, stats = torch.zeros(()), []
    start = 0
    for size in sizes:
        cut = {name: value[start : start + size] for name, value in made.items()}
        part = ours(case, settings, totals, cut)
        (part.loss / totals.micro_batches).backward()
        total = total + part.loss.detach() / totals.micro_batches
        stats.append(part.stats)
        start += size
    assert_close("loss", total, one)
    assert_close("gradient", made["logprobs"].grad, gradient)
    together = ours(case, settings, whole(case), made).stats
    assert read_stats(added_up(stats)) == pytest.approx(read_stats(together))


def test_bnpo_is_local_so_that_micro_batches_weigh_the_same_whatever_their_tokens():
    settings = PolicySettings(loss="bnpo")
    case = random_case(11)
    made = tensors(case)
    one = ours(case, settings, whole(case), made).loss
    cuts = [{name: value[rows] for name, value in made.items()} for rows in (slice(0, 1), slice(1, 5))]
    losses = [ours(case, settings, whole(case, micro_batches=2), cut).loss for cut in cuts]
    assert abs((sum(losses) / 2 - one).item()) > 1e-3


def test_a_focus_of_the_whole_step_makes_micro_batches_exact():
    settings = PolicySettings(loss="dapo", top_entropy=0.3)
    case = random_case(5)
    made = tensors(case)
    one = ours(case, settings, whole(case), made).loss
    focus = torch.tensor(plain_focus(case, 0.3))
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 5)):
        part = policy_loss(
            TokenScores(made["logprobs"][rows], made["mask"][rows]),
            made["old"][rows],
            made["advantages"][rows],
            settings,
            whole(case, micro_batches=2),
            focus=focus[rows],
        )
        total = total + part.loss / 2
    assert_close("loss", total, one)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_without_tokens_is_exactly_zero_and_keeps_its_graph(loss):
    settings = PolicySettings(loss=loss, kl=0.1, entropy_bonus=0.1, correction="sequence_truncate")
    empty = torch.zeros(3, 4, dtype=torch.bool)
    garbage = torch.full((3, 4), torch.nan)
    for tokens, episodes in ((7, 5), (0, 0)):
        logprobs = garbage.clone().requires_grad_()
        entropy = garbage.clone().requires_grad_()
        scores = TokenScores(
            logprobs, empty, entropy=entropy, rollout_logprobs=garbage, reference_logprobs=garbage
        )
        totals = StepTotals(tokens=tokens, episodes=episodes, micro_batches=2)
        part = policy_loss(scores, garbage, torch.ones(3), settings, totals)
        assert part.loss.item() == 0.0
        assert read_stats(part.stats) == {"tokens": 0.0, "episodes": 0.0}
        part.loss.backward()
        assert_close("gradient", logprobs.grad, torch.zeros(3, 4))
        assert_close("gradient of the entropy", entropy.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_without_columns_is_zero_too(loss):
    leaf = torch.zeros(2, 0, requires_grad=True)
    scores = TokenScores(leaf, torch.zeros(2, 0, dtype=torch.bool))
    part = policy_loss(scores, torch.zeros(2, 0), torch.ones(2), PolicySettings(loss=loss), StepTotals(3, 3))
    part.loss.backward()
    assert part.loss.item() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_the_order_of_episodes_do_not_matter(loss):
    settings = PolicySettings(loss=loss, kl=0.1, correction="sequence_mask")
    case = random_case(2)
    made = tensors(case)
    one = ours(case, settings, whole(case), made)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {
        name: torch.nn.functional.pad(value[order], (0, 2)) if value.ndim == 2 else value[order]
        for name, value in made.items()
    }
    other = ours(case, settings, whole(case), shuffled)
    assert_close("loss", other.loss, one.loss)
    assert read_stats(other.stats) == pytest.approx(read_stats(one.stats))


@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_first_update_ratios_are_one_nothing_is_clipped_and_the_gradient_is_that_of_reinforce(loss):
    case = random_case(7)
    made = tensors(case)
    made["old"] = made["logprobs"].detach()
    part = ours(case, PolicySettings(loss=loss), whole(case), made)
    stats = read_stats(part.stats)
    assert (stats["ratio_min"], stats["ratio"], stats["ratio_max"]) == (1.0, 1.0, 1.0)
    assert (stats["clip_low"], stats["clip_high"], stats["clip_bound"]) == (0.0, 0.0, 0.0)
    assert stats["active"] == 1.0
    (gradient,) = torch.autograd.grad(part.loss, made["logprobs"])
    totals = whole(case)
    counts = made["mask"].sum(dim=1, keepdim=True).clamp(min=1)
    divisor = {
        "grpo": totals.episodes * counts,
        "gspo": totals.episodes * counts,
        "sapo": totals.episodes * counts,
        "dr_grpo": totals.episodes * totals.max_tokens,
    }.get(loss, totals.tokens)
    expected = torch.where(made["mask"], -made["advantages"][:, None] / divisor, 0.0)
    assert_close("gradient", gradient, expected)


def test_gspo_is_grpo_where_every_episode_has_one_token():
    case = random_case(1, episodes=6, tokens=1)
    gradients, losses = [], []
    for loss in ("grpo", "gspo"):
        made = tensors(case)
        part = ours(case, PolicySettings(loss=loss), whole(case), made).loss
        part.backward()
        losses.append(part)
        gradients.append(made["logprobs"].grad)
    assert_close("loss", losses[1], losses[0])
    assert_close("gradient", gradients[1], gradients[0])


def test_gspo_has_the_gradient_of_its_token_wise_form():
    """GSPO-token (arXiv:2507.18071, Eq. 13-14): the episode's ratio held constant, times pi / sg[pi] per token."""
    case = random_case(9)
    made = tensors(case)
    ours(case, PolicySettings(loss="gspo"), whole(case), made).loss.backward()
    logprobs = made["logprobs"].detach().clone().requires_grad_()
    log_ratio = torch.where(made["mask"], logprobs - made["old"], 0.0)
    counts = made["mask"].sum(dim=1).clamp(min=1)
    constant = (log_ratio.sum(dim=1) / counts).exp().detach()[:, None]
    ratio = constant * (log_ratio - log_ratio.detach()).exp()
    advantage = made["advantages"][:, None]
    token = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -(torch.where(made["mask"], token, 0.0).sum(dim=1) / counts).sum() / len(case.mask)
    loss.backward()
    assert_close("gradient", made["logprobs"].grad, logprobs.grad)


def test_cispo_below_its_cap_has_reinforces_gradient_weighted_by_the_ratio():
    case = random_case(8)
    made = tensors(case)
    ours(case, PolicySettings(loss="cispo", cispo_max=1e6), whole(case), made).loss.backward()
    cispo = made["logprobs"].grad.clone()
    made = tensors(case)
    ours(case, PolicySettings(loss="reinforce"), whole(case), made).loss.backward()
    ratio = (made["logprobs"].detach() - made["old"]).exp()
    expected = torch.where(made["mask"], ratio * made["logprobs"].grad, 0.0)
    assert_close("gradient", cispo, expected)


def test_delta_bounds_the_loss_where_the_advantage_is_negative():
    case = random_case(6, spread=1.5)
    made = tensors(case)
    bounded = ours(case, PolicySettings(delta=1.5), whole(case), made)
    free = ours(case, PolicySettings(), whole(case), made)
    assert float(bounded.stats["clip_bound"]) > float(free.stats["clip_bound"]) == 0
    assert free.loss.item() > bounded.loss.item()


def test_the_deprecated_name_of_delta_still_works_and_says_so():
    with pytest.warns(FutureWarning, match=r"policy\.dual_clip is deprecated; set policy\.delta to 1\.5"):
        settings = PolicySettings(dual_clip=1.5)
    assert settings == PolicySettings(delta=1.5)


def test_ratios_beyond_all_bounds_stay_finite():
    logprobs = torch.tensor([[-0.0, -200.0], [-1e4, -0.0]], requires_grad=True)
    old = torch.tensor([[-300.0, -0.0], [-0.0, -1e4]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    for loss in LOSSES:
        settings = PolicySettings(loss=loss, kl=0.1, kl_weighted=True, correction="sequence_truncate")
        scores = TokenScores(logprobs, mask, rollout_logprobs=torch.zeros(2, 2), reference_logprobs=old)
        part = policy_loss(scores, old, torch.tensor([1.0, -1.0]), settings, StepTotals(4, 2))
        (gradient,) = torch.autograd.grad(part.loss, logprobs)
        assert bool(part.loss.isfinite())
        assert bool(gradient.isfinite().all())
        assert all(bool(value.isfinite()) for value in part.stats.values())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kl_of_a_policy_from_itself_is_zero(estimator, weighted):
    case = random_case(4)
    made = tensors(case)
    made["reference"] = made["logprobs"].detach()
    with_kl = PolicySettings(kl=0.5, kl_estimator=estimator, kl_weighted=weighted)
    part = ours(case, with_kl, whole(case), made)
    without = ours(case, PolicySettings(), whole(case), made)
    assert float(part.stats["kl"]) == float(part.stats["k1"]) == float(part.stats["k3"]) == 0.0
    assert_close("loss", part.loss, without.loss)
    (gradient,) = torch.autograd.grad(part.loss - without.loss, made["logprobs"])
    counts = made["mask"].sum(dim=1, keepdim=True).clamp(min=1)
    # k1's gradient is that of log pi: not 0 on a sample, 0 on average over the policy's own tokens.
    weight = (made["logprobs"].detach() - made["old"]).exp() if weighted else torch.ones_like(made["old"])
    expected = torch.where(made["mask"], 0.5 * weight / (len(case.mask) * counts), 0.0)
    assert_close("gradient", gradient, expected if estimator == "k1" else torch.zeros_like(expected))


def test_the_estimates_average_to_the_divergence_and_k2_and_the_weighted_ones_to_its_gradient():
    """Over all tokens of a small vocabulary, weighted with the policy: the average is exact, no sampling."""
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - other)).sum()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    policy = logp.exp().detach()
    for estimator in ("k1", "k3"):
        assert_close(estimator, (policy * kl_penalty(logp, other, estimator)).sum(), exact)
    ratio = (logp - logp.detach()).exp()
    terms = {
        "k2": kl_penalty(logp, other, "k2"),
        "k1 weighted": ratio * kl_penalty(logp, other, "k1"),
        "k3 weighted": ratio * kl_penalty(logp, other, "k3"),
    }
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad((policy * term).sum(), logits, retain_graph=True)
        assert_close(name, gradient, slope)
    (k1,) = torch.autograd.grad((policy * kl_penalty(logp, other, "k1")).sum(), logits, retain_graph=True)
    assert_close("k1", k1, torch.zeros_like(k1))
    (k3,) = torch.autograd.grad((policy * kl_penalty(logp, other, "k3")).sum(), logits)
    assert float((k3 - slope).abs().max()) > 0.01


def test_k3_is_held_within_its_limits_and_keeps_small_differences():
    zero = torch.zeros(4)
    far = kl_penalty(torch.tensor([-100.0, 100.0, -2.0, 0.0]), zero, "k3")
    assert_close("k3", far, torch.tensor([10.0, 10.0, 2.718281828**2 - 3.0, 0.0]))
    small = torch.tensor([1e-2, -1e-2])
    assert_close(
        "k3",
        kl_penalty(small, zero[:2], "k3"),
        (torch.exp(-small.double()) + small.double() - 1).float(),
        factor=5,
    )


# Focus


def test_the_threshold_is_the_least_entropy_that_is_kept():
    entropy = torch.tensor([0.5, 0.1, 0.9, 0.3])
    for share, least in ((0.25, 0.9), (0.5, 0.5), (1.0, 0.1), (0.01, 0.9)):
        assert float(entropy_threshold(entropy, share)) == pytest.approx(least)
    assert float(entropy_threshold(torch.zeros(0), 0.5)) == torch.inf
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 1.5"):
        entropy_threshold(entropy, 1.5)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_at_least_the_share_of_tokens_reaches_the_threshold_and_no_needless_one(values, share):
    entropy = torch.tensor(values) / 10
    threshold = entropy_threshold(entropy, share)
    wanted = max(1, round(share * len(values)))
    assert int((entropy >= threshold).sum()) >= wanted > int((entropy > threshold).sum())


def test_tokens_out_of_focus_keep_their_kl_but_have_no_surrogate():
    case = random_case(12)
    case.focus = [[False] * 6 for _ in range(5)]
    made = tensors(case)
    part = ours(case, PolicySettings(kl=0.2), whole(case), made)
    no_gain = dict(made, advantages=torch.zeros(5, dtype=torch.float64))
    case.focus = None
    only_kl = ours(case, PolicySettings(kl=0.2), whole(case), no_gain)
    assert_close("loss", part.loss, only_kl.loss)
    assert (
        float(part.stats["focused"]) == float(part.stats["active"]) == float(only_kl.stats["active"]) == 0.0
    )


def test_stats_report_drift_weights_and_entropy_per_token():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, torch.nan]])
    rollout = torch.tensor([[-1.0, -2.5], [-2.9, torch.nan]])
    entropy = torch.tensor([[0.1, 0.2], [0.6, torch.nan]])
    part = policy_loss(
        TokenScores(logprobs, mask, entropy=entropy, rollout_logprobs=rollout),
        logprobs,
        torch.tensor([1.0, -1.0]),
        PolicySettings(correction="token_mask", correction_max=1.5),
        StepTotals(3, 2),
    )
    stats = read_stats(part.stats)
    assert stats["drift"] == pytest.approx(0.2)
    assert stats["drift_max"] == pytest.approx(0.5)
    assert stats["entropy"] == pytest.approx(0.3)
    assert stats["correction"] == pytest.approx((1.0 + 0.0 + 2.718281828**-0.1) / 3)
    assert stats["active"] == pytest.approx(2 / 3)
    assert (stats["tokens"], stats["episodes"]) == (3.0, 2.0)


# Borders


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": 1.5}, r"clip_low must be in \[0, 1\], got 1.5"),
        ({"clip_high": -0.1}, "clip_high must be 0 or more, or null, got -0.1"),
        ({"delta": 1.2}, r"delta must be above 1 \+ clip_high = 1.2, got 1.2"),
        ({"clip_high": 0.5, "delta": 1.4}, r"delta must be above 1 \+ clip_high = 1.5, got 1.4"),
        ({"dual_clip": 1.1}, r"dual_clip is now delta, which must be above 1 \+ clip_high = 1.2, got 1.1"),
        ({"delta": 4.0, "dual_clip": 3.0}, "the same bound under two names"),
        ({"loss": "cispo", "delta": 4.0}, "delta has no effect on loss cispo"),
        ({"cispo_max": 0.0}, "cispo_max must be above 0, got 0.0"),
        ({"sapo_tau_negative": -1.0}, "sapo_tau_negative must be above 0"),
        ({"kl": -0.1}, "kl must be 0 or more, got -0.1"),
        ({"entropy_bonus": -0.1}, "entropy_bonus must be 0 or more"),
        ({"top_entropy": 0.0}, r"top_entropy must be in \(0, 1\], got 0.0"),
        ({"correction_min": 3.0}, "correction_min must be at most correction_max, got 3.0"),
        (
            {"leave_one_out": True, "loss": "reinforce"},
            "leave_one_out needs the group's mean, but the baseline is none",
        ),
        ({"loss": "reinforce_pp", "advantage_scale": "group"}, "reinforce_pp normalises over the batch"),
        ({"overlong_length": 10}, "go together, got 10 and None"),
        (
            {"overlong_length": 10, "overlong_buffer": 11},
            r"overlong_buffer must be in \(0, overlong_length\], got 11",
        ),
    ],
)
def test_settings_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolicySettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": 0.1}, "kl is 0.1, but there are no reference_logprobs"),
        ({"correction": "token_mask"}, "correction is token_mask, but there are no rollout_logprobs"),
        ({"top_entropy": 0.2}, "top_entropy is 0.2, but there is no focus"),
        ({"entropy_bonus": 0.2}, "entropy_bonus is 0.2, but there is no entropy"),
    ],
)
def test_what_the_settings_need_must_be_passed(options, message):
    logprobs = torch.zeros(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        policy_loss(
            TokenScores(logprobs, mask), logprobs, torch.ones(2), PolicySettings(**options), StepTotals(6, 2)
        )


def test_an_entropy_without_its_graph_and_half_precision_are_refused():
    logprobs = torch.zeros(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    bonus = PolicySettings(entropy_bonus=0.1)
    with pytest.raises(ValueError, match="needs the entropy with its graph"):
        policy_loss(
            TokenScores(logprobs, mask, torch.ones(2, 3)), logprobs, torch.ones(2), bonus, StepTotals(6, 2)
        )
    half = logprobs.bfloat16()
    with pytest.raises(ValueError, match=r"log-probabilities must be float32, got torch\.bfloat16"):
        policy_loss(TokenScores(half, mask), half, torch.ones(2), PolicySettings(), StepTotals(6, 2))


def test_a_step_of_no_micro_batches_is_refused():
    with pytest.raises(ValueError, match="micro_batches and max_tokens of 1 or more"):
        StepTotals(tokens=3, episodes=1, micro_batches=0)
