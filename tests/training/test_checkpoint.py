"""Checkpoints: exact round trips, strict loads, and writers that die at any moment."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memgen.chat import load_tokenizer
from memgen.files import remove_leftovers
from memgen.model.backbone import Backbone, BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import Boundary, TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.training import checkpoint
from memgen.training.checkpoint import (
    CheckpointError,
    TextSettings,
    export_released,
    import_released,
    load_checkpoint,
    open_checkpoint,
    read_config,
    read_text_settings,
    save_checkpoint,
)
from memgen.types import InsertionKind
from tiny import LORA, byte_tokenizer, random_batch, tiny_causal_lm, tiny_memgen

CONFIG = MemGenConfig(
    backbone=BackboneConfig(name="tiny"),
    weaver=WeaverConfig(lora=LORA, prompt_latents=3, inference_latents=2),
    boundaries=BoundaryConfig(delimiters=("a", "b"), max_inference_insertions=3, ignore_numeric=True),
)
WEAVER = "weaver.safetensors"


def trained_tensors(model) -> dict[str, torch.Tensor]:
    parts = {"weaver": model.weaver, "trigger": model.trigger}
    return {
        f"{part}.{name}": parameter.detach().clone()
        for part, module in parts.items()
        for name, parameter in module.own_parameters().items()
    }


def assert_same(ours, reference):
    assert set(ours) == set(reference)
    for name, tensor in reference.items():
        assert torch.equal(ours[name], tensor), name


def without_leftovers(parent: Path, *names: str) -> None:
    assert sorted(path.name for path in parent.iterdir()) == sorted(names)


def rewrite(directory: Path, change) -> None:
    """Changes the tensors of a checkpoint on disk."""
    tensors = load_file(directory / WEAVER)
    change(tensors)
    save_file(tensors, directory / WEAVER)


def set_config(directory: Path, change) -> None:
    header = json.loads((directory / "memgen.json").read_text())
    change(header)
    (directory / "memgen.json").write_text(json.dumps(header))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoint(tiny_memgen(), CONFIG, tmp_path / "saved", with_trigger=False)
    return tmp_path / "saved"


# Round trips


@pytest.mark.parametrize("own_bases", [False, True], ids=["shared base", "own bases"])
@pytest.mark.parametrize("trigger", ["always", "never", "random", "tokens", "hidden_states"])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, trigger, own_bases):
    model = tiny_memgen(trigger=trigger, own_bases=own_bases)
    save_checkpoint(model, CONFIG, tmp_path / "c", with_trigger=trigger in ("tokens", "hidden_states"))
    other = tiny_memgen(trigger=trigger, own_bases=own_bases, trained=False)
    before = trained_tensors(other)
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained_tensors(model).items())
    report = load_checkpoint(other, tmp_path / "c")
    assert_same(trained_tensors(other), trained_tensors(model))
    assert len(report.matched) == len(before)
    without_leftovers(tmp_path, "c")


def test_a_trigger_that_was_not_trained_is_not_written_and_keeps_its_values_on_load(tmp_path):
    model = tiny_memgen(trigger="tokens")
    save_checkpoint(model, CONFIG, tmp_path / "c", with_trigger=False)
    without_leftovers(tmp_path / "c", "memgen.json", WEAVER)
    other = tiny_memgen(seed=0, trigger="tokens", trained=False)
    before = {name: tensor.clone() for name, tensor in other.trigger.own_parameters().items()}
    load_checkpoint(other, tmp_path / "c")
    assert_same(dict(other.trigger.own_parameters()), before)
    assert_same(dict(other.weaver.own_parameters()), dict(model.weaver.own_parameters()))


def test_only_what_is_trained_is_in_the_files(saved):
    names = set(load_file(saved / WEAVER))
    assert names == set(tiny_memgen().weaver.own_parameters())
    assert not any("base_layer" in name or "embed_tokens" in name for name in names)


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = MemGenConfig(
        backbone=BackboneConfig(name="here", revision="r1", dtype="bfloat16"),
        weaver=WeaverConfig(backbone=BackboneConfig(name="there"), lora=LORA, reads="hidden_states"),
        trigger=TriggerConfig(kind="random", probability=0.25),
        boundaries=BoundaryConfig(
            delimiters=("\n", "; "), keep_turn_latents=True, skip_inside=("bracket", "number"), cooldown=8
        ),
    )
    save_checkpoint(tiny_memgen(), config, tmp_path / "c", with_trigger=False)
    assert read_config(tmp_path / "c") == config


def test_a_checkpoint_opens_as_the_model_that_it_describes(tmp_path):
    tiny_causal_lm().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = replace(CONFIG, backbone=BackboneConfig(name="asset:base"))
    resolve = {"asset:base": str(tmp_path / "base")}.__getitem__
    model = MemGenModel.build(config, byte_tokenizer(), resolve)
    save_checkpoint(model, config, tmp_path / "c", with_trigger=False)
    opened, opened_config = open_checkpoint(tmp_path / "c", type(byte_tokenizer()).from_pretrained, resolve)
    assert opened_config == config
    assert_same(trained_tensors(opened), trained_tensors(model))
    assert not opened.training


# Strict loads


def test_missing_unexpected_and_misshapen_tensors_are_listed_and_nothing_is_loaded(saved):
    def change(tensors):
        tensors["invented"] = torch.zeros(2)
        del tensors["prompt_queries.scale"], tensors["weaver_to_reasoner.bias"]
        tensors["prompt_queries.latents"] = torch.zeros(5, 32)

    rewrite(saved, change)
    model = tiny_memgen(seed=0, trained=False)
    before = trained_tensors(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, saved)
    message = str(caught.value)
    assert str(saved / WEAVER) in message
    assert "missing: prompt_queries.scale, weaver_to_reasoner.bias" in message
    assert "unexpected: invented" in message
    assert "wrong shape: prompt_queries.latents (5, 32) instead of (3, 32)" in message
    assert_same(trained_tensors(model), before)


def test_a_trigger_that_does_not_fit_leaves_the_weaver_unloaded_too(tmp_path):
    save_checkpoint(tiny_memgen(trigger="tokens"), CONFIG, tmp_path / "c", with_trigger=True)
    model = tiny_memgen(trigger="hidden_states", trained=False)
    before = trained_tensors(model)
    with pytest.raises(CheckpointError, match=r"trigger\.safetensors does not fit.*missing: norm\.bias"):
        load_checkpoint(model, tmp_path / "c")
    assert_same(trained_tensors(model), before)


def test_another_backbone_is_refused_and_both_are_named(saved):
    other = tiny_memgen(seed=7)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(other, saved)
    message = str(caught.value)
    recorded = json.loads((saved / "memgen.json").read_text())["backbones"]["reasoner"]
    assert recorded[:12] in message
    assert other.reasoner.backbone.fingerprint[:12] in message
    assert "set model.memgen.backbone.name to tiny, with the weights that it had there" in message


def test_another_base_of_the_weaver_alone_is_refused_by_its_own_key(tmp_path):
    config = replace(CONFIG, weaver=replace(CONFIG.weaver, backbone=BackboneConfig(name="tiny weaver")))
    save_checkpoint(tiny_memgen(own_bases=True), config, tmp_path / "c", with_trigger=False)
    own = {"hidden_size": 48, "intermediate_size": 40}
    model = MemGenModel.assemble(
        config,
        Backbone(tiny_causal_lm(), "tiny"),
        byte_tokenizer(),
        weaver_base=Backbone(tiny_causal_lm(9, **own), "another"),
    )
    with pytest.raises(CheckpointError, match=r"its weaver base.*weaver\.backbone\.name to tiny weaver"):
        load_checkpoint(model, tmp_path / "c")


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        for read in (read_config, lambda path: load_checkpoint(tiny_memgen(), path)):
            with pytest.raises(
                CheckpointError, match=r"is not a checkpoint directory: it has no memgen\.json"
            ):
                read(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(format_version=99), "has format version 99, this memgen reads 1"),
        (lambda header: header.pop("format_version"), "has format version None"),
        (lambda header: header.pop("config"), "it has no config"),
        (lambda header: header.pop("backbones"), "it has no backbones"),
        (lambda header: header["config"].update(colour=1), "colour is not a key of MemGenConfig"),
        (
            lambda header: header["config"]["weaver"]["lora"].update(rank=1),
            r"weaver\.lora\.rank is not a key of LoraSettings; known: .*'r'",
        ),
        (
            lambda header: header["config"]["weaver"].update(prompt_latents="3"),
            r"weaver\.prompt_latents must be a valid integer, got '3'",
        ),
    ],
    ids=[
        "newer version",
        "no version",
        "no configuration",
        "no fingerprints",
        "unknown key",
        "unknown inner key",
        "wrong type",
    ],
)
def test_a_header_that_this_version_cannot_read_is_refused(saved, change, message):
    set_config(saved, change)
    with pytest.raises(CheckpointError, match=message):
        read_config(saved)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_header_that_is_not_an_object_is_refused(saved, content):
    (saved / "memgen.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"memgen\.json (is not valid JSON|has format version None)"):
        read_config(saved)


def test_absent_and_broken_tensor_files_are_refused(saved):
    model = tiny_memgen()
    whole = (saved / WEAVER).read_bytes()
    (saved / WEAVER).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load_checkpoint(model, saved)
    (saved / WEAVER).unlink()
    with pytest.raises(CheckpointError, match="does not exist; the checkpoint is incomplete"):
        load_checkpoint(model, saved)


# Tensors under other settings


def rebuilt(directory: Path, **changes) -> MemGenModel:
    """A new model of the checkpoint's configuration with some of its keys changed."""
    config = read_config(directory)
    for key, value in changes.items():
        first, _, rest = key.partition("__")
        inner = getattr(config, first)
        if "__" in rest:
            part, _, leaf = rest.partition("__")
            value = replace(getattr(inner, part), **{leaf: value})
            rest = part
        config = replace(config, **{first: replace(inner, **{rest: value})})
    return MemGenModel.assemble(config, Backbone(tiny_causal_lm(), "tiny"), byte_tokenizer())


def save_whole(directory: Path, **changes) -> MemGenModel:
    """Saves a model with a trained token trigger under the configuration that it was built from."""
    config = replace(CONFIG, trigger=TriggerConfig(kind="tokens", lora=LORA), **changes)
    model = MemGenModel.assemble(config, Backbone(tiny_causal_lm(), "tiny"), byte_tokenizer())
    save_checkpoint(model, config, directory, with_trigger=True)
    return model


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("weaver__lora__alpha", 16, r"weaver\.lora\.alpha is 16 \(trained: 8\)"),
        ("weaver__lora__r", 2, r"weaver\.lora\.r is 2 \(trained: 4\)"),
        ("weaver__lora__target_modules", ("q_proj",), r"weaver\.lora\.target_modules is \[\"q_proj\"\]"),
        ("weaver__reads", "hidden_states", r"weaver\.reads is \"hidden_states\" \(trained: \"embeddings\"\)"),
        ("weaver__prompt_latents", 0, r"weaver\.prompt_latents is 0 \(trained: 3\)"),
        ("trigger__lora__alpha", 16, r"trigger\.lora\.alpha is 16 \(trained: 8\)"),
        ("trigger__kind", "hidden_states", r"trigger\.kind is \"hidden_states\" \(trained: \"tokens\"\)"),
    ],
)
def test_tensors_that_would_mean_something_else_are_refused_by_key(tmp_path, key, value, named):
    save_whole(tmp_path / "c")
    model = rebuilt(tmp_path / "c", **{key: value})
    before = trained_tensors(model)
    with pytest.raises(CheckpointError, match=f"model\\.memgen\\.{named}"):
        load_checkpoint(model, tmp_path / "c")
    assert_same(trained_tensors(model), before)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("boundaries__delimiters", (".",), 'boundaries.delimiters is ["."] (trained: ["a", "b"])'),
        ("boundaries__max_inference_insertions", 0, "boundaries.max_inference_insertions is 0 (trained: 3)"),
        ("boundaries__keep_turn_latents", True, "boundaries.keep_turn_latents is true"),
        ("boundaries__skip_inside", ("number",), 'boundaries.skip_inside is ["number"] (trained: [])'),
        ("boundaries__cooldown", 8, "boundaries.cooldown is 8 (trained: 0)"),
        ("trigger__kind", "always", "a trained trigger, which is not used"),
    ],
)
def test_a_choice_that_differs_is_named_and_loads(tmp_path, caplog, key, value, named):
    trained = save_whole(tmp_path / "c")
    model = rebuilt(tmp_path / "c", **{key: value})
    load_checkpoint(model, tmp_path / "c")
    assert named in caplog.text
    assert_same(dict(model.weaver.own_parameters()), dict(trained.weaver.own_parameters()))


def test_what_says_nothing_about_the_tensors_may_differ(tmp_path, caplog):
    save_whole(tmp_path / "c")
    model = rebuilt(
        tmp_path / "c",
        weaver__lora__dropout=0.5,
        weaver__lora__target_modules=("v_proj", "q_proj"),
        weaver__query_scale=2.0,
        boundaries__delimiters=("b", "a"),
    )
    load_checkpoint(model, tmp_path / "c")
    assert caplog.text == ""


def test_another_tokenizer_is_refused_and_an_added_token_is_not(tmp_path):
    config = save_whole(tmp_path / "c").config
    more = byte_tokenizer()
    more.add_tokens(["<|tool|>"])
    load_checkpoint(MemGenModel.assemble(config, Backbone(tiny_causal_lm()), more), tmp_path / "c")
    other = other_tokenizer()
    with pytest.raises(CheckpointError, match=r"trained with another tokenizer.*set data\.tokenizer"):
        load_checkpoint(MemGenModel.assemble(config, Backbone(tiny_causal_lm()), other), tmp_path / "c")


def test_latents_that_were_never_trained_are_named_where_they_are_inserted(tmp_path, caplog):
    model = MemGenModel.assemble(CONFIG, Backbone(tiny_causal_lm()), byte_tokenizer())
    batch, plan = random_batch([8], [4], [[4]])
    model.label_logprobs(batch, plan)
    save_checkpoint(model, CONFIG, tmp_path / "c", with_trigger=False)
    load_checkpoint(rebuilt(tmp_path / "c"), tmp_path / "c")
    assert "inference latents were never trained, but are inserted" in caplog.text
    caplog.clear()
    again = rebuilt(tmp_path / "c", boundaries__max_inference_insertions=0)
    load_checkpoint(again, tmp_path / "c")
    assert "never trained" not in caplog.text
    assert again.weaver.trained_kinds == {InsertionKind.PROMPT}


def test_an_older_checkpoint_that_says_less_loads(tmp_path, caplog):
    save_whole(tmp_path / "c")

    def change(header):
        for key in ("tokenizer", "text", "trained_insertions"):
            del header[key]
        for key in ("keep_turn_latents", "skip_inside", "cooldown"):
            del header["config"]["boundaries"][key]

    set_config(tmp_path / "c", change)
    load_checkpoint(rebuilt(tmp_path / "c"), tmp_path / "c")
    assert caplog.text == ""
    assert read_text_settings(tmp_path / "c") is None


def test_an_opened_checkpoint_ends_answers_as_training_did(tmp_path):
    tiny_causal_lm(eos_token_id=5).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = replace(CONFIG, backbone=BackboneConfig(name=str(tmp_path / "base")))
    model = MemGenModel.build(config, byte_tokenizer(), str)
    text = TextSettings(chat_template="{{ messages }}", end_ids=(5, 7, 258))
    save_checkpoint(model, config, tmp_path / "c", with_trigger=False, text=text)
    opened, _ = open_checkpoint(tmp_path / "c", type(byte_tokenizer()).from_pretrained, str)
    assert opened.reasoner.end_ids == (5, 7, 258)
    assert read_text_settings(tmp_path / "c") == text


@torch.no_grad()
def test_a_trigger_on_a_base_with_another_tokenizer_reads_its_own_token_ids(tmp_path):
    """The probability is that of the same text, read by the trigger's base alone; its cache grows with the text."""
    save_base(tmp_path / "reasoner", byte_tokenizer())
    save_base(tmp_path / "other", other_tokenizer())
    trigger = TriggerConfig(kind="tokens", lora=LORA, backbone=BackboneConfig(name=str(tmp_path / "other")))
    config = replace(CONFIG, backbone=BackboneConfig(name=str(tmp_path / "reasoner")), trigger=trigger)
    save_checkpoint(
        MemGenModel.build(config, byte_tokenizer(), str), config, tmp_path / "c", with_trigger=True
    )
    model, _ = open_checkpoint(tmp_path / "c", load_tokenizer, str)
    text = "a long, long walk " * 3
    device = torch.device("cpu")

    def asked(pieces, translate):
        model.trigger.translate = translate
        cache = model.trigger.kv_cache(1, 4 if translate else 200, device)
        probs = [model.trigger.invoke_probs(Boundary([0], [ids], None), cache) for ids in pieces]
        return float(probs[-1])

    translate = model.trigger.translate
    assert translate is not None
    halves = ("a long,", text[len("a long,") :])
    ours = asked([byte_tokenizer().encode(half) for half in halves], translate)
    theirs = asked([other_tokenizer().encode(half) for half in halves], None)
    assert ours == theirs
    assert ours != asked([byte_tokenizer().encode(half) for half in halves], None)


def test_a_trigger_on_another_base_with_the_same_tokenizer_reads_the_same_ids(tmp_path):
    save_base(tmp_path / "base", byte_tokenizer())
    name = BackboneConfig(name=str(tmp_path / "base"))
    config = replace(CONFIG, backbone=name, trigger=TriggerConfig(kind="tokens", lora=LORA, backbone=name))
    assert MemGenModel.build(config, byte_tokenizer(), str).trigger.translate is None


def save_base(directory: Path, tokenizer) -> None:
    tiny_causal_lm(3).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes under other ids than the byte tokenizer's, and one token of two of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocabulary = {symbol: place for place, symbol in enumerate([*alphabet, "lo"])}
    core = Tokenizer(models.BPE(vocabulary, merges=[("l", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="a")


# Nothing is unpickled


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("file", ["weaver.bin", "projs.bin", "trigger.bin"])
@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_pickle_in_place_of_tensors_is_refused_and_not_run(tmp_path, monkeypatch, file, how):
    monkeypatch.chdir(tmp_path)
    model = tiny_memgen(trigger="tokens")
    export_released(model, CONFIG, tmp_path / "released")
    if how == "torch.save":
        torch.save(Malicious(), tmp_path / "released" / file)
    else:
        (tmp_path / "released" / file).write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(CheckpointError, match=f"{file} is not a file of tensors alone"):
        import_released(model, tmp_path / "released")
    assert not Path("unpickled").exists()


def test_a_pickle_in_place_of_our_tensors_is_refused_and_not_run(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(Malicious(), saved / WEAVER)
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load_checkpoint(tiny_memgen(), saved)
    assert not Path("unpickled").exists()


def test_released_files_that_hold_something_else_or_lack_something_are_refused(tmp_path):
    model = tiny_memgen(trigger="tokens")
    export_released(model, CONFIG, tmp_path / "released")
    torch.save({"prompt_query_latents": [1, 2]}, tmp_path / "released" / "weaver.bin")
    with pytest.raises(CheckpointError, match=r"weaver\.prompt_query_latents is a list instead of a tensor"):
        import_released(model, tmp_path / "released")
    (tmp_path / "released" / "weaver.bin").unlink()
    with pytest.raises(CheckpointError, match=r"weaver\.bin does not exist"):
        import_released(model, tmp_path / "released")


def test_what_the_released_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds a trigger of kind tokens, this model's is always"):
        export_released(tiny_memgen(), CONFIG, tmp_path / "c")
    with pytest.raises(ValueError, match="K = 0 for one of them"):
        export_released(tiny_memgen(trigger="tokens", prompt_latents=0), CONFIG, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# Writers that fail


def fill(kind: str, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    match kind:
        case "tensors":
            monkeypatch.setattr(checkpoint, "save_file", full)
        case "sync":
            monkeypatch.setattr(os, "fsync", full)
        case "header":
            monkeypatch.setattr(Path, "write_text", full)
        case "rename":
            rename = Path.rename
            monkeypatch.setattr(
                Path, "rename", lambda path, to: full() if ".new-" in path.name else rename(path, to)
            )


@pytest.mark.parametrize("step", ["tensors", "sync", "header", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(saved, monkeypatch, step):
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    with monkeypatch.context() as patch:
        fill(step, patch)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tiny_memgen(seed=0), CONFIG, saved, with_trigger=False)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old
    without_leftovers(saved.parent, saved.name)
    load_checkpoint(tiny_memgen(trained=False), saved)


def test_a_disk_that_really_is_full_leaves_the_old_checkpoint_as_it_was(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        model = tiny_memgen()
        save_checkpoint(model, CONFIG, disk / "c", with_trigger=False)
        save_checkpoint(model, CONFIG, disk / "c", with_trigger=False)
        space = os.statvfs(disk)
        (disk / "filler").write_bytes(b"0" * (space.f_bavail * space.f_frsize - 8192))
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tiny_memgen(trained=False), CONFIG, disk / "c", with_trigger=False)
        without_leftovers(disk, "c", "filler")
        other = tiny_memgen(trained=False)
        load_checkpoint(other, disk / "c")
        assert_same(trained_tensors(other), trained_tensors(model))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_checkpoint_is_replaced_whole(saved):
    model = tiny_memgen(trigger="tokens")
    save_checkpoint(model, CONFIG, saved, with_trigger=True)
    save_checkpoint(model, CONFIG, saved, with_trigger=False)
    without_leftovers(saved, "memgen.json", WEAVER)
    without_leftovers(saved.parent, saved.name)


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"exists and is no checkpoint \(it has no memgen\.json\)"):
        save_checkpoint(tiny_memgen(), CONFIG, tmp_path, with_trigger=False)
    with pytest.raises(FileExistsError, match="exists and is no checkpoint"):
        save_checkpoint(tiny_memgen(), CONFIG, tmp_path / "thesis.tex", with_trigger=False)
    with pytest.raises(FileExistsError, match=r"exists and is no checkpoint \(it has no projs\.bin\)"):
        export_released(tiny_memgen(trigger="tokens"), CONFIG, tmp_path)
    without_leftovers(tmp_path, "thesis.tex")
    (tmp_path / "empty").mkdir()
    save_checkpoint(tiny_memgen(), CONFIG, tmp_path / "empty", with_trigger=False)
    without_leftovers(tmp_path, "empty", "thesis.tex")


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """A warm process that forks a writer for each order: the interpreter starts once."""
    folder = tmp_path_factory.mktemp("writers")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "running" / "killed_writer.py")],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


def killed(server, way: str, target: Path, moments: random.Random) -> int:
    """A writer that is killed at a random moment after its first save; how many saves it said it had finished."""
    server.stdin.write(f"{way}\t{target}\n")
    server.stdin.flush()
    pid = int(server.stdout.readline())
    assert int(server.stdout.readline()) == 1
    time.sleep(moments.uniform(0.0, 0.05))
    os.kill(pid, signal.SIGKILL)
    count = 1
    while (line := server.stdout.readline().strip()) != "dead":
        count = int(line)
    return count


def test_a_writer_killed_at_50_moments_always_leaves_one_whole_checkpoint(tmp_path, writers):
    directory = tmp_path / "run" / "last"
    model = tiny_memgen()
    moments = random.Random(0)
    for _ in range(50):
        finished = killed(writers, "checkpoint", directory, moments)
        load_checkpoint(model, directory)
        values = torch.cat([p.detach().flatten() for p in model.weaver.own_parameters().values()]).unique()
        assert len(values) == 1, f"tensors of several saves in one checkpoint: {values}"
        assert finished <= float(values) <= finished + 1
        # Of all the killed writers, only what the last one was at is left.
        names = {path.name for path in directory.parent.iterdir()} - {"last", ".last.old"}
        assert len(names) <= 1, names
    save_checkpoint(model, CONFIG, directory, with_trigger=False)
    without_leftovers(directory.parent, "last")


@pytest.mark.parametrize("way", ["file", "directory"])
def test_a_writer_of_ckpts_killed_at_50_moments_always_leaves_a_whole_last_one(way, tmp_path, writers):
    """As Lightning's checkpoints are written: one process writes a file, several (DeepSpeed) write a directory."""
    moments = random.Random(1)
    newest = 0
    for _ in range(50):
        finished = killed(writers, way, tmp_path, moments)
        last = (tmp_path / "last.ckpt").resolve()
        parts = [last] if way == "file" else sorted(last.iterdir())
        assert len(parts) == (1 if way == "file" else 2)
        counts = {float(torch.load(part, weights_only=True)["tensor"].unique()) for part in parts}
        assert len(counts) == 1
        (count,) = counts
        assert newest + finished <= count <= newest + finished + 1
        newest = count
    remove_leftovers(tmp_path)
    assert sum(path.name.startswith(".") for path in tmp_path.iterdir()) == 0
    assert len(list(tmp_path.glob("step_*.ckpt"))) <= 2


@pytest.mark.parametrize("moment", ["before the new one stands", "before the old one is gone"])
def test_a_writer_killed_while_it_replaces_a_checkpoint_leaves_something_to_load(saved, moment):
    """The two moments between renames, which random kills seldom hit."""
    old, new = tiny_memgen(), tiny_memgen(seed=0, trained=False)
    aside = saved.parent / f".{saved.name}.old"
    model = tiny_memgen()
    with torch.no_grad():
        for parameter in model.weaver.own_parameters().values():
            parameter.zero_()
    if moment == "before the new one stands":
        saved.rename(aside)
        load_checkpoint(new, saved)
        assert read_config(saved) == CONFIG
        assert_same(trained_tensors(new), trained_tensors(old))
    else:
        save_checkpoint(old, CONFIG, aside, with_trigger=False)
        save_checkpoint(model, CONFIG, saved, with_trigger=False)
        save_checkpoint(old, CONFIG, aside, with_trigger=False)
        load_checkpoint(new, saved)
        assert_same(trained_tensors(new), trained_tensors(model))
    save_checkpoint(model, CONFIG, saved, with_trigger=False)
    without_leftovers(saved.parent, saved.name)
    load_checkpoint(new, saved)
    assert_same(trained_tensors(new), trained_tensors(model))


def test_the_header_says_what_it_was_made_of(saved):
    header = json.loads((saved / "memgen.json").read_text())
    model = tiny_memgen()
    assert header["format_version"] == 1
    assert header["config"] == json.loads(json.dumps(asdict(CONFIG)))
    assert header["backbones"] == dict.fromkeys(("reasoner", "weaver"), model.reasoner.backbone.fingerprint)
