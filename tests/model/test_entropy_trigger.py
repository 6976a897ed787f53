"""The trigger that invokes where the reasoner is uncertain."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import entropy

from generations import asked_at
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.entropy_trigger import EntropyTrigger
from memgen.model.trigger import Trigger, TriggerConfig, build_trigger
from memgen.results.controls import deciding_by
from memgen.types import Decision, InsertionPlan, TokenBatch
from tiny import random_rows, tiny_memgen
from tolerance import assert_close

SETTINGS = GenerationSettings(max_new_tokens=16, temperature=1.0)


def trigger(model, threshold: float) -> EntropyTrigger:
    config = TriggerConfig(
        kind="memgen.model.entropy_trigger.EntropyTrigger", arguments={"threshold": threshold}
    )
    built = build_trigger(config, model.reasoner.backbone, model.reasoner.backbone.hidden_size)
    assert isinstance(built, EntropyTrigger)
    return built


def test_its_entropy_is_that_of_the_next_token_in_nats():
    model = tiny_memgen()
    states = torch.randn(5, model.reasoner.backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    probs = model.reasoner.logits(states).double().softmax(dim=-1)
    expected = torch.tensor(entropy(probs.detach().numpy(), axis=-1), dtype=torch.float32)
    assert_close("entropy", trigger(model, 1.0).entropy(states), expected)


def test_it_invokes_exactly_where_the_entropy_is_above_the_threshold():
    model = tiny_memgen(cap=9)
    decided = set()
    for threshold in (4.5, 4.62):
        generation = generate(
            deciding_by(model, trigger(model, threshold)), random_rows([9, 4, 17]), SETTINGS
        )
        batch, at = generation.as_batch(), []
        read = torch.zeros_like(batch.supervised)
        for row, turn in enumerate(generation.turns):
            asked = asked_at(generation, row)
            read[row, [len(turn.context) + index - 1 for index in asked]] = True
            at += [turn.decisions[index] == Decision.INVOKE for index in asked]
        states = _states_before_latents(model, batch, generation.plan, read)
        above = trigger(model, threshold).entropy(states) > threshold
        assert above.tolist() == at
        decided |= set(at)
    assert decided == {True, False}


def _states_before_latents(model, batch: TokenBatch, plan: InsertionPlan, read: torch.Tensor) -> torch.Tensor:
    """What a trigger that needs states is given, by the forward that trains one."""
    seen = []

    class Spy(Trigger):
        needs_states = True

        def invoke_probs(self, boundary, cache):
            raise NotImplementedError

        def logits(self, batch, at, states):
            seen.append(states)
            return states[:, :2]

    deciding_by(model, Spy()).decision_logits(batch, plan, read)
    return seen[0]


@pytest.mark.parametrize(
    ("threshold", "share"), [(0.0, 1.0), (math.log(260) + 0.1, 0.0)], ids=["0", "above ln V"]
)
def test_its_ends_are_always_and_never(threshold, share):
    model = tiny_memgen()
    turns = generate(deciding_by(model, trigger(model, threshold)), random_rows([9, 4]), SETTINGS).turns
    assert [turn.invocations for turn in turns] == [round(turn.offered * share) for turn in turns]


def test_it_has_nothing_to_train():
    model = tiny_memgen()
    assert trigger(model, 1.0).own_parameters() == {}
    batch = TokenBatch.from_rows(random_rows([5]))
    with pytest.raises(ValueError, match="the entropy trigger has no parameters"):
        deciding_by(model, trigger(model, 1.0)).decision_logits(
            batch, InsertionPlan.empty(1), torch.ones_like(batch.supervised)
        )


@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan])
def test_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(ValueError, match="must be 0 nats or more, got"):
        trigger(tiny_memgen(), threshold)
