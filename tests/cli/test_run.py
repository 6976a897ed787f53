"""fit, test and their configuration, on the dummy stage: one resolved document through LightningCLI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from memgen.cli import config
from memgen.cli import main as front_end
from memgen.run_context import run_context

CONFIG = ("--config", "stage.yaml")
DRY = ("--trainer.fast_dev_run", "true")
TESTS = Path(__file__).resolve().parents[1]


def refusal(capsys, *argv: str) -> str:
    """The one line that a refused command prints."""
    assert front_end.main(list(argv)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def printed_config(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert front_end.main(["fit", *argv, "--print_config"]) == 0
    return capsys.readouterr().out


def test_print_config_is_resolved_complete_and_round_trips(folder, capsys):
    first = printed_config(capsys, *CONFIG, "--model.memgen.backbone.name", "large")
    values = yaml.safe_load(first)
    assert values["data"]["path"] == "/data/large"
    assert values["data"]["environment"]["path"] == "/data/large"
    assert values["model"]["memgen"]["backbone"] == {"name": "large", "dtype": "float32"}
    assert values["model"]["learning_rate"] == 0.1
    (folder / "printed.yaml").write_text(first)
    assert printed_config(capsys, "--config", "printed.yaml") == first


def test_init_args_give_the_same_configuration(folder, capsys):
    values = config.with_init_args(yaml.safe_load((folder / "stage.yaml").read_text()))
    assert "init_args" in values["data"]["init_args"]["environment"]
    (folder / "nested.yaml").write_text(yaml.safe_dump(values))
    assert printed_config(capsys, "--config", "nested.yaml") == printed_config(capsys, *CONFIG)


def test_assets_are_made_once_and_before_the_trainer_starts(folder, monkeypatch):
    from cli.dummy_stage import Stage
    from memgen.api import names

    events = []
    monkeypatch.setattr(names, "resolve_asset", lambda name: events.append(name) or f"/made/{name}")

    def setup(self, stage):
        events.append(f"setup with {run_context(self.trainer).resolve_asset(self.init_from)}")

    monkeypatch.setattr(Stage, "setup", setup)
    assert front_end.main(["fit", *CONFIG, *DRY, "--model.init_from", "lab:weaver_sft"]) == 0
    assert sorted(events[:2]) == ["lab:weaver_sft", "small"]
    assert events[2:] == ["setup with /made/lab:weaver_sft"]


def test_printing_a_configuration_makes_no_asset(folder, monkeypatch, capsys):
    from memgen.api import names

    monkeypatch.setattr(names, "resolve_asset", lambda name: pytest.fail(f"{name} was made"))
    assert "lab:weaver_sft" in printed_config(capsys, *CONFIG, "--model.init_from", "lab:weaver_sft")


def test_fit_and_test_run_and_hand_over_the_asset_resolver(folder, capsys):
    assert front_end.main(["fit", *CONFIG, *DRY]) == 0
    assert capsys.readouterr().out.count("step\n") == 1
    assert front_end.main(["test", *CONFIG, *DRY]) == 0
    assert "test/loss" in capsys.readouterr().out


def test_predict_writes_a_line_for_every_item(folder, capsys):
    assert front_end.main(["predict", *CONFIG, "--trainer.logger", "false"]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("predictions: "))
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [item["batch"] for item in items] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert items[0]["text"] == "é"
    assert path.parent == Path("runs/predictions")


def test_keyword_overrides_reach_the_trainer(folder, capsys):
    assert front_end.main(["fit", *CONFIG, "--trainer.logger=false", "--trainer.max_steps", "5"]) == 0
    assert capsys.readouterr().out.count("step\n") == 5


UNKNOWN = {
    "trainer.max_stepz": "trainer.max_steps",
    "model_.x": "model",
    "model.lerning_rate": "model.learning_rate",
    "model.memgen.weavr.inference_latents": "model.memgen.weaver",
    "model.memgen.weaver.inference_latent": "model.memgen.weaver.inference_latents",
    "model.memgen.weaver.backbone.nme": "model.memgen.weaver.backbone.name",
    "data.bach_size": "data.batch_size",
    "data.environment.pth": "data.environment.path",
}


@pytest.mark.parametrize(("typed", "meant"), UNKNOWN.items(), ids=list(UNKNOWN))
def test_an_unknown_key_is_named_with_the_nearest_valid_one(folder, capsys, typed, meant):
    line = refusal(capsys, "fit", *CONFIG, f"--{typed}", "3")
    key = "model_" if typed == "model_.x" else typed.replace(".weavr.inference_latents", ".weavr")
    assert line == (
        f"memgen fit: {key} (the command line) is not a known key; the nearest valid one is {meant}"
    )


def test_an_unknown_key_names_its_file(folder, capsys):
    (folder / "overlay.yaml").write_text("trainer:\n  gradient_clip: 1.0\n")
    line = refusal(capsys, "fit", *CONFIG, "--config", "overlay.yaml")
    assert "trainer.gradient_clip (overlay.yaml) is not a known key" in line
    assert line.endswith("the nearest valid one is trainer.gradient_clip_val")


WRONG = {
    ("trainer.max_steps", "abc"): "must be int, got 'abc' (str)",
    ("data.batch_size", "5.5"): "must be int, got 5.5 (float)",
    ("data.path", "5"): "must be str or null, got 5 (int); to mean the text, quote it: '\"5\"'",
    ("model.memgen.weaver.inference_latents", "x"): "must be int, got 'x' (str)",
    ("model.memgen.backbone.dtype", "x"): "must be one of 'float32', 'bfloat16', got 'x' (str)",
    ("model.memgen.weaver", "3"): "must be a mapping (Weaver), got 3 (int)",
    ("trainer", "3"): "must be a mapping, got 3",
    ("seed_everything", "x"): "must be bool or int, got 'x' (str)",
}


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[key for key, _ in WRONG])
def test_a_value_of_the_wrong_type_names_key_value_and_type(folder, capsys, key, value):
    line = refusal(capsys, "fit", *CONFIG, f"--{key}", value)
    assert line == f"memgen fit: {key} (the command line) {WRONG[key, value]}"


@pytest.mark.parametrize("value", ["007", "0x10", "1e3", "1_000", "yes", "True"])
def test_the_text_that_a_hint_quotes_is_the_one_that_was_written(folder, capsys, value):
    (folder / "overlay.yaml").write_text(f"data:\n  batch_size: 7\n  path: {value}  # a folder\n")
    for arguments in (("--data.path", value), (f"--data.path={value}",), ("--config", "overlay.yaml")):
        line = refusal(capsys, "fit", *CONFIG, *arguments)
        assert line.endswith(f"to mean the text, quote it: '\"{value}\"'")


REFUSED = {
    "a value out of range": (
        ("--model.memgen.weaver.inference_latents", "-3"),
        "inference_latents must be at least 0, got -3",
    ),
    "mistyped class": (("--model", "cli.dummy_stage.Stge"), "did you mean cli.dummy_stage.Stage?"),
    "mistyped module": (("--model", "cli.dumy.Stage"), "cannot be imported: No module named 'cli.dumy'"),
    "a class of another kind": (("--model", "cli.dummy_stage.Data"), "which is not a LightningModule"),
    "mistyped nested class": (
        ("--data.environment.class_path", "cli.dummy_stage.Math"),
        "did you mean cli.dummy_stage.Maths?",
    ),
    "no checkpoint": (
        ("--checkpoint", "nowhere"),
        "nowhere is no checkpoint directory: it has no memgen.json",
    ),
    "no resume": (("--ckpt_path", "nowhere.ckpt"), "nowhere.ckpt does not exist"),
    "unknown strategy": (("--trainer.strategy", "fooo"), "the Trainer refuses its settings: "),
    "mistyped callback": (
        ("--trainer.callbacks", "[{class_path: ModelCheckpoin}]"),
        "trainer.callbacks.0.class_path (the command line) is ModelCheckpoin, which is no known Callback; "
        "did you mean ModelCheckpoint?",
    ),
    "arguments without a class": (
        ("--trainer.callbacks", "[{monitor: x}]"),
        "trainer.callbacks.0 (the command line) has no class_path, which names the Callback to build",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_status_2(folder, capsys, case):
    argv, message = REFUSED[case]
    assert message in refusal(capsys, "fit", *CONFIG, *DRY, *argv)


def test_a_missing_argument_is_named(folder, capsys):
    (folder / "bare.yaml").write_text("model:\n  class_path: cli.dummy_stage.Stage\n")
    line = refusal(capsys, "fit", "--config", "bare.yaml", *DRY)
    assert line == "memgen fit: model.memgen is missing; cli.dummy_stage.Stage needs it"


def test_overlays_without_a_stage_are_told_to_begin_with_one(folder, capsys):
    (folder / "overlay.yaml").write_text("trainer:\n  max_steps: 3\n")
    line = refusal(capsys, "fit", "--config", "overlay.yaml")
    assert "model.class_path is not set" in line
    assert line.endswith("begin with a stage file: --config conf/weaver_sft.yaml")


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "memgen.cli.main", "fit", *CONFIG, "--trainer.logger", "false", *argv]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_ends_a_run_with_one_line_and_status_130(folder):
    process = subprocess.Popen(
        command("--model.seconds", "0.2", "--trainer.max_steps", "1000"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line == "step\n" for line in process.stdout), "the run never began"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.endswith("memgen fit: interrupted\n")
    assert "Traceback" not in error


@pytest.mark.slow
def test_two_processes_read_the_same_configuration(folder):
    done = subprocess.run(
        command("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "2"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step\n") == 4


def test_a_run_that_was_stopped_before_its_first_checkpoint_says_that_it_begins_again(folder, caplog):
    argv = ["fit", "--config", "stage.yaml", "--run", "run", "--print_config"]
    assert front_end.main(argv) == 0
    assert "begins again" not in caplog.text
    (folder / "run" / "best").mkdir(parents=True)
    assert front_end.main(argv) == 0
    assert "run has no checkpoint to go on from, so its run begins again at step 0" in caplog.text
