"""The collection holds what decoding recorded, and goes on after a kill as if there had been none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.planted import TASKS, Marks, checkpoint, config, data, planted_weave, repeating_base, settings
from memgen.analysis import playing
from memgen.analysis.collection import read_collection
from memgen.analysis.failures import failure_type
from memgen.analysis.interventions import TRAINED
from memgen.analysis.playing import Player
from memgen.analysis.subject import Subject
from memgen.generation.rollout import rollout as play_episodes
from memgen.generation.sampling import GenerationSettings
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import Weaver
from memgen.types import InsertionPlan, TokenBatch
from sft_runs import make_trainer

LONGER = GenerationSettings(max_new_tokens=5)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes players of one checkpoint, which insert behind every X as well."""
    base = repeating_base(tmp_path / "base")
    chosen = config(base, cap=2)
    trained = str(checkpoint(base, tmp_path / "checkpoint", chosen))

    def make(out="out", environment=None, **changes):
        monkeypatch.setattr(Weaver, "weave", planted_weave({**TASKS, "X": "X", "Y": "Y"}, noise=0.0))
        return Player(
            Subject(
                data=data(base, environment or Marks(items=8)),
                init_from=trained,
                root=tmp_path,
                out=tmp_path / out,
                **{**settings(), "memgen": chosen, "generation": LONGER, **changes},
            )
        )

    return make


def test_a_block_is_recorded_with_its_place_its_latents_and_what_follows(made, tmp_path):
    player = made()
    collection = player.collect(make_trainer(tmp_path))
    assert [answer["index"] for answer in collection.answers] == list(range(8))
    assert [answer["reward"] for answer in collection.answers] == [1.0] * 8
    by_item = {i: [block for block in collection.blocks if block["index"] == i] for i in range(8)}
    embedding = player.memgen.reasoner.backbone.embedding.detach().numpy()
    for index, blocks in by_item.items():
        letter = "XY"[index % 2]
        # Y is no delimiter, so these items have a block at the end of the prompt alone.
        assert [block["position"] for block in blocks] == ([0, 1, 2] if letter == "X" else [0])
        assert [block["kind"] for block in blocks] == ["prompt", *["inference"] * (len(blocks) - 1)]
        assert [block["boundary"] for block in blocks] == ["end of prompt", *["X"] * (len(blocks) - 1)]
        assert [block["number"] for block in blocks] == list(range(len(blocks)))
        assert "".join(block["followed"] for block in blocks) == 5 * letter
        assert blocks[-1]["share"] == pytest.approx(blocks[-1]["position"] / 5)
        assert {block["probability"] for block in blocks} == {1.0}
        assert {block["task"] for block in blocks} == {f"task {'#@'[index % 2]}"}
    assert len(collection.latents) == 2 * len(collection.blocks)
    for number, block in enumerate(collection.blocks):
        letter = "XY"[block["index"] % 2]
        assert np.allclose(collection.block(number), embedding[player.data.tokenizer_object.encode(letter)])
    again = read_collection(player.folder / "collection")
    assert again.blocks == collection.blocks
    assert not (player.folder / "items").exists()


def test_mean_vectors_are_those_of_the_reasoners_own_reading(made, tmp_path):
    player = made()
    collection = player.collect(make_trainer(tmp_path))
    prompt = player.items[3]
    from memgen.chat import CHATML, prompt_ids

    tokenizer = player.data.tokenizer_object
    context = prompt_ids(tokenizer, player.data.environment.messages(prompt.example), CHATML)
    written = tokenizer.encode("YYYYY")
    batch = TokenBatch.from_rows([[*context, *written]])
    with torch.no_grad():
        states = player.memgen(batch, InsertionPlan.empty(1), torch.ones_like(batch.supervised)).hidden
    embedding = player.memgen.reasoner.backbone.embedding.detach()
    expected = {
        "context_embedding": embedding[context],
        "context_state": states[: len(context)],
        "trajectory_embedding": embedding[written],
        "trajectory_state": states[len(context) :],
    }
    for name, vectors in expected.items():
        assert np.allclose(collection.vectors[name][3], vectors.mean(dim=0).numpy(), atol=1e-5), name


def test_stopped_half_way_it_is_no_collection_and_goes_on_to_the_same_one(made, tmp_path, monkeypatch):
    whole = made("whole").collect(make_trainer(tmp_path))
    calls = []

    def stops(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return play_episodes(*args, **kwargs)

    player = made("part")
    player.data.batch_settings = SimpleNamespace(val_batch_size=2)
    monkeypatch.setattr(playing, "rollout", stops)
    with pytest.raises(RuntimeError, match="killed"):
        player.collect(make_trainer(tmp_path))
    assert len(calls) == 3
    with pytest.raises(FileNotFoundError, match=r"holds no complete collection.*goes on where it stopped"):
        read_collection(player.folder / "collection")
    # As if the kill had come between an item's tensors and its line.
    (player.folder / "items" / "000005.safetensors").write_bytes(b"half")
    found = made("part").collect(make_trainer(tmp_path))
    assert sum(len(args[1]) for args in calls[3:]) == 4, "four of eight items were played before"
    assert found.blocks == whole.blocks
    assert found.answers == whole.answers
    assert (found.latents == whole.latents).all()
    for name, vectors in whole.vectors.items():
        assert np.allclose(found.vectors[name], vectors, atol=1e-6)


def test_under_other_settings_a_folder_is_not_gone_on_with(made, tmp_path):
    made().collect(make_trainer(tmp_path))
    other = made(generation=GenerationSettings(max_new_tokens=6))
    with pytest.raises(ValueError, match=r"generation\.max_new_tokens was 5 and is 6"):
        other.collect(make_trainer(tmp_path))


def test_a_condition_that_was_played_is_not_played_again(made, tmp_path, monkeypatch):
    first = made().play(make_trainer(tmp_path), [TRAINED], [1, 2])
    monkeypatch.setattr(playing, "rollout", None)
    assert made().play(make_trainer(tmp_path), [TRAINED], [1, 2]) == first


def test_an_agent_that_never_weaves_is_refused(made, tmp_path):
    never = TriggerConfig(kind="random", probability=1e-9)
    player = made(memgen=dataclasses.replace(config(tmp_path / "base", cap=2), trigger=never))
    with pytest.raises(ValueError, match="wove latents into 0 of 8 answers"):
        player.collect(make_trainer(tmp_path))


def turn(finished=True):
    return SimpleNamespace(finished=finished)


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (None, {"reward": 1.0}),
        (None, {"fault": "it broke"}),
        ("cut off", {"turns": (turn(), turn(finished=False)), "parts": {"invalid": 1.0}}),
        ("invalid action", {"parts": {"invalid_actions": 2.0}, "truncated": True}),
        ("wrong format", {"parts": {"has_answer": 0.0}}),
        ("wrong format", {"parts": {"answered": 0.0, "invalid": 0.0}}),
        ("out of turns", {"truncated": True}),
        ("wrong answer", {"parts": {"has_answer": 1.0}}),
    ],
)
def test_the_first_rule_that_applies_names_the_failure(expected, changes):
    plain = {"reward": 0.0, "fault": None, "turns": (turn(),), "parts": {}, "truncated": False}
    assert failure_type(SimpleNamespace(**{**plain, **changes})) == expected
