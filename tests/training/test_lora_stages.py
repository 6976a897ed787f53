"""SFT and reinforcement of the reasoner by LoRA: the weaver's stages with an adapter of the reasoner in the weaver's place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lightning.pytorch.loggers import Logger

import rl_runs
import sft_runs
from memgen.chat import load_tokenizer
from memgen.objectives.policy_settings import PolicySettings
from memgen.training.checkpoint import open_checkpoint, save_checkpoint
from sft_runs import make_trainer, save_tiny
from training_records import SaveAt

LOSSES = ["grpo", "reinforce", "reinforce_pp"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def with_lora(stage, **arguments):
    """The stage with LoRA on the reasoner in the weaver's place."""
    memgen = stage.config
    stage.config = dataclasses.replace(
        memgen,
        weaver=dataclasses.replace(
            memgen.weaver, kind="lora", prompt_latents=0, inference_latents=0, arguments=arguments
        ),
        trigger=dataclasses.replace(memgen.trigger, kind="never"),
        boundaries=dataclasses.replace(memgen.boundaries, max_inference_insertions=0),
    )
    return stage


def sft(base, **settings):
    return with_lora(sft_runs.make_stage(base, **settings)), sft_runs.make_data(base)


def reinforcement(base, loss="grpo", **policy):
    stage = rl_runs.make_grpo(base, policy=PolicySettings(loss=loss, **policy))
    return with_lora(stage), rl_runs.make_data(base)


def tensors(stage, own: bool) -> dict[str, torch.Tensor]:
    trained = {id(p) for p in stage.memgen.weaver.own_parameters().values()}
    return {n: p.detach().clone() for n, p in stage.memgen.named_parameters() if (id(p) in trained) == own}


@pytest.mark.parametrize("make", [sft, reinforcement], ids=["sft", "grpo"])
def test_the_adapter_moves_alone_and_a_run_that_was_stopped_goes_on_bit_for_bit(base, tmp_path, make):
    stage, data = make(base)
    make_trainer(tmp_path, max_steps=0).fit(stage, data)
    frozen, before = tensors(stage, own=False), tensors(stage, own=True)
    stage, data = make(base)
    make_trainer(tmp_path, max_steps=4).fit(stage, data)
    after = tensors(stage, own=True)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tensors(stage, own=False).items())
    assert not any(torch.equal(after[name], before[name]) for name in after)

    stage, data = make(base)
    saver = SaveAt(2, tmp_path / "a.ckpt")
    make_trainer(tmp_path, max_steps=4, callbacks=[saver]).fit(stage, data)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"memgen.{name}" for name in after}
    stage, data = make(base)
    make_trainer(tmp_path, max_steps=4).fit(stage, data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors(stage, own=True).items())

    save_checkpoint(stage.memgen, stage.config, tmp_path / "saved", with_trigger=False)
    opened, config = open_checkpoint(tmp_path / "saved", load_tokenizer, lambda name: name)
    assert config == stage.config
    own = stage.memgen.weaver.own_parameters()
    assert all(torch.equal(p, own[name]) for name, p in opened.weaver.own_parameters().items())


@pytest.mark.parametrize("loss", LOSSES)
def test_reinforcement_begins_at_a_ratio_of_one_and_loads_no_reference_without_a_penalty(
    base, tmp_path, loss
):
    stage, data = reinforcement(base, loss)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(stage, data)
    assert float(trainer.logged_metrics["train/ratio_min"]) == pytest.approx(1.0, abs=1e-5)
    assert float(trainer.logged_metrics["train/ratio_max"]) == pytest.approx(1.0, abs=1e-5)
    assert stage.reference is None
    assert any(bool(p.grad.any()) for p in stage.trained().values() if p.grad is not None)


def test_the_reference_of_a_penalty_is_the_adapter_that_training_began_with(base, tmp_path):
    stage, data = reinforcement(base, kl=0.1)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(stage, data)
    assert float(trainer.logged_metrics["train/kl"]) == pytest.approx(0.0, abs=1e-6)
    assert set(stage.reference.tensors) == set(stage.trained())


def test_plain_sft_of_the_reasoner_learns_answers_by_heart(base, tmp_path):
    stage, data = sft(base)
    losses = []
    for steps in (1, 30):
        trainer = make_trainer(tmp_path, max_steps=steps)
        trainer.fit(stage, data)
        losses.append(float(trainer.logged_metrics["train/loss"]))
    assert losses[1] < 0.7 * losses[0]


class Recorder(Logger):
    """Keeps the parameters of a run."""

    name = version = "recorder"

    def __init__(self):
        super().__init__()
        self.parameters = {}

    def log_hyperparams(self, params, *args, **kwargs):
        self.parameters |= params

    def log_metrics(self, metrics, step=None):
        pass


def test_a_matched_rank_stands_among_the_runs_parameters(base, tmp_path):
    weaver, data = sft_runs.make_stage(base), sft_runs.make_data(base)
    lora = with_lora(sft_runs.make_stage(base), match={"prompt_latents": 3, "inference_latents": 2})
    found = []
    for stage in (weaver, lora):
        recorder = Recorder()
        make_trainer(tmp_path, max_steps=1, logger=recorder).fit(stage, data)
        found.append(recorder.parameters)
    assert set(found[0]) == {"trained_parameters"}
    assert found[1]["matched_parameters"] == found[0]["trained_parameters"]
    rank = found[1]["lora_rank"]
    assert rank > lora.config.weaver.lora.r
    per_rank = found[1]["trained_parameters"] // rank
    assert abs(found[1]["trained_parameters"] - found[1]["matched_parameters"]) <= per_rank / 2


def test_a_trigger_has_nothing_to_learn_over_it(base, tmp_path):
    stage = rl_runs.make_trigger(base, trigger="hidden_states")
    memgen = with_lora(stage).config
    stage.config = dataclasses.replace(
        memgen, trigger=dataclasses.replace(memgen.trigger, kind="hidden_states")
    )
    with pytest.raises(ValueError, match="kind lora writes no latents, so a trigger has nothing to decide"):
        make_trainer(tmp_path).fit(stage, rl_runs.make_data(base))
