"""What the weaver reads besides the stream, from the command line: `memgen test` and `memgen generate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.played import CONFIG, prepare_trained
from experiences import experience
from memgen.cli.main import main
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.results.score_files import read_records

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
