"""Every source of latents in the weaver's place: decoding and replay agree, gradients, checkpoints and work are exact."""

from __future__ import annotations

import dataclasses
from typing import final

import pytest
import torch
from torch import nn

from generations import logprobs
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.backbone import Backbone
from memgen.model.cache import PackedKVCache
from memgen.model.latent_source import LatentSource, WeaverConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.training.checkpoint import CheckpointError, export_released, load_checkpoint, save_checkpoint
from memgen.types import InsertionKind
from tiny import byte_tokenizer, random_batch, random_rows, tiny_causal_lm, tiny_memgen
from tolerance import assert_close

PROMPT, INFERENCE = InsertionKind.PROMPT, InsertionKind.INFERENCE
DRAWN = GenerationSettings(max_new_tokens=16, temperature=1.0, seed=5)
LENGTHS = [9, 4, 17, 1]
SOURCES = {
    "pause": {"source": "pause"},
    "soft prompt": {"source": "pause", "arguments": {"tied": False}},
    "one's own": {"source": f"{__name__}.LastEmbedding", "arguments": {"scale": 0.5}},
}
"""What `tiny_memgen` needs to build each."""

every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


@every_source
@pytest.mark.parametrize("trigger", ["always", "hidden_states"])
def test_decoding_then_replaying_its_plan_gives_the_same_logprobs(source, trigger):
    model = tiny_memgen(trigger=trigger, **source)
    generation = generate(model, random_rows(LENGTHS), DRAWN, keep_latents=True)
    assert any(count > 1 for count in generation.plan.counts)
    with torch.no_grad():
        replayed, woven = model.label_logprobs(generation.as_batch(), generation.plan)
    for row, ours in enumerate(replayed.split(generation.lengths)):
        assert_close(f"row {row}", ours, logprobs(generation, row))
    rounds = max(len(blocks) for blocks in generation.latents)
    decoded = [blocks[n] for n in range(rounds) for blocks in generation.latents if len(blocks) > n]
    assert_close("latents", woven.latents, torch.cat(decoded))


@every_source
def test_a_row_alone_gets_what_it_gets_among_others(source):
    model = tiny_memgen(**source)
    rows = random_rows(LENGTHS)
    batch = generate(model, rows, DRAWN, row_seeds=[1, 2, 3, 4])
    for row in (0, 3):
        alone = generate(model, [rows[row]], DRAWN, row_seeds=[row + 1])
        assert alone.answers()[0] == batch.answers()[row]
        assert alone.turns[0].work.weaver == batch.turns[row].work.weaver


@every_source
def test_answers_to_one_prompt_equal_answers_to_the_repeated_prompt(source):
    model = tiny_memgen(**source)
    prompts = random_rows([9, 5])
    grouped = generate(model, prompts, dataclasses.replace(DRAWN, group_size=2), row_seeds=[1, 2, 3, 4])
    repeated = generate(model, [p for p in prompts for _ in range(2)], DRAWN, row_seeds=[1, 2, 3, 4])
    assert grouped.answers() == repeated.answers()


@every_source
def test_gradients_reach_all_of_its_parameters_and_nothing_else(source):
    model = tiny_memgen(**source)
    model.train_only(model.weaver)
    batch, plan = random_batch([14, 9], [5, 4], [[5, 8, 12], [4]])
    model.label_logprobs(batch, plan)[0].sum().backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {id(p) for p in model.weaver.own_parameters().values()}
    assert model.weaver.trained_kinds == {PROMPT, INFERENCE}
    assert not model.weaver.is_untrained()


@every_source
def test_what_was_saved_is_loaded_bit_for_bit_and_another_source_is_refused(tmp_path, source):
    model = tiny_memgen(**source)
    model.weaver.trained_kinds = {PROMPT}
    save_checkpoint(model, model.config, tmp_path / "saved", with_trigger=False)
    again = tiny_memgen(**source, trained=False)
    load_checkpoint(again, tmp_path / "saved")
    ours, theirs = again.weaver.own_parameters(), model.weaver.own_parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.weaver.trained_kinds == {PROMPT}
    with pytest.raises(
        CheckpointError, match=r'weaver\.kind is "weaver" \(trained: "[^"]+"\).*; set them as trained'
    ):
        load_checkpoint(tiny_memgen(), tmp_path / "saved")
    save_checkpoint(tiny_memgen(), tiny_memgen().config, tmp_path / "weaver", with_trigger=False)
    with pytest.raises(CheckpointError, match=r'weaver\.kind is "[^"]+" \(trained: "weaver"\)'):
        load_checkpoint(again, tmp_path / "weaver")


@every_source
def test_the_released_format_has_no_place_for_it(tmp_path, source):
    model = tiny_memgen(trigger="tokens", **source)
    with pytest.raises(
        ValueError, match=r"holds a weaver, this model has a \w+ \(model\.memgen\.weaver\.kind\)"
    ):
        export_released(model, model.config, tmp_path / "released")


@every_source
def test_the_reasoner_reads_as_many_positions_as_with_a_weaver(source):
    prompts = random_rows(LENGTHS)
    generation = generate(tiny_memgen(**source), prompts, DRAWN)
    expected = 0
    for prompt, turn in zip(prompts, generation.turns, strict=True):
        inside = sum(kind == INFERENCE for _, kind in turn.insertions)
        expected += len(prompt) + 3 + len(turn.tokens) - 1 + 2 * inside
    assert generation.work.reasoner_positions == expected
    assert generation.work.reasoner_forwards == max(generation.lengths)


# Pause tokens


def test_pause_tokens_are_k_equal_vectors_of_d_parameters_whatever_the_text():
    model = tiny_memgen(source="pause", prompt_latents=10)
    generation = generate(model, random_rows(LENGTHS), DRAWN, keep_latents=True)
    blocks = torch.cat([block for row in generation.latents for block in row])
    assert all(row[0].shape == (10, 32) for row in generation.latents)
    assert torch.equal(blocks, model.weaver.vectors["pause"].expand_as(blocks))
    assert sum(p.numel() for p in model.weaver.own_parameters().values()) == 32


def test_an_untied_pause_is_k_vectors_for_each_kind_of_insertion():
    model = tiny_memgen(source="pause", arguments={"tied": False})
    assert {name: tuple(p.shape) for name, p in model.weaver.own_parameters().items()} == {
        "vectors.prompt": (3, 32),
        "vectors.inference": (2, 32),
    }
    nothing = torch.zeros(0, 32)
    woven = model.weaver.weave(nothing, [0, 0], [INFERENCE, PROMPT], [0, 1], PackedKVCache(2, nothing.device))
    vectors = model.weaver.vectors
    assert torch.equal(woven, torch.cat([vectors["inference"], vectors["prompt"]]))


def test_pause_tokens_read_nothing():
    model = tiny_memgen(source="pause")
    generation = generate(model, random_rows(LENGTHS), DRAWN)
    assert generation.work.weaver_positions == generation.work.weaver_forwards == 0
    batch, plan = random_batch([14, 9], [5, 4], [[5, 8, 12], [4]])
    _, woven = model.label_logprobs(batch, plan)
    assert woven.work.weaver_positions == woven.work.weaver_forwards == 0
    assert woven.latents.shape[0] == 3 + 2 + 2 + 3


def test_an_untrained_pause_has_the_norm_of_embeddings_and_depends_on_its_seed_alone():
    torch.manual_seed(1)
    one = tiny_memgen(source="pause", trained=False, arguments={"tied": False})
    torch.manual_seed(2)
    two = tiny_memgen(source="pause", trained=False, arguments={"tied": False})
    other = tiny_memgen(source="pause", trained=False, arguments={"tied": False, "seed": 1})
    block = one.weaver.block(PROMPT)
    assert torch.equal(block, two.weaver.block(PROMPT))
    assert not torch.equal(block, other.weaver.block(PROMPT))
    norm = one.reasoner.backbone.embedding.norm(dim=-1).mean()
    assert_close("norm", block.norm(dim=-1), norm.expand(3))
    assert one.weaver.is_untrained()


def test_pause_tokens_without_a_place_are_refused():
    with pytest.raises(ValueError, match=r"prompt_latents and weaver\.inference_latents are both 0"):
        tiny_memgen(source="pause", prompt_latents=0, inference_latents=0)


# A source of one's own, and settings that fit none


@final
class LastEmbedding(LatentSource):
    """K copies of the last embedding before the insertion, scaled by a learned number."""

    def __init__(self, config: WeaverConfig, scale: float = 1.0) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(scale))

    @classmethod
    def build(cls, config, around):
        return cls(config, **config.arguments)

    @property
    def dtype(self):
        return self.scale.dtype

    def weave(self, states, counts, kinds, rows, cache, texts=None):
        parts = zip(states.split(list(counts)), kinds, strict=True)
        return torch.cat(
            [self.scale * part[-1:].expand(self.config.latents(kind), -1) for part, kind in parts]
        )


def assembled(config: WeaverConfig) -> MemGenModel:
    return MemGenModel.assemble(
        MemGenConfig(weaver=config), Backbone(tiny_causal_lm(), "tiny"), byte_tokenizer()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "no.such.module.Class"}, r"weaver\.kind 'no\.such\.module\.Class' cannot be imported"),
        ({"kind": "torch.nn.Linear"}, r"is no memgen\.model\.latent_source\.LatentSource"),
        ({"kind": "memgen.model.latent_source.KINDS"}, r"is no memgen\.model\.latent_source\.LatentSource"),
        ({"kind": "paus"}, r"must be one of weaver, pause, .*import path of a class, got 'paus'"),
        ({"arguments": {"tied": True}}, r"weaver\.arguments are those of another kind"),
        (
            {"kind": "pause", "arguments": {"tide": True}},
            r"arguments \{'tide': True\} do not fit weaver\.kind pause",
        ),
    ],
)
def test_settings_that_name_no_source_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        assembled(WeaverConfig(**settings))
