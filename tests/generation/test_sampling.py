"""Drawing tokens: top-k and top-p by their definition, frequencies, and draws that ignore the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.generation.sampling import GenerationSettings, row_uniforms, sample, truncated
from tolerance import assert_close


def by_definition(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Probability of each token that may be drawn."""
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    ranked = sorted(range(len(logits)), key=lambda i: -float(scaled[i]))
    kept = ranked[:top_k] if top_k else ranked
    probs = dict(zip(kept, scaled[kept].softmax(-1).tolist(), strict=True))
    if top_p < 1:
        smallest, mass = [], 0.0
        for token in kept:
            smallest.append(token)
            mass += probs[token]
            if mass >= top_p:
                break
        kept = smallest
    total = sum(probs[token] for token in kept)
    return {token: probs[token] / total for token in kept}


def next_token_logprobs(logits, settings):
    return truncated(logits / settings.temperature, settings).log_softmax(dim=-1)


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.95, 0.6, 0.31, 0.01]),
)
@settings(max_examples=200, deadline=None)
def test_the_distribution_is_tempered_and_cut_by_its_definition(tenths, temperature, top_k, top_p):
    logits = [value / 10 for value in tenths]
    ours = next_token_logprobs(
        torch.tensor([logits]), GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    )[0]
    expected = torch.full((len(logits),), -torch.inf)
    for token, probability in by_definition(logits, temperature, top_k, top_p).items():
        expected[token] = torch.tensor(probability).log()
    assert_close("logprobs", ours, expected)


def test_rows_are_cut_independently():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 9.0], [0.0, 5.0, 5.1, 0.0]])
    settings = GenerationSettings(temperature=1.0, top_k=3, top_p=0.8)
    together = next_token_logprobs(logits, settings)
    for row in range(3):
        assert torch.equal(next_token_logprobs(logits[row : row + 1], settings)[0], together[row])


def test_the_most_probable_token_always_stays():
    logprobs = next_token_logprobs(
        torch.tensor([[0.0, 0.1, 0.0]]), GenerationSettings(temperature=1.0, top_p=1e-9)
    )
    assert logprobs.exp().tolist() == [[0.0, 1.0, 0.0]]


def test_greedy_takes_the_largest_logit_and_reports_the_models_own_distribution():
    logits = torch.tensor([[0.5, 2.0, 1.0], [3.0, -1.0, 2.9]])
    tokens, logprobs = sample(logits, GenerationSettings(temperature=0.0, top_k=1, top_p=0.1), None)
    assert tokens.tolist() == [1, 0]
    assert_close("logprobs", logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


LOGITS = torch.tensor([1.5, -0.5, 0.3, -2.0, 1.0, -torch.inf, 0.0])


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(temperature=1.0),
        GenerationSettings(temperature=0.5),
        GenerationSettings(temperature=2.0, top_k=4),
        GenerationSettings(temperature=1.0, top_p=0.7),
        GenerationSettings(temperature=1.3, top_k=5, top_p=0.9),
    ],
    ids=["plain", "cold", "top-k", "top-p", "both"],
)
def test_tokens_are_drawn_with_their_probabilities(settings):
    count = 20_000
    uniforms = row_uniforms([11], count)[0]
    tokens, logprobs = sample(LOGITS.expand(count, -1), settings, uniforms)
    probs = torch.zeros(len(LOGITS), dtype=torch.float64)
    for token, probability in by_definition(
        LOGITS.tolist(), settings.temperature, settings.top_k, settings.top_p
    ).items():
        probs[token] = probability
    observed = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert bool((observed[probs == 0] == 0).all())
    possible = probs > 0
    expected = probs[possible] * count
    chi_square = float(((observed[possible] - expected).square() / expected).sum())
    freedom = int(possible.sum()) - 1
    # Five standard deviations of the chi-square distribution above its mean.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    whole = (LOGITS / settings.temperature).log_softmax(dim=-1)
    assert_close("logprobs before the cut", logprobs, whole[tokens])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform):
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 300], logits[0, 700] = 0.1, 0.2
    tokens, logprobs = sample(
        logits, GenerationSettings(temperature=1.0), torch.tensor([uniform], dtype=torch.float64)
    )
    assert int(tokens) in (300, 700)
    assert bool(logprobs.isfinite().all())
    assert int(tokens) == (300 if uniform == 0.0 else 700)


def test_a_rows_token_does_not_depend_on_the_rows_around_it():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = row_uniforms(range(9), 1)[:, 0]
    settings = GenerationSettings(temperature=1.0, top_p=0.9)
    together = sample(logits, settings, uniforms)[0]
    for row in range(9):
        assert int(sample(logits[row : row + 1], settings, uniforms[row : row + 1])[0]) == int(together[row])


def test_a_seed_gives_its_own_line_whatever_seeds_stand_beside_it():
    lines = row_uniforms([5, 6, 5], 100)
    assert torch.equal(lines[0], lines[2])
    assert not torch.equal(lines[0], lines[1])
    assert torch.equal(row_uniforms([6], 100)[0], lines[1])
    # A longer line begins with the shorter one.
    assert torch.equal(row_uniforms([6], 200)[0, :100], lines[1])
    assert lines.dtype == torch.float64
    assert bool(((lines >= 0) & (lines < 1)).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or more, got -0.1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more, got -1"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)
