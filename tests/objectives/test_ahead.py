"""The loss on tokens ahead: what each row predicts, sees and weighs, and its place in weaver SFT."""

from __future__ import annotations

import pytest
import torch

from memgen.objectives.ahead import AheadSettings, rows_ahead
from memgen.types import InsertionKind, InsertionPlan, TokenBatch
from sft_runs import Gradients, assert_gradients_close, make_data, make_stage, make_trainer, save_tiny
from tiny import random_batch, tiny_memgen
from tolerance import assert_close

LENGTHS, PROMPTS = [14, 9, 30], [5, 4, 11]


def seeded(row: int) -> torch.Generator:
    return torch.Generator().manual_seed(row)


def texts() -> TokenBatch:
    return random_batch(LENGTHS, PROMPTS, [[], [], []])[0]


def test_a_row_ends_with_the_tokens_ahead_of_its_position_and_has_latents_there_alone():
    batch = texts()
    found = rows_ahead(batch, AheadSettings(tokens=4, positions=6), seeded)
    assert found.plan.counts == [1] * (6 + 5 + 6)
    for row, marks, plan, text in zip(
        found.tokens.rows(),
        found.tokens.supervised,
        found.plan.rows(),
        found.tokens.group.tolist(),
        strict=True,
    ):
        ((point, kind),) = plan
        assert kind == InsertionKind.PROMPT
        assert row == batch.rows()[text][: point + 4]
        assert torch.nonzero(marks).flatten().tolist() == list(range(point, len(row)))


def test_an_answer_shorter_than_the_number_of_positions_has_one_at_each_of_its_tokens():
    found = rows_ahead(texts(), AheadSettings(), seeded)
    expected = [p for length, prompt in zip(LENGTHS, PROMPTS, strict=True) for p in range(prompt, length)]
    assert [points[0][0] for points in found.plan.rows()] == expected


def test_positions_are_a_sample_that_depends_on_the_generator_alone():
    settings = AheadSettings(tokens=4, positions=3)
    one, two = (rows_ahead(texts(), settings, seeded).plan.rows() for _ in range(2))
    other = rows_ahead(texts(), settings, lambda row: seeded(row + 10)).plan.rows()
    assert one == two != other


def test_each_text_weighs_as_many_tokens_as_it_supervises():
    found = rows_ahead(texts(), AheadSettings(tokens=4, positions=6), seeded)
    text = found.tokens.group.repeat_interleave(found.tokens.supervised.sum(dim=1))
    for number, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        assert_close("weight", found.weights[text == number].sum(), torch.tensor(float(length - prompt)))


def test_tokens_ahead_see_the_text_in_front_of_their_position_and_their_own_latents_only():
    model = tiny_memgen()
    found = rows_ahead(texts(), AheadSettings(tokens=4, positions=6), seeded)
    together, woven = model.label_logprobs(found.tokens, found.plan)
    apart = []
    for row, marks, plan in zip(
        found.tokens.rows(), found.tokens.supervised.tolist(), found.plan.rows(), strict=True
    ):
        alone = TokenBatch.from_rows([row], [marks[: len(row)]])
        apart.append(model.label_logprobs(alone, InsertionPlan([plan]))[0])
    assert_close("logprobs", together, torch.cat(apart))
    # What lies in front of the last position of a text is read once for all its rows.
    last = {t: p for t, ((p, _),) in zip(found.tokens.group.tolist(), found.plan.rows(), strict=True)}
    behind = found.tokens.supervised.sum(dim=1) - 1 + 3
    assert woven.work.reasoner_positions == sum(last.values()) + int(behind.sum())
    assert woven.work.weaver_positions == sum(last.values()) + 3 * len(found.plan.rows())


def test_without_latents_it_is_the_bare_reasoners_loss():
    model = tiny_memgen(prompt_latents=0)
    batch = texts()
    found = rows_ahead(batch, AheadSettings(tokens=1), seeded)
    ours = model.label_logprobs(found.tokens, found.plan)[0]
    assert_close("logprobs", ours, model.label_logprobs(batch, InsertionPlan.empty(3))[0])
    assert torch.equal(found.weights, torch.ones(len(ours)))


def test_a_batch_that_supervises_nothing_has_no_loss():
    batch = TokenBatch.from_rows([[1, 2, 3]])
    found = rows_ahead(batch, AheadSettings(), seeded)
    assert found.plan.counts == [0]
    assert len(found.weights) == 0


@pytest.mark.parametrize("name", ["tokens", "positions"])
def test_nothing_ahead_is_refused(name):
    with pytest.raises(ValueError, match=rf"ahead\.{name} must be at least 1, got 0"):
        AheadSettings(**{name: 0})


def test_micro_batches_give_the_gradient_of_one_big_batch_in_weaver_sft(tmp_path):
    base = save_tiny(tmp_path / "base")
    found = []
    for size, number in ((4, 1), (1, 4)):
        stage = make_stage(base, ahead=AheadSettings(tokens=3, positions=2))
        gradients = Gradients()
        trainer = make_trainer(tmp_path, accumulate_grad_batches=number, callbacks=[gradients])
        trainer.fit(stage, make_data(base, batch_size=size))
        found.append(gradients.steps[0])
        assert stage.memgen.weaver.trained_kinds == {InsertionKind.PROMPT}
    assert_gradients_close("gradient", found[1], found[0])


def test_weaver_sft_that_looks_ahead_without_latents_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    stage = make_stage(base, ahead=AheadSettings())
    object.__setattr__(stage.config.weaver, "prompt_latents", 0)
    with pytest.raises(ValueError, match=r"model\.ahead trains the latents of a prompt's end"):
        make_trainer(tmp_path).fit(stage, make_data(base))
