"""The commands on real stages, real text and a tiny model: what a user types first."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from memgen.cli import main as front_end
from memgen.lab.saving import save_backbone
from tiny import byte_tokenizer, tiny_causal_lm

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MEMGEN_SHARED", ROOT.parent / "shared"))
GSM8K = SHARED / "data" / "gsm8k"
SFT = ("--config", str(ROOT / "conf" / "weaver_sft.yaml"))
REAL = (
    *SFT,
    "--config",
    str(ROOT / "conf/backbone/tiny.yaml"),
    "--config",
    str(ROOT / "conf/data/gsm8k.yaml"),
)
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")

needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K in {GSM8K}: set MEMGEN_SHARED")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    return tmp_path


def write_gsm8k(directory: Path, items: int = 24) -> Path:
    directory.mkdir()
    lines = [
        json.dumps(
            {
                "question": f"Tom has {n} nuts, and finds {n}. How many?",
                "answer": f"{n}+{n}={2 * n}.\n#### {2 * n}",
            }
        )
        for n in range(1, items + 1)
    ]
    for split in ("train", "test"):
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def write_backbone(directory: Path, seed: int = 0) -> Path:
    directory.mkdir()
    save_backbone(tiny_causal_lm(seed, max_position_embeddings=2048), byte_tokenizer(), directory)
    return directory


def small_run(folder: Path, *extra: str, command: str = "fit") -> int:
    """A few steps on made-up problems and the byte tokenizer; no record of the run."""
    data = folder / "data"
    if not data.is_dir():
        write_gsm8k(data)
    if not (folder / "base").is_dir():
        write_backbone(folder / "base")
    return front_end.main(
        [
            command, *REAL, *QUIET, "--data.path", str(data), "--model.memgen.backbone.name", str(folder / "base"),
            "--data.batch_size=4", "--model.generation.max_new_tokens=8", "--data.environment.validation_fraction=0.2",
            "--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.logger=false", *extra,
        ]
    )  # fmt: skip


def refusal(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@needs_gsm8k
def test_real_text_trains_with_a_falling_loss_and_is_recorded(folder, capsys):
    run = [
        "fit",
        *REAL,
        *QUIET,
        "--data.path",
        str(GSM8K),
        "--data.train_examples=480",
        "--data.val_examples=4",
    ]
    assert front_end.main([*run, "--trainer.max_steps=60", "--trainer.val_check_interval=60", "--trainer.log_every_n_steps=1",
                           "--model.generation.max_new_tokens=8"]) == 0  # fmt: skip
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (record,) = client.search_runs([client.get_experiment_by_name("memgen").experiment_id])
    losses = [point.value for point in client.get_metric_history(record.info.run_id, "train/loss")]
    assert len(losses) == 60
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.05
    files = {item.path for item in client.list_artifacts(record.info.run_id, "config")}
    assert {"config/resolved.yaml", "config/raw", "config/packages.txt"} <= files
    (best,) = client.list_artifacts(record.info.run_id, "checkpoints")
    assert best.path == "checkpoints/step_000060_best"
    checkpoint = {Path(item.path).name for item in client.list_artifacts(record.info.run_id, best.path)}
    assert checkpoint == {"memgen.json", "weaver.safetensors"}
    (sample,) = client.list_artifacts(record.info.run_id, "samples")
    page = Path(client.download_artifacts(record.info.run_id, sample.path)).read_text()
    assert "4 latents" in page
    assert record.data.tags["stage"] == "weaver_sft"
    assert record.data.tags["environment"] == "GSM8K"
    assert record.data.tags["backbone"].startswith("tiny:")


def test_fit_then_test_then_generate_on_the_checkpoint(folder, capsys):
    assert small_run(folder) == 0
    latest = folder / "runs" / "weaver_sft" / "latest"
    assert {path.name for path in latest.iterdir()} == {"best", "last", "resume"}
    assert small_run(folder, "--checkpoint", str(latest / "best"), command="test") == 0
    assert "test/exact_match" in capsys.readouterr().out
    argv = [
        "generate",
        "--checkpoint",
        str(latest / "best"),
        "--prompt",
        "How many?",
        "--max-new-tokens",
        "6",
    ]
    assert front_end.main([*argv, "--mark", "<m>"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("<m>")
    assert re.search(r"\[\d+ tokens, [1-9]\d* insertions", err)
    assert front_end.main([*argv, "--prompt", ""]) == 2
    assert "the prompt is empty" in refusal(capsys)


def test_predict_writes_an_answer_for_every_item(folder):
    assert small_run(folder) == 0
    best = folder / "runs/weaver_sft/latest/best"
    assert small_run(folder, "--checkpoint", str(best), command="predict") == 0
    (written,) = (folder / "runs" / "predictions").glob("*.jsonl")
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(records) == 24
    assert all({"id", "answer", "reward", "insertions"} <= set(record) for record in records)


def test_a_run_resumed_in_mid_epoch_ends_where_an_uninterrupted_one_does(folder):
    steps = (
        "--trainer.max_epochs=3",
        "--trainer.max_steps=12",
        "--trainer.callbacks.1.every_n_steps=7",
        "--trainer.callbacks.1.keep=100",
    )
    assert small_run(folder, *steps) == 0
    run = (folder / "runs/weaver_sft/latest").resolve()
    whole = load_file(run / "last/weaver.safetensors")
    saved = run / "resume" / "step_000007.ckpt"
    (run / "last/weaver.safetensors").unlink()
    assert small_run(folder, *steps, "--ckpt_path", str(saved)) == 0
    # The resumed run goes on in its folder.
    resumed = load_file(run / "last/weaver.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_resuming_never_unpickles_objects(folder, capsys):
    torch.save({"state_dict": {}, "payload": Payload()}, folder / "evil.ckpt")
    assert small_run(folder, "--ckpt_path", str(folder / "evil.ckpt")) == 2
    assert "evil.ckpt cannot be read as a .ckpt: Weights only load failed" in refusal(capsys)
    assert not (folder / "unpickled").exists()


def test_a_checkpoint_of_another_backbone_is_refused_by_name(folder, capsys):
    assert small_run(folder) == 0
    write_backbone(folder / "other", seed=9)
    best = str(folder / "runs/weaver_sft/latest/best")
    other = ("--model.memgen.backbone.name", str(folder / "other"), "--checkpoint", best)
    assert small_run(folder, *other, command="test") == 2
    message = refusal(capsys)
    assert "was made on another backbone" in message
    assert str(folder / "base") in message


def test_text_that_the_tokenizer_does_not_know_is_refused(folder, capsys):
    from memgen.lab.tokenizer import lab_tokenizer

    write_backbone(folder / "base")
    (folder / "words").mkdir()
    lab_tokenizer().save_pretrained(folder / "words")
    assert small_run(folder, "--data.tokenizer", str(folder / "words")) == 2
    assert "its text has words that the tokenizer" in refusal(capsys)


def test_a_broken_line_of_the_data_is_named(folder, capsys):
    data = write_gsm8k(folder / "data")
    with (data / "train.jsonl").open("a") as file:
        file.write('{"question": "cut off\n')
    assert small_run(folder) == 2
    assert "train.jsonl" in (message := refusal(capsys))
    assert "25" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.memgen.boundaries.delimiters=['☃']",
            "no token of this tokenizer ends in the delimiter '☃'",
        ),
        ("--model.memgen.weaver.prompt_latents=-1", "weaver.prompt_latents must be 0 or more, got -1"),
        (
            "--model.memgen.boundaries.max_inference_insertions=-2",
            "max_inference_insertions must be 0 or more, got -2",
        ),
        (
            "--model.memgen.weaver.lora.target_modules=[q_prj]",
            "lora.target_modules ['q_prj'] do not exist in this model",
        ),
        (
            "--model.memgen.weaver={prompt_latents: 0, inference_latents: 0}",
            "no latents would ever be inserted, so there is nothing to train",
        ),
        ("--model.curriculum.first=0.5", "must be 0 or more and add up to 1"),
        ("--model.generation.max_new_tokens=3000", "the reasoner's context is 2048"),
    ],
    ids=[
        "unknown delimiter",
        "negative K",
        "negative cap",
        "unknown layer",
        "no latents",
        "shares",
        "context",
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(folder, capsys, override, message):
    assert small_run(folder, override) == 2
    assert message in refusal(capsys)


@pytest.mark.parametrize(
    "overrides",
    [
        ("--model.memgen.weaver.prompt_latents=0",),
        ("--model.memgen.weaver.inference_latents=0",),
        ("--model.memgen.boundaries.max_inference_insertions=0",),
        ("--model.memgen.weaver.reads=hidden_states", "--model.memgen.trigger.kind=hidden_states"),
        ("--model.memgen.trigger.kind=tokens", "--model.checkpointing=true"),
        ("--trainer.precision=bf16-mixed",),
        ("--model.memgen.backbone.dtype=bfloat16",),
        ("--trainer.accumulate_grad_batches=2",),
    ],
    ids=["no prompt latents", "no inference latents", "cap 0", "hidden states", "tokens, checkpointing", "bf16 mixed",
         "bf16 base", "accumulation"],
)  # fmt: skip
def test_variants_of_the_stage_train_and_validate(folder, overrides):
    assert small_run(folder, *overrides) == 0


def test_the_papers_run_is_instantiated_on_a_small_model_of_its_architecture(folder):
    published = ROOT / "conf/published/weaver_sft_gsm8k_qwen2.5-1.5b.yaml"
    settings = yaml.safe_load(published.read_text())
    assert settings["model"]["optimizer"]["lr"] == 1e-5
    torch.manual_seed(0)
    small = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, tie_word_embeddings=True, eos_token_id=258, max_position_embeddings=4096,
        )
    )  # fmt: skip
    (folder / "qwen").mkdir()
    save_backbone(small, byte_tokenizer(), folder / "qwen")
    data = write_gsm8k(folder / "data")
    assert front_end.main(
        [
            "fit", "--config", str(published), *QUIET, "--model.memgen.backbone.name", str(folder / "qwen"),
            "--data.path", str(data), "--trainer.fast_dev_run=2", "--model.generation.max_new_tokens=8",
            "--data.max_length=2048", "--data.max_prompt_length=1500",
        ]
    ) == 0  # fmt: skip
