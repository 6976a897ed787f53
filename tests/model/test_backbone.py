"""Backbones: Hugging Face's own logits through our memories, fingerprints, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GptOssConfig,
    MambaConfig,
)

from architectures import ARCHITECTURES, COMMON, random_lm
from memgen.model.backbone import Backbone, BackboneConfig, fingerprint, load_backbone
from memgen.model.cache import PackedKVCache, PassSegment, RowKVCache
from tiny import tiny_causal_lm, tiny_memgen
from tolerance import assert_close


@pytest.mark.parametrize("memory", [RowKVCache, PackedKVCache], ids=["generation", "training"])
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_reading_rows_in_pieces_beside_each_other_gives_hugging_faces_own_logits(config, memory):
    model = random_lm(config)
    rows = torch.randint(2, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=rows).logits
    backbone = Backbone(model, "tiny")
    store = (
        RowKVCache(2, 13, torch.device("cpu"))
        if memory is RowKVCache
        else PackedKVCache(2, torch.device("cpu"))
    )
    read = [0, 0]
    # Row 1 lags behind, catches up with a long piece, and both take single steps.
    for counts in ((5, 2), (1, 1), (1, 8), (6, 2)):
        ids = torch.cat([rows[row, read[row] : read[row] + count] for row, count in enumerate(counts)])
        hidden = backbone(backbone.embed(ids), store.open([PassSegment([0, 1], counts)]))
        for row, part in enumerate(backbone.head(hidden).split(counts)):
            begin = read[row]
            assert_close(f"row {row} from {begin}", part, expected[row, begin : begin + counts[row]])
            read[row] += counts[row]
    assert read == [13, 13]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**COMMON, head_dim=8), r"tiny scales its logits \(final_logit_softcapping\)"),
        (Gemma3TextConfig(**COMMON, head_dim=8), r"tiny changes its embeddings as it looks them up"),
        (
            MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
            r"layers of kind \['linear_attention'\]",
        ),
        (
            BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
            "tiny computes attention by itself",
        ),
        (
            GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
            "tiny computes attention by itself",
        ),
    ],
    ids=["soft-capped logits", "scaled embeddings", "no attention", "ALiBi", "own attention"],
)
def test_architectures_that_packed_reading_would_get_wrong_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Backbone(random_lm(config), "tiny")


def test_attention_with_sinks_is_refused():
    config = GptOssConfig(**COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"tiny cannot be read by memgen.*soft capping or sinks"):
        Backbone(random_lm(config), "tiny")


def test_a_backbones_model_is_refused_outside_its_forward():
    backbone = Backbone(tiny_causal_lm(), "tiny")
    with pytest.raises(RuntimeError, match=r"called outside Backbone\.forward"):
        backbone.model(input_ids=torch.tensor([[1, 2]]))


def test_the_base_is_frozen_and_says_what_it_is():
    backbone = Backbone(tiny_causal_lm(), "tiny")
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.hidden_size == 32
    assert backbone.context_length == 512
    assert backbone.embedding.shape == (260, 32)


# Fingerprints


def test_the_same_weights_have_the_same_fingerprint_wherever_they_come_from(tmp_path):
    model = tiny_causal_lm()
    expected = fingerprint(model)
    model.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        loaded = load_backbone(BackboneConfig(name="asset:x", dtype=dtype), lambda name: str(tmp_path))
        assert loaded.fingerprint == expected, dtype
        assert loaded.embedding.dtype == getattr(torch, dtype)
        assert loaded.name == "asset:x"
    assert fingerprint(tiny_causal_lm()) == expected
    assert Backbone(tiny_causal_lm(), "another name").fingerprint == expected


def test_adapters_do_not_change_the_fingerprint():
    assert tiny_memgen(trigger="tokens").reasoner.backbone.fingerprint == fingerprint(tiny_causal_lm())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"rms_norm_eps": 1e-3},
        {"num_hidden_layers": 3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=["weights", "norm", "layers", "rotary base"],
)
def test_another_base_has_another_fingerprint(changes):
    assert fingerprint(tiny_causal_lm(**changes)) != fingerprint(tiny_causal_lm())


def test_one_changed_tensor_changes_the_fingerprint():
    model = tiny_causal_lm()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.5
    assert fingerprint(model) != before


# Models whose files are not theirs


def saved_model(directory, change, **settings) -> BackboneConfig:
    """A saved model whose tensors on disk were changed."""
    tiny_causal_lm(**settings).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return BackboneConfig(name=str(directory))


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), {}, f"missing: {DOWN}"),
        (
            lambda tensors: tensors.pop("lm_head.weight"),
            {"tie_word_embeddings": False},
            r"missing: lm_head\.weight",
        ),
        (
            lambda tensors: tensors.update(score=torch.zeros(2)),
            {},
            r"are not those of its architecture; unexpected: score\.",
        ),
        (
            lambda tensors: tensors.update({DOWN: torch.zeros(3, 2)}),
            {},
            rf"wrong shape: {DOWN} \(3, 2\) instead of \(32, 48\)",
        ),
        (lambda tensors: [tensors.pop(key) for key in list(tensors)[:12]], {}, r"missing: .* and 5 more\."),
    ],
    ids=["missing", "missing head", "unexpected", "wrong shape", "many"],
)
def test_a_base_with_other_tensors_than_its_architecture_is_refused_by_name(
    tmp_path, caplog, change, settings, message
):
    with pytest.raises(ValueError, match=message):
        load_backbone(saved_model(tmp_path, change, **settings), str)
    assert "LOAD REPORT" not in caplog.text


def test_a_tied_head_that_is_not_stored_is_not_missing(tmp_path):
    assert load_backbone(saved_model(tmp_path, lambda tensors: None), str).head.weight.shape == (260, 32)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"x" * 100], ids=["absent", "empty", "cut", "other"])
def test_a_model_folder_that_cannot_be_read_is_one_line(tmp_path, file, content):
    config = saved_model(tmp_path, lambda tensors: None)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(OSError, match=r"cannot be loaded: .*\(model\.memgen\.backbone\.name\)") as caught:
        load_backbone(config, str)
    assert "\n" not in str(caught.value)
