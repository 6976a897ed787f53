"""The trigger's shaped reward and its decisions' probabilities."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memgen.objectives.advantages import group_advantages
from memgen.objectives.policy_gradient import TokenScores, policy_loss
from memgen.objectives.policy_losses import StepTotals
from memgen.objectives.policy_settings import PolicySettings
from memgen.objectives.trigger import (
    Shaped,
    TriggerSettings,
    decision_entropy,
    decision_kl,
    decision_logprobs,
    shaped_rewards,
)
from memgen.types import Decision
from tolerance import assert_close

SETTINGS = [
    TriggerSettings(penalty=0.3, scope=scope, median=median)
    for scope in ("group", "batch")
    for median in ("average", "lower")
]
EPISODES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        st.lists(st.sampled_from([-1, 0, 1]), max_size=5),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def plain_shaped(episodes, settings: TriggerSettings) -> tuple[list[float], list[float]]:
    """Penalties and p-bar by the formula, decision by decision."""
    penalties, p_bars = [], []
    for group, _, decisions, _ in episodes:
        scope = [e for e in episodes if e[3] and (settings.scope == "batch" or e[0] == group)]
        rates = []
        if scope:
            rule = statistics.median if settings.median == "average" else statistics.median_low
            median = rule([e[1] for e in scope])
            for _, reward, taken, _ in scope:
                asked = [d for d in taken if d != -1]
                if reward >= median and asked:
                    rates.append(sum(asked) / len(asked))
        p_bar = statistics.fmean(rates) if rates else 1.0
        p_bars.append(p_bar)
        penalties.append(settings.penalty * sum(max(0.0, d - p_bar) for d in decisions if d != -1))
    return penalties, p_bars


def decision_table(episodes) -> torch.Tensor:
    width = max(len(e[2]) for e in episodes)
    return torch.tensor([e[2] + [-1] * (width - len(e[2])) for e in episodes]).reshape(len(episodes), width)


def shape(episodes, settings: TriggerSettings) -> Shaped:
    table = decision_table(episodes)
    return shaped_rewards(
        torch.tensor([e[1] for e in episodes], dtype=torch.float64),
        (table == Decision.INVOKE).sum(dim=1),
        (table != Decision.NOT_ASKED).sum(dim=1),
        torch.tensor([e[0] for e in episodes]),
        settings,
        torch.tensor([e[3] for e in episodes]),
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.scope}-{s.median}")
@hypothesis_settings(max_examples=60)
@given(episodes=EPISODES)
def test_penalty_and_p_bar_equal_the_formula_decision_by_decision(settings, episodes):
    shaped = shape(episodes, settings)
    penalties, p_bars = plain_shaped(episodes, settings)
    assert_close("p-bar", shaped.p_bar, torch.tensor(p_bars, dtype=torch.float64))
    assert_close("penalty", shaped.penalty, torch.tensor(penalties, dtype=torch.float64))
    rewards = torch.tensor([e[1] for e in episodes], dtype=torch.float64)
    assert_close("reward", shaped.rewards, rewards - shaped.penalty)


@hypothesis_settings(max_examples=40)
@given(episodes=EPISODES)
def test_without_lambda_the_reward_is_the_plain_one(episodes):
    shaped = shape(episodes, TriggerSettings(penalty=0.0))
    assert shaped.rewards.tolist() == [e[1] for e in episodes]


def test_nothing_is_paid_where_all_who_did_well_always_invoked():
    episodes = [(0, 1.0, [1, 1, 1], True), (0, 1.0, [1], True), (0, 0.0, [1, 0, 1], True)]
    shaped = shape(episodes, TriggerSettings(penalty=5.0))
    assert shaped.p_bar.tolist() == [1.0] * 3
    assert shaped.rewards.tolist() == [1.0, 1.0, 0.0]
    assert shaped.high.tolist() == [True, True, False]


def test_each_invocation_costs_lambda_where_success_needs_none():
    episodes = [(0, 1.0, [0, 0], True), (0, 1.0, [0], True), (0, 0.0, [1, 1, 0], True)]
    shaped = shape(episodes, TriggerSettings(penalty=0.1))
    assert_close("rewards", shaped.rewards, torch.tensor([1.0, 1.0, -0.2], dtype=torch.float64))


def test_groups_have_medians_and_rates_of_their_own_unless_the_scope_is_the_batch():
    episodes = [
        (7, 1.0, [1, 0], True),
        (7, 0.0, [1, 1], True),
        (3, 0.5, [0, 0], True),
        (3, 0.0, [1, 1], True),
    ]
    by_group = shape(episodes, TriggerSettings(scope="group"))
    assert by_group.p_bar.tolist() == [0.5, 0.5, 0.0, 0.0]
    # The batch's median reward is 0.25: both of the better episodes did well.
    by_batch = shape(episodes, TriggerSettings(scope="batch"))
    assert by_batch.p_bar.tolist() == [0.25] * 4


def test_with_half_of_the_answers_right_the_average_median_takes_the_right_ones_and_the_lower_all():
    episodes = [(0, 1.0, [0], True), (0, 1.0, [0], True), (0, 0.0, [1], True), (0, 0.0, [1], True)]
    assert shape(episodes, TriggerSettings(median="average")).high.tolist() == [True, True, False, False]
    lower = shape(episodes, TriggerSettings(median="lower"))
    assert lower.high.tolist() == [True] * 4
    assert lower.p_bar.tolist() == [0.5] * 4


def test_with_fewer_than_half_right_every_episode_did_well():
    episodes = [(0, 1.0, [1], True), (0, 0.0, [0], True), (0, 0.0, [0], True), (0, 0.0, [0], True)]
    shaped = shape(episodes, TriggerSettings())
    assert shaped.high.tolist() == [True] * 4
    assert shaped.p_bar.tolist() == [0.25] * 4


def test_an_episode_that_was_offered_nothing_counts_for_the_median_but_has_no_rate():
    episodes = [(0, 1.0, [], True), (0, 1.0, [1, 0], True), (0, 0.0, [1], True)]
    shaped = shape(episodes, TriggerSettings(penalty=0.2))
    assert shaped.high.tolist() == [True, True, False]
    assert shaped.p_bar.tolist() == [0.5] * 3
    assert shaped.penalty[0] == 0.0
    nothing_known = shape([(0, 1.0, [], True), (0, 0.0, [1, 1], True)], TriggerSettings(penalty=0.2))
    assert nothing_known.penalty.tolist() == [0.0, 0.0]


def test_an_episode_that_is_not_valid_pays_but_sets_no_standard():
    episodes = [(0, 9.0, [1, 1], False), (0, 1.0, [0, 0], True), (0, 0.0, [1, 0], True)]
    shaped = shape(episodes, TriggerSettings(penalty=0.5))
    assert shaped.p_bar.tolist() == [0.0] * 3
    assert shaped.penalty.tolist() == [1.0, 0.0, 0.5]
    assert shaped.high.tolist() == [False, True, False]


def test_the_order_of_episodes_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    offered = torch.randint(0, 6, (12,), generator=generator)
    invocations = (torch.rand(12, generator=generator) * (offered + 1)).long()
    rewards = torch.rand(12, generator=generator)
    group = torch.arange(12) % 3
    order = torch.randperm(12, generator=generator)
    one = shaped_rewards(rewards, invocations, offered, group, TriggerSettings())
    other = shaped_rewards(
        rewards[order], invocations[order], offered[order], group[order], TriggerSettings()
    )
    assert_close("rewards", other.rewards, one.rewards[order])
    assert_close("p-bar", other.p_bar, one.p_bar[order])


def test_more_invocations_than_decisions_are_refused():
    with pytest.raises(ValueError, match=r"between 0 and the decisions offered, got \[3\] of \[2\]"):
        shaped_rewards(
            torch.ones(1), torch.tensor([3]), torch.tensor([2]), torch.tensor([0]), TriggerSettings()
        )


def test_a_negative_lambda_is_refused():
    with pytest.raises(ValueError, match=r"penalty must be 0 or more, got -0\.1"):
        TriggerSettings(penalty=-0.1)


# Decisions


LOGITS = torch.tensor([[0.3, -1.2], [2.0, 2.0], [-4.0, 5.0], [700.0, -700.0]], dtype=torch.float64)
OTHER = torch.tensor([[1.0, 0.0], [2.0, 0.5], [-4.0, 5.0], [0.0, 1.0]], dtype=torch.float64)


def invoke_probability(logits: torch.Tensor) -> list[float]:
    return [1 / (1 + math.exp(min(700.0, skip - invoke))) for skip, invoke in logits.tolist()]


def test_log_probabilities_are_those_of_a_bernoulli_draw():
    decisions = torch.tensor([1, 0, 1, 0])
    expected = [
        math.log(p if decision else 1 - p)
        for p, decision in zip(invoke_probability(LOGITS), decisions.tolist(), strict=True)
    ]
    assert_close(
        "log-probability", decision_logprobs(LOGITS, decisions), torch.tensor(expected, dtype=torch.float64)
    )
    assert decision_logprobs(LOGITS[:0], decisions[:0]).shape == (0,)


def test_decisions_that_were_not_taken_have_no_log_probability():
    with pytest.raises(ValueError, match="must be SKIP"):
        decision_logprobs(LOGITS[:2], torch.tensor([1, int(Decision.NOT_ASKED)]))


def test_entropy_and_divergence_are_exact():
    entropy, divergence = [], []
    for p, q in zip(invoke_probability(LOGITS), invoke_probability(OTHER), strict=True):
        outcomes = [(p, q), (1 - p, 1 - q)]
        entropy.append(-sum(a * math.log(a) for a, _ in outcomes if a > 0))
        divergence.append(sum(a * math.log(a / b) for a, b in outcomes if a > 0))
    assert_close("entropy", decision_entropy(LOGITS), torch.tensor(entropy, dtype=torch.float64))
    assert_close("KL", decision_kl(LOGITS, OTHER), torch.tensor(divergence, dtype=torch.float64))


def test_the_divergence_of_a_trigger_from_itself_is_zero_with_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    divergence = decision_kl(logits, logits)
    divergence.sum().backward()
    assert divergence.tolist() == [0.0] * 4
    assert_close("gradient", logits.grad, torch.zeros_like(LOGITS))


def test_the_papers_trigger_objective_is_reinforce_with_its_groups_baseline_and_deviation():
    """REV, Eq. 17-18: sum over decisions of log pi times (R - mean) / std, less beta times the exact divergence."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    old = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator)
    decisions = torch.randint(0, 2, (4, 3), generator=generator)
    offered = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    rewards = torch.tensor([1.0, 0.0, 0.4, 0.1], dtype=torch.float64)
    settings = PolicySettings(loss="reinforce", baseline="group", advantage_scale="group", kl=0.05)
    advantages = group_advantages(rewards, torch.zeros(4, dtype=torch.int64), settings).values
    logprobs = decision_logprobs(logits.reshape(-1, 2), decisions.reshape(-1)).reshape(4, 3)
    divergence = decision_kl(logits.reshape(-1, 2), old.reshape(-1, 2)).reshape(4, 3)
    totals = StepTotals(tokens=int(offered.sum()), episodes=4)
    scores = TokenScores(logprobs, offered, exact_kl=divergence)
    part = policy_loss(scores, logprobs.detach(), advantages, settings, totals)
    mean, deviation = statistics.fmean(rewards.tolist()), statistics.pstdev(rewards.tolist())
    expected = torch.zeros((), dtype=torch.float64)
    for e in range(4):
        for d in range(3):
            if offered[e, d]:
                p, q = logits[e, d].softmax(0), old[e, d].softmax(0)
                expected = expected + p[decisions[e, d]].log() * (rewards[e] - mean) / deviation
                expected = expected - 0.05 * (p * (p / q).log()).sum()
    expected = -expected / totals.tokens
    assert_close("loss", part.loss, expected)
    (ours,) = torch.autograd.grad(part.loss, logits, retain_graph=True)
    (reference,) = torch.autograd.grad(expected, logits)
    assert_close("gradient", ours, reference)


@pytest.mark.parametrize("penalty", [0.0, 0.2])
def test_the_penalty_lowers_the_advantage_of_those_who_invoke_more(penalty):
    """Two right answers, of which one invokes throughout: only lambda tells them apart."""
    episodes = [(0, 1.0, [1, 1, 1, 1], True), (0, 1.0, [1, 0, 0, 0], True)]
    shaped = shape(episodes, TriggerSettings(penalty=penalty))
    result = group_advantages(shaped.rewards, torch.zeros(2, dtype=torch.int64), PolicySettings())
    if penalty == 0.0:
        assert result.values.tolist() == [0.0, 0.0]
    else:
        # p-bar = (1 + 1/4) / 2; the rewards differ by lambda (1 - p-bar) times three invocations.
        gap = 0.2 * (1 - 0.625) * 3
        assert_close("advantages", result.values, torch.tensor([-gap / 2, gap / 2], dtype=torch.float64))
