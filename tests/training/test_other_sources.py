"""Weaver SFT and weaver GRPO train whatever stands in the weaver's place, and its checkpoint says what that is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import rl_runs
import sft_runs
from experiences import experience
from memgen.chat import load_tokenizer
from memgen.generation.latent_bank import bank_of
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.model.backbone import BackboneConfig
from memgen.model.external import BankSettings, RetrievalSettings
from memgen.model.memgen import MemGenModel
from memgen.training.checkpoint import open_checkpoint, save_checkpoint
from memgen.types import InsertionKind
from sft_runs import make_trainer, save_tiny

SOURCES = {
    "pause": {"kind": "pause"},
    "soft prompt": {"kind": "pause", "arguments": {"tied": False}},
    "softcot": {"kind": "softcot", "backbone": "other"},
    "composer": {"kind": "memgen.generation.composer.Composer", "arguments": {"memory": "memory.sqlite"}},
    "retrieval into the weaver": {"retrieval": RetrievalSettings()},
    "retrieval alone into the weaver": {"retrieval": RetrievalSettings(parametric=False)},
    "latent bank": {"bank": BankSettings(least=-1.0)},
}

every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny(folder / "base")
    save_tiny(folder / "other", seed=1, hidden_size=48)
    with RawTrajectories(folder / "memory.sqlite") as memory:
        for number in range(20):
            memory.write(experience(f"count {number} or say {number}", [f"a, {number}."]))
    with_block(folder)
    return folder


def with_block(folder) -> None:
    """Begins a bank of the reasoner that holds a block of each kind."""
    stage = with_source(sft_runs.make_stage(folder / "base"), folder, SOURCES["latent bank"])
    tokenizer = load_tokenizer(str(folder / "base"))
    model = MemGenModel.build(stage.config, tokenizer, lambda name: name)
    points, blocks = [(4, 0), (6, 1)], [torch.ones(3, 32), torch.ones(2, 32)]
    assert bank_of(model).remember("one", 1.0, [(list(range(65, 75)), points)], blocks).added == 2


def with_source(stage, folder, source):
    """The stage with another source in the weaver's place."""
    changes = dict(source)
    if "backbone" in changes:
        changes["backbone"] = BackboneConfig(name=str(folder / changes["backbone"]))
    if "memory" in changes.get("arguments", {}):
        changes["arguments"] = {"memory": str(folder / "memory.sqlite")}
    if "bank" in changes:
        changes["bank"] = dataclasses.replace(changes["bank"], path=str(folder / "bank.sqlite"))
    if "retrieval" in changes:
        changes["retrieval"] = dataclasses.replace(changes["retrieval"], memory=str(folder / "memory.sqlite"))
    stage.config = dataclasses.replace(
        stage.config, weaver=dataclasses.replace(stage.config.weaver, **changes)
    )
    return stage


def tensors(stage, own: bool) -> dict[str, torch.Tensor]:
    trained = {id(p) for p in stage.memgen.weaver.own_parameters().values()}
    return {n: p.detach().clone() for n, p in stage.memgen.named_parameters() if (id(p) in trained) == own}


@every_source
def test_weaver_sft_moves_it_alone_and_its_checkpoint_opens_as_the_same(folder, tmp_path, source):
    stage = with_source(sft_runs.make_stage(folder / "base"), folder, source)
    data = sft_runs.make_data(folder / "base")
    trainer = make_trainer(tmp_path, max_steps=0)
    trainer.fit(stage, data)
    frozen, before = tensors(stage, own=False), tensors(stage, own=True)
    make_trainer(tmp_path, max_steps=6).fit(stage, data)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tensors(stage, own=False).items())
    after = tensors(stage, own=True)
    assert before.keys() == after.keys()
    assert not any(torch.equal(after[name], before[name]) for name in after)
    assert stage.memgen.weaver.trained_kinds == set(InsertionKind)

    save_checkpoint(stage.memgen, stage.config, tmp_path / "saved", with_trigger=False)
    opened, config = open_checkpoint(tmp_path / "saved", load_tokenizer, lambda name: name)
    assert config == stage.config
    for name, parameter in opened.weaver.own_parameters().items():
        assert torch.equal(parameter, stage.memgen.weaver.own_parameters()[name])


@every_source
def test_weaver_grpo_moves_it_and_its_first_update_has_a_ratio_of_one(folder, tmp_path, source):
    stage = with_source(rl_runs.make_grpo(folder / "base"), folder, source)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(stage, rl_runs.make_data(folder / "base"))
    metrics = trainer.logged_metrics
    assert float(metrics["train/ratio_min"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["train/ratio_max"]) == pytest.approx(1.0, abs=1e-5)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in stage.memgen.parameters())
    assert stage.memgen.weaver.trained_kinds


def test_the_example_of_the_documentation_makes_a_memory_of_collected_trajectories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("collected.jsonl").write_text(
        '{"id": "t", "reward": 1.0, "messages": [{"role": "user", "content": "say tea"}, {"role": "assistant", "content": "tea", "agent": true}]}\n'
    )
    text = (Path(__file__).parents[2] / "docs/comparators.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/comparators.md", "exec"), {})
    with RawTrajectories("trajectories.sqlite") as memory:
        assert [p.text for p in memory.read("say nut or tea")] == ["say tea\ntea"]
