"""The demo on SmolLM2, with random models of two layers in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from memgen.cli import demo
from memgen.cli import main as front_end
from memgen.lab import assets, trained
from memgen.lab.english import EnglishLab
from memgen.lab.report import Questions
from memgen.lab.saving import save_backbone
from memgen.lab.tiny import tiny_tokenizer
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ROWS = (
    "reasoner alone",
    "3 worked examples",
    "untrained latents",
    "weaver SFT",
    "latents of another item",
    "half-trained weaver",
    "and then weaver GRPO",
    "weaver SFT and trigger RL",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where the names of SmolLM2's assets lead: a random base, weavers and a trigger."""
    folder = tmp_path_factory.mktemp("models")
    text = "\n".join(f"{e.question}\n{e.target}" for e in EnglishLab().examples("train")[:50])
    tokenizer = tiny_tokenizer(text, vocab_size=400, max_length=512)
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    (folder / "base").mkdir()
    save_backbone(Qwen2ForCausalLM(settings), tokenizer, folder / "base")
    lora = LoraSettings(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"))
    found = {demo.SMOLLM2: folder / "base"}
    for name in demo.SMOLLM2_STAGES.values():
        kind = "tokens" if name.endswith("trigger_rl") else "always"
        config = MemGenConfig(
            backbone=BackboneConfig(name=str(folder / "base"), dtype="bfloat16"),
            weaver=WeaverConfig(prompt_latents=2, inference_latents=2, lora=lora),
            trigger=TriggerConfig(kind=kind, lora=lora, initial_invoke_bias=-60.0),
            boundaries=BoundaryConfig(delimiters=(",",), max_inference_insertions=0),
        )
        model = MemGenModel.build(config, tokenizer, str)
        save_checkpoint(model, config, folder / name, with_trigger=kind == "tokens")
        found[f"lab:{name}"] = folder / name
    return found


@pytest.fixture
def asked(models, monkeypatch, tmp_path):
    """The names that were resolved, in a working directory with the configuration files."""
    names = []

    def resolve(name):
        names.append(name)
        return str(models.get(name.partition("?")[0], name))

    monkeypatch.setattr(assets, "resolve_asset", resolve)
    small = Questions(
        target=EnglishLab(val_size=4, test_size=4),
        others=EnglishLab(("open", "copy"), test_size=2),
        max_new_tokens=4,
        shots=3,
    )
    monkeypatch.setattr(Questions, "english", classmethod(lambda cls: small))
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(tmp_path)
    return names


def test_the_demo_on_smollm2_goes_from_stage_to_stage_and_ends_in_a_table(
    asked, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(trained, "is_trained", lambda name, seed, version: name.endswith("half"))
    assert front_end.main(["demo", "--backbone", "lab:smollm2", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 stages are to be trained" in out
    stages = [f"lab:{name}?seed=2" for name in demo.SMOLLM2_STAGES.values()]
    assert [name for name in asked if "smollm2_" in name] == stages
    for number, stage in enumerate(stages, start=2):
        assert f"{number}/6" in next(line for line in out.splitlines() if stage in line)
    assert "half?seed=2 (there already)" in out
    report = json.loads((tmp_path / "runs" / "demo_smollm2.json").read_text())
    assert [name.strip() for name in report["conditions"]] == list(ROWS)
    rows = {name.strip(): row for name, row in report["conditions"].items()}
    woven = {name: row["insertions_per_answer"] for name, row in rows.items()}
    assert woven["reasoner alone"] == woven["3 worked examples"] == 0.0
    assert woven["weaver SFT"] == woven["latents of another item"] == 1.0
    # Worked examples are read as part of the prompt, latents once by the reasoner and once as queries of the weaver.
    positions = {name: row["positions_per_answer"] for name, row in rows.items()}
    assert positions["reasoner alone"] < positions["weaver SFT"] < positions["3 worked examples"]


def test_a_demo_that_was_stopped_goes_on_in_its_table(asked, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trained, "is_trained", lambda name, seed, version: True)
    command = ["demo", "--backbone", "lab:smollm2"]
    say = demo._say

    def stop(text):
        say(text)
        if text.strip() == "half-trained weaver":
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_say", stop)
    assert front_end.main(command) == 130
    (kept,) = (tmp_path / "home").glob("demo-*")
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(before) == 5
    monkeypatch.setattr(demo, "_say", say)
    assert front_end.main(command) == 0
    assert {name: (kept / name).stat().st_mtime_ns for name in before} == before
    assert "0 of 4 stages are to be trained" in capsys.readouterr().out


def test_another_backbone_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        front_end.main(["demo", "--backbone", "lab:smollm3"])
    assert stop.value.code == 2
    assert "lab:smollm2" in capsys.readouterr().err
