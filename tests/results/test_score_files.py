"""Records of a test: written by several processes, read as one, and added up."""

from __future__ import annotations

import json

import pytest

from memgen.environments.base import Example
from memgen.results.comparison import compare
from memgen.results.score_files import Answered, Recorded, Records, data_hash, read_records
from memgen.results.summary import item_score, summarise

SETTINGS = {
    "data": {"environment": "maths", "split": "test", "items": 4, "hash": "h"},
    "generation": {"n": 2},
}


def row(index, sample=0, reward=1.0, fault=None, **parts):
    return {
        "index": index,
        "id": f"test-{index}",
        "sample": sample,
        "item": f"hash{index}",
        "reward": reward,
        "parts": parts,
        "finished": True,
        "tokens": 5,
        "turns": 1,
        "insertions": 1,
        "latents": 4,
        "invoked_at_prompt_end": True,
        "fault": fault,
        "reasoner_positions": 10.0,
        "weaver_positions": 6.0,
        "trigger_positions": 0.0,
        "seconds": 0.5,
    }


def answered(*rows) -> Answered:
    return Answered(rows[0]["index"], [{"index": r["index"], "answer": "4"} for r in rows], rows)


def write(folder, *items, settings=SETTINGS, rank=0) -> None:
    records = Records(folder, settings, {"memgen": "0"}, rank)
    records.add([answered(*rows) for rows in items])
    records.close()


def recorded(*rows, settings=SETTINGS, folder="run") -> Recorded:
    return Recorded(folder, settings, {}, rows)


def test_several_processes_write_and_a_reader_sees_one_run(tmp_path):
    write(tmp_path, [row(2)], [row(0)])
    write(tmp_path, [row(3)], [row(1)], rank=1)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{part}.jsonl" for name in ("answers", "scores", "journal") for part in ("", ".rank1")
    }
    run = read_records(tmp_path)
    assert [r["index"] for r in run.rows] == [0, 1, 2, 3]
    assert run.items == 4
    assert run.settings == SETTINGS


def test_a_run_goes_on_with_fewer_processes(tmp_path):
    write(tmp_path, [row(0)])
    write(tmp_path, [row(1, reward=0.25)], rank=1)
    records = Records(tmp_path, SETTINGS, {})
    assert set(records.done) == {0, 1}
    assert records.done[1][0]["reward"] == 0.25
    records.close()


def test_a_process_refuses_to_join_a_run_of_other_settings(tmp_path):
    write(tmp_path, [row(0)])
    with pytest.raises(ValueError, match=r"generation\.n was 2 and is 3"):
        Records(tmp_path, {**SETTINGS, "generation": {"n": 3}}, {}, rank=1)


def test_answers_and_scores_lie_in_files_of_their_own(tmp_path):
    write(tmp_path, [row(0, right=1.0)])
    assert json.loads((tmp_path / "answers.jsonl").read_text()) == {"index": 0, "answer": "4"}
    assert json.loads((tmp_path / "scores.jsonl").read_text()) == row(0, right=1.0)


def test_a_folder_without_records_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no records: it has no journal.jsonl"):
        read_records(tmp_path)


def test_the_data_hash_knows_contents_and_order():
    items = [Example("1", "a", "", "b"), Example("2", "c", "", "d")]
    hashes = {data_hash(items), data_hash(items[::-1]), data_hash(items[:1]), data_hash([items[0], items[0]])}
    assert len(hashes) == 4
    assert data_hash(items) == data_hash(list(items))


def test_every_item_counts_the_same_however_many_of_its_answers_are_valid():
    rows = [
        row(0, 0, 1.0),
        row(0, 1, 0.0, fault="gone"),
        row(1, 0, 0.0),
        row(1, 1, 0.5),
        row(2, 0, fault="gone"),
    ]
    found = summarise(rows)
    assert found.reward.mean == pytest.approx((1.0 + 0.25) / 2)
    assert (found.items, found.answers, found.faulted) == (2, 3, 2)


def test_pass_at_k_counts_whole_rewards_and_leaves_out_items_with_too_few_answers():
    rows = [row(0, s, reward) for s, reward in enumerate([1.0, 0.9, 0.0])]
    rows += [row(1, s, 1.0) for s in range(2)] + [row(1, 2, fault="gone")]
    found = summarise(rows).pass_at_k
    assert {k: round(i.mean, 4) for k, i in found.items()} == {
        1: round((1 / 3 + 1) / 2, 4),
        2: round((2 / 3 + 1) / 2, 4),
        3: 1.0,
    }
    assert {k: i.count for k, i in found.items()} == {1: 2, 2: 2, 3: 1}


def test_one_answer_per_item_has_no_pass_at_k():
    assert summarise([row(0), row(1)]).pass_at_k == {}


def test_costs_are_per_item_over_all_of_its_answers():
    found = summarise([row(i, s) for i in range(2) for s in range(3)]).per_item
    assert found == {
        "tokens": 15.0, "reasoner_positions": 30.0, "weaver_positions": 18.0, "trigger_positions": 0.0, "seconds": 1.5,
    }  # fmt: skip


def test_a_run_that_failed_altogether_has_no_mean():
    found = summarise([row(0, fault="gone")])
    assert found.reward is None
    assert found.lines() == ["no valid answer: all 1 had an environment error"]


def test_a_part_is_averaged_over_the_answers_that_have_it():
    rows = [row(0, 0, format=1.0), row(0, 1), row(1, 0)]
    assert summarise(rows).parts["format"].mean == 1.0
    assert item_score(rows[:2], "format") == 1.0
    with pytest.raises(ValueError, match="has no reward component 'format'"):
        item_score(rows[2:], "format")


# Comparison

A = [row(i, reward=float(i < 2)) for i in range(4)]
B = [row(i, reward=float(i > 0)) for i in range(4)]


def test_a_comparison_counts_won_lost_and_tied_items():
    found = compare(recorded(*A), recorded(*B))
    assert (found.won, found.lost, found.tied, found.items) == (2, 1, 1, 4)
    assert (found.a.mean, found.b.mean, found.difference.mean) == (0.5, 0.75, 0.25)
    assert found.test.name == "McNemar, exact"
    assert found.test.p_value == 1.0
    assert found.settings == ()


def test_the_interval_of_a_difference_is_that_of_the_pairs():
    """Two runs whose items are of very different difficulty, and that differ by the same on each."""
    first = [row(i, reward=i / 3) for i in range(4)]
    second = [row(i, reward=i / 3 + 0.125) for i in range(4)]
    found = compare(recorded(*first), recorded(*second))
    assert found.difference.high - found.difference.low < 1e-9
    assert found.a.high - found.a.low > 0.3


def test_items_that_the_environment_failed_in_one_run_are_left_out_of_both():
    broken = [B[0], row(1, reward=0.0, fault="gone"), *B[2:]]
    found = compare(recorded(*A), recorded(*broken))
    assert (found.items, found.left_out) == (3, 1)


def test_the_score_of_several_answers_is_their_mean_and_the_test_a_permutation():
    several = [row(i, s, reward=float(s < i)) for i in range(4) for s in range(2)]
    found = compare(recorded(*A), recorded(*several))
    assert found.b.mean == pytest.approx((0 + 0.5 + 1 + 1) / 4)
    assert found.test.name == "sign-flip permutation"


OTHER = {
    "another environment": (
        recorded(
            *B, settings={**SETTINGS, "data": {**SETTINGS["data"], "environment": "search"}}, folder="other"
        ),
        r"run of maths \(test\), other of search \(test\)",
    ),
    "another item under one name": (
        recorded(B[0], {**B[1], "item": "changed"}, *B[2:], folder="other"),
        r"item test-1 is another one in other than in run \(1 items differ\)",
    ),
    "other items": (
        recorded(*B, settings={**SETTINGS, "data": {**SETTINGS["data"], "hash": "x"}}, folder="other"),
        "not the same ones in the same order; --common",
    ),
    "a run in the middle": (recorded(*B[:3], folder="other"), "other is not complete: it has 3 of 4 items"),
    "nothing valid": (
        recorded(*(row(i, fault="gone") for i in range(4)), folder="other"),
        "no item has a valid answer in both",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_runs_that_cannot_be_paired_are_refused(case):
    other, message = OTHER[case]
    with pytest.raises(ValueError, match=message):
        compare(recorded(*A), other)


def test_the_items_that_both_runs_have_are_paired_by_name():
    found = compare(recorded(*A), recorded(B[3], B[1]), common=True)
    assert (found.items, found.left_out) == (2, 2)


def test_what_the_runs_differ_in_is_told():
    other = recorded(*B, settings={**SETTINGS, "generation": {"n": 8}})
    assert compare(recorded(*A), other).settings == ("generation.n 2 against 8",)
