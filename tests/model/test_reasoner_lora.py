"""LoRA on the reasoner, in the weaver's place: against the same update merged into plain weights, and beside the bare base."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import functional_call

from generations import logprobs
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.memgen import MemGenModel
from memgen.results.controls import without_memory
from memgen.results.recorded_test import weights_hash
from memgen.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from memgen.types import InsertionPlan, TokenBatch
from tiny import random_batch, random_rows, tiny_causal_lm, tiny_memgen
from tolerance import assert_close

LORA = LoraSettings(r=3, alpha=6, dropout=0.0, target_modules=("q_proj", "v_proj", "up_proj"))
DRAWN = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=5)
LENGTHS = [9, 4, 17, 1]


def lora_memgen(trained: bool = True, lora: LoraSettings = LORA, **given) -> MemGenModel:
    given = {"prompt_latents": 0, "inference_latents": 0, "trigger": "never", **given}
    return tiny_memgen(source="lora", lora=lora, trained=trained, **given)


def bare_memgen() -> MemGenModel:
    return tiny_memgen(trigger="never")


def batch() -> TokenBatch:
    return random_batch([14, 9, 6], [5, 4, 2], [[], [], []])[0]


def scores(model: MemGenModel, rows: TokenBatch) -> torch.Tensor:
    return model.label_logprobs(rows, InsertionPlan.empty(len(rows.rows())))[0]


def merged(model: MemGenModel) -> dict[str, torch.Tensor]:
    """The base's weights with W + alpha / r * B A in the place of each W, as a graph over the adapter."""
    pairs = model.reasoner.backbone.adapters.parameters("reasoner")
    weights = dict(tiny_causal_lm().named_parameters())
    for name, down in pairs.items():
        if ".lora_A." in name:
            layer = name.partition(".lora_A.")[0]
            up = pairs[name.replace(".lora_A.", ".lora_B.")]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + LORA.alpha / LORA.r * up @ down
    return weights


def merged_scores(model: MemGenModel, rows: TokenBatch) -> torch.Tensor:
    found = []
    for ids, marks in zip(rows.rows(), rows.supervised.tolist(), strict=True):
        logits = functional_call(
            tiny_causal_lm(), merged(model), (torch.tensor([ids]),), {"use_cache": False}
        ).logits[0]
        places = [i for i in range(1, len(ids)) if marks[i]]
        found += [logits[i - 1].log_softmax(-1)[ids[i]] for i in places]
    return torch.stack(found)


def test_a_new_adapter_changes_nothing_and_without_it_the_base_is_read_bit_for_bit():
    bare, new, trained = bare_memgen(), lora_memgen(trained=False), lora_memgen()
    rows = batch()
    with torch.no_grad():
        assert torch.equal(scores(new, rows), scores(bare, rows))
        assert not torch.equal(scores(trained, rows), scores(bare, rows))
        trained.reasoner.adapter = None
        assert torch.equal(scores(trained, rows), scores(bare, rows))
    prompts = random_rows(LENGTHS)
    assert generate(new, prompts, DRAWN).answers() == generate(bare, prompts, DRAWN).answers()
    assert new.weaver.is_untrained()
    assert not trained.weaver.is_untrained()


def test_scores_and_gradients_are_those_of_the_merged_weights():
    model, rows = lora_memgen(), batch()
    model.train_only(model.weaver)
    ours, reference = scores(model, rows), merged_scores(model, rows)
    assert_close("log-probabilities", ours, reference)
    own = model.weaver.own_parameters()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    theirs = torch.autograd.grad(reference.sum(), list(own.values()))
    ours.sum().backward()
    for (name, parameter), gradient in zip(own.items(), theirs, strict=True):
        assert_close(name, parameter.grad, gradient)
    model.use_checkpointing(True)
    again = torch.autograd.grad(scores(model, rows).sum(), list(own.values()))
    for (name, parameter), gradient in zip(own.items(), again, strict=True):
        assert_close(f"{name}, recomputed", gradient, parameter.grad)


def test_rows_that_share_a_prompt_have_the_gradient_of_rows_that_do_not():
    model = lora_memgen()
    model.train_only(model.weaver)
    prompt, *answers = random_rows([7, 3, 5, 4])
    lines = [prompt + answer for answer in answers]
    apart = TokenBatch.from_rows(lines, [[i >= 7 for i in range(len(line))] for line in lines])
    together = dataclasses.replace(apart, group=torch.zeros(3, dtype=torch.int64), shared=torch.full((3,), 7))
    own = list(model.weaver.own_parameters().values())
    first, second = (torch.autograd.grad(scores(model, rows).sum(), own) for rows in (apart, together))
    for one, other in zip(first, second, strict=True):
        assert_close("gradient", other, one)


def test_decoding_then_scoring_gives_the_same_logprobs_and_no_weaver_works():
    model = lora_memgen()
    generation = generate(model, random_rows(LENGTHS), dataclasses.replace(DRAWN, group_size=2))
    with torch.no_grad():
        again, woven = model.label_logprobs(generation.as_batch(), generation.plan)
    for row, ours in enumerate(again.split(generation.lengths)):
        assert_close(f"row {row}", ours, logprobs(generation, row))
    assert sum(generation.plan.counts) == 0
    assert generation.work.weaver_positions == woven.work.weaver_positions == 0
    # The bare reasoner of this agent has the adapter: it is the agent.
    again = generate(without_memory(model), random_rows(LENGTHS), dataclasses.replace(DRAWN, group_size=2))
    assert again.answers() == generation.answers()


def test_a_checkpoint_holds_the_adapter_bit_for_bit_and_is_no_weavers(tmp_path):
    model = lora_memgen()
    save_checkpoint(model, model.config, tmp_path / "saved", with_trigger=False)
    again = lora_memgen(trained=False)
    assert weights_hash(again) != weights_hash(model) != weights_hash(bare_memgen())
    load_checkpoint(again, tmp_path / "saved")
    assert weights_hash(again) == weights_hash(model)
    with torch.no_grad():
        assert torch.equal(scores(again, batch()), scores(model, batch()))
    with pytest.raises(
        CheckpointError, match=r'another latent source: .*kind is "weaver" \(trained: "lora"\)'
    ):
        load_checkpoint(tiny_memgen(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"weaver\.lora\.alpha is 7 \(trained: 6\)"):
        load_checkpoint(lora_memgen(lora=dataclasses.replace(LORA, alpha=7)), tmp_path / "saved")


@pytest.mark.parametrize("kinds", [(3, 2), (8, 0), (0, 1)])
def test_a_matched_rank_has_the_parameters_nearest_to_the_weavers(kinds):
    prompt, inference = kinds
    weaver = tiny_memgen(prompt_latents=prompt, inference_latents=inference, lora=LORA).weaver
    wanted = sum(p.numel() for p in weaver.own_parameters().values())
    model = lora_memgen(arguments={"match": {"prompt_latents": prompt, "inference_latents": inference}})
    size = sum(p.numel() for p in model.weaver.own_parameters().values())
    rank = model.weaver.lora.r
    per_rank = size // rank
    assert rank > LORA.r
    assert abs(size - wanted) <= per_rank / 2
    assert model.weaver.chosen() == {
        "lora_rank": rank,
        "lora_alpha": 2 * rank,
        "matched_parameters": wanted,
    }
    assert lora_memgen().weaver.chosen() == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_latents": 3}, r"kind lora writes no latents; set weaver\.prompt_latents \(3\)"),
        ({"arguments": {"match": {"prompt_latents": 3}}}, r"match says which weaver to match, .*got \{'prompt_latents': 3\}"),
        ({"arguments": {"rank": 3}}, r"arguments \{'rank': 3\} do not fit weaver\.kind lora"),
        ({"lora": dataclasses.replace(LORA, target_modules=("lm_head",))}, "the output head"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        lora_memgen(**given)


def test_a_base_of_its_own_is_refused():
    config = lora_memgen().config
    own = dataclasses.replace(config.weaver, backbone=BackboneConfig("other"))
    with pytest.raises(
        ValueError, match=r"adapts the reasoner's own base; set weaver\.backbone \(other\) to null"
    ):
        type(lora_memgen().weaver)(own, lora_memgen().reasoner.backbone)
