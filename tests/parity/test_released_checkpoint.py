"""Checkpoints that the released code wrote: imported, exported, and answered with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_data import ROOT, VARIANTS, Golden, golden, tokenizer
from safetensors.torch import load_file

from memgen.cli import main as front_end
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.lab.saving import save_backbone
from memgen.training.checkpoint import CheckpointError, export_released, import_released, released_names

WITH_CHECKPOINT = [name for name in VARIANTS if (ROOT / name / "released_checkpoint").is_dir()]

pytestmark = pytest.mark.skipif(not WITH_CHECKPOINT, reason="no golden data: set MEMGEN_GOLDEN")


@pytest.fixture(params=WITH_CHECKPOINT or ["none"])
def data(request) -> Golden:
    return golden(request.param)


def imported(data: Golden, trigger: str = "tokens"):
    model = data.memgen(trigger, with_weights=False)
    report = import_released(model, data.path / "released_checkpoint")
    assert set(report.matched) == set(released_names(model))
    return model


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def content(directory: Path) -> dict[str, dict]:
    """Every tensor of a released checkpoint by file and by the key path inside it."""

    def flat(value, prefix=""):
        if isinstance(value, torch.Tensor):
            return {prefix: value}
        return {k: t for key, inner in value.items() for k, t in flat(inner, f"{prefix}/{key}").items()}

    found = {
        name: flat(torch.load(directory / name, weights_only=True))
        for name in files(directory)
        if name.endswith(".bin")
    }
    return found | {
        name: load_file(directory / name) for name in files(directory) if name.endswith(".safetensors")
    }


def test_the_import_equals_the_released_parameters_bit_for_bit(data):
    names = released_names(imported(data))
    expected = load_file(data.path / "memgen.safetensors")
    assert set(names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(names[name], tensor), name


def test_without_a_learned_trigger_the_weaver_alone_is_imported(data):
    names = released_names(imported(data, "always"))
    expected = load_file(data.path / "memgen.safetensors")
    assert set(names) == {name for name in expected if not name.startswith("trigger.")}
    for name, parameter in names.items():
        assert torch.equal(parameter, expected[name]), name


def test_the_export_has_the_released_files_with_their_names_shapes_and_values(data, tmp_path):
    export_released(imported(data), data.memgen_config(), tmp_path / "exported")
    theirs = data.path / "released_checkpoint"
    # The released code's adapters come with a model card that says nothing.
    assert files(tmp_path / "exported") == {name for name in files(theirs) if not name.endswith("README.md")}
    ours, expected = content(tmp_path / "exported"), content(theirs)
    assert set(ours) == set(expected)
    for file, tensors in expected.items():
        assert set(ours[file]) == set(tensors), file
        for name, tensor in tensors.items():
            assert ours[file][name].dtype == tensor.dtype, f"{file}: {name}"
            assert torch.equal(ours[file][name], tensor), f"{file}: {name}"


def test_the_exported_adapter_settings_are_the_released_ones(data, tmp_path):
    export_released(imported(data), data.memgen_config(), tmp_path / "exported")
    for part in ("weaver", "trigger"):
        place = Path(part) / part / "adapter_config.json"
        ours = json.loads((tmp_path / "exported" / place).read_text())
        theirs = json.loads((data.path / "released_checkpoint" / place).read_text())
        for key in ("peft_type", "task_type", "bias", "r", "lora_alpha", "lora_dropout"):
            assert ours[key] == theirs[key], key
        assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])


def test_export_and_import_are_a_bit_exact_round_trip(data, tmp_path):
    model = imported(data)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in released_names(model).values():
            parameter += torch.randn(parameter.shape, generator=generator)
    export_released(model, data.memgen_config(), tmp_path / "exported")
    other = data.memgen(with_weights=False)
    import_released(other, tmp_path / "exported")
    names = released_names(other)
    for name, parameter in released_names(model).items():
        assert torch.equal(names[name], parameter), name


def test_a_checkpoint_for_another_number_of_latents_is_refused_with_the_names(data):
    wider = replace(data, config=data.config | {"prompt_latents_len": data.config["prompt_latents_len"] + 1})
    with pytest.raises(CheckpointError, match=r"wrong shape: weaver\.prompt_query_latents"):
        import_released(wider.memgen(with_weights=False), data.path / "released_checkpoint")


def test_greedy_answers_through_the_imported_checkpoint_are_the_released_ones(data):
    case = data.case("gen_inactive")
    real = case["attention_mask"].bool()
    prompts = [ids[mask].tolist() for ids, mask in zip(case["input_ids"], real, strict=True)]
    model = imported(data, "always")
    ours = generate(model, prompts, GenerationSettings(max_new_tokens=int(case["max_new_tokens"])))
    width = case["input_ids"].shape[1]
    for answer, output in zip(ours.answers(), case["output_ids"][:, width:].tolist(), strict=True):
        # The released code goes on behind the first end token, we stop there.
        assert answer == output[: len(answer)]
        assert len(answer) == len(output) or answer[-1] == data.config["eos_token_id"]


def test_the_command_imports_and_exports_without_losing_a_bit(data, tmp_path, capsys):
    source = data.path / "released_checkpoint"
    names = {}
    for part in ("reasoner", "weaver", "trigger"):
        if part != "reasoner" and data.config["bases_identical"]:
            continue
        directory = names[part] = tmp_path / part
        directory.mkdir()
        save_backbone(data.language_model(part), tokenizer(), directory)
    arguments = ["--backbone", str(names["reasoner"]), "--trigger", "tokens"]
    for part in ("weaver", "trigger"):
        arguments += [f"--{part}-backbone", str(names[part])] if part in names else []
    ours, again = tmp_path / "ours", tmp_path / "again"
    assert front_end.main(["convert", str(source), str(ours), *arguments]) == 0
    assert front_end.main(["convert", str(ours), str(again)]) == 0
    for file in ("weaver/weaver/adapter_model.safetensors", "trigger/trigger/adapter_model.safetensors"):
        expected, found = load_file(source / file), load_file(again / file)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert front_end.main(["convert", str(source), str(tmp_path / "x")]) == 2
    assert "give --backbone NAME" in capsys.readouterr().err
