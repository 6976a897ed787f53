"""The demo on SmolLM2, with random models of two layers in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memgen.cli import demo
from memgen.cli import main as front_end
from memgen.lab import assets, trained
from memgen.lab.english import EnglishLab
from memgen.lab.report import Questions
from tiny_english import save_english_base, save_english_checkpoint

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
    save_english_base(folder / "base")
    found = {demo.SMOLLM2: folder / "base"}
    for name in demo.SMOLLM2_STAGES.values():
        save_english_checkpoint(folder / "base", folder / name, trigger=name.endswith("trigger_rl"))
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
