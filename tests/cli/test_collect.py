"""memgen collect as a person runs it, and as machines interrupt it."""

from __future__ import annotations

import json
import signal

import pytest

from cli.played import CONFIG, NAMED, SLOW, named_base, prepare, start, wait_for_lines
from memgen.api import names
from memgen.cli import main as front_end
from memgen.cli.options import take_options

KEEP = ("--samples", "3", "--min-reward", "0.5", "--max-per-item", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    prepare(tmp_path)
    return tmp_path


def collect(out: str, *extra: str) -> int:
    return front_end.main(["collect", *CONFIG, "--out", out, *KEEP, *extra])


def test_it_says_what_it_kept_and_goes_on_from_nothing_to_do(folder, capsys):
    assert collect("t.jsonl") == 0
    out = capsys.readouterr().out
    lines = (folder / "t.jsonl").read_text().splitlines()
    assert f"kept {len(lines)} of 36 trajectories; 12 of 12 items played" in out
    assert "t.jsonl is complete" in out
    assert collect("t.jsonl") == 0
    again = capsys.readouterr()
    assert again.out == out
    assert (folder / "t.jsonl").read_text().splitlines() == lines


def test_a_base_may_be_named_as_an_asset(folder, capsys, monkeypatch):
    monkeypatch.setattr(names, "resolve_asset", named_base)
    assert collect("t.jsonl", *NAMED) == 0
    assert "t.jsonl is complete" in capsys.readouterr().out


def test_other_settings_are_refused_in_one_line_that_names_them(folder, capsys):
    assert collect("t.jsonl") == 0
    capsys.readouterr()
    assert collect("t.jsonl", "--temperature", "0.5", "--best") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "generation.temperature was 1.0 and is 0.5; keep.best was false and is true" in line


def test_out_is_required_and_its_value_too(folder, capsys):
    assert front_end.main(["collect", *CONFIG]) == 2
    assert "--out is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        front_end.main(["collect", "--out", *CONFIG])


def test_options_of_a_commands_own_are_told_from_overrides():
    argv = [
        "--config",
        "a",
        "--out=b",
        "--model.x",
        "-3",
        "--best",
        "--y",
        "--out",
        "c",
        "--min-reward",
        "-1",
    ]
    own, rest = take_options(argv, ("--out", "--min-reward"), ("--best",))
    assert own == ["--out=b", "--best", "--out", "c", "--min-reward", "-1"]
    assert rest == ["--config", "a", "--model.x", "-3", "--y"]


def test_killed_again_and_again_it_ends_with_the_file_of_a_run_that_was_not(folder, caplog):
    assert collect("whole.jsonl", *SLOW[:1], "0.0001") == 0
    whole = (folder / "whole.jsonl").read_bytes()
    journal = folder / "t.jsonl.journal"
    for lines in (3, 8):
        process = start(folder, "collect", *CONFIG, "--out", "t.jsonl", *KEEP, *SLOW)
        wait_for_lines(journal, lines, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < 12, "it was killed in the middle"
    # As if the second kill had come in the middle of a write.
    with (folder / "t.jsonl").open("ab") as file:
        file.write(b'{"index": 11, "messages": [{"ro')
    with journal.open("ab") as file:
        file.write(b'{"index": 11, "no')
    assert collect("t.jsonl", *SLOW) == 0
    assert f"t.jsonl: {done} of 12 items were played before" in caplog.text
    assert (folder / "t.jsonl").read_bytes() == whole


def test_ctrl_c_loses_nothing_that_was_played(folder):
    process = start(folder, "collect", *CONFIG, "--out", "t.jsonl", *KEEP, *SLOW)
    wait_for_lines(folder / "t.jsonl.journal", 3, process)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.endswith("memgen collect: interrupted\n")
    assert "Traceback" not in error
    assert "t.jsonl is not complete; the same command continues it" in out
    items = [json.loads(line) for line in (folder / "t.jsonl.journal").read_text().splitlines()[1:]]
    kept = (folder / "t.jsonl").read_text().splitlines()
    assert sum(item["note"]["kept"] for item in items) == len(kept)
    assert f"{len(items)} of 12 items played" in out
    assert all(json.loads(line)["messages"] for line in kept)
