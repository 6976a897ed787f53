"""Recorded conversations as training data: the agent's turns are learned, nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memgen.data import EnvironmentData
from memgen.environments.trajectories import Trajectories
from memgen.lab.saving import save_backbone
from tiny import byte_tokenizer, tiny_causal_lm

TOKENIZER = byte_tokenizer()


def said(role, content, **marks):
    return {"role": role, "content": content, **marks}


EPISODE = [
    said("system", "be short"),
    said("user", "letter 1"),
    said("assistant", "go", agent=True, insertion_points=[0]),
    said("user", "seen 1"),
    said("assistant", "stop", agent=True),
]
SHOWN = [
    said("user", "1+1"),
    said("assistant", "2"),
    said("user", "2+2"),
    said("assistant", "4", agent=True),
]


def write(path: Path, *conversations, **fields) -> str:
    lines = [
        json.dumps(
            {"id": f"train-{i}", "sample": 1, "environment": "letter_game", "messages": messages, **fields}
        )
        for i, messages in enumerate(conversations)
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def data(folder, trajectories, **settings) -> EnvironmentData:
    from letters_env import LetterGame

    base = folder / "base"
    if not base.is_dir():
        base.mkdir()
        save_backbone(tiny_causal_lm(), byte_tokenizer(), base)
    return EnvironmentData(
        LetterGame(),
        tokenizer=str(base),
        chat_template="chatml",
        trajectories=trajectories,
        batch_size=2,
        **settings,
    )


def supervised(module: EnvironmentData) -> list[str]:
    """What every row learns, as text."""
    (batch,) = module.train_dataloader()
    rows = batch.tokens.rows()
    marks = batch.tokens.supervised.tolist()
    return sorted(
        TOKENIZER.decode([token for token, mark in zip(row, line, strict=False) if mark])
        for row, line in zip(rows, marks, strict=True)
    )


def test_the_agents_turns_are_learned_and_nothing_else(tmp_path):
    module = data(tmp_path, write(tmp_path / "t.jsonl", EPISODE, SHOWN))
    module.setup("fit")
    assert supervised(module) == ["4<|im_end|>", "go<|im_end|>", "stop<|im_end|>"]


def test_a_conversation_may_be_one_row(tmp_path):
    module = data(tmp_path, write(tmp_path / "t.jsonl", EPISODE, SHOWN), keep_turn_latents=True)
    module.setup("fit")
    assert supervised(module) == ["4<|im_end|>", "go<|im_end|>stop<|im_end|>"]


def test_validation_and_test_stay_the_environments(tmp_path):
    module = data(tmp_path, write(tmp_path / "t.jsonl", EPISODE, SHOWN))
    module.setup("fit")
    module.setup("test")
    assert [item.example.id for item in module.items["val"]] == [f"val-{i}" for i in range(6)]
    assert [item.example.id for item in module.items["test"]] == [f"test-{i}" for i in range(6)]
    assert len({item.example.id for item in module.items["train"]}) == 2


def test_what_to_play_next_time_is_the_environments_own_items(tmp_path):
    module = data(tmp_path, write(tmp_path / "t.jsonl", EPISODE))
    module.learn_from = "rollouts"
    module.setup("collect")
    assert [item.example.id for item in module.items["train"]][:2] == ["train-0", "train-1"]


def test_a_stage_that_learns_from_rollouts_refuses_recorded_ones(tmp_path):
    with pytest.raises(ValueError, match=r"data.trajectories is .*, but data.learn_from is rollouts"):
        data(tmp_path, "t.jsonl", learn_from="rollouts")


def test_conversations_of_another_environment_are_told(tmp_path, caplog):
    module = data(tmp_path, write(tmp_path / "t.jsonl", EPISODE, environment="gsm8k"))
    module.setup("fit")
    assert "was collected on gsm8k, not on letter_game" in caplog.text


def test_a_recorded_conversation_scores_nothing(tmp_path):
    source = Trajectories(write(tmp_path / "t.jsonl", EPISODE))
    with pytest.raises(NotImplementedError, match="a training split only"):
        source.reward(source.examples("train")[0], "go")
    assert source.examples("test") == []


BROKEN = {
    "nothing of the agent": ([said("user", "a"), said("assistant", "b")], "has no message of the agent"),
    "an answer that is nobody's": (
        [*EPISODE, said("user", "more"), said("assistant", "x")],
        "message 6: from the agent's first message on, the assistant's messages and no others",
    ),
    "a user's message as the agent's": ([*EPISODE, said("user", "x", agent=True)], "its role is user"),
    "no role": ([{"content": "a"}], "message 0 needs a role"),
    "no text": ([{"role": "user", "content": ["a"]}], "a content that is text"),
    "no list": ("hello", "is not a list of objects"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_conversation_is_named_by_its_line(tmp_path, case):
    messages, reason = BROKEN[case]
    source = Trajectories(write(tmp_path / "t.jsonl", EPISODE, messages))
    with pytest.raises(ValueError, match=rf't.jsonl, line 2: "messages" .*{reason}'):
        source.examples("train")


def test_a_missing_and_an_empty_file_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="memgen collect --out FILE"):
        Trajectories(str(tmp_path / "none.jsonl")).examples("train")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="nothing was collected; lower --min-reward"):
        Trajectories(str(tmp_path / "empty.jsonl")).examples("train")
