"""Strategies as configurations name them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision

from memgen.cli.config import with_init_args
from memgen.distributed.zero import LayerShards, ZeroStrategy, _unpack, require_whole, whole_weights
from memgen.model.memgen import MemGenConfig
from memgen.training.checkpoint import save_checkpoint
from tiny import tiny_memgen

CONF = Path(__file__).resolve().parents[2] / "conf" / "trainer"
ZERO = {"zero1": (1, False), "zero2": (2, False), "zero3": (3, False), "zero3_offload": (3, True)}


def trainer_of(name: str, **changes) -> Trainer:
    """The Trainer that a file of conf/trainer describes, on two CPU processes that are never started."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())["trainer"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    values = {**values, "accelerator": "cpu", "devices": 2, **quiet, **changes}
    config = parser.parse_object(with_init_args({"trainer": values}))
    return parser.instantiate(config).trainer


@pytest.mark.parametrize("name", ZERO)
def test_a_configuration_of_zero_makes_the_strategy_with_its_stage(name):
    stage, offloads = ZERO[name]
    strategy = trainer_of(name).strategy
    assert isinstance(strategy, ZeroStrategy)
    settings = strategy.config["zero_optimization"]
    assert settings["stage"] == stage
    assert ("offload_param" in settings, "offload_optimizer" in settings) == (offloads, offloads)
    assert strategy.num_processes == 2


def test_a_configuration_of_data_parallel_training_makes_two_processes():
    strategy = trainer_of("ddp").strategy
    assert type(strategy).__name__ == "DDPStrategy"
    assert strategy.num_processes == 2


@pytest.mark.parametrize("name", ["cpu", "one_gpu"])
def test_one_device_needs_no_strategy(name):
    trainer = trainer_of(name, devices=1)
    assert trainer.world_size == 1
    with whole_weights(trainer):
        assert not isinstance(trainer.strategy, ZeroStrategy)


def test_every_file_is_tested():
    assert {path.stem for path in CONF.glob("*.yaml")} == {*ZERO, "ddp", "cpu", "one_gpu"}


def test_another_precision_than_float32_is_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"bf16-mixed.*32-true.*backbone\.dtype"):
        ZeroStrategy(2).precision_plugin = DeepSpeedPrecision("bf16-mixed")


def test_a_frozen_base_keeps_its_type():
    strategy = ZeroStrategy(2)
    strategy.precision_plugin = DeepSpeedPrecision("32-true")
    module = torch.nn.Linear(2, 2).to(torch.bfloat16)
    assert strategy.precision_plugin.convert_module(module).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"stage": 4}, {"stage": 2, "offload_parameters": True}])
def test_settings_that_do_not_fit_together_are_refused(settings):
    with pytest.raises(ValueError, match=r"strategy\.stage"):
        ZeroStrategy(**settings)


def test_a_model_with_an_empty_weight_is_refused_by_name():
    model = tiny_memgen()
    require_whole(model)
    model.weaver.weaver_to_reasoner.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"weaver\.weaver_to_reasoner\.weight holds 0 numbers"):
        require_whole(model)


def test_weights_in_shares_are_not_written_as_if_they_were_empty(tmp_path):
    model = tiny_memgen()
    model.weaver.weaver_to_reasoner.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"weaver_to_reasoner\.weight.*whole_weights"):
        save_checkpoint(model, MemGenConfig(), tmp_path / "checkpoint", with_trigger=False)
    assert not (tmp_path / "checkpoint").exists()


def test_autograd_keeps_no_memory_of_a_weight_that_is_released_and_finds_it_again():
    values = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    copy, kept = values.copy(), weakref.ref(values)
    weight = torch.nn.Parameter(torch.from_numpy(values), requires_grad=False)
    del values
    shards = LayerShards.__new__(LayerShards)
    shards._whole = {weight.untyped_storage().data_ptr(): weight}
    x = torch.randn(5, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(shards._pack, _unpack):
        y = torch.nn.functional.linear(x * 2, weight) * weight.t()[0]
    weight.data = torch.empty(0)
    gc.collect()
    assert kept() is None
    weight.data = torch.from_numpy(copy)
    y.sum().backward()
    again = x.detach().requires_grad_()
    (torch.nn.functional.linear(again * 2, weight) * weight.t()[0]).sum().backward()
    assert torch.equal(x.grad, again.grad)
