"""Which policies are tried on an item, against an episode whose boundaries depend on every decision."""

from __future__ import annotations

from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.analysis.policies import ALWAYS, NEVER, Explorer, Policy, Trace

MOST = 6


def episode(seed: int):
    """An item: greedy, so the decisions decide when it ends and whether it is solved."""

    def run(policy: Policy) -> Trace:
        decisions: list[bool] = []
        while len(decisions) < MOST and Random(f"{seed} {decisions}").random() < 0.85:
            decisions.append(policy.invokes(len(decisions)))
        right = Random(f"{seed} {decisions} solved").random() < 0.5
        return Trace(tuple(decisions), right, float(right))

    return run


def explored(run, budget: int) -> Explorer:
    explorer = Explorer()
    for _ in range(budget):
        policy = explorer.next()
        if policy is None:
            break
        explorer.traces[policy] = run(policy)
    return explorer


def test_boundaries_have_numbers_from_one_in_words():
    assert [NEVER.name, ALWAYS.name] == ["never", "always"]
    assert Policy(False, (0,)).name == "boundary 1 alone"
    assert Policy(False, (0, 3)).name == "boundaries 1 and 4 alone"
    assert Policy(True, (2,)).name == "all but boundary 3"


@given(st.integers(0, 10_000), st.integers(2, 12))
@settings(max_examples=150, deadline=None)
def test_no_answer_is_decoded_twice_and_the_budget_is_kept(seed, budget):
    explorer = explored(episode(seed), budget)
    traces = [trace.decisions for trace in explorer.traces.values()]
    assert len(set(traces)) == len(traces) <= budget
    assert next(iter(explorer.traces)) == NEVER
    if len(traces) > 1:  # An episode without boundaries is the same under every policy.
        assert list(explorer.traces)[1] == ALWAYS


@given(st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_with_budget_enough_every_policy_of_one_and_two_boundaries_has_its_outcome(seed):
    run = episode(seed)
    explorer = explored(run, 1000)
    assert explorer.next() is None
    assert explorer.tried_singly
    singles = [Policy(elsewhere, (number,)) for elsewhere in (False, True) for number in range(MOST)]
    pairs = [Policy(False, pair) for pair in combinations(range(MOST), 2)]
    for policy in [NEVER, ALWAYS, *singles, *pairs]:
        assert explorer.outcome(policy) == run(policy)


@given(st.integers(0, 10_000), st.integers(1, 20), st.lists(st.integers(0, MOST), max_size=4, unique=True))
@settings(max_examples=150, deadline=None)
def test_an_outcome_that_was_not_decoded_is_what_decoding_would_give(seed, budget, boundaries):
    run = episode(seed)
    explorer = explored(run, budget)
    policy = Policy(False, tuple(boundaries))
    assert explorer.outcome(policy) in (None, run(policy))
