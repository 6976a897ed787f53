"""Collecting and testing by two processes gives what one gives."""

from __future__ import annotations

import json

import pytest

from cli.played import CONFIG, prepare, start
from memgen.cli import main as front_end
from memgen.results.score_files import read_records

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return tmp_path


def finished(folder, *argv: str) -> str:
    process = start(folder, *argv)
    out, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    return out


@pytest.mark.slow
def test_two_ranks_collect_what_one_does_also_where_their_items_do_not_come_out_even(folder):
    # 7 items in batches of 2: the second rank has fewer batches.
    common = ("--samples", "2", "--min-reward", "0.5", "--data.environment.items", "7")
    assert front_end.main(["collect", *CONFIG, *common, "--out", "one.jsonl"]) == 0
    out = finished(folder, "collect", *CONFIG, *common, *TWO, "--out", "two.jsonl")
    assert out.count("7 of 7 items played") == 1
    one, two = (
        sorted((json.loads(line) for line in (folder / name).read_text().splitlines()), key=json.dumps)
        for name in ("one.jsonl", "two.jsonl")
    )
    assert one == two
    assert one


@pytest.mark.slow
def test_two_ranks_record_what_one_does_and_one_may_go_on_with_it(folder, capsys):
    assert front_end.main(["test", *CONFIG, "--records", "one", "--data.test_examples", "5"]) == 0
    capsys.readouterr()
    out = finished(folder, "test", *CONFIG, *TWO, "--records", "two", "--data.test_examples", "5")
    assert out.count("of 5 items") == 1
    one, two = (
        [
            {k: v for k, v in row.items() if not k.endswith("seconds")}
            for row in read_records(folder / name).rows
        ]
        for name in ("one", "two")
    )
    assert one == two
    assert (folder / "two" / "scores.rank1.jsonl").stat().st_size
    assert front_end.main(["compare", "one", "two"]) == 0
    assert "equal on 5" in capsys.readouterr().out
    assert front_end.main(["test", *CONFIG, "--records", "two", "--data.test_examples", "5"]) == 0
    assert "of 5 items" in capsys.readouterr().out
