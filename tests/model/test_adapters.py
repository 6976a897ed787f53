"""Adapters on one base: what a switch changes, and what it must not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memgen.model.adapters import AdapterSwitch, LoraSettings
from tolerance import assert_close


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.q_proj(x)) * self.v_proj(x))


SETTINGS = LoraSettings(r=2, alpha=4, dropout=0.0)


@pytest.fixture
def block() -> tuple[Block, AdapterSwitch]:
    torch.manual_seed(0)
    model = Block()
    model.requires_grad_(False)
    switch = AdapterSwitch(model)
    for name in ("weaver", "trigger"):
        switch.add(name, SETTINGS)
    with torch.no_grad():
        for name in ("weaver", "trigger"):
            for parameter in switch.parameters(name).values():
                parameter.normal_()
    return model, switch


X = torch.linspace(-1, 1, 18).view(3, 6)


def by_hand(model: Block, name: str | None) -> torch.Tensor:
    def project(layer):
        out = layer.base_layer(X)
        if name is None:
            return out
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        return out + (SETTINGS.alpha / SETTINGS.r) * X @ down.T @ up.T

    return model.out(torch.tanh(project(model.q_proj)) * project(model.v_proj))


def test_a_pass_applies_the_named_adapter_and_the_bare_base_without_one(block):
    model, switch = block
    results = {}
    for name in (None, "weaver", "trigger"):
        with switch.using(name):
            results[name] = model(X)
        assert_close(str(name), results[name], by_hand(model, name))
    assert not torch.allclose(results["weaver"], results["trigger"])
    assert torch.equal(model(X), results[None])


def test_a_new_adapter_changes_nothing_and_leaves_the_others_alone(block):
    model, switch = block
    with switch.using("weaver"):
        before = model(X)
    switch.add("third", SETTINGS)
    switch.assert_untouched("third")
    assert switch.active is None
    with switch.using("third"):
        assert_close("third", model(X), by_hand(model, None))
    with switch.using("weaver"):
        assert torch.equal(model(X), before)


def test_an_adapter_that_was_overwritten_is_noticed(block):
    with pytest.raises(RuntimeError, match=r"q_proj\.lora_B\.weaver\.weight is not zero"):
        block[1].assert_untouched("weaver")


def test_nested_uses_restore_what_was_applied_before(block):
    model, switch = block
    seen = []
    with switch.using("weaver"):
        with switch.using("trigger"):
            with switch.using(None):
                seen.append(switch.active)
            seen.append(switch.active)
            with switch.using("trigger"):
                seen.append(switch.active)
        seen.append(switch.active)
        assert_close("after nesting", model(X), by_hand(model, "weaver"))
    assert [*seen, switch.active] == [None, "trigger", "trigger", "weaver", None]


def test_an_error_inside_a_use_restores_what_was_applied_before(block):
    model, switch = block
    with pytest.raises(ZeroDivisionError), switch.using("weaver"):
        raise ZeroDivisionError
    assert switch.active is None
    assert_close("base", model(X), by_hand(model, None))


def test_a_switch_never_touches_requires_grad(block):
    model, switch = block
    for parameter in switch.parameters("trigger").values():
        parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(before.values()) == {True, False}
    for name in ("weaver", None, "trigger"):
        with switch.using(name):
            assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_gradients_survive_switches_between_forward_and_backward(block):
    model, switch = block
    with switch.using("weaver"):
        expected = model(X).square().sum()
        parameters = list(switch.parameters("weaver").values())
        gradients = torch.autograd.grad(expected, parameters)
    with switch.using("weaver"):
        loss = model(X).square().sum()
    with switch.using("trigger"), torch.no_grad():
        model(X)
    with switch.using(None):
        model(X)
        loss.backward()
    for ours, reference in zip(parameters, gradients, strict=True):
        assert torch.equal(ours.grad, reference)
        assert float(reference.abs().max()) > 0
    assert all(p.grad is None for p in switch.parameters("trigger").values())


def test_adapters_of_a_low_precision_base_are_float32():
    model = Block().to(torch.bfloat16)
    switch = AdapterSwitch(model)
    switch.add("weaver", SETTINGS)
    assert {p.dtype for p in switch.parameters("weaver").values()} == {torch.float32}
    assert model.q_proj.base_layer.weight.dtype == torch.bfloat16
    with switch.using("weaver"):
        assert model(X.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("earlier", [False, True], ids=["first adapter", "second adapter"])
@pytest.mark.parametrize("targets", [("nope",), ("q_proj", "nope")])
def test_a_target_that_no_layer_has_is_refused_with_the_names_that_exist(earlier, targets):
    switch = AdapterSwitch(Block())
    if earlier:
        switch.add("weaver", LoraSettings(r=2, target_modules=("q_proj", "out")))
    with pytest.raises(
        ValueError, match=r"\['nope'\] do not exist in this model; it has \['out', 'q_proj', 'v_proj'\]"
    ):
        switch.add("trigger", LoraSettings(r=2, target_modules=targets))


def test_two_adapters_may_have_different_targets():
    model = Block()
    model.requires_grad_(False)
    switch = AdapterSwitch(model)
    switch.add("weaver", LoraSettings(r=2, target_modules=("q_proj",)))
    switch.add("trigger", LoraSettings(r=2, target_modules=("v_proj", "q_proj")))
    assert len(switch.parameters("weaver")) == 2
    assert len(switch.parameters("trigger")) == 4
    with torch.no_grad():
        for parameter in switch.parameters("trigger").values():
            parameter.normal_()
    base = model(X)
    with switch.using("weaver"):
        assert torch.equal(model(X), base)
    with switch.using("trigger"):
        assert not torch.equal(model(X), base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "lora.r must be at least 1, got 0"),
        ({"dropout": 1.0}, r"lora.dropout must be in \[0, 1\), got 1.0"),
        ({"target_modules": ()}, "lora.target_modules is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_only_dropout_follows_the_training_mode():
    model = Block().eval()
    switch = AdapterSwitch(model)
    switch.add("weaver", LoraSettings(r=2, dropout=0.5))
    with torch.no_grad():
        for parameter in switch.parameters("weaver").values():
            parameter.normal_()
    with switch.using("weaver"):
        switch.train(False)
        assert torch.equal(model(X), model(X))
        switch.train(True)
        assert not torch.equal(model(X), model(X))
