"""ZeRO 1, 2 and 3 on two real gloo processes against one process on the same items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sft_runs
from launched import launch
from memgen.model.backbone import Backbone
from memgen.model.memgen import MemGenModel
from memgen.training.checkpoint import load_checkpoint, read_config
from sft_runs import assert_gradients_close, save_tiny
from tiny import byte_tokenizer
from tolerance import assert_close

# A fixture's launch counts for the first test that asks for it; alone on two cores it takes a minute.
pytestmark = pytest.mark.timeout(3600)

WORKER = Path(__file__).with_name("zero_worker.py")

SMALL_BUCKETS = {"bucket_size": 1000}
"""Many messages per step: gradients that come in another order on another rank would be mixed up."""

SINGLE = [
    {"name": "sft", "kind": "sft", "test": True},
    {"name": "clipped", "kind": "sft", "clip": 0.05},
    {"name": "low", "kind": "sft", "dtype": "bfloat16"},
    {"name": "weaver", "kind": "weaver"},
    {"name": "trigger", "kind": "trigger"},
]
RUNS = [
    {"name": f"{kind}-{strategy}", "kind": kind, "strategy": strategy, "zero": SMALL_BUCKETS}
    for kind in ("sft", "weaver", "trigger")
    for strategy in ("zero1", "zero2", "zero3")
]
VARIANTS = [
    {"name": "tested-zero2", "kind": "sft", "strategy": "zero2", "test": True},
    {"name": "tested-zero3", "kind": "sft", "strategy": "zero3", "test": True, "recompute": True},
    {"name": "clipped-zero1", "kind": "sft", "strategy": "zero1", "accumulate": 2, "clip": 0.05},
    {"name": "clipped-zero3", "kind": "sft", "strategy": "zero3", "accumulate": 2, "clip": 0.05},
    {
        "name": "offloaded-zero3",
        "kind": "sft",
        "strategy": "zero3",
        "zero": {"offload_optimizer": True, "offload_parameters": True},
    },
    {"name": "low-zero3", "kind": "sft", "strategy": "zero3", "dtype": "bfloat16"},
    *(
        {"name": f"resumed-{kind}-{strategy}", "kind": kind, "strategy": strategy, "save_at": 1}
        for kind, strategy in (
            ("sft", "zero1"),
            ("sft", "zero3"),
            ("weaver", "zero2"),
            ("trigger", "zero3"),
        )
    ),
]
PROVOKED = [
    {"name": "noise-zero1", "kind": "sft", "strategy": "zero1", "provoke": "noise"},
    {"name": "noise-zero3", "kind": "sft", "strategy": "zero3", "provoke": "noise"},
    # The last one: DeepSpeed stays as it is after an error in its context.
    {"name": "built-zero3", "kind": "sft", "strategy": "zero3", "provoke": "built in shares"},
]


def run(ranks: int, base: Path, out: Path, tasks: list[dict]) -> dict[str, list[dict]]:
    """What each rank of each task wrote."""
    launch(WORKER, ranks, base, out, json.dumps(tasks), seconds=3000)
    return {
        task["name"]: [torch.load(f"{out}-{task['name']}.{rank}", weights_only=True) for rank in range(ranks)]
        for task in tasks
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(
        tmp_path_factory.mktemp("zero") / "base", max_position_embeddings=1024, pad_token_id=None
    )


@pytest.fixture(scope="module")
def single(base):
    found = run(1, base, base.with_name("one"), [{**task, "strategy": "single"} for task in SINGLE])
    return {name: ranks[0] for name, ranks in found.items()}


@pytest.fixture(scope="module")
def runs(base):
    return run(2, base, base.with_name("two"), RUNS)


@pytest.fixture(scope="module")
def variants(base):
    return run(2, base, base.with_name("variants"), VARIANTS)


@pytest.fixture(scope="module")
def provoked(base):
    return run(2, base, base.with_name("provoked"), PROVOKED)


def assert_parameters_close(rank: dict, reference: dict, factor: float = 100) -> None:
    for name, tensor in reference["parameters"].items():
        assert_close(name, rank["parameters"][name], tensor, factor=factor)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["sft", "weaver", "trigger"])
def test_ranks_with_unequal_passes_take_the_steps_of_one_process(single, runs, kind, strategy):
    one, two = single[kind], runs[f"{kind}-{strategy}"]
    if kind != "sft":
        assert sorted(rank["turns"][0] for rank in two) == [[1] * 4, [5] * 4]
    for rank in two:
        assert len(rank["losses"]) == 3
        assert rank["losses"] == pytest.approx(one["losses"], abs=3e-6)
        for step in range(3):
            # Later steps start from parameters that AdamW has moved by slightly other gradients.
            assert_gradients_close(
                f"step {step}", rank["gradients"][step], one["gradients"][step], factor=10 ** min(step, 2)
            )
        assert_parameters_close(rank, one)
        assert rank["measures"] == pytest.approx(one["measures"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_both_ranks_end_with_the_same_parameters(runs, strategy):
    for kind in ("sft", "weaver", "trigger"):
        first, second = (rank["parameters"] for rank in runs[f"{kind}-{strategy}"])
        for name, tensor in first.items():
            assert torch.equal(second[name], tensor), f"{kind}: {name}"


@pytest.mark.slow
def test_a_rollout_gathers_no_weights_while_it_decodes(runs):
    for kind in ("weaver", "trigger"):
        for rank in runs[f"{kind}-zero3"]:
            assert rank["gathers"] == [0, 0], kind


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_evaluation_of_a_checkpoint_in_shares_measures_what_one_process_measures(single, variants, strategy):
    expected = single["sft"]["tested"]
    assert {"test/exact_match", "test/reward_letters", "test/insertions_per_answer"} <= set(expected)
    for rank in variants[f"tested-{strategy}"]:
        assert rank["tested"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_clipped_gradients_of_accumulated_steps_move_the_weights_alike(single, variants, strategy):
    for rank in variants[f"clipped-{strategy}"]:
        assert_parameters_close(rank, single["clipped"])


@pytest.mark.slow
def test_shares_in_host_memory_take_the_same_steps(single, variants):
    for rank in variants["offloaded-zero3"]:
        assert rank["losses"] == pytest.approx(single["sft"]["losses"], abs=3e-6)
        assert_parameters_close(rank, single["sft"])


@pytest.mark.slow
def test_a_frozen_base_in_bfloat16_stays_so_and_what_is_trained_is_float32(single, variants):
    one = single["low"]
    for rank in variants["low-zero3"]:
        assert rank["dtypes"] == one["dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert {tensor.dtype for tensor in rank["parameters"].values()} == {torch.float32}
        assert rank["losses"] == pytest.approx(one["losses"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [task["name"] for task in VARIANTS if "save_at" in task])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(single, variants, name):
    kind = name.split("-")[1]
    for rank in variants[name]:
        assert len(rank["losses"]) == 2
        assert rank["losses"] == pytest.approx(single[kind]["losses"][1:], abs=3e-6)
        assert_parameters_close(rank, single[kind])


@pytest.mark.slow
def test_what_ranks_with_shares_save_is_the_file_of_a_single_process(base, single, variants):
    content = torch.load(base.with_name("variants-resumed-sft-zero3.ckpt"), weights_only=True)
    state = content["optimizer_states"][0]["state"]
    assert set(content["state_dict"]) == {
        f"memgen.weaver.{name}" for name in single["sft"]["parameters"] if not name.startswith("backbone.")
    } | {
        name.replace("backbone.", "memgen.reasoner.backbone.", 1)
        for name in single["sft"]["parameters"]
        if name.startswith("backbone.")
    }
    assert len(state) == len(content["state_dict"])
    assert {int(kept["step"]) for kept in state.values()} == {1}
    # The first step's moving average is a tenth of its gradient.
    for kept, (name, gradient) in zip(state.values(), single["sft"]["gradients"][0].items(), strict=True):
        assert_close(name, kept["exp_avg"], 0.1 * gradient, factor=20)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_the_adapters_checkpoint_is_the_file_of_one_process_and_loads_without_a_strategy(
    base, runs, strategy
):
    for kind in ("sft", "weaver", "trigger"):
        rank = runs[f"{kind}-{strategy}"][0]
        directory = Path(rank["run"]) / "last"
        config = read_config(directory)
        model = MemGenModel.assemble(
            config, Backbone(sft_runs.tiny_causal_lm(max_position_embeddings=1024)), byte_tokenizer()
        )
        model.reasoner.backbone.fingerprint = json.loads((directory / "memgen.json").read_text())[
            "backbones"
        ]["reasoner"]
        load_checkpoint(model, directory)
        part = model.trigger if kind == "trigger" else model.weaver
        for name, tensor in part.own_parameters().items():
            assert torch.equal(tensor, rank["parameters"][name]), f"{kind}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [task["name"] for task in PROVOKED])
def test_an_initialisation_that_a_strategy_destroys_is_told_on_every_rank(provoked, name):
    expected = "has other values than before" if "noise" in name else "built inside deepspeed.zero.Init"
    for rank in provoked[name]:
        assert expected in rank["told"]
        assert ".lora_" in rank["told"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_ranks_complete_in_opposite_order_are_not_mixed_up(tmp_path, stage):
    worker = WORKER.with_name("order_worker.py")
    for rank in launch(worker, 2, tmp_path, tmp_path / "order", str(stage), seconds=3000):
        for name, factor in (("a", 1.0), ("b", 10.0), ("c", 100.0)):
            assert torch.equal(rank["tied"][name], torch.full((50,), factor)), name
        # What DeepSpeed makes of them otherwise; if this ever fails, the tie may go.
        assert torch.equal(rank["untied"]["a"], torch.full((50,), 50.5))
