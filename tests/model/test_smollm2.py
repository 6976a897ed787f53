"""A real language model, lab:smollm2: its text, its decoding and its numbers.

It is taken from MEMGEN_HOME, the hub or the package index, and these tests are skipped where it is in none of them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from memgen.chat import end_of_turn_id, load_tokenizer, prompt_ids
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.lab.assets import resolve_asset
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from tolerance import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

QUESTIONS = (
    "What is the capital of France? Answer in one short sentence.",
    "Tom has 3 apples and buys 5 more. He gives 2 away. How many are left?",
    "Name three colours.",
    "Why is the sky blue? Explain it to a child, in one sentence, without difficult words.",
)
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder():
    try:
        return resolve_asset("lab:smollm2")
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(loaded, request):
    """The model as transformers has it."""
    dtype = getattr(torch, request.param)
    return loaded if dtype == torch.bfloat16 else copy.deepcopy(loaded).to(dtype)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


def memgen_model(plain, tokenizer, trigger: str) -> MemGenModel:
    """A MemGenModel on the same weights, with an adapter that is not 0."""
    config = MemGenConfig(
        weaver=WeaverConfig(lora=LoraSettings(r=16, alpha=32, dropout=0.0)),
        trigger=TriggerConfig(kind=trigger),
        boundaries=BoundaryConfig(max_inference_insertions=2),
    )
    shared = {id(parameter): parameter for parameter in plain.parameters()}
    torch.manual_seed(0)
    model = MemGenModel.assemble(config, Backbone(copy.deepcopy(plain, shared), "lab:smollm2"), tokenizer)
    with torch.no_grad():
        for name, parameter in model.weaver.own_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    model.reasoner.end_at(end_of_turn_id(tokenizer))
    model.train_only(model.weaver)
    return model.eval()


def answers_of_transformers(plain, tokenizer, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers, up to the end token inclusive, of one left-padded batch."""
    width = max(map(len, prompts))
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end, use_cache=True
    )
    with torch.no_grad():
        output = plain.generate(ids, attention_mask=mask, generation_config=config)
    rows = output[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def test_greedy_answers_without_memory_are_those_of_transformers(plain, tokenizer, prompts):
    ours = generate(
        memgen_model(plain, tokenizer, "never"), prompts, GenerationSettings(max_new_tokens=NEW_TOKENS)
    )
    answers = [list(turn.tokens) for turn in ours.turns]
    theirs = answers_of_transformers(plain, tokenizer, prompts)
    assert len({len(row) for row in prompts}) == len(prompts)
    assert any(turn.finished for turn in ours.turns)
    if plain.dtype == torch.float32:
        assert answers == theirs
        return
    # A padded batch rounds otherwise, and where two tokens are as good the texts part. What holds: each of our tokens is
    # the best one of transformers' own logits on the same text, up to their rounding.
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        best = logits.max(dim=1).values
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert ((best - chosen) <= 2 * torch.finfo(torch.bfloat16).eps * best.abs()).all()


def test_a_rollouts_log_probabilities_are_the_updates(plain, tokenizer, prompts):
    model = memgen_model(plain, tokenizer, "always")
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, temperature=0.7, group_size=2, seed=1)
    generation = generate(model, prompts, settings)
    rows = generation.as_batch()
    with torch.no_grad():
        old = model.label_scores(rows, generation.plan, temperature=0.7).logprobs
    update = model.label_scores(rows, generation.plan, temperature=0.7).logprobs.detach()
    assert torch.equal(update, old)
    rollout = torch.tensor([p for turn in generation.turns for p in turn.logprobs])
    difference = (update - rollout).double()
    k3 = float((torch.exp(-difference) - 1 + difference).mean())
    if plain.dtype == torch.float32:
        assert_close("logprobs", update, rollout)
    else:
        # benchmarks/one_policy.py: ratios between 0.81 and 1.45, a k3 of 0.002 to 0.003 (docs/performance.md).
        assert k3 < 0.01
        assert float(difference.abs().max()) < 0.7


def test_every_digit_is_a_token(tokenizer):
    text = "12 eggs\n\n5 of 3,141,592  77\t0; x=10**2, in 2024"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([index]) for index in ids]
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == [c for c in text if c.isdigit()]
    assert tokenizer.model_max_length == 8192


def test_the_template_puts_its_system_message_first_unless_there_is_one(tokenizer):
    user = {"role": "user", "content": "Hi"}
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert tokenizer.decode(prompt_ids(tokenizer, [user])) == f"<|im_start|>system\n{own}<|im_end|>\n{asked}"
    given = [{"role": "system", "content": "Be brief."}, user]
    assert (
        tokenizer.decode(prompt_ids(tokenizer, given)) == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"
    )
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|im_end|>"
