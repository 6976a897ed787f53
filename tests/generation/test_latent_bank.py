"""A latent bank beside the weaver: blocks of good episodes are kept, found by the reasoner's state, and inserted or read."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from experiences import experience
from generations import logprobs
from memgen.generation.decode import generate
from memgen.generation.latent_bank import BankReader, bank_of, bank_to_write, remember_episodes
from memgen.generation.rollout import Rollouts
from memgen.generation.sampling import GenerationSettings
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.model.cache import PackedKVCache
from memgen.model.external import BankSettings, RetrievalSettings
from memgen.types import InsertionKind, InsertionPlan, TokenBatch, Trajectory
from tiny import byte_tokenizer, random_rows, tiny_memgen
from tolerance import assert_close

PROMPT, INFERENCE = InsertionKind.PROMPT, InsertionKind.INFERENCE
DRAWN = GenerationSettings(max_new_tokens=16, temperature=1.0, seed=5)
PROMPTS = random_rows([19, 6, 70])
TOKENIZER = byte_tokenizer()
VARIANTS = {
    "read": {"use": "weaver"},
    "two read": {"use": "weaver", "blocks": 2},
    "read, of hidden states": {"use": "weaver", "reads": "hidden_states"},
    "inserted": {"use": "insert"},
    "inserted, of hidden states": {"use": "insert", "reads": "hidden_states"},
    "at prompts alone": {"use": "weaver", "insertions": "prompt"},
}

every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bank.sqlite"


def banking(path, external=None, reads="embeddings", model=None, **settings):
    """A model with a bank; without a threshold and decay, unless they are given."""
    bank = BankSettings(path=str(path), **{"least": -1.0, "decay": 0.0, "capacity": 100} | settings)
    return tiny_memgen(external={"bank": bank, **(external or {})}, reads=reads, **(model or {}))


def reader(model) -> BankReader:
    found = bank_of(model)
    assert found is not None
    return found


def filled(path, seed: int = 9) -> None:
    """Keeps the blocks of an episode for each of some prompts."""
    model = banking(path)
    generation = generate(
        model, random_rows([12, 30, 44], seed), dataclasses.replace(DRAWN, seed=seed), keep_latents=True
    )
    for number, turn in enumerate(generation.turns):
        row = ([*turn.context, *turn.tokens], turn.insertions)
        kept = reader(model).remember(f"episode {number}", 1.0, [row], generation.latents[number])
        assert kept.added == len(turn.insertions)


def replayed(model, generation):
    with torch.no_grad():
        return model.label_logprobs(generation.as_batch(), generation.plan)


@every_variant
def test_decoding_then_replaying_its_plan_gives_the_same_logprobs_and_latents(path, variant):
    filled(path)
    model = banking(path, **variant)
    generation = generate(model, PROMPTS, DRAWN, keep_latents=True)
    assert any(count > 1 for count in generation.plan.counts)
    ours, woven = replayed(model, generation)
    for row, part in enumerate(ours.split(generation.lengths)):
        assert_close(f"row {row}", part, logprobs(generation, row))
    rounds = max(len(blocks) for blocks in generation.latents)
    decoded = [blocks[n] for n in range(rounds) for blocks in generation.latents if len(blocks) > n]
    assert_close("latents", woven.latents, torch.cat(decoded))


@pytest.mark.parametrize("use", ["weaver", "insert"])
def test_an_empty_bank_and_one_without_a_block_that_fits_are_the_plain_weaver_bit_for_bit(path, use):
    plain = tiny_memgen()
    theirs = generate(plain, PROMPTS, DRAWN, keep_latents=True)
    for least in (-1.0, 1.1):
        ours = generate(banking(path, use=use, least=least), PROMPTS, DRAWN, keep_latents=True)
        assert ours.answers() == theirs.answers()
        for blocks, others in zip(ours.latents, theirs.latents, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(blocks, others, strict=True))
        keys = sum(min(point, 64) for row in ours.plan.rows() for point, _ in row)
        assert ours.work.weaver_positions == theirs.work.weaver_positions + keys
        assert ours.work.reasoner_positions == theirs.work.reasoner_positions
        filled(path)


def test_a_block_is_inserted_as_it_is_and_the_weaver_goes_on_as_if_it_were_its_own(path):
    filled(path)
    model = banking(path, use="insert", insertions="prompt")
    woven = generate(model, PROMPTS, DRAWN, keep_latents=True)
    plain = tiny_memgen()
    inserted = [reader(model).found(prompt, PROMPT)[0] for prompt in PROMPTS]

    def intervene(answers, before, blocks):
        return [inserted[a] if n == 0 else b for a, n, b in zip(answers, before, blocks, strict=True)]

    theirs = generate(plain, PROMPTS, DRAWN, keep_latents=True, intervene=intervene)
    assert woven.answers() == theirs.answers()
    for blocks, others, block in zip(woven.latents, theirs.latents, inserted, strict=True):
        assert torch.equal(blocks[0], block)
        assert all(torch.equal(a, b) for a, b in zip(blocks, others, strict=True))


def test_a_block_that_is_read_is_a_snippet_of_the_weaver(path, tmp_path):
    filled(path)
    with RawTrajectories(tmp_path / "memory.sqlite") as memory:
        memory.write(experience("bring the tea", ["now"]))
    retrieval = RetrievalSettings(memory=str(tmp_path / "memory.sqlite"))
    model = banking(path, external={"retrieval": retrieval}, model={"cap": 0}, blocks=2)
    prompt = TOKENIZER.encode("bring tea")
    (latents,) = generate(model, [prompt], DRAWN, keep_latents=True).latents[0]
    passages, bank = model.weaver.external
    pieces = [passages.read([prompt], [PROMPT])[0], *bank.found(prompt, PROMPT)]
    assert [len(piece) for piece in pieces] == [17, 3, 3]
    alone = tiny_memgen().weaver.weave(
        model.reasoner.backbone.embed(torch.tensor(prompt)),
        [len(prompt)], [PROMPT], [0], PackedKVCache(1, torch.device("cpu")), snippets=[torch.cat(pieces)],
    )  # fmt: skip
    assert_close("latents", latents, alone)


@every_variant
def test_every_position_that_is_read_is_counted(path, variant):
    filled(path)
    model = banking(path, **variant)
    times = 2 if "reads" in variant else 1
    for turn in generate(model, PROMPTS, DRAWN).turns:
        text, latents = turn.context + turn.tokens, 0
        expected = turn.insertions[-1][0]
        for point, kind in turn.insertions:
            size = model.weaver.config.latents(InsertionKind(kind))
            expected, latents = expected + latents + size, size
            blocks = reader(model).found(text[:point], InsertionKind(kind))
            if variant.get("insertions") == "prompt" and kind == INFERENCE:
                assert blocks == []
                continue
            assert len(blocks) == variant.get("blocks", 1)
            expected += min(point, 64)
            expected += times * sum(map(len, blocks)) if variant["use"] == "weaver" else 0
        assert turn.work.weaver == expected


def test_the_key_is_the_mean_state_of_the_last_tokens_read_by_themselves(path):
    model = banking(path, key_tokens=20)
    for row in PROMPTS:
        tail = row[-20:]
        read = torch.ones(1, len(tail), dtype=torch.bool)
        batch = TokenBatch.from_rows([tail], [[False] + [True] * (len(tail) - 1)])
        with torch.no_grad():
            states = model(batch, InsertionPlan([[]]), read).hidden
        assert_close("key", torch.from_numpy(reader(model).key(row)), states.mean(dim=0))


def test_what_was_kept_is_found_after_a_restart_and_every_text_finds_its_own(path):
    model = banking(path)
    generation = generate(model, PROMPTS, DRAWN, keep_latents=True)
    for number, turn in enumerate(generation.turns):
        row = ([*turn.context, *turn.tokens], turn.insertions)
        reader(model).remember(f"episode {number}", 1.0, [row], generation.latents[number])
    again = reader(banking(path, least=0.999))
    for turn, blocks in zip(generation.turns, generation.latents, strict=True):
        text = turn.context + turn.tokens
        for (point, kind), block in zip(turn.insertions, blocks, strict=True):
            assert torch.equal(again.found(text[:point], InsertionKind(kind))[0], block)
    assert {stored.kind for stored in again.bank.blocks()} == {"prompt", "inference"}
    assert again.bank.blocks()[0].text == TOKENIZER.decode(PROMPTS[0])


def test_only_good_episodes_are_kept_and_never_those_that_the_environment_failed(path):
    model = banking(path, min_reward=0.5)
    generation = generate(model, PROMPTS, DRAWN, keep_latents=True)
    played = [(0.4, None), (0.5, None), (1.0, "the environment is gone")]
    trajectories = [
        Trajectory(example=f"item {n}", turns=(turn,), reward=reward, parts={}, fault=fault)
        for n, (turn, (reward, fault)) in enumerate(zip(generation.turns, played, strict=True))
    ]
    rollouts = Rollouts(trajectories, generation.latents, generation.work, 0.0, 0.0)
    remember_episodes(bank_to_write(model), "letters", rollouts)
    assert {stored.episode for stored in reader(model).bank.blocks()} == {"letters/item 1"}
    assert bank_to_write(banking(path, write=False)) is None
    assert bank_to_write(tiny_memgen()) is None


def test_a_block_that_was_inserted_again_is_renewed_instead_of_being_kept_twice(path):
    filled(path)
    model = banking(path, use="insert", insertions="prompt", model={"cap": 0})
    generation = generate(model, PROMPTS[:1], DRAWN, keep_latents=True)
    before = len(reader(model).bank.blocks())
    row = (PROMPTS[0], generation.turns[0].insertions)
    kept = reader(model).remember("another", 1.0, [row], generation.latents[0])
    assert (kept.added, kept.renewed) == (0, 1)
    assert len(reader(model).bank.blocks()) == before


@pytest.mark.parametrize("use", ["weaver", "insert"])
def test_gradients_reach_the_weaver_alone_and_none_goes_through_an_inserted_block(path, use):
    filled(path)
    model = banking(path, use=use)
    model.train_only(model.weaver)
    batch = TokenBatch.from_rows([PROMPTS[0]], [[False] * 8 + [True] * (len(PROMPTS[0]) - 8)])
    loss = model.label_logprobs(batch, InsertionPlan([[(8, 0), (12, 1)]]))[0].sum()
    if use == "insert":
        assert not loss.requires_grad or not any(
            p is not None and bool(p.any())
            for p in torch.autograd.grad(
                loss, list(model.weaver.own_parameters().values()), allow_unused=True
            )
        )
        return
    loss.backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {id(p) for p in model.weaver.own_parameters().values()}


def test_rows_alone_get_what_they_get_among_others(path):
    filled(path)
    model = banking(path, use="insert")
    batch = generate(model, PROMPTS, DRAWN, row_seeds=[1, 2, 3], keep_latents=True)
    for row in range(3):
        alone = generate(
            banking(path, use="insert"), [PROMPTS[row]], DRAWN, row_seeds=[row + 1], keep_latents=True
        )
        assert alone.answers()[0] == batch.answers()[row]
        assert torch.equal(alone.latents[0][0], batch.latents[row][0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"path": None}, ValueError, r"set model\.memgen\.weaver\.bank\.path"),
        (
            {"write": False},
            FileNotFoundError,
            r"no latent bank .*bank\.sqlite \(model\.memgen\.weaver\.bank\.path\)",
        ),
        ({"capacity": 0}, ValueError, r"weaver\.bank\.capacity must be at least 1, got 0"),
        ({"decay": -1.0}, ValueError, r"weaver\.bank\.decay must be 0 or more, got -1\.0"),
        ({"use": "insert", "blocks": 2}, ValueError, r"bank\.use insert takes one block, but .*blocks is 2"),
    ],
)
def test_settings_that_make_no_bank_are_refused(path, settings, error, message):
    with pytest.raises(error, match=message):
        tiny_memgen(external={"bank": BankSettings(**{"path": str(path), **settings})})


def test_the_bank_of_another_model_is_refused_by_name(path):
    filled(path)
    with pytest.raises(
        ValueError, match=r"is a latent bank of tiny \(weights \w+\), .*mean nothing to tiny \(weights"
    ):
        banking(path, model={"seed": 1})
    with pytest.raises(ValueError, match=r"keys of 64 tokens, not 32"):
        banking(path, key_tokens=32)
