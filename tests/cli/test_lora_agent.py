"""LoRA on the reasoner from the command line: trained, tested, asked, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memgen
from memgen.cli import main as front_end
from memgen.results.score_files import read_records
from tiny_english import save_english_base

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = ["--config", str(CONF / "weaver_sft.yaml"), "--config", str(CONF / "baselines" / "lora_sft.yaml")]
SMALL = [
    "--data.environment.class_path", "memgen.lab.english.EnglishLab", "--data.environment.train_size", "8",
    "--data.environment.val_size", "2", "--data.environment.test_size", "4", "--model.memgen.weaver.lora.r", "2",
    "--model.memgen.backbone.name", "base", "--model.generation.max_new_tokens", "4", "--data.batch_size", "4",
    "--trainer.logger", "false", "--trainer.callbacks.0.monitor", "null",
]  # fmt: skip
STEPS = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
MATCH = ["--model.memgen.weaver.arguments.match", "{prompt_latents: 4, inference_latents: 4}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_english_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert front_end.main(["fit", *FILES, *SMALL, *STEPS, *MATCH, "--run", "run"]) == 0
    return folder


def test_a_trained_adapter_is_tested_asked_and_loaded_as_an_agent_is(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    tested = ["test", *FILES, *SMALL, *MATCH]
    assert front_end.main([*tested, "--checkpoint", "run/last", "--records", "trained"]) == 0
    assert front_end.main([*tested, "--records", "bare"]) == 0
    summaries = [json.loads(Path(name, "summary.json").read_text()) for name in ("trained", "bare")]
    assert summaries[0]["items"] == summaries[1]["items"] == 4
    agents = [read_records(Path(name)).settings["agent"]["weights"] for name in ("trained", "bare")]
    assert agents[0] != agents[1]
    assert all(row["weaver_positions"] == 0 for row in read_records(Path("trained")).rows)

    capsys.readouterr()
    assert (
        front_end.main(["generate", "--checkpoint", "run/last", "--prompt", "hello", "--max-new-tokens", "3"])
        == 0
    )
    assert "0 insertions" in capsys.readouterr().err
    agent = memgen.load("run/last")
    assert agent.model.weaver.chosen()["lora_rank"] == agent.model.weaver.lora.r > 2
    assert not agent.model.weaver.is_untrained()
    agent.save_pretrained("again")
    assert "LoRA on the reasoner" in Path("again/README.md").read_text()
