"""memgen continual as a person runs it, on a random model of two layers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from memgen.cli import continual
from memgen.cli import main as front_end
from memgen.cli.config import Request, merge, resolve
from memgen.continual.settings import METHODS, read_settings
from memgen.lab import trained
from memgen.results.score_files import read_records
from memgen.tracking.family import PARENT_VARIABLE
from tiny_english import save_english_base

ROOT = Path(__file__).resolve().parents[2]

TINY = """\
chain: [shop, copy]
methods: [memgen_trigger, lora_replay]
all:
  settings:
    model:
      memgen:
        backbone: {name: base}
        weaver: {prompt_latents: 2, inference_latents: 2, lora: {r: 2, alpha: 4, target_modules: [q_proj]}}
        boundaries: {max_inference_insertions: 1}
      generation: {max_new_tokens: 4}
    data: {batch_size: 2, val_batch_size: 4}
    trainer: {logger: false, enable_progress_bar: false, accelerator: cpu}
  weaver_sft: {trainer: {max_steps: 1, val_check_interval: 1}}
  trigger_rl:
    model:
      memgen: {trigger: {lora: {r: 2, alpha: 4, target_modules: [q_proj]}}}
      rollout: {group_size: 2}
    trainer: {max_steps: 1, val_check_interval: 1}
tasks:
  shop: {settings: {data: {environment: {class_path: memgen.lab.english.EnglishLab, train_size: 8, val_size: 2, test_size: 4}}}}
  copy:
    settings: {data: {environment: {class_path: memgen.lab.english.EnglishLab, tasks: [copy], train_size: 8, val_size: 2, test_size: 4}}}
  bill: null
  add: null
  text_world: null
"""
COMMAND = ("continual", "--config", str(ROOT / "conf" / "continual.yaml"), "--config", "tiny.yaml")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    save_english_base(tmp_path / "base")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def fit_here(files, overrides, run):
    """`memgen fit` in this process, which is not the point here."""
    arguments = [token for file in files for token in ("--config", str(file))]
    arguments += [f"--{key}={value}" for key, value in overrides.items()]
    assert front_end.main(["fit", *arguments, "--run", str(run)]) == 0


def test_a_chain_is_learnt_tested_reported_and_not_done_again(folder, monkeypatch, capsys):
    monkeypatch.setattr(trained, "fit", fit_here)
    assert front_end.main([*COMMAND, "--out", "found"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.rstrip().endswith("report: found/report.html")
    numbers = json.loads((folder / "found" / "continual.json").read_text())
    assert numbers["chain"] == ["shop", "copy"]
    assert numbers["items"] == {"shop": 4, "copy": 4}
    assert list(numbers["methods"]) == ["memgen_trigger", "lora_replay"]
    for method in numbers["methods"].values():
        assert [line["after"] for line in method["matrix"]] == ["before", "shop", "copy"]
        assert method["matrix"][0] == numbers["methods"]["lora_replay"]["matrix"][0]
        assert set(method["measures"]) == {"average", "forgetting", "backward", "forward", "other"}
    page = (folder / "found" / "report.html").read_text()
    assert "LoRA-SFT with replay" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    # The trigger was trained, and goes on beside the weaver of its own task.
    files = {path.name for path in (folder / "found" / "trigger_rl" / "2-copy" / "best").iterdir()}
    assert {"weaver.safetensors", "trigger.safetensors"} <= files
    start = folder / "found" / "trigger_start" / "2-copy" / "weaver.safetensors"
    assert (
        start.read_bytes() == (folder / "found" / "weaver_sft" / "2-copy" / "best" / start.name).read_bytes()
    )
    # LoRA-SFT goes on from the adapter of the task before, which it has in its batches again; no latents are ever inserted.
    adapter = json.loads((folder / "found" / "lora_replay" / "2-copy" / "best" / "memgen.json").read_text())
    assert (adapter["config"]["weaver"]["kind"], adapter["config"]["weaver"]["lora"]["r"]) == ("lora", 2)
    begun = yaml.safe_load(
        (folder / "found" / "lora_replay" / "2-copy" / "resume" / "config.yaml").read_text()
    )
    assert begun["model"]["init_from"].endswith("lora_replay/1-shop/best")
    assert begun["data"]["replay"]["items"] == 256
    rows = read_records(folder / "found" / "tests" / "lora_replay" / "2-copy" / "shop").rows
    assert all(row["weaver_positions"] == 0 for row in rows)

    monkeypatch.setattr(trained, "fit", None)
    assert front_end.main([*COMMAND, "--out", "found"]) == 0
    assert (folder / "found" / "report.html").read_text() == page
    assert front_end.main([*COMMAND, "--out", "found", "--all.weaver_sft.trainer.max_steps", "2"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks.copy", "null", "--chain", "[shop]"], "at least two tasks, got shop"),
        (["--chain", "[shop, shop]"], "chain names 'shop' twice"),
        (["--methods", "[memory]"], "methods names 'memory', which is none of memgen"),
        (["--all.weaver_sft.trainer.max_steps", "0"], "weaver_sft of shop: trainer.max_steps must be at least 1, got 0"),
        (["--tasks.copy.settings.model.memgen.weaver.prompt_latents", "3"], "model.memgen of weaver_sft of copy is not that of"),
        (["--all.settings.model.init_from", "lab:weaver_sft"], "a chain begins without memory"),
        (["--all.settings.model.optimiser", "1"], "all.settings"),
        (["--all.overlays", "[nowhere.yaml]"], "overlays: there is no file nowhere.yaml"),
        (["--run", "somewhere"], "takes --out DIR, not --run"),
    ],
    ids=["one task", "a task twice", "method", "no steps", "two models", "a start", "a key", "a file", "--run"],
)  # fmt: skip
def test_what_cannot_be_learnt_is_refused_in_one_line_and_leaves_nothing(folder, capsys, arguments, message):
    assert front_end.main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (folder / "runs").exists()


def test_a_chain_that_goes_on_is_the_same_run_in_mlflow(folder, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = read_settings({"chain": ["a", "b"], "tasks": {"a": {}, "b": {}}, "seed": 3})
    out = Path("found")

    def begin():
        with continual._parent(settings, out) as parent:
            assert os.environ[PARENT_VARIABLE] == parent.run_id
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    first = json.loads((out / "mlflow_run.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    assert client.get_run(first).info.status == "FAILED"
    with continual._parent(settings, out) as parent:
        parent.log_metrics({"memgen/a": 0.5}, 1)
    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["memgen/a"] == 0.5
    assert (run.data.tags["chain"], run.data.tags["memgen.family"]) == ("a b", "pipeline")
    assert PARENT_VARIABLE not in os.environ


@pytest.mark.parametrize("overlays", [[], ["smollm2/continual.yaml"]], ids=["the lab", "SmolLM2"])
def test_the_files_of_the_project_are_whole(overlays, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [ROOT / "conf" / name for name in ("continual.yaml", *overlays)]
    layers = Request(tuple(files), (), False, ()).layers()
    settings = read_settings(resolve(merge(layers), layers))
    assert len(settings.chain) == len(settings.tasks) == 4
    assert settings.methods == tuple(METHODS)
    built = {
        f"{stage} of {task}": continual._built(settings, stage, task)
        for stage, task in (("weaver_sft", settings.chain[0]), ("trigger_rl", settings.chain[-1]))
    }
    continual._require_one_model(built)
    backbones = {document["model"]["memgen"]["backbone"]["name"] for document in built.values()}
    assert backbones == {"lab:smollm2" if overlays else "lab:reasoner"}
