"""Boundaries that settings rule out: decoding asks, and training inserts, exactly where a reading of the whole text says."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.chat import CHATML
from memgen.generation.decode import generate
from memgen.generation.rollout import Actor, EpisodeSettings, replay, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.boundary import Boundaries, BoundaryConfig
from memgen.model.inside import KINDS, TextReader
from memgen.types import Decision, TokenBatch
from rl_runs import Countdown
from tiny import byte_tokenizer, random_rows, tiny_memgen

TOKENIZER = byte_tokenizer()
WRITTEN = "12.,$<>()[]`\na "
DELIMITERS = (",", ".", "\n", "1")


def writes(model):
    """The model writes these characters alone, so that there is something to be inside of."""
    ids = [TOKENIZER.encode(char)[0] for char in WRITTEN]
    bias = torch.full((260,), -1e9)
    bias[ids] = 0.0
    original = model.reasoner.logits
    model.reasoner.logits = lambda hidden: original(hidden) * 0.2 + bias
    return model


def bounded(model, **changes):
    config = BoundaryConfig(delimiters=DELIMITERS, max_inference_insertions=4, **changes)
    prompt = model.weaver.config.prompt_latents > 0
    model.boundaries = Boundaries.from_tokenizer(config, TOKENIZER, 260, at_prompt_end=prompt)
    return model


MODELS = {
    (trigger, latents): writes(tiny_memgen(trigger=trigger, prompt_latents=latents))
    for trigger in ("always", "random")
    for latents in (0, 3)
}


def inside(kinds, text):
    """The first kind that the whole text's end is inside of, read from its beginning."""
    reader = TextReader(kinds)
    reader.read(text)
    return reader.inside


def expected(turn, config):
    """Where the trigger is asked behind the prompt, given where it invoked, and what is ruled out."""
    asked, ruled_out, inserted = [], dict.fromkeys(config.skip_inside, 0), 0
    if config.cooldown:
        ruled_out["cooldown"] = 0
    last = 0 if turn.decisions[0] == Decision.INVOKE else None
    for place in range(1, len(turn.tokens)):
        text = TOKENIZER.decode(turn.tokens[:place])
        if not text.endswith(config.delimiters) or inserted == config.max_inference_insertions:
            continue
        reason = inside(config.skip_inside, text)
        if reason is None and last is not None and place - last < config.cooldown:
            reason = "cooldown"
        if reason is not None:
            ruled_out[reason] += 1
            continue
        asked.append(place)
        if turn.decisions[place] == Decision.INVOKE:
            inserted, last = inserted + 1, place
    return asked, ruled_out


@given(
    st.sampled_from(["always", "random"]),
    st.sampled_from([0, 3]),
    st.lists(st.sampled_from(KINDS), unique=True),
    st.integers(0, 7),
    st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_decoding_asks_where_a_reading_of_the_whole_text_says(trigger, latents, kinds, cooldown, seed):
    model = bounded(MODELS[trigger, latents], skip_inside=tuple(kinds), cooldown=cooldown)
    sampled = GenerationSettings(max_new_tokens=24, temperature=1.0, group_size=2, seed=seed)
    generation = generate(model, random_rows([5, 2]), sampled)
    for turn in generation.turns:
        asked, ruled_out = expected(turn, model.boundaries.config)
        found = [i for i, d in enumerate(turn.decisions) if i and d != Decision.NOT_ASKED]
        assert found == asked
        assert turn.ruled_out == ruled_out
    if trigger == "always":
        planned = model.boundaries.plan(generation.as_batch()).rows()
        prompts = (
            1 if latents else 0
        )  # Kinds that are switched off are in a plan, and nothing is inserted there.
        assert [row[1 - prompts :] for row in planned] == generation.plan.rows()


@given(
    st.lists(st.text(alphabet=WRITTEN, min_size=1, max_size=3), min_size=1, max_size=20),
    st.lists(st.sampled_from(KINDS), unique=True),
    st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_plans_depend_on_the_text_and_the_tokens_between_insertions_alone(pieces, kinds, cooldown):
    """Any tokenisation: the tokens are the pieces, and a token a character."""
    vocabulary = sorted({*pieces, *DELIMITERS})
    config = BoundaryConfig(
        delimiters=DELIMITERS, max_inference_insertions=99, skip_inside=tuple(kinds), cooldown=cooldown
    )
    table = Boundaries(config, vocabulary)
    ids = [vocabulary.index(piece) for piece in pieces]
    marks = [False] + [True] * len(ids)
    ((_, *planned),) = table.plan(TokenBatch.from_rows([[0, *ids]], [marks])).rows()
    wanted, last = [], 1
    for place in range(1, len(pieces)):
        text = "".join(pieces[:place])
        if text.endswith(DELIMITERS) and inside(kinds, text) is None and place + 1 - last >= cooldown:
            last = place + 1
            wanted.append(last)
    assert [point for point, _ in planned] == wanted


def test_every_turn_begins_outside_of_everything_and_rested():
    """Brackets that a prompt, an observation or an earlier turn left open rule out nothing."""
    table = Boundaries(
        BoundaryConfig(delimiters=(",",), skip_inside=("bracket",), cooldown=2), ["a", ",", "(", ")"]
    )
    prompt, first, between, second = [2, 0], [0, 1, 2, 1, 3, 1, 0], [2, 0], [1, 0, 1, 0]
    ids = prompt + first + between + second
    marks = [False] * 2 + [True] * 7 + [False] * 2 + [True] * 4
    (turns,) = table.turns(TokenBatch.from_rows([ids], [marks]))
    assert [(turn.begin, turn.points) for turn in turns] == [(2, (4, 8)), (11, (12, 14))]
    plan = table.plan(TokenBatch.from_rows([ids], [marks])).rows()
    assert plan == [[(2, 0), (4, 1), (8, 1), (11, 0), (14, 1)]]


@pytest.mark.parametrize("keep", [False, True], ids=["latents of a turn", "latents of all turns"])
def test_episodes_of_several_turns_are_planned_as_they_were_played(keep):
    model = bounded(
        writes(tiny_memgen()), skip_inside=("bracket", "number"), cooldown=3, keep_turn_latents=keep
    )
    environment = Countdown((2, 3))
    sampled = GenerationSettings(max_new_tokens=14, temperature=1.0, group_size=2)
    actor = Actor(model, TOKENIZER, environment, sampled, EpisodeSettings(), CHATML)
    trajectories = rollout(actor, environment.examples("train")[:2], [1, 2, 3, 4]).trajectories
    assert max(len(trajectory.turns) for trajectory in trajectories) > 1
    again = replay(trajectories, [0, 0, 1, 1], keep_turn_latents=keep)
    assert model.boundaries.plan(again.batch).rows() == again.plan.rows()
    assert sum(sum(turn.ruled_out.values()) for t in trajectories for turn in t.turns) > 0


def test_decoding_reads_every_token_once(monkeypatch):
    """However long the answer: no row is decoded again."""
    characters = []
    original = TextReader.read
    monkeypatch.setattr(
        TextReader, "read", lambda self, text: (characters.append(len(text)), original(self, text))[1]
    )
    model = bounded(MODELS["always", 3], skip_inside=KINDS, cooldown=2)
    generation = generate(model, random_rows([4, 6]), GenerationSettings(max_new_tokens=40))
    assert sum(characters) == len(characters) == sum(generation.lengths) - len(generation.turns)


def test_settings_that_rule_out_nothing_change_nothing():
    model = bounded(MODELS["random", 3])
    sampled = GenerationSettings(max_new_tokens=16, temperature=1.0, group_size=2)
    plain = generate(model, random_rows([4, 6]), sampled)
    assert plain.turns[0].ruled_out == {}
    rested = generate(bounded(model, cooldown=1), random_rows([4, 6]), sampled)
    assert [dataclasses.replace(turn, ruled_out={}) for turn in rested.turns] == plain.turns


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"skip_inside": ("numbers",)}, "boundaries.skip_inside has 'numbers'; choose from number, currency"),
        ({"cooldown": -1}, "boundaries.cooldown must be 0 or more tokens, got -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BoundaryConfig(**setting)
