from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from memgen.chat import CHATML, conversation_ids
from memgen.data import BatchIndex, EnvironmentData, Replay, SFTBatch
from memgen.data.order import WindowSampler
from memgen.environments.base import Environment, Example, Reward
from memgen.environments.qa.gsm8k import GSM8K
from memgen.model.boundary import Boundaries, BoundaryConfig
from memgen.run_context import RunContext
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Echo(Environment):
    """Repeat what is said; in several turns if the target has several lines."""

    name = "echo"
    sizes: ClassVar[dict[str, int]] = {"train": 23, "val": 7, "test": 5}

    def __init__(self, sizes=None, targets=None):
        self.sizes = sizes or self.sizes
        self.targets = targets or {}

    def examples(self, split):
        return [
            Example(
                id=f"{split}-{i}",
                question=f"say {i}",
                target=self.targets.get(i, "x" * (1 + 7 * i % 11)),
                answer=str(i),
            )
            for i in range(self.sizes[split])
        ]

    def messages(self, example):
        return [{"role": "user", "content": example.question}]

    def conversation(self, example):
        messages = []
        for number, line in enumerate(example.target.split("\n")):
            question = example.question if number == 0 else f"and {number}?"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": line}]
        return messages

    def reward(self, example, answer):
        return Reward(float(answer == example.target))


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def make(tokenizer_directory):
    def make(environment=None, stage="fit", **settings):
        data = EnvironmentData(environment or Echo(), tokenizer=tokenizer_directory, **settings)
        data.setup(stage)
        return data

    return make


def fake_trainer(**changes):
    settings = {
        "world_size": 1,
        "global_rank": 0,
        "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0,
        "strategy": SimpleNamespace(handles_gradient_accumulation=False),
    }
    return SimpleNamespace(**{**settings, **changes})


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def supervised_text(batch: SFTBatch) -> list[str]:
    tokens = batch.tokens
    return [
        TOKENIZER.decode(ids[mark].tolist()) for ids, mark in zip(tokens.ids, tokens.supervised, strict=True)
    ]


# What a batch holds


def test_only_the_completion_and_its_end_token_are_supervised(make):
    data = make(batch_size=4)
    batch = epoch_of(data)[0]
    items = [data.items["train"][i] for i in batch.examples]
    assert supervised_text(batch) == [item.example.target + "<|im_end|>" for item in items]
    assert batch.tokens.rows() == [item.conversation.ids for item in items]
    assert batch.tokens.group is None
    # The padding token equals the end token; nothing behind a row's end is supervised.
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    for length, marks in zip(batch.tokens.lengths, batch.tokens.supervised, strict=True):
        assert marks[length - 1]
        assert not marks[length:].any()


def test_a_conversation_gives_one_row_per_turn_in_one_group(make):
    data = make(Echo({"train": 3, "val": 1}, {1: "ab\nc\ndef"}), batch_size=3)
    (batch,) = epoch_of(data)
    place = batch.examples.index(1)
    rows = (batch.tokens.group == place).nonzero().flatten().tolist()
    assert [supervised_text(batch)[row] for row in rows] == [f"{t}<|im_end|>" for t in ("ab", "c", "def")]
    ids, turns = data.items["train"][1].conversation.ids, data.items["train"][1].conversation.turns
    assert [batch.tokens.rows()[row] for row in rows] == [ids[: turn.end] for turn in turns]
    assert batch.tokens.shared[rows].tolist() == [turn.prompt_end for turn in turns]
    assert batch.tokens.group.tolist() == sorted(batch.tokens.group.tolist())
    assert batch.window_tokens == batch.tokens.supervised_tokens


def test_kept_turn_latents_give_one_row_with_all_turns_supervised(make):
    data = make(Echo({"train": 2, "val": 1}, {1: "ab\nc\ndef"}), batch_size=2, keep_turn_latents=True)
    (batch,) = epoch_of(data)
    assert batch.tokens.ids.shape[0] == 2
    assert batch.tokens.group is None
    assert supervised_text(batch)[batch.examples.index(1)] == "ab<|im_end|>c<|im_end|>def<|im_end|>"


@pytest.mark.parametrize("keep", [False, True])
def test_drawn_turns_differ_between_epochs_and_agree_between_runs(make, keep):
    settings = {"batch_size": 1, "max_turns": 2, "keep_turn_latents": keep}
    data = make(Echo({"train": 1, "val": 1}, {0: "a\nb\nc\nd"}), **settings)
    again = make(Echo({"train": 1, "val": 1}, {0: "a\nb\nc\nd"}), **settings)
    drawn = []
    for epoch in range(12):
        (batch,) = epoch_of(data, epoch)
        text = "".join(supervised_text(batch)).split("<|im_end|>")[:-1]
        assert len(text) == 2
        assert text == sorted(text)
        assert batch.window_tokens == batch.tokens.supervised_tokens == 4
        (other,) = epoch_of(again, epoch)
        assert other.tokens.rows() == batch.tokens.rows()
        drawn.append(tuple(text))
    assert len(set(drawn)) > 2


def test_validation_has_items_to_answer_and_completions_to_score(make):
    data = make(Echo(targets={1: "ab\nc"}), val_batch_size=3)
    batches = list(data.val_dataloader())
    examples = [e for batch in batches for e in batch.examples]
    assert examples == data.environment.examples("val")
    assert [len(batch.examples) for batch in batches] == [3, 3, 1]
    for batch in batches:
        assert batch.examples == [examples[index] for index in batch.indices]
        expected = [conversation_ids(TOKENIZER, data.environment.conversation(e)) for e in batch.examples]
        assert batch.sft.tokens.supervised_tokens == sum(
            turn.end - turn.prompt_end for tokens in expected for turn in tokens.turns
        )
        assert batch.sft.window_tokens == batch.sft.tokens.supervised_tokens


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_test_and_predict_need_no_completion(make, stage):
    data = make(Echo(targets={0: ""}), stage=stage)
    loader = data.test_dataloader() if stage == "test" else data.predict_dataloader()
    (batch,) = loader
    assert [e.id for e in batch.examples] == [f"test-{i}" for i in range(5)]
    assert batch.sft is None


def test_batches_stay_on_the_host_where_plans_are_made(make):
    data = make()
    batch = epoch_of(data)[0].to("meta")
    assert batch.tokens.ids.device.type == "cpu"
    evaluation = next(iter(data.val_dataloader())).to("meta")
    assert evaluation.sft.tokens.supervised.device.type == "cpu"
    assert evaluation.indices == tuple(range(len(evaluation.examples)))


# Order, windows, ranks


def plan(lengths, targets, **settings):
    return [
        WindowSampler(lengths, lambda epoch: targets, rank=r, **settings)
        for r in range(settings["world_size"])
    ]


@given(
    items=st.integers(1, 40),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    bucket=st.booleans(),
    limit=st.one_of(st.integers(1, 12), st.sampled_from([1.0, 0.5])),
)
def test_windows_count_the_tokens_of_all_their_micro_batches_and_ranks(
    items, world_size, batch_size, accumulate, seed, epoch, bucket, limit
):
    if items < world_size:
        return
    targets = [3 + 5 * i % 17 for i in range(items)]
    samplers = plan(
        [10 + i % 7 for i in range(items)],
        targets,
        batch_size=batch_size,
        world_size=world_size,
        accumulate=accumulate,
        seed=seed,
        bucket=bucket,
        limit=limit,
    )
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    steps = len(samplers[0])
    assert {len(rank) for rank in ranks} == {steps}
    # Every rank always has something to do, no item comes twice, and fewer than world_size items are left out.
    assert all(1 <= len(index.indices) <= batch_size for rank in ranks for index in rank)
    seen = [i for rank in ranks for index in rank for i in index.indices]
    assert len(seen) == len(set(seen)) > items - world_size
    used = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
    for first in range(0, used, accumulate):
        window = [index for rank in ranks for index in rank[first : min(first + accumulate, used)]]
        total = sum(targets[i] for index in window for i in index.indices)
        assert {index.window_tokens for index in window} == {total}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loaders_of_all_ranks_share_an_epoch_out(make, world_size):
    ranks = []
    for rank in range(world_size):
        data = make(batch_size=2, bucket=True)
        data.trainer = fake_trainer(world_size=world_size, global_rank=rank, accumulate_grad_batches=3)
        ranks.append(epoch_of(data, epoch=1))
    assert len({len(batches) for batches in ranks}) == 1
    for first in range(0, len(ranks[0]), 3):
        window = [batch for batches in ranks for batch in batches[first : first + 3]]
        assert {b.window_tokens for b in window} == {sum(b.tokens.supervised_tokens for b in window)}
    seen = sorted(i for batches in ranks for batch in batches for i in batch.examples)
    left_out = 23 % (2 * world_size) % 23 if 23 % (2 * world_size) < world_size else 0
    assert len(seen) == len(set(seen)) == 23 - left_out


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_shares_items_out_without_repeating_any(make, world_size):
    ids = []
    for rank in range(world_size):
        data = make(val_batch_size=2)
        data.trainer = fake_trainer(world_size=world_size, global_rank=rank)
        ids += [e.id for batch in data.val_dataloader() for e in batch.examples]
    assert sorted(ids) == [f"val-{i}" for i in range(7)]


def test_the_order_depends_on_seed_and_epoch_alone(make):
    def order(seed, epoch):
        return [batch.examples for batch in epoch_of(make(batch_size=2, seed=seed), epoch)]

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)


def test_buckets_gather_like_lengths():
    lengths = [(i * 37) % 101 for i in range(400)]

    def spread(bucket):
        sampler = WindowSampler(lengths, lambda epoch: lengths, batch_size=8, bucket=bucket)
        return sum(max(part) - min(part) for part in ([lengths[i] for i in b.indices] for b in sampler))

    assert spread(True) < 0.2 * spread(False)


@pytest.mark.parametrize(("share", "size", "items"), [(0.5, 32, 16), (0.01, 8, 1), (0.99, 8, 7), (0.3, 4, 1)])
def test_a_batch_has_items_of_both(share, size, items):
    assert Replay([Echo()], share=share).of_batch(size) == items


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("bucket", [False, True])
def test_every_batch_of_every_rank_replays_its_share_and_every_kept_item_in_turn(world_size, bucket):
    lengths = [10 + i % 7 for i in range(24 + 5)]
    ranks = [
        [index.indices for index in sampler]
        for sampler in plan(
            lengths, lengths, batch_size=4, world_size=world_size, bucket=bucket, replayed=5, replay=1
        )
    ]
    steps = 24 // (3 * world_size)
    assert [len(rank) for rank in ranks] == [steps] * world_size
    assert all(sum(i >= 24 for i in batch) == 1 and len(batch) == 4 for rank in ranks for batch in rank)
    own = sorted(i for rank in ranks for batch in rank for i in batch if i < 24)
    assert own == list(range(24))
    again = Counter(i for rank in ranks for batch in rank for i in batch if i >= 24)
    assert max(again.values()) - min(again[i] for i in range(24, 29)) <= 1


def test_earlier_tasks_are_replayed_from_their_first_items_and_count_in_their_window(make):
    earlier = [Echo(targets=dict.fromkeys(range(23), "a")), Echo(targets=dict.fromkeys(range(23), "bb"))]
    data = make(batch_size=4, replay=Replay(earlier, items=3, share=0.5), train_examples=8)
    data.trainer = fake_trainer(accumulate_grad_batches=2)
    batches = epoch_of(data)
    assert len(batches) == 4
    texts = [supervised_text(batch) for batch in batches]
    replayed = [text for batch in texts for text in batch if text.startswith(("a", "b"))]
    assert all(sum(text.startswith(("a", "b")) for text in batch) == 2 for batch in texts)
    assert len(replayed) == 8
    assert {text.partition("<")[0] for text in replayed} == {"a", "bb"}
    for first in (0, 2):
        window = batches[first : first + 2]
        assert {b.window_tokens for b in window} == {sum(b.tokens.supervised_tokens for b in window)}
    assert "replay" not in make().train_dataloader().sampler.order_key()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, r"a batch of 1 has no room for replay; set data\.batch_size to 2 or more"),
        ({"learn_from": "rollouts"}, r"data\.replay is for data\.learn_from answers"),
    ],
)
def test_replay_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvironmentData(Echo(), replay=Replay([Echo()]), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environments": []}, r"data\.replay\.environments is empty"),
        ({"share": 1.0}, r"data\.replay\.share must be above 0 and below 1, got 1\.0"),
        ({"items": 0}, r"data\.replay\.items must be at least 1, got 0"),
    ],
)
def test_settings_of_replay_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Replay(**{"environments": [Echo()], **settings})


def test_a_strategy_that_accumulates_by_itself_gets_whole_windows(make):
    data = make(batch_size=2)
    data.trainer = fake_trainer(
        accumulate_grad_batches=5, strategy=SimpleNamespace(handles_gradient_accumulation=True)
    )
    assert len(epoch_of(data)) == 10
    data.trainer.limit_train_batches = 7
    with pytest.raises(ValueError, match=r"leaves 7 steps, no multiple of accumulate_grad_batches 5"):
        data.train_dataloader()


def test_more_ranks_than_items_is_an_error(make):
    data = make(Echo({"train": 2, "val": 1}))
    data.trainer = fake_trainer(world_size=3)
    with pytest.raises(ValueError, match="2 training items give no step for 3 ranks"):
        data.train_dataloader()


# Resume


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_within_an_epoch_and_starts_the_next_at_its_beginning(make, num_workers):
    data = make(batch_size=2, num_workers=num_workers)
    whole = [batch.examples for batch in epoch_of(data, 3)]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    iterator = iter(loader)
    first = [next(iterator).examples for _ in range(5)]
    state = json.loads(json.dumps(loader.state_dict()))
    del iterator

    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.sampler.set_epoch(3)
    rest = [batch.examples for batch in resumed]
    assert first + rest == whole
    resumed.sampler.set_epoch(4)
    assert [batch.examples for batch in resumed] == [batch.examples for batch in epoch_of(data, 4)]


def test_a_place_in_another_order_is_refused(make):
    loader = make(batch_size=2).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    other = make(batch_size=4).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"'batch_size': 2.*'batch_size': 4.*resume with the same settings"):
        next(iter(other))


class Recorder(LightningModule):
    """Learns nothing, writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = []
        self.stepped = []

    def training_step(self, batch, batch_index):
        assert isinstance(batch, SFTBatch)
        self.seen.append((batch.epoch, batch.examples, batch.window_tokens))
        return self.weight * batch.tokens.supervised_tokens / batch.window_tokens

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append(float(self.weight.grad) * self.trainer.accumulate_grad_batches)

    def validation_step(self, batch, batch_index):
        self.validated += [e.id for e in batch.examples]

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Stop(Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.after:
            raise KeyboardInterrupt


def trainer_for(directory, *callbacks, **settings):
    return Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": bool(callbacks), "max_epochs": 3, **settings},
    )


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("every", [3, 8, 12], ids=["mid-epoch", "mid-second-epoch", "epoch-end"])
def test_training_resumed_from_a_checkpoint_sees_the_same_batches(make, tmp_path, every):
    whole = Recorder()
    trainer_for(tmp_path).fit(whole, datamodule=make(batch_size=2))
    assert len(whole.seen) == 3 * 12

    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    before = Recorder()
    with pytest.raises(SystemExit):  # Lightning's answer to an interrupt.
        trainer_for(tmp_path, saver, Stop(every + 2)).fit(before, datamodule=make(batch_size=2))
    after = Recorder()
    trainer_for(tmp_path, ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=every)).fit(
        after, datamodule=make(batch_size=2), ckpt_path=tmp_path / f"step={every}.ckpt", weights_only=False
    )
    assert before.seen[:every] + after.seen == whole.seen


@pytest.mark.parametrize(("accumulate", "limit"), [(1, 1.0), (5, 1.0), (5, 7), (4, 0.5)])
def test_each_optimizer_step_adds_up_to_exactly_one_window(make, tmp_path, accumulate, limit):
    recorder = Recorder()
    trainer_for(tmp_path, accumulate_grad_batches=accumulate, limit_train_batches=limit).fit(
        recorder, datamodule=make(batch_size=2)
    )
    steps = {1.0: 12, 7: 7, 0.5: 6}[limit]
    assert len(recorder.seen) == 3 * steps
    assert recorder.stepped == pytest.approx([1.0] * (3 * -(-steps // accumulate)))


def test_validation_and_test_run_in_a_trainer(make, tmp_path):
    recorder = Recorder()
    trainer = trainer_for(tmp_path, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(recorder, datamodule=make())
    assert recorder.validated == [f"val-{i}" for i in range(7)]
    recorder.validated.clear()
    trainer.test(recorder, datamodule=make(stage="test"), verbose=False)
    assert recorder.validated == [f"test-{i}" for i in range(5)]


@pytest.mark.filterwarnings("ignore:Total length of `Loader` across ranks is zero")
def test_a_split_without_validation_items_trains_all_the_same(make, tmp_path):
    recorder = Recorder()
    trainer_for(tmp_path, max_epochs=1).fit(recorder, datamodule=make(Echo({"train": 8, "val": 0})))
    assert recorder.seen
    assert recorder.validated == []


def test_a_replaced_sampler_is_noticed(make):
    data = make()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(TypeError, match=r"use_distributed_sampler=false"):
            loader.dataset[0]


# Bad input


def test_over_long_items_are_dropped_counted_and_logged(make, caplog):
    lengths = sorted(len(item.conversation.ids) for item in make().items["train"])
    limit = lengths[15]
    with caplog.at_level(logging.INFO, logger="memgen.data"):
        data = make(max_length=limit)
    kept = [length for length in lengths if length <= limit]
    assert sorted(len(item.conversation.ids) for item in data.items["train"]) == kept
    assert data.dropped["train"] == 23 - len(kept) > 0
    assert f"echo, train: {len(kept)} items, {23 - len(kept)} dropped" in caplog.text
    assert f"data.max_length {limit}" in caplog.text
    seen = {i for batch in epoch_of(data) for i in batch.examples}
    assert seen == set(range(len(kept)))


def test_over_long_prompts_are_dropped_in_every_split(make):
    long = Echo()
    long.messages = lambda example: [
        {"role": "user", "content": "say " * (50 if example.id == "test-2" else 1)}
    ]
    data = make(long, stage="test", max_prompt_length=100)
    assert data.dropped == {"test": 1}
    assert [item.example.id for item in data.items["test"]] == ["test-0", "test-1", "test-3", "test-4"]
    assert make(max_prompt_length=200, max_length=300).dropped == {"train": 0, "val": 0}


def test_if_every_item_is_over_long_the_error_says_by_how_much(make):
    shortest = min(len(item.conversation.ids) for item in make().items["train"])
    with pytest.raises(ValueError, match=rf"all 23 train items of echo .* the shortest by {shortest - 20}"):
        make(max_length=20)


@pytest.mark.parametrize(
    ("question", "target", "complaint"),
    [
        ("say", " ", r"message 1 \(assistant\) is empty"),
        (" ", "x", r"prompt of message 1 \(assistant\) is empty"),
    ],
)
def test_empty_prompts_and_completions_name_the_item(make, question, target, complaint):
    environment = Echo({"train": 3, "val": 1})
    good = environment.examples
    environment.examples = lambda split: [
        dataclasses.replace(e, question=question, target=target) if e.id == "train-2" else e
        for e in good(split)
    ]
    with pytest.raises(ValueError, match=rf"^echo, train item train-2: .*{complaint}"):
        make(environment)


def test_a_broken_line_reaches_the_user_with_its_number(make, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b #### 1"}\n{"question": \n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: not a JSON object"):
        make(GSM8K(str(tmp_path)))


def test_limits_take_the_first_items(make):
    data = make(train_examples=4, val_examples=2)
    assert [item.example.id for item in data.items["train"]] == [f"train-{i}" for i in range(4)]
    assert len(data.items["val"]) == 2


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"val_batch_size": 0},
        {"max_length": 1},
        {"max_prompt_length": 0},
        {"train_examples": 0},
        {"max_turns": 0},
        {"num_workers": -1},
        {"seed": -1},
    ],
)
def test_numbers_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(setting))} must be at least"):
        EnvironmentData(Echo(), **setting)


def test_a_built_asset_needs_a_resolver_and_is_asked_for_by_name(tokenizer_directory):
    data = EnvironmentData(Echo(), tokenizer="lab:reasoner")
    with pytest.raises(ValueError, match="'lab:reasoner' is an asset that is built on first use"):
        data.prepare_data()
    context = RunContext(resolve_asset={"lab:reasoner": tokenizer_directory}.__getitem__)
    data.trainer = Trainer(accelerator="cpu", logger=False, callbacks=[context])
    data.setup("fit")
    assert data.tokenizer_object.eos_token == "<|im_end|>"


def test_a_batch_index_says_everything_a_batch_needs(make):
    data = make()
    dataset = data.train_dataloader().dataset
    batch = dataset[BatchIndex(indices=(3, 1), window_tokens=99, epoch=7)]
    assert (batch.examples, batch.window_tokens, batch.epoch) == ((3, 1), 99, 7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked here")
def test_workers_build_the_same_batches(make):
    alone, helped = make(batch_size=3), make(batch_size=3, num_workers=2)
    for ours, theirs in zip(epoch_of(alone), epoch_of(helped), strict=True):
        assert ours.examples == theirs.examples
        assert torch.equal(ours.tokens.ids, theirs.tokens.ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked here")
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("learn_from", ["answers", "rollouts"])
def test_workers_outlive_the_signals_of_a_scheduler(make, num_workers, learn_from):
    data = make(batch_size=1, val_batch_size=1, num_workers=num_workers, learn_from=learn_from)
    data.trainer = fake_trainer(lightning_module=SimpleNamespace(steps_per_rollout=1))
    before = set(psutil.Process().children())
    for loader, batches in ((data.train_dataloader(), 23), (data.val_dataloader(), len(data.items["val"]))):
        stream = iter(loader)
        got = [next(stream)]
        workers = set(psutil.Process().children()) - before
        assert len(workers) == num_workers
        # The scheduler is another process: torch's workers take their parent's SIGTERM for its own wish.
        for number in ("TERM", "USR1", "USR2", "TERM"):
            subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers)], check=True)
            got += [next(stream) for _ in range((batches - 1) // 4)]
        assert len(got) + sum(1 for _ in stream) == batches
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "they end with their loader"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked here")
def test_workers_end_when_their_parent_says_so(make):
    data = make(batch_size=1, num_workers=1)
    before = set(psutil.Process().children())
    stream = iter(data.train_dataloader())
    next(stream)
    (worker,) = set(psutil.Process().children()) - before
    worker.terminate()
    assert not psutil.wait_procs([worker], timeout=10)[1]
    with contextlib.suppress(RuntimeError, OSError):  # torch notices.
        list(stream)


def test_items_of_one_id_are_named(make, caplog):
    class Twins(Echo):
        def examples(self, split):
            return [dataclasses.replace(example, id="same") for example in super().examples(split)[:3]]

    with caplog.at_level(logging.WARNING):
        make(Twins())
    assert "echo, train: 1 ids belong to several items, 'same' to 3" in caplog.text


THOUGHTS = CHATML.replace(
    "message['content'] + '<|im_end|>",
    "('<think>,\n</think>,\n' if message['role'] == 'assistant' and think else '') + message['content'] + '<|im_end|>",
)


@pytest.mark.parametrize("keep", [True, False])
def test_no_boundary_lies_in_what_the_template_writes_into_a_turn(make, keep, monkeypatch):
    monkeypatch.setattr("memgen.data.module.CHATML", THOUGHTS)
    settings = {"chat_template": "chatml", "keep_turn_latents": keep, "batch_size": 2}
    environment = Echo(targets=dict.fromkeys(range(23), "one, two.\nthree, four."))
    table = Boundaries.from_tokenizer(BoundaryConfig(), TOKENIZER, len(TOKENIZER))
    plans = {}
    for think in (True, False):
        data = make(environment, template_arguments={"think": think}, **settings)
        batch = epoch_of(data)[0].tokens
        assert (batch.fixed is not None) is think
        turns = [turn for row in table.turns(batch) for turn in row]
        plans[think] = [len(turn.points) for turn in turns]
        assert batch.select(torch.tensor([0])).rows() == batch.rows()[:1]
    assert plans[True] == plans[False]
    assert sum(plans[True]) > 0


def test_arguments_that_the_template_does_not_read_are_refused_and_dates_are_warned_of(
    make, caplog, monkeypatch
):
    monkeypatch.setattr("memgen.data.module.CHATML", "{{- strftime_now('%d') -}}" + CHATML)
    with pytest.raises(ValueError, match=r"data\.template_arguments\.enable_thinkng: the chat template"):
        make(chat_template="chatml", template_arguments={"enable_thinkng": False})
    make(chat_template="chatml")
    assert "writes today's date into every prompt" in caplog.text
    caplog.clear()
    make(chat_template="chatml", template_arguments={"strftime_now": "2026-01-31"})
    assert "today" not in caplog.text
