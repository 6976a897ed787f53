"""GGUF files as backbones: written here from tiny models, converted, and compared with what they were written from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Tokenizer

from memgen.chat import load_tokenizer
from memgen.lab import gguf as lab_gguf
from memgen.lab.assets import resolve_asset
from memgen.lab.cache import MANIFEST
from memgen.model.backbone import BackboneConfig, load_backbone
from memgen.run_context import no_assets

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

TEXT = "Tom has 12 apples and 345 pears.\n\n5 of them, 10  20  3, are red; it's 2024.\n" * 20
SAMPLES = (
    "Tom has 12 apples\n\n5 pears,  20 plums\t7\n\n\n 1) 3.14, 1,000 x\u00b2 \u00bd",
    "it's WE'LL don't  caf\u00e9 cafe\u0301 \u4f60\u597d\u3002\u0661\u0662",
    "  leading,  trailing  \r\n def f(x):\n\treturn 10**2",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
# As the published tokenizer.json of SmolLM2 has it.
SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def byte_pairs(pre_tokenizer: dict) -> Tokenizer:
    """A byte-level tokenizer with merges learnt from TEXT, which it splits as described."""
    core = Tokenizer(models.BPE())
    described = json.loads(core.to_str()) | {"pre_tokenizer": pre_tokenizer}
    core = Tokenizer.from_str(json.dumps(described))
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    return core


def official(kind: str) -> Tokenizer:
    """The tokenizer of a model of that kind."""
    if kind == "smollm":
        return byte_pairs(SMOLLM)
    if kind == "qwen2":
        trained = Qwen2Tokenizer().train_new_from_iterator(
            [TEXT], vocab_size=400, new_special_tokens=SPECIAL[1:], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        return trained.backend_tokenizer
    return byte_pairs(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    )


def llama(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=96, tie_word_embeddings=tied, rope_theta=50000.0,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def for_rotation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a query or key projection's rows: the halves of each head interleaved."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).clone()
    )


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(path, model, core, kind="smollm", model_kind="gpt2", half=False, without=(), scaled=False):
    """A GGUF file as llama.cpp's own converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    described = json.loads(core.to_str())
    vocabulary = core.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model(model_kind)
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[token in SPECIAL] for token in tokens])
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_chat_template(TEMPLATE)
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        for theirs, name in NAMES.items():
            weight = layer.get_submodule(theirs).weight
            if name in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                weight = for_rotation(weight, heads)
            tensors[f"blk.{index}.{name}.weight"] = weight
    for name, weight in tensors.items():
        values = weight.detach().numpy()
        if name not in without:
            writer.add_tensor(name, values.astype(np.float16) if half and values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm():
    return official("smollm")


@pytest.fixture
def written(tmp_path, smollm):
    """A tiny model with its GGUF file."""
    (tmp_path / "model").mkdir()
    model = llama(smollm.get_vocab_size(), tied=True)
    return model, write_gguf(tmp_path / "model" / "tiny.gguf", model, smollm)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 200, 31, 7, 60]])).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_a_converted_model_is_what_the_file_was_written_from(tmp_path, smollm, tied):
    model = llama(smollm.get_vocab_size(), tied)
    path = write_gguf(tmp_path / "tiny.gguf", model, smollm)
    folder = resolve_asset(str(path))
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.dtype == torch.float32
    assert torch.equal(logits(converted), logits(model))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits(converted), logits(theirs))
    backbone = load_backbone(BackboneConfig(str(path)), resolve_asset)
    assert (backbone.name, backbone.context_length) == (str(path), 96)


def test_half_precision_weights_keep_their_type(tmp_path, smollm):
    model = llama(smollm.get_vocab_size(), tied=True)
    converted = AutoModelForCausalLM.from_pretrained(
        resolve_asset(str(write_gguf(tmp_path / "tiny.gguf", model, smollm, half=True)))
    )
    assert converted.dtype == torch.float16
    ours, theirs = converted.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(ours, theirs.half())


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2"])
def test_text_gets_the_ids_that_the_models_own_tokenizer_gives_it(tmp_path, kind):
    core = official(kind)
    path = write_gguf(tmp_path / "tiny.gguf", llama(core.get_vocab_size(), tied=True), core, kind)
    ours = load_tokenizer(resolve_asset(str(path)))
    for text in (TEXT, *SAMPLES, *SPECIAL, "a<|im_end|>\n5"):
        assert (
            ours(text, add_special_tokens=False).input_ids == core.encode(text, add_special_tokens=False).ids
        )
    assert ours.model_max_length == 96
    assert (ours.bos_token, ours.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert ours.chat_template == TEMPLATE


def test_digits_are_single_tokens_though_merges_would_join_them(written):
    # Learnt from undivided text.
    _, path = written
    joined = official("gpt-2")
    assert len(joined.encode("45").ids) == 1
    write_gguf(path, llama(joined.get_vocab_size(), tied=True), joined)
    tokenizer = load_tokenizer(resolve_asset(str(path)))
    assert tokenizer.tokenize("345") == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("kind", "model_kind"), [("llama-bpe", "gpt2"), ("default", "llama"), ("no such kind", "gpt2")]
)
def test_a_tokenizer_whose_way_of_splitting_is_not_known_is_refused_by_name(
    tmp_path, smollm, home, kind, model_kind
):
    path = write_gguf(tmp_path / "tiny.gguf", llama(smollm.get_vocab_size(), True), smollm, kind, model_kind)
    with pytest.raises(
        ValueError, match=rf"of kind {model_kind}/{kind};.* put the model's own tokenizer\.json"
    ):
        resolve_asset(str(path))
    assert not [found for found in home.iterdir() if found.is_dir()]


def test_a_tokenizer_beside_the_file_is_taken_in_place_of_its_own(tmp_path, smollm):
    path = write_gguf(tmp_path / "tiny.gguf", llama(smollm.get_vocab_size(), True), smollm, "no such kind")
    (tmp_path / "tokenizer.json").write_text(smollm.to_str())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "model_max_length": 77,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    first = resolve_asset(str(path))
    tokenizer = load_tokenizer(first)
    assert tokenizer("10  20\n\n5").input_ids == smollm.encode("10  20\n\n5").ids
    assert tokenizer.model_max_length == 77
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 78}))
    assert resolve_asset(str(path)) != first


def test_a_file_is_converted_once_wherever_it_lies(written, monkeypatch, tmp_path):
    _, path = written
    first = resolve_asset(str(path))
    moved = path.rename(tmp_path / "moved.gguf")
    monkeypatch.setattr(lab_gguf, "convert_gguf", None)
    assert resolve_asset(str(moved)) == first


def test_another_file_of_the_same_name_is_converted_anew(written, smollm):
    model, path = written
    first = resolve_asset(str(path))
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    write_gguf(path, model, smollm)
    assert resolve_asset(str(path)) != first


def test_the_folder_tells_the_file(written):
    _, path = written
    recipe = json.loads((Path(resolve_asset(str(path))) / MANIFEST).read_text())["recipe"]
    assert recipe["sha256"] == lab_gguf.sha256_of(path)


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(tmp_path, smollm, home):
    path = write_gguf(
        tmp_path / "tiny.gguf", llama(smollm.get_vocab_size(), True), smollm, without=["blk.1.ffn_up.weight"]
    )
    with pytest.raises(ValueError, match=r"tiny\.gguf.* missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve_asset(str(path))
    assert not [found for found in home.iterdir() if found.is_dir()]


def test_rotary_scaling_which_would_be_lost_is_refused(tmp_path, smollm):
    path = write_gguf(tmp_path / "tiny.gguf", llama(smollm.get_vocab_size(), True), smollm, scaled=True)
    with pytest.raises(ValueError, match="scales its rotary positions"):
        resolve_asset(str(path))


def test_half_a_file_is_refused(written):
    _, path = written
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tiny\.gguf is no GGUF file, or not a whole one"):
        resolve_asset(str(path))


def test_another_format_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_text("hello " * 100)
    with pytest.raises(ValueError, match=r"a\.gguf is no GGUF file"):
        resolve_asset(str(tmp_path / "a.gguf"))


def test_a_file_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.gguf does not exist"):
        resolve_asset("nowhere/a.gguf")


def test_without_the_package_the_command_that_installs_it_is_named(written, monkeypatch):
    _, path = written
    monkeypatch.setattr(lab_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"tiny\.gguf needs the package gguf .*pip install 'memgen\[gguf\]'"
    ):
        resolve_asset(str(path))


def test_outside_the_command_line_the_file_is_not_converted_unasked():
    with pytest.raises(ValueError, match="is an asset that is built on first use"):
        no_assets("model.gguf")


def test_transformers_messages_are_as_before(written):
    from transformers.utils import logging

    _, path = written
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    resolve_asset(str(path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
