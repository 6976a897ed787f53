"""Collecting trajectories: what is kept, and what the file says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from letters_env import LetterGame
from memgen.chat import CHATML, conversation_ids
from memgen.data import EnvironmentData
from memgen.generation.rollout import Actor, EpisodeSettings, rollout
from memgen.generation.sampling import GenerationSettings, seed_of
from memgen.lab.saving import save_backbone
from memgen.results.collect import Candidate, Collector, KeepRule, select
from memgen.training.checkpoint import save_checkpoint
from rl_runs import memgen_config
from sft_runs import make_stage, make_trainer
from tiny import byte_tokenizer, tiny_causal_lm

DRAWN = GenerationSettings(max_new_tokens=40, temperature=1.0, group_size=4)


@pytest.fixture
def base(tmp_path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    save_backbone(tiny_causal_lm(max_position_embeddings=2048), byte_tokenizer(), directory)
    return directory


def items(base, environment=None) -> EnvironmentData:
    return EnvironmentData(
        environment or LetterGame(), tokenizer=str(base), chat_template="chatml", val_batch_size=5
    )


def collector(base, out="t.jsonl", *, environment=None, rollout=DRAWN, keep=None, **changes) -> Collector:
    torch.manual_seed(0)
    settings = {"init_from": None, "environment": {}, "resolve_asset": lambda name: name} | changes
    return Collector(
        memgen=memgen_config(base),
        data=items(base, environment),
        rollout=rollout,
        episodes=EpisodeSettings(),
        keep=keep or KeepRule(min_reward=0.5),
        out=base.parent / out,
        **settings,
    )


def collected(folder, player) -> list[dict]:
    make_trainer(folder).predict(player, return_predictions=False)
    return [json.loads(line) for line in player.out.read_text(encoding="utf-8").splitlines()]


def candidates(*rewards):
    return [Candidate((f"text {i}",), reward) for i, reward in enumerate(rewards)]


RULES = {
    "threshold": (KeepRule(min_reward=0.5), [0, 2, 3], {"below": 1}),
    "best of them": (KeepRule(min_reward=0.0, best=True), [2], {"worse": 3}),
    "best above the threshold": (KeepRule(min_reward=2.0, best=True), [], {"below": 4}),
    "the best so many": (KeepRule(min_reward=0.0, max_per_item=2), [2, 3], {"beyond": 2}),
}


@pytest.mark.parametrize("case", RULES)
def test_trajectories_are_kept_by_reward(case):
    rule, kept, reasons = RULES[case]
    assert select(candidates(0.5, 0.0, 1.0, 0.75), rule) == (kept, reasons)


def test_equal_rewards_are_kept_in_the_order_of_their_playing():
    assert select(candidates(1.0, 1.0, 1.0), KeepRule(max_per_item=2))[0] == [0, 1]


def test_what_cannot_teach_is_left_out_whatever_its_reward():
    played = [
        Candidate(("a",), 1.0, fault=True),
        Candidate(("b",), 1.0, cut=True),
        Candidate(("c",), 1.0, flaw="it is empty"),
        Candidate(("d",), 1.0),
        Candidate(("d",), 1.0),
        Candidate(("d", "e"), 1.0),
    ]
    reasons = {"faulted": 1, "cut": 1, "unlearnable": 1, "repeated": 1}
    assert select(played, KeepRule()) == ([3, 5], reasons)


def test_at_most_none_is_refused():
    with pytest.raises(ValueError, match="max_per_item must be at least 1, got 0"):
        KeepRule(max_per_item=0)


def test_a_line_is_a_conversation_with_the_agents_turns_marked(base, tmp_path):
    player = collector(base)
    lines = collected(tmp_path, player)
    assert lines
    for line in lines:
        roles = [message["role"] for message in line["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant"]
        assert [message.get("agent", False) for message in line["messages"]] == [
            r == "assistant" for r in roles
        ]
        upper = sum(m["content"][-1].isupper() for m in line["messages"] if m.get("agent"))
        assert line["reward"] == upper / 2 >= 0.5
        assert line["parts"] == {"upper": upper}
        assert line["id"] == f"train-{line['index']}"
        assert line["environment"] == "letter_game"
        conversation_ids(byte_tokenizer(), line["messages"], CHATML)


def test_the_counts_add_up_and_items_without_a_trajectory_are_known(base, tmp_path):
    player = collector(base, environment=LetterGame(items=11, fails=(3,)), keep=KeepRule(min_reward=1.0))
    lines = collected(tmp_path, player)
    found = player.collected()
    assert (found.items, found.total, found.played) == (11, 11, 44)
    assert found.kept == len(lines)
    assert found.kept + sum(found.reasons.values()) == 44
    assert found.reasons["faulted"] == 4
    assert found.empty == 11 - len({line["index"] for line in lines}) >= 1
    assert "failed by the environment" in "\n".join(found.lines(player.keep))


def test_a_line_says_how_to_draw_it_again(base, tmp_path):
    player = collector(base)
    line = collected(tmp_path, player)[-1]
    assert line["seed"] == seed_of("collect", 0, line["index"], line["sample"])
    example = player.items[line["index"]].example
    actor = Actor(
        player.memgen,
        byte_tokenizer(),
        LetterGame(),
        GenerationSettings(40, temperature=1.0),
        template=CHATML,
    )
    (again,) = rollout(actor, [example], [line["seed"]]).trajectories
    said = [byte_tokenizer().decode(turn.tokens, skip_special_tokens=True) for turn in again.turns]
    assert said == [message["content"] for message in line["messages"] if message.get("agent")]


def test_without_a_checkpoint_the_bare_reasoner_plays(base, tmp_path):
    lines = collected(tmp_path, collector(base))
    points = [m["insertion_points"] for line in lines for m in line["messages"] if m.get("agent")]
    assert not any(points)


def test_with_a_checkpoint_its_weaver_plays_and_the_places_are_told(base, tmp_path):
    stage = make_stage(base)
    module = items(base)
    trainer = make_trainer(tmp_path)
    trainer.test(stage, datamodule=module, verbose=False)
    save_checkpoint(stage.memgen, stage.config, tmp_path / "agent", with_trigger=False)
    player = collector(base, init_from=str(tmp_path / "agent"))
    lines = collected(tmp_path, player)
    points = [m["insertion_points"] for line in lines for m in line["messages"] if m.get("agent")]
    assert points
    assert all(turn[0] == 0 for turn in points)


def test_nothing_is_played_twice_and_other_settings_are_refused(base, tmp_path):
    first = collected(tmp_path, collector(base))
    assert collected(tmp_path, collector(base)) == first
    other = collector(base, keep=KeepRule(min_reward=0.25))
    with pytest.raises(ValueError, match=r"keep.min_reward was 0\.5 and is 0\.25"):
        collected(tmp_path, other)
    other = collector(base, environment=LetterGame(items=13))
    with pytest.raises(ValueError, match=r"data.items was 12 and is 13; data.hash was"):
        collected(tmp_path, other)
    changed = GenerationSettings(max_new_tokens=40, temperature=0.5, group_size=4)
    with pytest.raises(ValueError, match=r"generation.temperature was 1\.0 and is 0\.5"):
        collected(tmp_path, collector(base, rollout=changed))


def test_draws_that_would_all_be_equal_are_refused(base, tmp_path):
    greedy = GenerationSettings(max_new_tokens=8, group_size=4)
    with pytest.raises(ValueError, match="4 answers to each item are to be drawn, but the temperature is 0"):
        collected(tmp_path, collector(base, rollout=greedy))


def test_sft_trains_on_what_was_collected(base, tmp_path):
    collected(tmp_path, collector(base))
    module = EnvironmentData(
        LetterGame(),
        tokenizer=str(base),
        chat_template="chatml",
        trajectories=str(tmp_path / "t.jsonl"),
        batch_size=4,
    )
    stage = make_stage(base)
    make_trainer(tmp_path, max_steps=3).fit(stage, datamodule=module)
    assert stage.global_step == 3
    assert any(
        bool(p.any()) for name, p in stage.memgen.weaver.own_parameters().items() if ".lora_B." in name
    )
