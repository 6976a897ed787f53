"""Every golden case of the released code, at the tolerances that its README suggests, with each optimisation on and off."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from golden_data import VARIANTS, Golden, golden, left_aligned, tokenizer
from switches import SWITCHES

from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenModel
from memgen.training.checkpoint import released_names
from memgen.types import Decision, InsertionPlan, TokenBatch

pytestmark = pytest.mark.skipif(not VARIANTS, reason="no golden data: set MEMGEN_GOLDEN")

LOGITS_ATOL, LOSS_ATOL, GRAD_RTOL = 1e-4, 1e-5, 5e-4


@pytest.fixture(params=VARIANTS or ["none"])
def variant(request) -> str:
    return request.param


@pytest.fixture(params=SWITCHES.values(), ids=SWITCHES)
def data(request, variant) -> Iterator[Golden]:
    with request.param.kernels_forced():
        yield golden(variant, request.param)


def without_headers(ids: torch.Tensor, supervised: torch.Tensor, im_start: int) -> torch.Tensor:
    """The released code takes '<|im_start|>assistant\\n' out of the labels itself."""
    header = tokenizer().encode("<|im_start|>assistant\n", add_special_tokens=False)
    assert header[0] == im_start
    marks = supervised.clone()
    for row in range(ids.shape[0]):
        for i in range(ids.shape[1] - len(header) + 1):
            if ids[row, i : i + len(header)].tolist() == header:
                marks[row, i : i + len(header)] = False
    return marks


def run_training_case(model: MemGenModel, data: Golden, case: dict, rows: TokenBatch, plan: InsertionPlan):
    """Loss with gradients, and the logits behind every token, row by row."""
    model.train_only(model.weaver)
    logprobs, _ = model.label_logprobs(rows, plan)
    loss = -logprobs.mean()
    loss.backward()
    with torch.no_grad():
        everywhere = torch.arange(rows.ids.shape[1]) < rows.lengths[:, None]
        logits = model.reasoner.logits(model(rows, plan, everywhere).hidden)
    return loss.detach(), logits.split(rows.lengths.tolist())


def check_gradients(model: MemGenModel, case: dict) -> None:
    expected = {k.removeprefix("grad."): v for k, v in case.items() if k.startswith("grad.")}
    names = released_names(model)
    for name, reference in expected.items():
        ours = names[name].grad
        assert ours is not None, f"{name} has no gradient"
        bound = GRAD_RTOL * float(reference.abs().max())
        error = float((ours - reference).abs().max())
        assert error <= bound, f"gradient of {name}: {error:.3g} > {bound:.3g}"
    trained = {name for name, parameter in names.items() if parameter.grad is not None}
    assert trained == set(expected)
    assert len(expected) >= 20


@pytest.mark.parametrize("name", ["train_one", "train_batch_rightpad", "train_batch_grpo_layout"])
def test_single_turn_batches_match_logits_loss_gradients_and_points(data, name):
    case = data.case(name)
    supervised = without_headers(case["input_ids"], case["labels"] != -100, data.config["im_start_id"])
    real = case["attention_mask"].bool()
    rows = left_aligned(case["input_ids"], real, supervised)
    model = data.memgen()
    plan = model.boundaries.plan(rows)
    # The points of the golden file count padding; ours count from the row's first token.
    for row, points in enumerate(plan.rows()):
        before = (~real[row]).cumsum(0)
        expected = [int(p) - int(before[int(p)]) for p in case[f"points.{row}"].flatten().tolist() if p >= 0]
        assert [point for point, _ in points] == expected
    loss, logits = run_training_case(model, data, case, rows, plan)
    assert abs(float(loss) - float(case["loss"])) <= LOSS_ATOL
    for row, ours in enumerate(logits):
        reference = case["logits"][row][real[row]]
        assert float((ours - reference).abs().max()) <= LOGITS_ATOL
    check_gradients(model, case)


@pytest.mark.parametrize("name", ["train_conv_allturns", "train_conv_oneturn"])
def test_conversations_match_with_latents_of_one_turn_invisible_to_the_next(data, name):
    case = data.case(name)
    ids = case["input_ids"]
    supervised = case["supervised_labels"] != -100
    turns = data.memgen().boundaries.turns(TokenBatch.from_rows(ids.tolist(), supervised.tolist()))[0]
    edges = torch.nonzero(supervised[0, :-1] & ~supervised[0, 1:]).flatten().tolist()
    ends = [edge + 1 for edge in edges] + ([ids.shape[1]] if bool(supervised[0, -1]) else [])
    assert len(turns) == len(ends)
    whole = TokenBatch.from_rows(
        [ids[0, :end].tolist() for end in ends],
        [[turn.begin <= i < end for i in range(end)] for turn, end in zip(turns, ends, strict=True)],
    )
    rows = TokenBatch(
        ids=whole.ids,
        lengths=whole.lengths,
        supervised=whole.supervised,
        group=torch.zeros(len(ends), dtype=torch.int64),
        shared=torch.tensor([turn.begin for turn in turns]),
    )
    model = data.memgen()
    plan = model.boundaries.plan(rows)
    expected = [case[f"points.{turn}"].flatten().tolist() for turn in range(len(ends))]
    assert [[point for point, _ in points] for points in plan.rows()] == expected
    loss, logits = run_training_case(model, data, case, rows, plan)
    assert abs(float(loss) - float(case["loss"])) <= LOSS_ATOL
    check_gradients(model, case)
    for ours, turn, end in zip(logits, turns, ends, strict=True):
        reference = case["logits"][0, turn.begin - 1 : end - 1]
        # The released code keeps the logits of [previous end, end); those that predict the turn are compared here.
        assert float((ours[turn.begin - 1 : end - 1] - reference).abs().max()) <= LOGITS_ATOL


def test_delimiter_table_is_the_released_codes(data):
    table = data.memgen().boundaries.is_delimiter
    assert np.flatnonzero(table).tolist() == data.config["delimiter_ending_token_ids"]


def test_chat_template_of_the_conversation_reproduces_its_ids(data):
    messages = json.loads((data.path / "train_conv_messages.json").read_text())
    messages = messages["messages"] if isinstance(messages, dict) else messages
    ids = tokenizer().apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == data.case("train_conv_allturns")["input_ids"][0].tolist()


def test_trigger_logits_match_behind_every_token(data):
    case = data.case("trigger_logits")
    real = case["attention_mask"].bool()
    rows = left_aligned(case["input_ids"], real)
    trigger = data.memgen().trigger
    with torch.no_grad():
        ours = trigger.logits(rows, torch.ones_like(rows.supervised), None)
    assert float((ours - case["trigger_logits"][real]).abs().max()) <= LOGITS_ATOL


def ends_at(case: str, row: int, variant: str, generated: torch.Tensor, eos: int) -> int:
    """New tokens to compare: the released code goes on behind the first end token, we stop there."""
    places = torch.nonzero(generated[row] == eos).flatten()
    return int(places[0]) + 1 if len(places) else generated.shape[1]


@pytest.mark.parametrize(
    ("name", "trigger", "cap"),
    [
        ("gen_inactive", "always", None),
        ("gen_inactive_b1", "always", None),
        ("gen_inactive_cap2", "always", 2),
        ("gen_active", "tokens", None),
        ("gen_cap0", "always", 0),
    ],
)
def test_generated_ids_decisions_and_insertions_match(data, name, trigger, cap):
    case = data.case(name)
    real = case["attention_mask"].bool()
    prompts = [ids[mask].tolist() for ids, mask in zip(case["input_ids"], real, strict=True)]
    new = int(case["max_new_tokens"])
    model = data.memgen(trigger, cap)
    if trigger == "tokens" and "trigger_bias" in case:
        with torch.no_grad():
            model.trigger.output_layer.bias.copy_(case["trigger_bias"])
    ours = data.switches.generate(model, prompts, GenerationSettings(max_new_tokens=new))
    width = case["input_ids"].shape[1]
    generated = case["output_ids"][:, width:]
    theirs_positions = case["augmentation_pos"]
    codes = {-100: int(Decision.NOT_ASKED), 0: int(Decision.SKIP), 1: int(Decision.INVOKE)}
    for row, answer in enumerate(ours.answers()):
        end = ends_at(name, row, data.variant, generated, data.config["eos_token_id"])
        assert answer == generated[row, :end].tolist()
        expected = [codes[int(code)] for code in theirs_positions[row, :end]]
        assert ours.turns[row].decisions[:end] == expected
        points = [point - len(prompts[row]) for point, _ in ours.plan.rows()[row]]
        assert points == [i for i, code in enumerate(expected) if code == Decision.INVOKE]


@pytest.mark.parametrize("name", ["gen_inactive", "gen_active"])
def test_logits_of_generated_tokens_match_a_teacher_forced_replay(data, name):
    case = data.case(name)
    real = case["attention_mask"].bool()
    prompts = [ids[mask].tolist() for ids, mask in zip(case["input_ids"], real, strict=True)]
    model = data.memgen("tokens" if name == "gen_active" else "always")
    if name == "gen_active":
        with torch.no_grad():
            model.trigger.output_layer.bias.copy_(case["trigger_bias"])
    ours = data.switches.generate(
        model, prompts, GenerationSettings(max_new_tokens=int(case["max_new_tokens"]))
    )
    replayed = ours.as_batch()
    read = torch.zeros_like(replayed.supervised)
    read[:, :-1] = replayed.supervised[:, 1:]
    with torch.no_grad():
        logits = model.reasoner.logits(model(replayed, ours.plan, read).hidden).split(ours.lengths)
    compared = 0
    for row, mine in enumerate(logits):
        theirs = case["last_logits"][row, : mine.shape[0]]
        error = float((mine[: theirs.shape[0]] - theirs).abs().max())
        assert error <= LOGITS_ATOL
        compared += theirs.shape[0]
    assert compared >= len(prompts)
