"""memgen oracle as a person runs it, on a tiny checkpoint and an environment of several turns."""

from __future__ import annotations

import json

import pytest

from cli.played import CONFIG, prepare_trained
from memgen.analysis import playing
from memgen.chat import load_tokenizer
from memgen.cli import main as front_end
from memgen.model.memgen import MemGenModel
from memgen.results import statistics
from memgen.training.checkpoint import read_config, save_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    prepare_trained(tmp_path)
    return tmp_path


def oracle(*extra: str) -> int:
    return front_end.main(
        ["oracle", *CONFIG, "--checkpoint", "trained", "--model.generation.max_new_tokens", "12", *extra]
    )


def test_it_says_what_a_trigger_can_gain_and_the_same_again_without_playing(folder, capsys, monkeypatch):
    assert oracle("--out", "found", "--budget", "5") == 0
    out = capsys.readouterr().out
    numbers = json.loads((folder / "found" / "oracle.json").read_text())
    assert out == (folder / "found" / "oracle.md").read_text() + "report: found/oracle.md\n"
    assert numbers["headline"] in out
    assert numbers["items"] == 6
    assert numbers["boundaries"] >= 2  # the end of each turn's prompt
    assert all(item["decoded"] <= 5 for item in numbers["details"])
    assert numbers["trigger"] is None
    monkeypatch.setattr(playing, "rollout", None)
    assert oracle("--out", "found", "--budget", "5") == 0
    assert capsys.readouterr().out == out
    # A trigger that never invokes has no say: the oracle decides.
    assert oracle("--out", "found", "--budget", "5", "--model.memgen.trigger.kind", "never") == 0
    assert capsys.readouterr().out == out


def test_a_trained_trigger_is_compared(folder, capsys):
    config = read_config(folder / "trained")
    learned = ("--model.memgen.trigger.kind", "hidden_states", "--budget", "3")
    assert oracle(*learned, "--out", "without") == 0
    assert "The checkpoint has no trained trigger to compare." in capsys.readouterr().out
    model = MemGenModel.build(
        type(config)(
            config.backbone, config.weaver, type(config.trigger)("hidden_states"), config.boundaries
        ),
        load_tokenizer("base"),
        lambda name: name,
    )
    save_checkpoint(model, model.config, folder / "trained", with_trigger=True)
    assert oracle(*learned, "--out", "with") == 0
    assert "The trained trigger solves " in capsys.readouterr().out
    found = json.loads((folder / "with" / "oracle.json").read_text())
    assert found["trigger_gain"]["against"] in ("never", "always")
    assert found["trigger_loss"]["difference"]["mean"] <= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "2"], "--budget must be at least 3 (never, always, and one boundary alone), got 2"),
        (["--data.test_examples", "1"], "the test split has 1 items, but an analysis needs at least 4"),
        (["--ckpt_path", "last"], "memgen oracle needs a checkpoint directory: --checkpoint DIR"),
        (["--trainer.devices", "2"], "memgen oracle: plays in one process, got 2"),
    ],
    ids=["a small budget", "one item", "a checkpoint to resume from", "two processes"],
)
def test_what_cannot_be_tried_is_refused_in_one_line(folder, capsys, arguments, message):
    assert oracle(*arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_answers_without_a_boundary_are_refused(folder, capsys):
    header = folder / "trained" / "memgen.json"
    text = header.read_text().replace('"prompt_latents": 3', '"prompt_latents": 0')
    header.write_text(text)
    from safetensors.torch import load_file, save_file

    weaver = folder / "trained" / "weaver.safetensors"
    kept = {name: t for name, t in load_file(weaver).items() if not name.startswith("prompt_queries")}
    save_file(kept, weaver)
    silent = (
        "--model.memgen.weaver.prompt_latents=0",
        "--model.memgen.boundaries.max_inference_insertions=0",
    )
    assert oracle(*silent, "--budget", "3") == 2
    assert "no episode has a boundary, so a trigger has nothing to decide" in capsys.readouterr().err
