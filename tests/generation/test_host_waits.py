"""The host waits for the device where it must, and nowhere else: once per pass of a decoding step, never in a forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import memgen.generation.prompt as prompt_module
import memgen.generation.state as state
import memgen.generation.step as step_module
from host_waits import HostWaits
from memgen.generation.decode import generate
from memgen.generation.rollout import replay
from memgen.generation.sampling import GenerationSettings
from memgen.objectives.policy_gradient import StepTotals, policy_loss
from memgen.objectives.policy_settings import PolicySettings
from memgen.objectives.sft import token_loss
from memgen.training.trigger_rl import TriggerRL
from memgen.training.weaver_grpo import WeaverGRPO
from memgen.types import Trajectory
from tiny import random_batch, random_rows, tiny_memgen

SETTINGS = GenerationSettings(max_new_tokens=12, temperature=1.0, group_size=2, sample_decisions=True)


def watched(model, monkeypatch) -> tuple[HostWaits, list[int]]:
    """What is read of the device outside `to_host`, and how often that was called for some of the device's."""
    waits, calls = HostWaits(model), []
    original = state.to_host

    def to_host(*parts):
        if waits._on_device(parts):
            calls.append(len(parts))
        return waits.allow(original)(*parts)

    for module in (prompt_module, step_module, state):
        monkeypatch.setattr(module, "to_host", to_host, raising=False)
    monkeypatch.setattr("memgen.generation.decode.to_host", to_host)
    return waits, calls


def warmed(**changes):
    """A model that has found out how its bases are computed."""
    model = tiny_memgen(**changes)
    generate(model, [[65]], SETTINGS)
    return model


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
@pytest.mark.parametrize("trigger", ["always", "random", "tokens", "hidden_states"])
@pytest.mark.parametrize("static", ["on", "off"])
def test_decoding_reads_the_device_in_one_place_and_no_oftener_than_it_must(
    trigger, reads, static, monkeypatch
):
    model = warmed(trigger=trigger, reads=reads)
    settings = GenerationSettings(
        max_new_tokens=12, temperature=1.0, group_size=2, sample_decisions=True, static_step=static
    )
    waits, calls = watched(model, monkeypatch)
    with waits.watching():
        generation = generate(model, random_rows([9, 4, 17]), settings)
    assert waits.places == []
    assert sum(generation.plan.counts) > 3
    learned = trigger in ("tokens", "hidden_states")
    # A step needs the tokens. A learned trigger's probabilities are needed before it is known what is inserted, the prompt's
    # among them; they come with the tokens in a step of fixed shape, where latents take a pass of their own.
    passes = 1 + int(learned or (static == "on" and reads == "hidden_states"))
    assert len(calls) <= passes * max(generation.lengths)
    if not learned and static == "off":
        assert len(calls) == max(generation.lengths)


@pytest.mark.parametrize("reads", ["embeddings", "hidden_states"])
def test_a_supervised_step_reads_nothing_of_the_device(reads):
    model = warmed(reads=reads)
    model.train_only(model.weaver)
    batch, plan = random_batch([20, 9, 15], [6, 4, 8], [[6, 9, 14], [4], [8, 12]])
    waits = HostWaits(model)
    with waits.watching():
        logprobs, _ = model.label_logprobs(batch, plan)
        token_loss(logprobs, len(logprobs)).backward()
    assert waits.places == []


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputation"])
@pytest.mark.parametrize(
    ("stage", "trigger"), [(WeaverGRPO, "always"), (TriggerRL, "tokens"), (TriggerRL, "hidden_states")]
)
def test_a_reinforcement_step_reads_nothing_of_the_device(stage, trigger, recompute):
    model = warmed(trigger=trigger)
    model.use_checkpointing(recompute)
    generation = generate(model, random_rows([9, 4]), SETTINGS)
    trajectories = [Trajectory(str(i), (turn,), float(i)) for i, turn in enumerate(generation.turns)]
    rows = replay(trajectories, [0, 0, 1, 1], keep_turn_latents=False)
    assert rows is not None
    part = model.trigger if stage is TriggerRL else model.weaver
    model.train_only(part)
    self = SimpleNamespace(memgen=model, rollout=SETTINGS)
    self._logits = lambda rows: TriggerRL._logits(self, rows)
    units = int(rows.decided.sum()) if stage is TriggerRL else int(rows.tokens.sum())
    waits = HostWaits(model)
    with waits.watching():
        scores = stage.score(self, rows, entropy=True, reference=None)
        result = policy_loss(
            scores,
            scores.logprobs.detach(),
            torch.tensor([1.0, -1.0, 0.5, -0.5]),
            PolicySettings(),
            StepTotals(tokens=units, episodes=4, micro_batches=1, max_tokens=12),
        )
        result.loss.backward()
    assert waits.places == []
    assert any(p.grad is not None for p in part.own_parameters().values())


def test_a_read_of_the_device_is_seen():
    model = tiny_memgen()
    weight = model.weaver.weaver_to_reasoner.weight
    waits = HostWaits(model)
    host = torch.tensor([1.0, 2.0])
    with waits.watching():
        host.tolist(), bool(host[0] > 0), host[host > 1]
        assert waits.places == []
        found = (weight * 2).sum(dim=0)
        bool(found[0] > 0)
        found.tolist()
        found.cpu()
        found[found > 0]
        float(found[0].detach())
        torch.nonzero(found)
        moved = host.to(model.device)
        assert len(waits.places) >= 6
        waits.places.clear()
        host.tolist()
        assert waits.places == []
        host[moved > 1]
    assert len(waits.places) == 1
    assert "test_host_waits" in waits.places[0]
