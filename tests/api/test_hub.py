"""Agents on the hub: push, pull, and the model card."""

from __future__ import annotations

import json

import pytest
import yaml

import memgen
from fake_hub import fake_hub
from memgen.api.card import Card
from memgen.results.recorded_test import weights_hash
from memgen.results.score_files import JOURNAL, SUMMARY

BASE = "org/tiny-base"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub(monkeypatch, tmp_path / "hub") as server:
        yield server


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_what_is_pushed_is_pulled_to_the_byte(hub, agent, base, tmp_path):
    hub.repositories[BASE] = {path.name: path.read_bytes() for path in base.iterdir()}
    address = agent.push_to_hub("org/agent", bases={str(base): BASE}, licence="mit")
    assert address.startswith(f"{hub.address}/org/agent/commit/")
    agent.save_pretrained(tmp_path / "agent", bases={str(base): BASE}, licence="mit")
    names = {"memgen.json", "weaver.safetensors", "trigger.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "agent").iterdir()} == names
    pulled = memgen.load("hf://org/agent")
    assert 'memgen.load("hf://org/agent")' in hub.repositories["org/agent"]["README.md"].decode()
    for name in names:
        pushed = hub.repositories["org/agent"][name]
        assert (pulled.source / name).read_bytes() == pushed
        assert name == "README.md" or (tmp_path / "agent" / name).read_bytes() == pushed
    assert str(base) not in hub.repositories["org/agent"]["memgen.json"].decode()
    assert pulled.generate("a b", max_new_tokens=12) == agent.generate("a b", max_new_tokens=12)
    assert memgen.load("hf://org/agent@main").source == pulled.source


def test_a_base_that_no_one_else_has_is_not_pushed(hub, agent, base):
    with pytest.raises(ValueError, match="is on this machine only; say what it is called on the hub"):
        agent.push_to_hub("org/agent")
    with pytest.raises(ValueError, match="bases names 'other', but the agent's bases are"):
        agent.push_to_hub("org/agent", bases={"other": BASE})
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [("hf://org/missing", "there is no hf://org/missing"), ("hf://missing", "not of the form hf://ORG/NAME")],
)
def test_what_is_not_on_the_hub_is_refused_in_one_line(hub, name, message):
    with pytest.raises(ValueError, match=message) as refused:
        memgen.load(name)
    assert "\n" not in str(refused.value)


def test_a_hub_that_does_not_answer_is_named(hub, agent, base):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match="org/agent could not be uploaded"):
        agent.push_to_hub("org/agent", bases={str(base): BASE})


def test_the_card_says_what_the_run_and_its_tests_say(agent, checkpoint):
    run = checkpoint.parent / "resume"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "seed_everything": 7,
                "model": {"class_path": "memgen.training.weaver_sft.WeaverSFT"},
                "data": {
                    "environment": {"class_path": "memgen.environments.qa.gsm8k.GSM8K"},
                    "path": "/home/someone/gsm8k",
                    "train_examples": 480,
                },
            }
        )
    )
    for name, weights in (("ours", weights_hash(agent.model)), ("another", "0" * 16)):
        folder = checkpoint.parents[2] / "tests" / name
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "agent": {"weights": weights},
            "data": {"environment": name, "split": "test"},
            "generation": {"temperature": 0.0},
        }
        (folder / JOURNAL).write_text(json.dumps({"format": 1, "settings": settings, "about": {}}) + "\n")
        interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 100}
        summary = {"items": 100, "reward": interval, "parts": {"exact_match": interval}}
        (folder / SUMMARY).write_text(json.dumps(summary))
    card = Card.of(agent.model, agent.config, agent.source, "mit").text("agent")
    for line in (
        "| Stage | weaver_sft |",
        "| Task | GSM8K |",
        "| Data | `gsm8k`, train_examples 480 |",
        "| Seed | 7 |",
        "| Trained kinds of insertion | prompt (K = 3), inference (K = 2) |",
        "| Licence | mit |",
        "| ours | test | 100 | 0 | exact_match | 0.5000 | 0.4000 to 0.6000 |",
    ):
        assert line in card
    assert "another" not in card
    assert "/home/someone" not in card
    found = metadata(card)
    assert found["license"] == "mit"
    assert found["library_name"] == "memgen"
    assert found["model-index"][0]["results"][0]["metrics"][0] == {"type": "reward", "value": 0.5}


def test_a_licence_is_the_bases_or_not_stated(agent, base, tmp_path):
    assert Card.of(agent.model, agent.config, None).licence is None
    assert "| Licence | not stated |" in Card.of(agent.model, agent.config, None).text("agent")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    try:
        assert Card.of(agent.model, agent.config, None).licence == "apache-2.0"
    finally:
        (base / "README.md").unlink()
