"""The direct computation of a decoder against its Hugging Face modules, and when the modules are called instead."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, Olmo2Config, Phi3Config

from architectures import ARCHITECTURES, COMMON, PROVEN, REFUSED, random_lm, uneven_lm
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.cache import PackedKVCache, PassSegment, RowKVCache
from tiny import random_batch, tiny_causal_lm, tiny_memgen
from tolerance import assert_close

CPU = torch.device("cpu")


def with_adapter(config, dropout: float = 0.0, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Backbone:
    backbone = Backbone(random_lm(config), "tiny")
    backbone.add_adapter("weaver", LoraSettings(r=3, alpha=5, dropout=dropout, target_modules=targets))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.adapters.parameters("weaver").values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return backbone


def is_direct(backbone: Backbone) -> bool:
    backbone(backbone.embed(torch.tensor([3])), RowKVCache(1, 1, CPU).open([PassSegment([0], [1])]))
    return backbone._direct is not None


def passes(backbone, memory, adapter, reads):
    """Two rows in three passes, the last ones narrowed: all hidden states that are wanted."""
    store = RowKVCache(2, 13, CPU) if memory is RowKVCache else PackedKVCache(2, CPU)
    rows = torch.randint(2, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    begin, found = [0, 0], []
    for counts, read in zip(((5, 2), (1, 8), (7, 3)), reads, strict=True):
        ids = torch.cat([rows[row, begin[row] : begin[row] + count] for row, count in enumerate(counts)])
        view = store.open([PassSegment([0, 1], counts, read=read)])
        found.append(backbone(backbone.embed(ids), view, adapter))
        begin = [b + count for b, count in zip(begin, counts, strict=True)]
    return torch.cat(found)


def scalar(hidden: torch.Tensor) -> torch.Tensor:
    """A number that depends on every entry. The squares of normed states would not do: their sum is constant."""
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))).sum()


@pytest.mark.parametrize("memory", [RowKVCache, PackedKVCache], ids=["generation", "training"])
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_equals_the_modules_with_and_without_an_adapter_and_for_any_wanted_positions(config, memory):
    backbone = with_adapter(config)
    assert is_direct(backbone)
    for adapter in (None, "weaver"):
        for reads in ((None, None, None), ([2, 2], [1, 8], [0, 3]), ([0, 0], [1, 1], None)):
            ours, theirs = [], []
            for results, direct in ((ours, True), (theirs, False)):
                backbone.compute_directly(direct)
                backbone.zero_grad()
                with torch.set_grad_enabled(memory is PackedKVCache):
                    hidden = passes(backbone, memory, adapter, reads)
                results.append(hidden)
                if memory is PackedKVCache and adapter is not None:
                    scalar(hidden).backward()
                    results += [p.grad for p in backbone.adapters.parameters(adapter).values()]
            for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert_close(f"{adapter}, {reads}, {index}", a, b)


def test_each_wanted_position_has_the_state_that_it_has_where_all_are_wanted():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    with torch.no_grad():
        everything = passes(backbone, RowKVCache, "weaver", (None, None, None))
        some = passes(backbone, RowKVCache, "weaver", ([1, 2], [0, 8], [3, 0]))
    places = [4, 5, 6, *range(8, 16), 20, 21, 22]
    assert_close("wanted", some, everything[places])


@pytest.mark.parametrize("targets", [("q_proj",), ("down_proj",), ("gate_proj",)])
def test_an_adapters_dropout_is_that_of_its_layer(targets):
    backbone = with_adapter(ARCHITECTURES["llama"], dropout=0.4, targets=targets).train()
    results = []
    for direct in (True, False):
        backbone.compute_directly(direct)
        is_direct(backbone)
        torch.manual_seed(3)
        results.append(passes(backbone, PackedKVCache, "weaver", (None, None, None)))
    assert_close("hidden", *results)
    assert not torch.equal(results[0], passes(backbone, PackedKVCache, "weaver", (None, None, None)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_no_further_from_float32_than_the_modules_are(dtype):
    exact = passes(Backbone(random_lm(ARCHITECTURES["qwen3"])), RowKVCache, None, (None, None, None))
    backbone = Backbone(random_lm(ARCHITECTURES["qwen3"]).to(dtype))
    errors = []
    for direct in (True, False):
        backbone.compute_directly(direct)
        hidden = passes(backbone, RowKVCache, None, (None, None, None))
        assert hidden.dtype == dtype
        errors.append(float((hidden.float() - exact).norm()))
    assert errors[0] <= 1.2 * errors[1]


def test_a_mixed_precision_pass_equals_the_modules():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    results = []
    for direct in (True, False):
        backbone.compute_directly(direct)
        backbone.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = passes(backbone, PackedKVCache, "weaver", (None, None, None))
        scalar(hidden.float()).backward()
        grads = [p.grad for p in backbone.adapters.parameters("weaver").values()]
        results.append([hidden, *grads])
    for index, (ours, theirs) in enumerate(zip(*results, strict=True)):
        # Both round at every layer, in another order: two bfloat16 computations, not one against its reference.
        assert_close(str(index), ours, theirs, dtype=torch.bfloat16, factor=2)


def test_angles_made_while_evaluating_serve_training():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    with torch.inference_mode():
        passes(backbone, RowKVCache, None, (None, None, None))
    passes(backbone, PackedKVCache, "weaver", (None, None, None)).sum().backward()
    assert all(p.grad is not None for p in backbone.adapters.parameters("weaver").values())


def test_an_adapter_added_later_is_applied():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    assert is_direct(backbone)
    backbone.add_adapter(
        "trigger", LoraSettings(r=2, alpha=4, dropout=0.0, target_modules=("k_proj", "v_proj"))
    )
    with torch.no_grad():
        for parameter in backbone.adapters.parameters("trigger").values():
            parameter.normal_()
        ours = passes(backbone, RowKVCache, "trigger", (None, None, None))
        backbone.compute_directly(False)
        assert_close("hidden", ours, passes(backbone, RowKVCache, "trigger", (None, None, None)))
        assert not torch.allclose(ours, passes(backbone, RowKVCache, "weaver", (None, None, None)))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GraniteConfig(**COMMON, residual_multiplier=0.5), "differs by"),
        (Olmo2Config(**COMMON), "consists of"),
        (Phi3Config(**COMMON), "consists of"),
    ],
    ids=["scaled residuals", "norms elsewhere", "fused projections"],
)
@torch.no_grad()
def test_another_shape_is_read_through_its_modules_and_says_so(config, reason, caplog):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    ids = torch.randint(2, 64, (9,), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids[None]).logits[0]
    backbone = Backbone(model, "tiny")
    with caplog.at_level(logging.INFO, logger="memgen.model.backbone"):
        hidden = backbone(backbone.embed(ids), RowKVCache(1, 9, CPU).open([PassSegment([0], [9], read=[4])]))
    assert_close("logits", backbone.head(hidden), expected[-4:])
    assert "tiny is read through its modules" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    "where",
    ["layers.0", "layers.1", "layers.1.mlp.up_proj", "layers.1.self_attn.v_proj.lora_B.weaver", "norm"],
)
@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_modules_that_somebody_hooks_into_are_called(kind, where):
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    with torch.no_grad():
        expected = passes(backbone, RowKVCache, "weaver", (None, None, None))
        heard = []
        module = backbone._decoder.get_submodule(where)
        handle = getattr(module, kind)(lambda *_: heard.append(1))
        assert_close("hooked", passes(backbone, RowKVCache, "weaver", (None, None, None)), expected)
        assert len(heard) == 3
        handle.remove()
        passes(backbone, RowKVCache, "weaver", (None, None, None))
        assert len(heard) == 3


def test_a_hook_into_all_modules_and_a_hook_into_the_backward_pass_are_called():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    passes(backbone, PackedKVCache, "weaver", (None, None, None))
    heard = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    passes(backbone, PackedKVCache, None, (None, None, None))
    hook.remove()
    assert backbone._layers[1].mlp in heard
    heard.clear()
    backbone._layers[1].register_full_backward_hook(lambda module, *_: heard.append(module))
    passes(backbone, PackedKVCache, "weaver", (None, None, None)).sum().backward()
    assert heard == [backbone._layers[1]] * 3


def test_a_layer_that_was_replaced_is_called():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    with torch.no_grad():
        passes(backbone, RowKVCache, None, (None, None, None))

        class Silent(torch.nn.Module):
            def forward(self, hidden_states, **_):
                return hidden_states

        backbone._decoder.layers[1] = Silent()
        ours = passes(backbone, RowKVCache, None, (None, None, None))
        backbone.compute_directly(False)
        assert torch.equal(ours, passes(backbone, RowKVCache, None, (None, None, None)))


def test_a_model_that_is_hooked_into_from_the_start_is_not_probed():
    backbone = with_adapter(ARCHITECTURES["qwen2"])
    hook = backbone._layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert not is_direct(backbone)
    hook.remove()
    assert is_direct(backbone)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_forward_is_the_same_both_ways(recompute):
    model = tiny_memgen(double=True)
    model.train_only(model.weaver)
    model.use_checkpointing(recompute)
    batch, plan = random_batch([20, 9, 15, 12], [6, 4, 8, 5], [[6, 9, 14], [4], [8, 12], []])
    results = []
    for direct in (True, False):
        for base in model.bases():
            base.compute_directly(direct)
        model.zero_grad()
        logprobs, woven = model.label_logprobs(batch, plan)
        logprobs.sum().backward()
        results.append([logprobs, *(p.grad for p in model.weaver.own_parameters().values()), woven.work])
    assert results[0].pop() == results[1].pop()
    for index, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert_close(str(index), ours, theirs)


def test_a_long_stream_has_its_own_angles():
    backbone = Backbone(tiny_causal_lm(max_position_embeddings=2048), "tiny")
    ids = torch.randint(2, 250, (1200,), generator=torch.Generator().manual_seed(1))
    results = []
    with torch.no_grad():
        for direct in (True, False):
            backbone.compute_directly(direct)
            is_direct(backbone)  # the table begins short
            view = RowKVCache(1, 1200, CPU).open([PassSegment([0], [1200])])
            results.append(backbone(backbone.embed(ids), view))
    assert_close("hidden", *results)


def in_pieces(backbone, memory, rows, lengths):
    """Logits of two rows of unequal length that are read in pieces beside each other."""
    store = RowKVCache(2, rows.shape[1], CPU) if memory is RowKVCache else PackedKVCache(2, CPU)
    begin, found = [0, 0], ([], [])
    long, short = lengths
    for counts in ((long - 20, 3), (1, 1), (10, short - 6), (9, 2)):
        ids = torch.cat([rows[row, begin[row] : begin[row] + count] for row, count in enumerate(counts)])
        logits = backbone.head(backbone(backbone.embed(ids), store.open([PassSegment([0, 1], counts)])))
        for row, part in enumerate(logits.split(counts)):
            found[row].append(part)
        begin = [b + count for b, count in zip(begin, counts, strict=True)]
    assert begin == list(lengths)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("memory", [RowKVCache, PackedKVCache], ids=["generation", "training"])
@pytest.mark.parametrize("name", [*PROVEN, *ARCHITECTURES])
@torch.no_grad()
def test_what_is_loaded_says_what_the_model_says_up_to_the_contexts_end_and_beside_a_short_row(name, memory):
    config, path = PROVEN[name] if name in PROVEN else (ARCHITECTURES[name], "direct")
    model = uneven_lm(config)
    rows = torch.randint(2, 64, (2, 128), generator=torch.Generator().manual_seed(1))
    context = 32 if name.endswith("longrope") else 128
    lengths = (context, context // 3)
    expected = [
        model(input_ids=row[None, :length], use_cache=False).logits[0]
        for row, length in zip(rows, lengths, strict=True)
    ]
    backbone = Backbone(model, "tiny")
    assert backbone.context_length == context
    for row, (ours, theirs) in enumerate(
        zip(in_pieces(backbone, memory, rows, lengths), expected, strict=True)
    ):
        assert_close(f"row {row}", ours, theirs)
    assert ("direct" if backbone._direct is not None else "modules") == path


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proven_is_refused_by_name(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"tiny.*{message}"):
        Backbone(uneven_lm(config), "tiny")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@torch.no_grad()
def test_angles_that_depend_on_the_longest_row_are_refused_where_they_begin_to(kind):
    backbone = Backbone(uneven_lm(PROVEN[f"llama, {kind}"][0]), "tiny")
    most = backbone.context_length
    ids = torch.arange(most + 1) % 60
    backbone(backbone.embed(ids[:most]), RowKVCache(1, most, CPU).open([PassSegment([0], [most])]))
    view = RowKVCache(1, most + 1, CPU).open([PassSegment([0], [most + 1])])
    with pytest.raises(ValueError, match=rf"tiny has rotary positions of kind {kind}.*got {most + 1}"):
        backbone(backbone.embed(ids), view)


@torch.no_grad()
def test_a_decoder_that_scales_its_input_where_it_lies_leaves_the_callers_alone():
    backbone = Backbone(uneven_lm(PROVEN["ctrl, which scales its input where it lies"][0]), "tiny")
    table, embeddings = backbone.embedding.clone(), backbone.embed(torch.tensor([3, 4]))
    before = embeddings.clone()
    backbone(embeddings, RowKVCache(1, 2, CPU).open([PassSegment([0], [2])]))
    assert torch.equal(embeddings, before)
    assert torch.equal(backbone.embedding, table)


@torch.no_grad()
def test_a_model_that_takes_positions_from_their_order_or_scales_its_logits_is_refused():
    model = uneven_lm(ARCHITECTURES["llama"])
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(ValueError, match=r"tiny \(LlamaForCausalLM\) says something else"):
        Backbone(model, "tiny")
    model = uneven_lm(ARCHITECTURES["llama"])
    whole = model.forward

    def halved(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = halved
    with pytest.raises(ValueError, match=r"tiny \(LlamaForCausalLM\) says something else at its first"):
        Backbone(model, "tiny")


def test_a_window_is_seen_in_the_probe():
    config = copy.deepcopy(ARCHITECTURES["mistral with a window"])
    backbone = Backbone(random_lm(config), "tiny")
    assert is_direct(backbone)
    assert [layer.window for layer in backbone._direct._layers] == [4, 4]
