"""What is refused before a run begins: lengths beyond the context, folders that are not the run's, targets without effect."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from memgen.generation.sampling import GenerationSettings
from memgen.running.resume import last_checkpoint
from memgen.training.callbacks import AdapterCheckpoint
from rl_runs import Vowels, make_grpo, make_trigger
from rl_runs import make_data as prompts
from sft_runs import Letters, make_stage, make_trainer, save_tiny
from sft_runs import make_data as answers

CONTEXT = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), max_position_embeddings=CONTEXT)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_length_beyond_the_context_is_refused(base, tmp_path, command):
    trainer = make_trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"data.max_length is 20000, but the reasoner's context is 128; lower it"
    ):
        getattr(trainer, command)(make_stage(base), answers(base, max_length=20_000))


def test_an_item_beyond_the_context_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"a train item of \d+ tokens with up to 7 latents is longer than"):
        make_trainer(tmp_path).fit(make_stage(base), answers(base, Letters(["a" * 110])))
    make_trainer(tmp_path).fit(
        make_stage(base), answers(base, Letters(["a" * 110, "b"]), max_length=CONTEXT - 7)
    )


@pytest.mark.parametrize("make", [make_grpo, make_trigger])
def test_a_rollout_beyond_the_context_is_refused(base, tmp_path, make):
    rollout = GenerationSettings(max_new_tokens=115, temperature=1.0, group_size=2, sample_decisions=True)
    with pytest.raises(ValueError, match=r"a train prompt of \d+ tokens .* rollout.max_new_tokens 115"):
        make_trainer(tmp_path).fit(make(base, rollout=rollout), prompts(base, Vowels()))


@pytest.mark.parametrize(("command", "split"), [("fit", "val"), ("validate", "val"), ("test", "test")])
def test_an_answer_beyond_the_context_is_refused_before_the_first_step(base, tmp_path, command, split):
    stage = make_stage(base, generation=GenerationSettings(max_new_tokens=115))
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    with pytest.raises(ValueError, match=rf"a {split} prompt of \d+ tokens .* generation.max_new_tokens 115"):
        getattr(trainer, command)(stage, answers(base))
    assert trainer.global_step == 0


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_foreign_folder_is_refused_before_the_first_step(base, tmp_path, name, monkeypatch):
    foreign = tmp_path / "runs" / "one" / name
    foreign.mkdir(parents=True)
    callback = AdapterCheckpoint(root=str(tmp_path / "runs"))
    monkeypatch.setattr(callback, "_folder", lambda trainer: tmp_path / "runs" / "one")
    make_trainer(tmp_path, callbacks=[callback]).fit(make_stage(base), answers(base))  # An empty one is none.
    (foreign / "memgen.json").unlink(missing_ok=True)
    (foreign / "thesis.tex").write_text("mine")
    trainer = make_trainer(tmp_path, callbacks=[callback])
    with pytest.raises(FileExistsError, match=f"{name} exists and is no checkpoint"):
        trainer.fit(make_stage(base), answers(base))
    assert trainer.global_step == 0
    assert (foreign / "thesis.tex").read_text() == "mine"


def test_a_last_checkpoint_that_is_gone_is_told(tmp_path, caplog):
    folder = tmp_path / "resume"
    folder.mkdir()
    (folder / "last.ckpt").symlink_to("step_000009.ckpt")
    with pytest.raises(FileNotFoundError, match=r"last.ckpt points to step_000009.ckpt, which is gone"):
        last_checkpoint(tmp_path)
    (folder / "step_000006.ckpt").write_text("")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == folder / "step_000006.ckpt"
    assert "going on from" in caplog.text


def test_the_output_head_is_no_target_of_an_adapter(base, tmp_path):
    stage = make_stage(base)
    lora = dataclasses.replace(stage.config.weaver.lora, target_modules=("q_proj", "lm_head"))
    stage.config = dataclasses.replace(
        stage.config, weaver=dataclasses.replace(stage.config.weaver, lora=lora)
    )
    with pytest.raises(ValueError, match=r"lora.target_modules has lm_head, the output head"):
        make_trainer(tmp_path).fit(stage, answers(base))
