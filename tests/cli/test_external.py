"""What the weaver reads besides the stream, from the command line: `memgen test` and `memgen generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memgen
from cli.played import CONFIG, prepare_trained
from experiences import experience
from memgen.cli.main import main
from memgen.generation.decode import generate
from memgen.generation.latent_bank import bank_of
from memgen.generation.sampling import GenerationSettings
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.results.score_files import read_records
from memgen.types import InsertionKind
from tolerance import assert_close

TRAINED = ("--checkpoint", "trained")
MEMORY = ("--model.memgen.weaver.retrieval.memory", "memory.sqlite")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_trained(tmp_path)
    return tmp_path


def remembered() -> None:
    with RawTrajectories("memory.sqlite") as memory:
        for letter in "abcdefgh":
            memory.write(experience(f"write the letter {letter} as often as you can", [letter * 9]))


def weaver_positions(folder: str) -> int:
    return sum(int(row["weaver_positions"]) for row in read_records(Path(folder)).rows)


def generated(capsys, *options: str) -> str:
    capsys.readouterr()
    argv = ["generate", *TRAINED, "--prompt", "write the letter a", "--max-new-tokens", "8", *options]
    assert main(argv) == 0, capsys.readouterr().err
    return capsys.readouterr().err


def test_a_plain_checkpoint_is_tested_and_asked_with_retrieval(folder, capsys, caplog):
    remembered()
    assert main(["test", *CONFIG, *TRAINED, "--records", "plain"]) == 0, capsys.readouterr().err
    assert main(["test", *CONFIG, *TRAINED, "--records", "read", *MEMORY]) == 0, capsys.readouterr().err
    assert "model.memgen.weaver.retrieval is" in caplog.text
    assert weaver_positions("read") > weaver_positions("plain")
    # The memory is part of the test's identity: what it learns makes another test.
    with RawTrajectories("memory.sqlite") as memory:
        memory.write(experience("one more"))
    assert main(["test", *CONFIG, *TRAINED, "--records", "read", *MEMORY]) == 2
    assert "settings" in capsys.readouterr().err

    plain = generated(capsys)
    assert generated(capsys, "--retrieval", "null") == plain
    assert generated(capsys, "--retrieval", json.dumps({"memory": "memory.sqlite"})) != plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"memory": "none.sqlite"}', "there is no file none.sqlite (model.memgen.weaver.retrieval.memory)"),
        ('{"memory": "memory.sqlite", "pasages": 1}', "pasages is not a key of RetrievalSettings"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_a_memory_that_cannot_be_read_is_named(folder, capsys, settings, message):
    remembered()
    try:
        status = main(["generate", *TRAINED, "--prompt", "a", "--retrieval", settings])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


# A latent bank

BANK = (
    "--model.memgen.weaver.bank.path", "bank.sqlite", "--model.memgen.weaver.bank.min_reward", "0",
    "--model.memgen.weaver.bank.least", "-1", "--model.memgen.weaver.bank.capacity", "1000",
)  # fmt: skip


def inspected(capsys) -> dict:
    capsys.readouterr()
    assert main(["bank", "inspect", "bank.sqlite", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_test_keeps_the_blocks_of_good_episodes_and_finds_them_again(folder, capsys):
    assert main(["test", *CONFIG, *TRAINED, "--records", "first", *BANK]) == 0, capsys.readouterr().err
    found = inspected(capsys)
    rows = read_records(Path("first")).rows
    good = {f"letter_game/{row['id']}" for row in rows if row["insertions"]}
    assert {block["episode"] for block in found["blocks"]} == good
    assert found["written"] == len(good) > 0
    assert sum(row["insertions"] for row in rows) == len(found["blocks"])
    # Recorded items are not played again, so nothing is kept twice.
    assert main(["test", *CONFIG, *TRAINED, "--records", "first", *BANK]) == 0
    assert inspected(capsys) == found
    # A frozen bank is read and stays as it is.
    frozen = (*BANK, "--model.memgen.weaver.bank.write", "false")
    assert main(["test", *CONFIG, *TRAINED, "--records", "frozen", *frozen]) == 0
    assert inspected(capsys) == found
    assert weaver_positions("frozen") > weaver_positions("first")

    asked = generated(capsys, "--bank", json.dumps({"path": "bank.sqlite", "least": -1.0, "write": False}))
    assert asked != generated(capsys)


def test_a_bank_is_looked_into_and_pruned(folder, capsys):
    collect = ("collect", *CONFIG, *TRAINED, "--out", "kept.jsonl", "--min-reward", "0", *BANK)
    assert main(list(collect)) == 0, capsys.readouterr().err
    blocks = inspected(capsys)["blocks"]
    assert len(blocks) > 3
    assert main(["bank", "inspect", "bank.sqlite", "--last", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"bank.sqlite: {len(blocks)} blocks of " in lines[0]
    assert "reasoner base (weights " in lines[1]
    assert "prompt of 3 latents" in lines[2]
    assert lines[-4].startswith("cosines between keys of different episodes, prompt: 5 % ")
    assert lines[-3].startswith("cosines between keys of different episodes, prompt, centred: 5 % ")
    assert blocks[-1]["episode"] in lines[-1]

    assert main(["bank", "prune", "bank.sqlite", "--episode", blocks[0]["episode"], "--capacity", "2"]) == 0
    assert f"{len(blocks) - 2} blocks removed, 2 left" in capsys.readouterr().out
    assert [block["number"] for block in inspected(capsys)["blocks"]] == [b["number"] for b in blocks[-2:]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "none.sqlite"], "there is no latent bank none.sqlite"),
        (["inspect", "stage.yaml"], "stage.yaml is no latent bank file"),
        (["prune", "bank.sqlite"], "say what to prune: --capacity N, --older-than N or --episode NAME"),
        (["prune", "bank.sqlite", "--capacity", "-1"], "must be a number of 0 or more, got -1"),
    ],
)
def test_what_cannot_be_looked_into_is_named(folder, capsys, argv, message):
    generated(capsys, "--bank", '{"path": "bank.sqlite"}')
    try:
        status = main(["bank", *argv])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_an_answer_is_remembered_once_its_reward_is_known(folder):
    agent = memgen.load("trained", bank={"path": "bank.sqlite", "least": 0.99})
    bank = bank_of(agent.model)
    answer = agent.generate("write the letter a", max_new_tokens=12)
    assert agent.remember("write the letter a", answer, reward=0.5) is None
    kept = agent.remember("write the letter a", answer)
    assert kept.added == len(answer.insertions) > 0
    prompt = agent.prompt("write the letter a")
    (block,) = bank.found(prompt, InsertionKind.PROMPT)
    (plain,) = generate(
        memgen.load("trained").model, [prompt], GenerationSettings(max_new_tokens=1), keep_latents=True
    ).latents[0]
    assert_close("the block that was woven", block, plain)
    with pytest.raises(ValueError, match=r"no latent bank to write: load it with bank="):
        memgen.load("trained").remember("write the letter a", answer)
