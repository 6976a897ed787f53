"""Tasksets of verifiers as environments: asked and rewarded as they say, and trained on."""

from __future__ import annotations

import asyncio
import importlib.util
import math
from pathlib import Path

import pytest

from memgen.cli import main as front_end
from memgen.environments.base import checked_reward
from memgen.environments.verifiers import Verifiers

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def with_library(test):
    absent = importlib.util.find_spec("verifiers") is None
    return pytest.mark.verifiers(pytest.mark.skipif(absent, reason="the extra verifiers is absent")(test))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    """verifiers finds tasksets by module name."""
    monkeypatch.syspath_prepend(HERE)


def by_question(environment):
    examples = [item for split in ("train", "val", "test") for item in environment.examples(split)]
    return {example.question: example for example in examples}


@with_library
def test_tasks_are_split_once_and_asked_with_their_system_prompt():
    environment = Verifiers("toy_sums")
    splits = {split: environment.examples(split) for split in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == len(by_question(environment)) == 100
    assert len(splits["train"]) > 60
    assert all(splits.values())
    shorter = Verifiers("toy_sums", limit=50)
    assert {item.id for item in shorter.examples("test")} < {item.id for item in splits["test"]}
    assert environment.messages(by_question(environment)["3 + 4 ="]) == [
        {"role": "system", "content": "Reply with a number."},
        {"role": "user", "content": "3 + 4 ="},
    ]


@with_library
def test_rewards_are_the_weighted_sum_of_the_tasks_own_inside_and_outside_of_an_event_loop(caplog):
    environment = Verifiers("toy_sums")
    example = by_question(environment)["3 + 4 ="]
    answers = ["7", "8", "seven", "crash"]

    async def inside():
        return environment.rewards([example] * 4, answers)

    for rewards in (environment.rewards([example] * 4, answers), asyncio.run(inside())):
        assert [reward.total for reward in rewards[:3]] == [1.5, 0.5, 0.0]
        assert rewards[0].parts == {"right": 1.0, "digits": 1.0, "length": 1.0}
        assert math.isnan(rewards[3].total)
    assert "no such answer" in caplog.text
    with pytest.raises(ValueError, match="nan"):
        checked_reward(rewards[3])


@with_library
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taskset": "no_such_taskset"}, "'no_such_taskset' cannot be loaded"),
        ({"parameters": {"largest": "many"}}, "parameters of toy_sums: largest"),
        ({"parameters": {"smallest": 1}}, "parameters of toy_sums: smallest"),
        ({"parameters": {"broken": "container"}}, "task 0: it needs a container"),
        ({"parameters": {"broken": "setup"}}, "it prepares a runtime"),
        ({"parameters": {"broken": "runtime"}}, "its passes needs a runtime"),
        ({"parameters": {"broken": "prompt"}}, "its user opens the conversation"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "must leave something to train on"),
    ],
)
def test_what_cannot_be_played_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Verifiers(**({"taskset": "toy_sums"} | settings))


@with_library
def test_supervised_training_is_refused_for_want_of_reference_answers():
    environment = Verifiers("toy_sums")
    with pytest.raises(ValueError, match="no reference answers"):
        environment.conversation(environment.examples("train")[0])


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"memgen\[verifiers\]"):
        Verifiers("toy_sums")


@with_library
def test_weaver_grpo_trains_on_a_taskset(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(f"{first} + {first} = {first}" for first in range(10)))
    assert not front_end.main(
        [
            "fit", "--config", str(ROOT / "conf/weaver_grpo.yaml"), "--config", str(ROOT / "conf/backbone/tiny.yaml"),
            "--config", str(ROOT / "conf/data/verifiers.yaml"), "--data.environment.taskset=toy_sums",
            "--data.path", str(tmp_path / "text.txt"), "--model.init_from=null", "--data.batch_size=2",
            "--data.val_batch_size=8", "--model.rollout.group_size=4", "--model.generation.max_new_tokens=3",
            "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false", "--trainer.logger=false",
        ]
    )  # fmt: skip
    assert list((tmp_path / "runs/weaver_grpo").glob("*/last/weaver.safetensors"))
