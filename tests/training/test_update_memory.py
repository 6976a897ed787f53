"""No training step of any stage holds logits of all rows, positions and classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from allocations import Largest
from memgen.generation.sampling import GenerationSettings
from memgen.objectives.policy_settings import PolicySettings
from memgen.training.micro_batches import UpdateSettings
from rl_runs import Vowels, make_data, make_grpo, make_trigger
from sft_runs import Letters, make_stage, make_trainer, save_tiny
from sft_runs import make_data as make_sft_data

VOCABULARY = 32_768
ROWS, LENGTH = 16, 96


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), vocab_size=VOCABULARY, num_hidden_layers=1)


@contextmanager
def watched(stage, positions: int = ROWS * LENGTH) -> Iterator[Largest]:
    """The largest allocation of the stage's training steps, rollout and backward pass included."""
    largest = Largest()
    stage.on_train_batch_start = lambda *_: largest.__enter__() and None
    stage.on_train_batch_end = lambda *_: largest.__exit__(None, None, None)
    yield largest
    logits = positions * VOCABULARY
    assert largest.elements < logits / 4, f"{largest.where} asks for {largest.elements} of {logits} elements"
    # The hook does see logits: a chunk of them.
    assert largest.elements >= 64 * VOCABULARY


EVERYTHING = PolicySettings(kl=0.01, entropy_bonus=0.01, top_entropy=0.5)


def test_supervised_steps_hold_no_logits_of_a_whole_batch(base, tmp_path):
    stage = make_stage(base)
    target = "ab, c. " * 25
    data = make_sft_data(base, Letters([target] * ROWS), batch_size=ROWS)
    with watched(stage, ROWS * len(target)):
        make_trainer(tmp_path).fit(stage, data)


@pytest.mark.parametrize("policy", [PolicySettings(), EVERYTHING], ids=["plain", "entropy, KL, focus"])
def test_weaver_grpo_steps_hold_no_logits_of_a_whole_batch(base, tmp_path, policy):
    stage = make_grpo(
        base,
        policy=policy,
        update=UpdateSettings(iterations=1 if policy == PolicySettings() else 2),
        rollout=GenerationSettings(max_new_tokens=LENGTH, temperature=0.9, group_size=ROWS),
    )
    with watched(stage):
        make_trainer(tmp_path).fit(stage, make_data(base, Vowels(2), batch_size=1))
    (part,) = stage.buffer.micro_batches
    assert part.totals.tokens > 0.9 * ROWS * LENGTH


@pytest.mark.parametrize("kind", ["tokens", "hidden_states"])
def test_trigger_steps_hold_no_logits_at_all_but_those_of_a_decoding_step(base, tmp_path, kind):
    stage = make_trigger(
        base,
        trigger=kind,
        policy=EVERYTHING,
        update=UpdateSettings(iterations=2),
        rollout=GenerationSettings(
            max_new_tokens=LENGTH // 2, temperature=0.9, group_size=ROWS, sample_decisions=True
        ),
    )
    largest = Largest()
    with largest:
        make_trainer(tmp_path).fit(stage, make_data(base, Vowels(2), batch_size=1))
    # A decision has two classes; a decoding step has logits of each row's next token.
    assert largest.elements < 64 * VOCABULARY, largest.where


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "policy",
    [{}, {"kl": 0.01, "entropy_bonus": 0.01, "top_entropy": 0.2}],
    ids=["plain", "entropy, KL, focus"],
)
def test_an_update_on_8192_tokens_and_151936_words_takes_less_than_a_gigabyte(tmp_path, policy):
    rows, length, vocabulary = 8, 1024, 151_936
    worker = Path(__file__).with_name("update_memory_worker.py")
    command = [sys.executable, str(worker), str(tmp_path), str(rows), str(length), str(vocabulary)]
    done = subprocess.run(
        [*command, json.dumps(policy)],
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
        # At a fixed threshold every tensor of size goes back to the system at once, and a peak is what is in use.
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(worker.parents[1]), *filter(None, sys.path)]),
            "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    step = json.loads(done.stdout.splitlines()[-1])
    assert step["tokens"] == rows * (length - 24)
    assert step["gradient"] > 0
    assert 11 < step["entropy"] < 12
    peak = step["peak_above_weights_bytes"]
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    # The logits alone would be 5 GB; a chunk of 64 rows of them is seen.
    assert 64 * vocabulary * 4 < peak < 1e9
