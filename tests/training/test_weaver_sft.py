"""Weaver SFT under a real Trainer: exact accumulation, what moves, what is saved, and what is measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule

from memgen.chat import prompt_ids
from memgen.generation.decode import generate
from memgen.model.memgen import MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.objectives.sft import Curriculum, choose_points
from memgen.training.checkpoint import save_checkpoint
from memgen.training.optimizer import OptimizerSettings
from memgen.types import InsertionKind, TokenBatch
from sft_runs import (
    MIXED,
    TARGETS,
    Gradients,
    Letters,
    assert_gradients_close,
    make_data,
    make_stage,
    make_trainer,
    save_tiny,
)
from tiny import byte_tokenizer, tiny_causal_lm
from tolerance import assert_close


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def fit(base, tmp_path, *, stage=None, data=None, callbacks=(), ckpt_path=None, **trainer):
    stage = stage or make_stage(base)
    trainer = make_trainer(tmp_path, callbacks=list(callbacks), **trainer)
    trainer.fit(stage, data or make_data(base), ckpt_path=ckpt_path)
    return stage, trainer


def base_hash(stage) -> str:
    """Of every tensor that is not the weaver's, bit for bit."""
    digest = hashlib.sha256()
    own = {id(parameter) for parameter in stage.memgen.weaver.own_parameters().values()}
    for name, tensor in stage.memgen.named_parameters():
        if id(tensor) not in own:
            digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["train/loss"]))


# Accumulation


@pytest.mark.parametrize("curriculum", [Curriculum(), MIXED], ids=["first", "random curriculum"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_give_the_gradient_and_the_parameters_of_one_big_batch(
    base, tmp_path, parts, curriculum
):
    results = []
    for accumulate in (1, parts):
        gradients = Gradients()
        stage = make_stage(base, curriculum=curriculum)
        data = make_data(base, batch_size=8 // accumulate)
        fit(
            base,
            tmp_path,
            stage=stage,
            data=data,
            callbacks=[gradients],
            accumulate_grad_batches=accumulate,
            max_steps=2,
        )
        results.append((gradients, dict(stage.memgen.weaver.own_parameters())))
    (whole, parameters), (split, split_parameters) = results
    assert len(whole.steps) == len(split.steps) == 2
    for step in range(2):
        # AdamW divides by the gradient's own size, so the second step starts from slightly other parameters.
        assert_gradients_close(f"step {step}", split.steps[step], whole.steps[step], factor=10**step)
    for name, reference in parameters.items():
        assert_close(name, split_parameters[name], reference, factor=100)
    sizes = {len(target) for target in TARGETS}
    assert len(sizes) > 4, "token counts differ between the micro-batches"
    assert any(float(gradient.abs().max()) > 0 for gradient in whole.steps[0].values())


def test_the_last_shorter_window_of_an_epoch_is_exact_too(base, tmp_path):
    """Five micro-batches of one item in windows of three: the second window holds two."""
    environment, gradients = Letters(TARGETS[:5]), Gradients()
    stage = make_stage(base, optimizer=OptimizerSettings(lr=1e-30))
    data = make_data(base, environment, batch_size=1)
    fit(base, tmp_path, stage=stage, data=data, callbacks=[gradients], accumulate_grad_batches=3, max_steps=2)
    order = [item for items, _ in gradients.plans for item in items]
    for step, window in enumerate((order[:3], order[3:])):
        assert_gradients_close(
            f"window {step}", gradients.steps[step], direct_gradient(base, environment, window)
        )


def direct_gradient(base, environment, items):
    """Gradient of the mean loss over all supervised tokens of some items, without a Trainer."""
    stage = make_stage(base)
    data = make_data(base, environment)
    data.setup("fit")
    torch.manual_seed(0)
    model = MemGenModel.build(stage.config, data.tokenizer_object, lambda name: name)
    model.train_only(model.weaver)
    conversations = [data.items["train"][item].conversation for item in items]
    rows = TokenBatch.from_rows(
        [c.ids for c in conversations],
        [[c.turns[0].prompt_end <= i < c.turns[0].end for i in range(len(c.ids))] for c in conversations],
    )
    logprobs, _ = model.label_logprobs(rows, model.boundaries.plan(rows))
    (-logprobs.mean()).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.weaver.own_parameters().items()
    }


# The curriculum


def planned(base, tmp_path, curriculum, *, batch_size=2, seed=0, epochs=1):
    """Points inside the answer, per epoch and item."""
    gradients = Gradients()
    stage = make_stage(base, curriculum=curriculum, seed=seed, optimizer=OptimizerSettings(lr=1e-6))
    fit(
        base,
        tmp_path,
        stage=stage,
        data=make_data(base, batch_size=batch_size),
        callbacks=[gradients],
        max_steps=epochs * 8 // batch_size,
    )
    found: list[dict[int, list[int]]] = [{} for _ in range(epochs)]
    for step, (items, rows) in enumerate(gradients.plans):
        epoch = step // (8 // batch_size)
        for item, row in zip(items, rows, strict=True):
            assert row[0][1] == InsertionKind.PROMPT
            assert all(kind == InsertionKind.INFERENCE for _, kind in row[1:])
            found[epoch][item] = [point - row[0][0] for point, _ in row[1:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in found)
    return found


def delimiters(target: str) -> list[int]:
    """Answer tokens (bytes here) that directly follow a delimiter; the end token follows the last one."""
    return [i + 1 for i, letter in enumerate(target) if letter in ",."]


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        (Curriculum(), [delimiters(t)[:2] for t in TARGETS]),
        (Curriculum(first=0.0, all=1.0), [delimiters(t) for t in TARGETS]),
        (Curriculum(first=0.0, none=1.0), [[] for _ in TARGETS]),
    ],
    ids=["first", "all", "none"],
)
def test_each_rule_of_the_curriculum_gives_its_plans(base, tmp_path, curriculum, expected):
    (plans,) = planned(base, tmp_path, curriculum)
    assert [plans[item] for item in range(8)] == expected


def test_a_random_curriculum_depends_on_item_epoch_and_seed_and_not_on_the_batch(base, tmp_path):
    first, second = planned(base, tmp_path, MIXED, batch_size=2, epochs=2)
    again = planned(base, tmp_path, MIXED, batch_size=4, epochs=2)
    assert again == [first, second]
    assert first != second
    assert planned(base, tmp_path, MIXED, seed=1)[0] != first


# What moves


def test_only_the_weaver_moves_and_the_base_keeps_every_byte(base, tmp_path):
    stage = make_stage(base, dropout=0.1)
    before: dict[str, torch.Tensor] = {}
    hashes = []

    class Before(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(
                {n: p.detach().clone() for n, p in pl_module.memgen.weaver.own_parameters().items()}
            )
            hashes.append(base_hash(pl_module))
            trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert trained == {id(p) for p in pl_module.memgen.weaver.own_parameters().values()}

    fit(base, tmp_path, stage=stage, callbacks=[Before()], max_steps=4)
    assert base_hash(stage) == hashes[0]
    for name, parameter in stage.memgen.weaver.own_parameters().items():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"


def test_the_loss_falls_when_four_answers_are_learned_by_heart(base, tmp_path):
    losses = Losses()
    fit(
        base,
        tmp_path,
        stage=make_stage(base, optimizer=OptimizerSettings(lr=5e-2)),
        data=make_data(base, Letters(TARGETS[:4]), batch_size=4),
        callbacks=[losses],
        max_steps=80,
    )
    assert losses.values[-1] < 0.6 * losses.values[0]


def test_activation_checkpointing_gives_the_same_loss_and_gradients(base, tmp_path):
    results = []
    for checkpointing in (False, True):
        gradients, losses = Gradients(), Losses()
        fit(
            base,
            tmp_path,
            stage=make_stage(base, checkpointing=checkpointing, dropout=0.2),
            callbacks=[gradients, losses],
        )
        results.append((gradients.steps[0], losses.values))
    assert results[0][1] == results[1][1]
    for name, reference in results[0][0].items():
        assert_close(name, results[1][0][name], reference)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "float32"), ("32-true", "bfloat16")],
    ids=["bf16-mixed", "bf16 base"],
)
def test_bfloat16_runs_and_its_loss_is_close_to_float32s(base, tmp_path, precision, dtype):
    values = []
    for settings in ({"precision": "32-true", "dtype": "float32"}, {"precision": precision, "dtype": dtype}):
        losses, gradients = Losses(), Gradients()
        stage = make_stage(base, dtype=settings["dtype"])
        fit(
            base,
            tmp_path,
            stage=stage,
            callbacks=[losses, gradients],
            precision=settings["precision"],
            max_steps=3,
            limit_val_batches=2,
            val_check_interval=3,
        )
        values.append((losses.values, gradients.steps[0]))
        weaver = stage.memgen.weaver.own_parameters()
        assert {p.dtype for p in weaver.values()} == {torch.float32}
        assert stage.memgen.reasoner.backbone.embedding.dtype == getattr(torch, settings["dtype"])
    (exact, exact_gradient), (ours, gradient) = values
    for step in range(3):
        assert abs(ours[step] - exact[step]) < 0.03 * exact[step]
    assert ours != exact
    whole = [torch.cat([g.flatten() for g in each.values()]) for each in (gradient, exact_gradient)]
    assert float(torch.nn.functional.cosine_similarity(*whole, dim=0)) > 0.99


# Lightning's checkpoints


def resumable(tmp_path):
    return ModelCheckpoint(dirpath=tmp_path / "resume", save_last=True, save_top_k=0, every_n_train_steps=2)


def test_a_ckpt_holds_only_what_is_trained_and_a_resumed_run_equals_one_that_was_not_stopped(base, tmp_path):
    settings = {
        "curriculum": MIXED,
        "optimizer": OptimizerSettings(lr=1e-2, warmup_ratio=0.0, final_lr_ratio=1.0),
    }
    with_ckpt = {"callbacks": [resumable(tmp_path)], "enable_checkpointing": True}
    whole, _ = fit(base, tmp_path, stage=make_stage(base, **settings), max_steps=6)
    part, _ = fit(base, tmp_path, stage=make_stage(base, **settings), max_steps=2, **with_ckpt)
    path = tmp_path / "resume" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    trained = {id(p) for p in part.memgen.weaver.own_parameters().values()}
    assert set(state) == {name for name, p in part.named_parameters() if id(p) in trained}
    assert len(state) == len(trained)
    again = {"callbacks": [resumable(tmp_path)], "enable_checkpointing": True}
    rest, _ = fit(base, tmp_path, stage=make_stage(base, **settings), max_steps=6, ckpt_path=path, **again)
    for name, reference in whole.memgen.weaver.own_parameters().items():
        assert_close(name, rest.memgen.weaver.own_parameters()[name], reference)
        assert not torch.allclose(part.memgen.weaver.own_parameters()[name], reference)


def test_a_ckpt_with_missing_or_unexpected_tensors_is_refused_with_their_names(base, tmp_path):
    fit(base, tmp_path, max_steps=2, callbacks=[resumable(tmp_path)], enable_checkpointing=True)
    path = tmp_path / "resume" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    gone = next(name for name in checkpoint["state_dict"] if name.endswith("prompt_queries.scale"))
    del checkpoint["state_dict"][gone]
    checkpoint["state_dict"]["invented"] = torch.zeros(1)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"missing: \['{gone}'\], unexpected: \['invented'\]"):
        fit(
            base,
            tmp_path,
            max_steps=4,
            ckpt_path=path,
            callbacks=[resumable(tmp_path)],
            enable_checkpointing=True,
        )


def test_a_run_may_start_from_a_checkpoint_directory(base, tmp_path):
    stage, _ = fit(base, tmp_path, max_steps=2)
    save_checkpoint(stage.memgen, stage.config, tmp_path / "c", with_trigger=False)
    other = make_stage(base, init_from=str(tmp_path / "c"), optimizer=OptimizerSettings(lr=1e-30))
    fit(base, tmp_path, stage=other)
    for name, reference in stage.memgen.weaver.own_parameters().items():
        assert_close(name, other.memgen.weaver.own_parameters()[name], reference)


# Measures


def by_hand(stage, data):
    """Loss and accuracy over all supervised tokens, and the answers, item by item."""
    model = stage.memgen.eval()
    total = hits = tokens = insertions = exact = 0
    for item in data.items["val"]:
        conversation = item.conversation
        marks = [
            conversation.turns[0].prompt_end <= i < conversation.turns[0].end
            for i in range(len(conversation.ids))
        ]
        row = TokenBatch.from_rows([conversation.ids], [marks])
        with torch.no_grad():
            logprobs, woven = model.label_logprobs(row, model.boundaries.plan(row))
            logits = model.reasoner.logits(woven.hidden)
        targets = torch.tensor([i for i, mark in zip(conversation.ids, marks, strict=True) if mark])
        total -= float(logprobs.sum())
        hits += int((logits.argmax(-1) == targets).sum())
        tokens += len(targets)
        prompt = prompt_ids(data.tokenizer_object, data.environment.messages(item.example), data.template)
        answer = generate(model, [prompt], stage.generation)
        insertions += len(answer.plan.rows()[0])
        text = data.tokenizer_object.decode(answer.answers()[0], skip_special_tokens=True)
        exact += text == item.example.target
    count = len(data.items["val"])
    return total / tokens, hits / tokens, exact / count, insertions / count


def test_validation_measures_are_those_of_the_items_weighted_by_tokens(base, tmp_path):
    """Three items in batches of two: means of batch means would differ."""
    stage = make_stage(base)
    data = make_data(base, Letters([TARGETS[1], TARGETS[3], TARGETS[4]]), batch_size=3)
    stage, trainer = fit(
        base,
        tmp_path,
        stage=stage,
        data=data,
        max_steps=30,
        limit_val_batches=1.0,
        val_check_interval=30,
        check_val_every_n_epoch=None,
    )
    measured = {
        name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
    }
    assert stage.memgen.training
    loss, accuracy, exact, insertions = by_hand(stage, data)
    assert measured["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert measured["val/token_accuracy"] == pytest.approx(accuracy, rel=1e-4)
    assert measured["val/exact_match"] == pytest.approx(exact, rel=1e-4)
    assert measured["val/insertions_per_answer"] == pytest.approx(insertions, rel=1e-4)
    assert measured["val/invoked_at_prompt_end"] == 1.0
    assert {
        "val/reward",
        "val/finished",
        "val/answer_tokens",
        "val/reward_same",
        "val/reward_letters",
    } <= set(measured)
    assert accuracy > 0


def test_the_logged_training_loss_is_the_mean_over_the_batchs_tokens(base, tmp_path):
    losses = Losses()
    data = make_data(base, Letters(TARGETS[:2]), batch_size=2)
    stage, _ = fit(
        base,
        tmp_path,
        stage=make_stage(base, optimizer=OptimizerSettings(lr=1e-30)),
        data=data,
        callbacks=[losses],
    )
    data.environment.val = 2
    data.items.pop("val")
    data.setup("validate")
    assert losses.values[0] == pytest.approx(by_hand(stage, data)[0], rel=1e-4)


def test_testing_answers_the_test_items_and_predicting_tells_where_memory_went(base, tmp_path):
    stage, data = make_stage(base), make_data(base)
    trainer = make_trainer(tmp_path)
    (results,) = trainer.test(stage, data, verbose=False)
    assert {"test/reward", "test/exact_match", "test/insertions_per_answer"} <= set(results)
    predictions = [item for batch in trainer.predict(stage, data) for item in batch]
    assert [item["id"] for item in predictions] == ["test-0", "test-1", "test-2"]
    assert all(item["insertions"][0] == 0 for item in predictions)
    mean = sum(len(item["insertions"]) for item in predictions) / 3
    assert results["test/insertions_per_answer"] == pytest.approx(mean)


PROMPT_ONLY = Curriculum(first=0.0, none=1.0)


def warnings_of(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "never train" in record.getMessage()]
    caplog.clear()
    return found


def test_a_kind_of_insertion_that_decoding_makes_and_nothing_trained_is_told_once(base, tmp_path, caplog):
    stage, trainer = fit(base, tmp_path, stage=make_stage(base, curriculum=PROMPT_ONLY), max_steps=2)
    (told,) = warnings_of(caplog)
    assert "the curriculum never trains inference latents" in told
    assert "set model.memgen.boundaries.max_inference_insertions to 0" in told
    assert stage.memgen.weaver.trained_kinds == {InsertionKind.PROMPT}
    save_checkpoint(stage.memgen, stage.config, tmp_path / "c", with_trigger=False)
    assert json.loads((tmp_path / "c" / "memgen.json").read_text())["trained_insertions"] == ["prompt"]
    trainer.save_checkpoint(tmp_path / "c.ckpt")

    def scored(ckpt_path=None, init_from=None, **settings):
        make_trainer(tmp_path).test(
            make_stage(base, init_from=init_from, **settings), make_data(base), ckpt_path=ckpt_path
        )
        return warnings_of(caplog)

    for found in (scored(init_from=str(tmp_path / "c")), scored(ckpt_path=str(tmp_path / "c.ckpt"))):
        (told,) = found
        assert "inference latents were never trained, but are inserted (set model.memgen.boundaries." in told


def test_a_fit_from_a_checkpoint_tells_what_neither_it_nor_its_start_trains(base, tmp_path, caplog):
    stage, _ = fit(base, tmp_path, stage=make_stage(base, curriculum=PROMPT_ONLY))
    save_checkpoint(stage.memgen, stage.config, tmp_path / "c", with_trigger=False)
    caplog.clear()
    start = str(tmp_path / "c")
    fit(base, tmp_path, stage=make_stage(base, init_from=start, curriculum=PROMPT_ONLY))
    assert len(warnings_of(caplog)) == 1
    both, _ = fit(base, tmp_path, stage=make_stage(base, init_from=start, curriculum=Curriculum()))
    assert warnings_of(caplog) == []
    save_checkpoint(both.memgen, both.config, tmp_path / "both", with_trigger=False)
    fit(base, tmp_path, stage=make_stage(base, init_from=str(tmp_path / "both"), curriculum=PROMPT_ONLY))
    assert warnings_of(caplog) == []


def test_a_trigger_that_never_invokes_inserts_nothing_untrained(base, tmp_path, caplog):
    stage = make_stage(base, curriculum=PROMPT_ONLY)
    stage.config = replace(stage.config, trigger=TriggerConfig(kind="never"))
    fit(base, tmp_path, stage=stage)
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("shares", "cap", "expected"),
    [
        ({"first": 1.0}, 2, True),
        ({"first": 1.0}, 0, False),
        ({"first": 0.0, "all": 1.0}, 0, True),
        ({"first": 0.0, "random": 1.0}, 2, True),
        ({"first": 0.0, "random": 1.0, "probability": 0.0}, 2, False),
        ({"first": 0.0, "none": 1.0}, 2, False),
    ],
    ids=str,
)
def test_whether_a_curriculum_inserts_inside_answers(base, shares, cap, expected):
    curriculum = Curriculum(**shares)
    assert curriculum.inserts_inside(cap) == expected
    draws = [
        choose_points((3, 5, 9), cap, curriculum, torch.Generator().manual_seed(seed)) for seed in range(40)
    ]
    assert any(draws) == expected


def test_other_data_than_an_environments_is_refused(base, tmp_path):
    with pytest.raises(TypeError, match=r"needs a memgen\.data\.EnvironmentData, got BoringDataModule"):
        make_trainer(tmp_path).fit(make_stage(base), BoringDataModule())


def test_answers_end_at_the_templates_end_of_turn_where_the_model_has_another_end_token(tmp_path):
    base = tmp_path / "base"
    tiny_causal_lm(eos_token_id=256, pad_token_id=256).save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    stage = make_stage(base)
    make_trainer(tmp_path).fit(stage, datamodule=make_data(base))
    assert stage.memgen.reasoner.end_ids == (256, 258)
