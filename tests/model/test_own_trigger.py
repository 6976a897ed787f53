"""A learned trigger of one's own in one file: the package is neither edited nor told of it, only given its path."""

from __future__ import annotations

import dataclasses
from typing import final

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from generations import asked_at, invoke_probs
from memgen.chat import CHATML
from memgen.generation.decode import generate
from memgen.generation.rollout import Actor, replay, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.backbone import Backbone
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import Trigger, TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.training.checkpoint import load_checkpoint, save_checkpoint
from memgen.types import Decision, InsertionPlan, TokenBatch
from rl_runs import Vowels
from tiny import DELIMITERS, LORA, byte_tokenizer, random_rows, tiny_causal_lm
from tolerance import assert_close


@final
class LastToken(Trigger):
    """Decides by the boundary token alone."""

    def __init__(self, base: Backbone, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(base.embedding.shape[0], 2)
        self.scale = scale

    def invoke_probs(self, boundary, cache):
        last = torch.tensor([ids[-1] for ids in boundary.unread], device=self.table.weight.device)
        return (self.table(last) * self.scale).softmax(dim=-1)[:, Decision.INVOKE]

    def logits(self, batch, at, states):
        return self.table(batch.ids[at].to(self.table.weight.device)) * self.scale


@final
class Shouter(Trigger):
    """Decides by the sum of the reasoner's state."""

    needs_states = True

    def __init__(self, base: Backbone) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(base.hidden_size))

    def invoke_probs(self, boundary, cache):
        return self.logits(None, None, boundary.states).softmax(dim=-1)[:, Decision.INVOKE]

    def logits(self, batch, at, states):
        score = states @ self.weight
        return torch.stack([-score, score], dim=-1)


def model_with(name: str, **arguments) -> tuple[MemGenModel, MemGenConfig]:
    torch.manual_seed(0)
    config = MemGenConfig(
        weaver=WeaverConfig(lora=LORA, prompt_latents=2, inference_latents=2, query_scale=0.3),
        trigger=TriggerConfig(kind=f"{__name__}.{name}", arguments=arguments),
        boundaries=BoundaryConfig(delimiters=DELIMITERS, max_inference_insertions=9),
    )
    base = Backbone(tiny_causal_lm(), "tiny")
    return MemGenModel.assemble(config, base, byte_tokenizer()).eval(), config


SAMPLED = GenerationSettings(max_new_tokens=24, temperature=1.0, sample_decisions=True)


@pytest.mark.parametrize("name", ["LastToken", "Shouter"])
def test_decoding_asks_it_and_training_sees_the_probabilities_that_decoding_saw(name):
    model, _ = model_with(name)
    assert type(model.trigger).__name__ == name
    generation = generate(model, random_rows([9, 4, 17]), SAMPLED)
    decisions = {decision for turn in generation.turns for decision in turn.decisions}
    assert decisions == {Decision.NOT_ASKED, Decision.SKIP, Decision.INVOKE} or name == "Shouter"
    batch = generation.as_batch()
    at = torch.zeros_like(batch.supervised)
    expected = []
    for row, turn in enumerate(generation.turns):
        asked = asked_at(generation, row)
        at[row, [len(turn.context) + index - 1 for index in asked]] = True
        expected.append(invoke_probs(generation, row)[asked])
    logits = model.decision_logits(batch, generation.plan, at)
    assert_close("probabilities", logits.softmax(-1)[:, Decision.INVOKE], torch.cat(expected))


def test_its_parameters_alone_are_trained_and_get_gradient():
    model, _ = model_with("LastToken", scale=2.0)
    model.train_only(model.trigger)
    batch = TokenBatch.from_rows(random_rows([5, 3]))
    logits = model.decision_logits(batch, InsertionPlan.empty(2), torch.ones_like(batch.supervised))
    cross_entropy(logits, torch.ones(len(logits), dtype=torch.int64)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"trigger.table.weight"}
    assert list(model.trigger.own_parameters()) == ["table.weight"]


def test_a_rollout_of_it_can_be_replayed_for_trigger_rl():
    model, _ = model_with("LastToken")
    environment = Vowels()
    actor = Actor(model, byte_tokenizer(), environment, SAMPLED, template=CHATML)
    examples = environment.examples("train")[:3]
    trajectories = rollout(actor, examples, [1, 2, 3]).trajectories
    again = replay(trajectories, [0, 1, 2], keep_turn_latents=False)
    assert again is not None
    logits = model.decision_logits(again.batch, again.plan, again.at)
    probs = again.by_episode(logits.softmax(-1)[:, Decision.INVOKE], again.decided)
    assert_close("probabilities", probs, again.invoke_probs)


def test_a_checkpoint_keeps_it(tmp_path):
    model, config = model_with("LastToken")
    save_checkpoint(model, config, tmp_path / "saved", with_trigger=True)
    other, _ = model_with("LastToken")
    with torch.no_grad():
        other.trigger.table.weight.zero_()
    load_checkpoint(other, tmp_path / "saved")
    assert torch.equal(other.trigger.table.weight, model.trigger.table.weight)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such.module.Class", "cannot be imported"),
        ("torch.nn.Linear", r"is no memgen\.model\.trigger\.Trigger"),
        ("memgen.model.trigger.KINDS", "is no memgen"),
    ],
)
def test_a_path_that_names_no_trigger_is_refused(path, message):
    config = dataclasses.replace(model_with("LastToken")[1], trigger=TriggerConfig(kind=path))
    with pytest.raises(ValueError, match=rf"model\.memgen\.trigger\.kind '{path}' {message}"):
        MemGenModel.assemble(config, Backbone(tiny_causal_lm(), "tiny"), byte_tokenizer())


def test_arguments_without_a_class_are_refused():
    with pytest.raises(ValueError, match=r"trigger\.arguments are those of a class of your own"):
        TriggerConfig(arguments={"scale": 1.0})


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"must be one of always, never, random, .* got 'alwys'"):
        TriggerConfig(kind="alwys")
