"""Checkpoints and runs under other settings than they were trained under: refused, named, or taken from there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cli.test_real_stages import ROOT, small_run
from memgen.cli import main as front_end

SETTINGS = (
    "--model.memgen.weaver.lora.alpha=8",
    "--model.memgen.boundaries.delimiters=[+]",
    "--data.chat_template=chatml",
    "--model.generation.max_new_tokens=16",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run of three steps, with a checkpoint to resume from behind the second."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert small_run(folder, *SETTINGS, "--run", "run", "--trainer.callbacks.1.every_n_steps=2") == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, symlinks=True)
    recorded = tmp_path / "run/resume/config.yaml"
    recorded.write_text(recorded.read_text().replace(str(trained), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def run_of(folder: Path, command: str, *arguments: str) -> int:
    """A command with the trained run's data and base, which may lie in another folder now."""
    return small_run(folder, *arguments, command=command)


def line(capsys) -> str:
    """The one line that a refused command prints."""
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("memgen ")]
    assert len(lines) == 1
    return lines[0]


# Tested from a checkpoint directory


def test_a_checkpoint_says_what_gives_its_tensors_their_meaning(folder):
    header = json.loads((folder / "run/best/memgen.json").read_text())
    assert "<|im_start|>" in header["text"]["chat_template"]
    assert header["text"]["end_ids"] == [258]
    assert header["trained_insertions"] == ["prompt", "inference"]
    assert len(header["tokenizer"]) == 64


def test_a_test_under_another_alpha_is_refused_by_key(folder, capsys):
    assert run_of(folder, "test", "--checkpoint", "run/best") == 2
    assert "model.memgen.weaver.lora.alpha is 16 (trained: 8)" in line(capsys)


def test_a_test_where_the_weaver_cannot_speak_says_so(folder, capsys, caplog):
    silent = ("--model.memgen.boundaries.max_inference_insertions=0", "--model.memgen.trigger.kind=always")
    config = folder / "run/best/memgen.json"
    header = json.loads(config.read_text())
    header["config"]["weaver"]["prompt_latents"] = 0
    config.write_text(json.dumps(header))
    drop(folder / "run/best/weaver.safetensors", "prompt_queries.")
    arguments = ("--checkpoint", "run/best", "--model.memgen.weaver.prompt_latents=0", *SETTINGS[:1], *silent)
    assert run_of(folder, "test", *arguments) == 0
    assert "the trained weaver never wove: no answer had an insertion" in caplog.text
    assert "boundaries.max_inference_insertions is 0 (trained: 3)" in caplog.text
    caplog.clear()
    assert run_of(folder, "test", *arguments, "--model.memgen.trigger.kind=never") == 0
    assert "never wove" not in caplog.text


def drop(file: Path, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: t for name, t in load_file(file).items() if not name.startswith(prefix)}, file)


def test_what_no_file_sets_is_taken_from_the_checkpoint(folder, capsys):
    stage = yaml.safe_load((ROOT / "conf/weaver_sft.yaml").read_text())
    for key in ("weaver", "boundaries", "trigger"):
        del stage["model"]["memgen"][key]
    del stage["data"]["keep_turn_latents"]
    (folder / "bare.yaml").write_text(yaml.safe_dump(stage))
    config = folder / "run/best/memgen.json"
    header = json.loads(config.read_text())
    header["text"]["template_arguments"] = {"enable_thinking": False}
    config.write_text(json.dumps(header))
    argv = ["test", "--config", "bare.yaml", "--checkpoint", "run/best", "--print_config"]
    assert front_end.main([*argv, "--model.memgen.boundaries.max_inference_insertions=1"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    weaver, boundaries = found["model"]["memgen"]["weaver"], found["model"]["memgen"]["boundaries"]
    assert (weaver["lora"]["alpha"], weaver["lora"]["r"], weaver["prompt_latents"]) == (8, 8, 4)
    assert (boundaries["delimiters"], boundaries["max_inference_insertions"]) == (["+"], 1)
    assert found["data"]["chat_template"] == "chatml"
    assert found["data"]["template_arguments"] == {"enable_thinking": False}


def test_generate_renders_and_ends_as_training_did(folder, monkeypatch):
    from memgen import chat
    from memgen.api import agent
    from memgen.cli import generate

    reads = "{{ enable_thinking }}"
    seen = []
    monkeypatch.setattr(
        agent, "prompt_ids", lambda tokenizer, messages, template: seen.append(template) or [65, 66]
    )
    argv = ["--checkpoint", "run/best", "--prompt", "x", "--max-new-tokens", "2"]
    header = json.loads((folder / "run/best/memgen.json").read_text())
    assert header["text"]["template_arguments"] == {}
    header["text"] |= {"chat_template": reads, "template_arguments": {"day": 1}}
    (folder / "run/best/memgen.json").write_text(json.dumps(header))
    assert generate.main(argv) == 0
    assert generate.main([*argv, "--chat-template", "chatml"]) == 0
    assert generate.main([*argv, "--template-arguments", '{"enable_thinking": false}']) == 0
    assert [template.text for template in seen] == [reads, chat.CHATML, reads]
    assert [template.arguments for template in seen] == [{"day": 1}, {"day": 1}, {"enable_thinking": False}]
    with pytest.raises(ValueError, match="does not read it; did you mean enable_thinking"):
        generate.main([*argv, "--template-arguments", '{"enable_thinkin": false}'])


# Resumed


def resume(folder: Path, *arguments: str, command: str = "fit") -> int:
    return run_of(folder, command, *SETTINGS, "--run", "run", *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--model.optimizer.lr=0.5",), "model.optimizer.lr is 0.5 (was 0.01)"),
        (("--model.optimizer.weight_decay=0.5",), "model.optimizer.weight_decay is 0.5 (was 0.0)"),
        (("--seed_everything=7",), "seed_everything is 7 (was 0)"),
        (("--checkpoint", "run/best"), "model.init_from is 'run/best' (was None)"),
        (("--model.memgen.weaver.lora.r=2",), "model.memgen.weaver.lora.r is 2 (was 8)"),
        (("--model.memgen.weaver.lora.alpha=16",), "model.memgen.weaver.lora.alpha is 16 (was 8)"),
        (("--model.memgen.weaver.prompt_latents=2",), "model.memgen.weaver.prompt_latents is 2 (was 4)"),
        (("--trainer.callbacks.0.monitor=val/loss",), "callbacks.AdapterCheckpoint.monitor is 'val/loss'"),
    ],
)
def test_a_resumed_run_refuses_what_would_be_ignored_or_meaningless(folder, capsys, arguments, named):
    assert resume(folder, *arguments) == 2
    message = line(capsys)
    assert named in message
    assert f"--checkpoint {folder / 'run/last'}" in message


def test_a_run_resumed_on_another_task_is_refused(folder, capsys):
    recorded = folder / "run/resume/config.yaml"
    recorded.write_text(recorded.read_text().replace("gsm8k.GSM8K", "gsm8k.Other"))
    assert resume(folder) == 2
    assert "data.environment.class_path is 'memgen.environments.qa.gsm8k.GSM8K' (was" in line(capsys)


def test_a_run_resumed_by_another_stage_is_refused(folder, capsys):
    stage = str(ROOT / "conf/weaver_grpo.yaml")
    argv = ["fit", "--config", stage, "--run", "run", "--model.init_from=null", "--trainer.logger=false"]
    assert front_end.main([*argv, f"--model.memgen.backbone.name={folder / 'base'}"]) == 2
    assert "model.class_path is 'memgen.training.weaver_grpo.WeaverGRPO' (was" in line(capsys)
    (folder / "run/resume/config.yaml").unlink()  # as runs of earlier versions
    arguments = ("--model.memgen.weaver.lora={r: 8, alpha: 8, target_modules: [q_proj, v_proj]}", *argv[-2:])
    assert front_end.main([*argv[:5], *arguments, f"--model.memgen.backbone.name={folder / 'base'}"]) == 2
    assert "the .ckpt was written by WeaverSFT, which WeaverGRPO cannot resume" in line(capsys)


def test_a_resumed_run_names_what_it_takes_and_says_nothing_if_all_is_the_same(folder, caplog):
    assert resume(folder, "--trainer.callbacks.1.every_n_steps=2") == 0
    assert "other settings" not in caplog.text
    changes = ("--model.curriculum={first: 1.0, all: 0, random: 0, none: 0}", "--trainer.max_steps=4")
    assert (
        resume(folder, "--model.memgen.boundaries.delimiters=[.]", "--data.val_batch_size=3", *changes) == 0
    )
    for named in (
        "model.curriculum.first is 1.0 (was 0.0)",
        "trainer.max_steps is 4 (was 3)",
        "model.memgen.boundaries.delimiters is ['.'] (was ['+'])",
        "data.val_batch_size is 3 (was 32)",
        "ResumeCheckpoint.every_n_steps is None (was 2)",
    ):
        assert named in caplog.text
    kept = yaml.safe_load((folder / "run/resume/config.yaml").read_text())
    assert kept["trainer"]["max_steps"] == 4


def test_a_ckpt_is_tested_under_its_own_settings_only(folder, capsys):
    ckpt = ("--ckpt_path", "run/resume/last.ckpt")
    assert run_of(folder, "test", *SETTINGS, *ckpt) == 0
    assert run_of(folder, "test", *ckpt) == 2
    assert "model.memgen.weaver.lora.alpha is 16 (trained: 8)" in line(capsys)
    assert run_of(folder, "test", *SETTINGS, "--model.memgen.weaver.lora.r=2", *ckpt) == 2
    assert "model.memgen.weaver.lora.r is 2 (trained: 8)" in line(capsys)


# Two runs


def test_a_second_run_in_a_folder_in_use_is_refused_in_one_line(folder, capsys, monkeypatch):
    from memgen import files

    monkeypatch.setattr(files, "HOLD_SECONDS", 0.1)
    holder = f"import sys, time, pathlib; from memgen import files; files.hold(pathlib.Path({str(folder / 'run')!r}))"
    command = [sys.executable, "-c", f"{holder}; print('held', flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
        assert resume(folder) == 2
        assert "another process is running in run, and two would mix their files" in line(capsys)
        assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
        process.kill()
    assert resume(folder) == 0


def test_runs_that_begin_within_a_second_have_folders_of_their_own(folder, monkeypatch):
    from memgen import files

    monkeypatch.setattr(files.time, "strftime", lambda form: "20260101-000000")
    for _ in range(2):
        assert small_run(folder, "--trainer.max_steps=1", "--trainer.limit_val_batches=0") == 0
    runs = folder / "runs" / "weaver_sft"
    assert {path.name for path in runs.iterdir()} == {"20260101-000000", "20260101-000000-2", "latest"}
    assert all((path / "last").is_dir() for path in runs.iterdir())


# Precision


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16-true", "bfloat16"), ("16-true", "float16"), ("64-true", None)]
)
def test_a_precision_that_would_convert_what_is_trained_is_refused(folder, capsys, command, name, dtype):
    assert run_of(folder, command, *SETTINGS, f"--trainer.precision={name}") == 2
    message = line(capsys)
    assert f"trainer.precision {name} would convert what is trained" in message
    assert dtype is None or f"model.memgen.backbone.dtype to {dtype}" in message


# What cannot be read or written


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (truncate, "cannot be read as a .ckpt: "),
        (lambda path: path.write_bytes(b""), "cannot be read as a .ckpt: "),
        (lambda path: path.write_bytes(b"no checkpoint" * 9), "cannot be read as a .ckpt: "),
        (lambda path: torch.save({"weights": 1}, path), "is no .ckpt of a run: it has no state_dict"),
        (lambda path: torch.save([1], path), "is no .ckpt of a run: it has no state_dict"),
    ],
    ids=["truncated", "empty", "garbage", "other file", "a list"],
)
def test_a_broken_ckpt_is_one_line_that_says_what_to_do(folder, capsys, command, change, reason):
    ckpt = (folder / "run/resume/last.ckpt").resolve()
    change(ckpt)
    how = ("--run", "run") if command == "fit" else ("--ckpt_path", str(ckpt))
    assert run_of(folder, command, *SETTINGS, *how) == 2
    message = line(capsys)
    assert reason in message
    assert f"--checkpoint {folder / 'run/last'}" in message


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("--ckpt_path", "run"),
            "run is a folder; ckpt_path takes a .ckpt file, for example run/resume/last.ckpt",
        ),
        (("--ckpt_path", "run/resume"), "for example run/resume/last.ckpt"),
        (("--ckpt_path", "run/best"), "(a folder with memgen.json: --checkpoint; a run's folder: --run)"),
        (("--ckpt_path", "absent.ckpt"), "absent.ckpt does not exist (ckpt_path)"),
        (("--run", "bare"), "bare is a file; --run takes the folder of a run"),
        (("--run", "bare/run"), "Not a directory: "),
        (("--trainer.callbacks.0.root=bare/runs",), "Not a directory: 'bare"),
        (("--checkpoint", "run/resume/last.ckpt"), "is no checkpoint directory"),
    ],
)
def test_a_path_of_the_wrong_kind_is_one_line(folder, capsys, arguments, reason):
    (folder / "bare").write_text("a file")
    assert run_of(folder, "fit", *SETTINGS, *arguments) == 2
    assert reason in line(capsys)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_broken_model_folder_is_one_line(folder, capsys, file):
    truncate(folder / "base" / file)
    assert run_of(folder, "test", *SETTINGS) == 2
    assert "cannot be loaded: " in (message := line(capsys)) or "cannot be read" in message


@pytest.mark.parametrize("place", ["run", "runs"])
def test_a_full_disk_is_one_line(folder, capsys, place):
    """And what was written before is whole."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        where = ("--run", str(disk)) if place == "run" else (f"--trainer.callbacks.0.root={disk}",)
        assert run_of(folder, "fit", *SETTINGS, *where) == 2
        assert "No space left on device" in (message := line(capsys)) or "could not be written" in message
        assert "make room" in message
    finally:
        subprocess.run(["umount", str(disk)], check=True)
