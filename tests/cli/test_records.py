"""memgen test with its records, and memgen compare on them."""

from __future__ import annotations

import json
import signal

import pytest

from cli.played import CONFIG, SLOW, prepare, start, wait_for_lines
from letters_env import LetterGame
from memgen.cli import main as front_end
from memgen.results.score_files import read_records


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    prepare(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: two agents on all items, and one of them on fewer."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert test("--records", "a") == 0
        assert test("--records", "b", "--model.memgen.trigger.kind", "never") == 0
        assert test("--records", "fewer", "--data.test_examples", "4") == 0
    return folder


@pytest.fixture
def beside_runs(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    return runs


def test(*argv: str) -> int:
    return front_end.main(["test", *CONFIG, *argv])


test.__test__ = False


def printed(capsys, *argv: str) -> str:
    assert front_end.main([*argv]) == 0
    return capsys.readouterr().out


def without_times(path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def test_records_go_below_the_runs_and_say_everything_about_an_answer(folder, capsys):
    assert test("--trainer.default_root_dir", "out") == 0
    out = capsys.readouterr().out
    (records,) = (folder / "out" / "tests").iterdir()
    assert f"records: out/tests/{records.name}" in out
    assert records.name.startswith("letter_game-")
    answers, scores = without_times(records / "answers.jsonl"), without_times(records / "scores.jsonl")
    assert [line["index"] for line in answers] == [line["index"] for line in scores] == list(range(6))
    assert answers[0]["prompt"][0] == {"role": "system", "content": "write a letter"}
    assert len(answers[0]["answer"]) == 2
    assert "reward" not in answers[0]
    assert {"reward", "parts", "tokens", "insertions", "reasoner_positions", "weaver_positions"} <= set(
        scores[0]
    )
    assert "answer" not in scores[0]
    summary = json.loads((records / "summary.json").read_text())
    mean = sum(line["reward"] for line in scores) / 6
    assert summary["reward"]["mean"] == pytest.approx(mean)
    assert f"reward {mean:.4f} (95% interval" in out


def test_several_answers_of_an_item_give_pass_at_k(folder, capsys):
    assert test("--records", "r", "--model.generation.group_size", "3") == 0
    out = capsys.readouterr().out
    assert [line["sample"] for line in without_times(folder / "r" / "scores.jsonl")] == [0, 1, 2] * 6
    assert all(f"pass@{k} " in out for k in (1, 2, 3))
    assert "test/pass_at_3" in out


def test_several_answers_that_would_be_equal_are_refused(folder, capsys):
    assert test("--model.generation.group_size", "3", "--model.generation.temperature", "0") == 2
    assert "3 answers to each item are to be sampled, but the temperature is 0" in capsys.readouterr().err


def test_what_is_recorded_is_not_played_again_and_other_settings_are_refused(folder, capsys, caplog):
    assert test("--records", "r") == 0
    first = capsys.readouterr().out
    before = (folder / "r" / "answers.jsonl").read_bytes()
    assert test("--records", "r") == 0
    assert "6 of 6 items are recorded in r and are not played again" in caplog.text
    assert capsys.readouterr().out == first
    assert (folder / "r" / "answers.jsonl").read_bytes() == before
    assert test("--records", "r", "--model.generation.max_new_tokens", "30", "--trainer.devices", "1") == 2
    assert "generation.max_new_tokens was 40 and is 30" in capsys.readouterr().err
    assert test("--records", "r", "--seed_everything", "1") == 2
    assert "agent.weights was" in capsys.readouterr().err


def test_ruled_out_boundaries_are_counted_and_are_settings_only_where_they_are_set(folder, capsys):
    """Records that were made before boundaries could be ruled out go on."""
    assert test("--records", "r") == 0
    assert not {"skip_inside", "cooldown"} & set(read_records(folder / "r").settings["agent"]["boundaries"])
    rules = ("--model.memgen.boundaries.skip_inside=[bracket]", "--model.memgen.boundaries.cooldown=40")
    assert test("--records", "r", *rules) == 2
    assert "agent.boundaries.cooldown was not set and is 40" in capsys.readouterr().err
    assert test("--records", "ruled", *rules) == 0
    out = capsys.readouterr().out
    assert "test/ruled_out_bracket" in out
    assert "test/ruled_out_cooldown" in out
    counts = [line["ruled_out"] for line in without_times(folder / "ruled" / "scores.jsonl")]
    assert all(set(found) == {"bracket", "cooldown"} for found in counts)


def test_a_batch_size_is_no_setting_of_a_test(folder, caplog):
    assert test("--records", "r", "--data.val_batch_size", "4") == 0
    assert test("--records", "r", "--data.val_batch_size", "1") == 0
    assert "are not played again" in caplog.text


def test_killed_it_goes_on_and_ends_where_a_run_that_was_not_does(folder, capsys, caplog):
    assert test("--records", "whole", *SLOW[:1], "0.0001") == 0
    whole = capsys.readouterr().out
    process = start(folder, "test", *CONFIG, *SLOW, "--records", "r")
    wait_for_lines(folder / "r" / "journal.jsonl", 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    done = len(read_records(folder / "r").rows)
    assert 0 < done < 6, "it was killed in the middle"
    with (folder / "r" / "answers.jsonl").open("ab") as file:
        file.write(b'{"index": 5, "answ')
    assert front_end.main(["compare", "r", "whole"]) == 2
    assert f"r is not complete: it has {done} of 6 items" in capsys.readouterr().err
    assert test("--records", "r", *SLOW) == 0
    assert f"{done} of 6 items are recorded in r" in caplog.text
    for name in ("answers.jsonl", "scores.jsonl"):
        assert without_times(folder / "r" / name) == without_times(folder / "whole" / name)
    figures = [line for line in whole.splitlines() if line.startswith("reward ")]
    assert figures
    assert figures[0] in capsys.readouterr().out


def test_recorded_answers_can_be_scored_again(beside_runs):
    game = LetterGame()
    examples = {example.id: example for example in game.examples("test")}
    scores = {row["id"]: row["reward"] for row in read_records(beside_runs / "a").rows}
    for line in without_times(beside_runs / "a" / "answers.jsonl"):
        episode = game.episode()
        episode.reset(examples[line["id"]])
        seen = [episode.step(answer).observation for answer in line["answer"]]
        assert episode.reward().total == scores[line["id"]]
        assert seen[:-1] == line["observations"]


def test_two_runs_are_compared_item_by_item(beside_runs, capsys):
    out = printed(capsys, "compare", "a", "b")
    assert "over 6 items" in out
    assert "the runs differ in: agent.weights" in out
    assert 'agent.trigger.kind "always" against "never"' in out
    found = json.loads(printed(capsys, "compare", "a", "b", "--json", "--metric", "upper"))
    rows = {name: read_records(beside_runs / name).rows for name in "ab"}
    gains = [b["parts"]["upper"] - a["parts"]["upper"] for a, b in zip(rows["a"], rows["b"], strict=True)]
    assert found["difference"]["mean"] == pytest.approx(sum(gains) / 6)
    assert (found["won"], found["lost"]) == (sum(g > 0 for g in gains), sum(g < 0 for g in gains))
    same = json.loads(printed(capsys, "compare", "a", "a", "--json"))
    assert (same["tied"], same["test"]["p_value"]) == (6, 1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a", "nowhere"), "nowhere holds no records"),
        (("a", "fewer"), "the runs are of different data: a is to have 6 items, fewer 4"),
        (("a", "a", "--metric", "lower"), "has no reward component 'lower'; there are: reward, upper"),
    ],
    ids=["no records", "other data", "no such part"],
)
def test_what_cannot_be_compared_is_refused_in_one_line(beside_runs, capsys, argv, message):
    assert front_end.main(["compare", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_items_that_both_runs_have_can_be_compared(beside_runs, capsys):
    out = printed(capsys, "compare", "a", "fewer", "--common")
    assert "over 4 items" in out
    assert "2 items are left out" in out


def test_a_missing_folder_name_is_told(folder, capsys):
    assert test("--records") == 2
    assert "--records needs a value" in capsys.readouterr().err
