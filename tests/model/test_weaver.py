"""The weaver: against dense reads of everything so far, with its own queries per kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memgen.model.backbone import Backbone
from memgen.model.cache import PackedKVCache, RowKVCache
from memgen.model.weaver import QueryBank, Weaver, WeaverConfig
from memgen.types import InsertionKind
from tiny import LORA, tiny_causal_lm, tiny_memgen
from tolerance import assert_close

CPU = torch.device("cpu")
PROMPT, INFERENCE = InsertionKind.PROMPT, InsertionKind.INFERENCE


def states(*counts: int, seed: int = 0, hidden: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, hidden, generator=generator) * 0.3 for count in counts]


def from_scratch(weaver: Weaver, everything: torch.Tensor, kind: InsertionKind) -> torch.Tensor:
    """The definition (paper, Eq. 5): one read of all states with the queries behind them, nothing remembered."""
    bank = weaver.prompt_queries if kind == PROMPT else weaver.inference_queries
    queries = torch.nn.functional.layer_norm(
        bank.latents, bank.latents.shape[-1:], bank.norm.weight, bank.norm.bias
    )
    inputs = torch.cat([weaver.reasoner_to_weaver(everything), queries * bank.scale])
    base = weaver.backbone
    base.model.set_attn_implementation("sdpa")
    try:
        with base.adapters.using("weaver"):
            hidden = base.model.get_decoder()(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[
                0
            ]
    finally:
        base.model.set_attn_implementation("memgen")
    return weaver.weaver_to_reasoner(hidden[-bank.latents.shape[0] :])


@pytest.mark.parametrize("own_bases", [False, True], ids=["shared base", "own base"])
@pytest.mark.parametrize("memory", [RowKVCache, PackedKVCache], ids=["generation", "training"])
@torch.no_grad()
def test_reading_only_what_is_new_equals_reading_everything_again(memory, own_bases):
    weaver = tiny_memgen(own_bases=own_bases).weaver
    store = RowKVCache(3, 40, CPU) if memory is RowKVCache else PackedKVCache(3, CPU)
    seen = {row: torch.zeros(0, 32) for row in range(3)}
    calls = [
        ([0, 1, 2], [5, 1, 9], [PROMPT] * 3),
        ([2, 0], [3, 4], [INFERENCE] * 2),
        ([1, 0, 2], [7, 1, 0], [INFERENCE, INFERENCE, PROMPT]),
    ]
    for step, (rows, counts, kinds) in enumerate(calls):
        new = states(*counts, seed=step)
        latents = weaver.weave(torch.cat(new), counts, kinds, rows, store)
        assert latents.dtype == torch.float32
        for row, part, kind, block in zip(
            rows,
            new,
            kinds,
            latents.split([weaver.config.latents(kind) for kind in kinds]),
            strict=True,
        ):
            seen[row] = torch.cat([seen[row], part])
            assert_close(f"step {step}, row {row}", block, from_scratch(weaver, seen[row], kind))
            assert store.length(row) == len(seen[row])


def test_gradients_reach_every_parameter_and_through_what_was_read_before():
    weaver = tiny_memgen().weaver
    store = PackedKVCache(1, CPU)
    earlier = states(5)[0].requires_grad_(True)
    weaver.weave(earlier, [5], [PROMPT], [0], store)
    (later,) = states(3, seed=1)
    latents = weaver.weave(later, [3], [INFERENCE], [0], store)
    latents.square().sum().backward()
    ours = {name: p.grad.clone() for name, p in weaver.own_parameters().items()}
    # The prompt's queries were forgotten after their own pass.
    idle = {name for name, gradient in ours.items() if float(gradient.abs().max()) == 0}
    assert idle == {f"prompt_queries.{name}" for name in ("latents", "scale", "norm.weight", "norm.bias")}
    through_memory = earlier.grad.clone()
    assert float(through_memory.abs().max()) > 0
    earlier.grad = None
    weaver.zero_grad()
    from_scratch(weaver, torch.cat([earlier, later]), INFERENCE).square().sum().backward()
    assert_close("earlier states", through_memory, earlier.grad)
    for name in set(ours) - idle:
        assert_close(name, ours[name], weaver.own_parameters()[name].grad, factor=10)


def test_each_kind_has_queries_and_a_number_of_latents_of_its_own():
    weaver = tiny_memgen(prompt_latents=3, inference_latents=2).weaver
    (new,) = states(4)
    for kind, count in ((PROMPT, 3), (INFERENCE, 2)):
        assert weaver.config.latents(kind) == count
        assert weaver.weave(new, [4], [kind], [0], PackedKVCache(1, CPU)).shape == (count, 32)


@pytest.mark.parametrize(("prompt", "inference"), [(0, 2), (3, 0), (0, 0)])
def test_a_kind_with_no_latents_has_no_parameters(prompt, inference):
    weaver = tiny_memgen(prompt_latents=prompt, inference_latents=inference).weaver
    names = weaver.own_parameters()
    assert any(name.startswith("prompt_queries") for name in names) == bool(prompt)
    assert any(name.startswith("inference_queries") for name in names) == bool(inference)
    assert weaver.config.latents(PROMPT) == prompt


def test_a_negative_number_of_latents_is_refused():
    with pytest.raises(ValueError, match=r"weaver\.inference_latents must be 0 or more, got -1"):
        WeaverConfig(inference_latents=-1)


def test_queries_are_normalised_and_scaled_like_the_bases_embeddings():
    base = Backbone(tiny_causal_lm(), "tiny")
    weaver = Weaver(base, WeaverConfig(lora=LORA), reasoner_hidden=24)
    deviation = float(base.embedding.std())
    for bank in (weaver.prompt_queries, weaver.inference_queries):
        assert isinstance(bank, QueryBank)
        queries = bank()
        assert_close("mean", queries.mean(-1), torch.zeros(8))
        assert_close("deviation", queries.std(-1, correction=0), torch.full((8,), deviation), factor=10)
    assert weaver.reasoner_to_weaver.weight.shape == (32, 24)
    assert weaver.weaver_to_reasoner.weight.shape == (24, 32)
    scaled = Weaver(Backbone(tiny_causal_lm(), "tiny"), WeaverConfig(lora=LORA, query_scale=0.125), 24)
    assert float(scaled.prompt_queries.scale.detach()) == 0.125


@torch.no_grad()
def test_with_identity_maps_it_reads_embeddings_unchanged_and_writes_latents_of_their_norm():
    base = Backbone(tiny_causal_lm(), "tiny")
    weaver = Weaver(base, WeaverConfig(lora=LORA, map_init="identity"), base.hidden_size)
    embeddings = base.embedding[:20]
    assert torch.equal(weaver.reasoner_to_weaver(embeddings), embeddings)
    latents = weaver.weave(embeddings, [20], [PROMPT], [0], PackedKVCache(1, CPU))
    ratio = latents.norm(dim=-1).mean() / base.embedding.norm(dim=-1).mean()
    assert 0.5 < float(ratio) < 2.0
    # The direction is that of the base's last hidden states.
    hidden = weaver.backbone.embedding_scale() * torch.eye(base.hidden_size)
    assert torch.equal(weaver.weaver_to_reasoner.weight, hidden)


def test_identity_maps_between_different_widths_are_refused():
    with pytest.raises(
        ValueError, match=r"reasoner's is 24 and that of the weaver's base 32; set weaver\.map_init=random"
    ):
        Weaver(Backbone(tiny_causal_lm(), "tiny"), WeaverConfig(lora=LORA, map_init="identity"), 24)


def test_its_own_parameters_are_the_maps_the_queries_and_the_adapter_and_nothing_of_the_base():
    model = tiny_memgen(trigger="tokens")
    names = model.weaver.own_parameters()
    adapter = {name for name in names if name.startswith("backbone.")}
    assert adapter
    assert all(".lora_" in name and ".weaver." in name for name in adapter)
    rest = {name.split(".")[0] for name in set(names) - adapter}
    assert rest == {"reasoner_to_weaver", "weaver_to_reasoner", "prompt_queries", "inference_queries"}
    assert all(isinstance(parameter, nn.Parameter) for parameter in names.values())
    # The names are those under which the module itself knows them.
    known = dict(model.weaver.named_parameters())
    assert all(known[name] is parameter for name, parameter in names.items())
