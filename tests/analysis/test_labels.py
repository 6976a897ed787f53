"""Labels of failures: the export, agreement against scikit-learn, and what takes part in which table."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from memgen.analysis.effects import effects, outcomes
from memgen.analysis.failures import CUT_OFF, INVALID_ACTION, WRONG_FORMAT
from memgen.analysis.labels import (
    BELIEF,
    FORMATTING,
    MEANINGS,
    NONE,
    PARSING,
    PLANNING,
    UNLABELLED,
    Labels,
    cohens_kappa,
    collect_failures,
    combine,
    export_id,
    failure_id,
    label_page,
    read_labels,
    relabelled,
    write_failures,
)

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;<!--"


def answer(index, text="wrong", failure=CUT_OFF, **others):
    return {
        "index": index,
        "id": f"item-{index}",
        "task": "a",
        "reward": float(failure is None),
        "failure": failure,
        "fault": None,
        "text": text,
        "messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": text}],
        "removed": 0,
        "invoked": 1,
        **others,
    }


def reference(index):
    return f"right {index}"


def labels(failures, annotator, types):
    return Labels("memgen labels 1", export_id(failures), annotator, types)


def test_kappa_is_scikit_learns():
    random = np.random.default_rng(0)
    names = list(MEANINGS)
    for kinds, count in product((2, 3, 9), (2, 7, 60)):
        first = [names[i] for i in random.integers(0, kinds, count)]
        second = [a if random.random() < 0.5 else names[random.integers(0, kinds)] for a in first]
        if len({*first, *second}) > 1:
            assert cohens_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert cohens_kappa(names, names) == 1.0
    assert cohens_kappa(["a", "b"], ["b", "a"]) == -1.0


def test_kappa_is_not_defined_where_chance_agrees_on_everything():
    assert cohens_kappa(["a", "a"], ["a", "a"]) is None
    assert cohens_kappa([], []) is None


def test_a_failure_is_exported_once_whatever_its_conditions_and_successes_never():
    answers = {
        "as it is": {0: answer(0), 1: answer(1, failure=None)},
        "removed": {0: answer(0), 1: answer(1)},
        "noise": {0: answer(0, "elsewhere"), 1: answer(1, "elsewhere")},
    }
    failures = collect_failures(answers, ["as it is", "removed"], reference, 0)
    assert sorted(failure.item for failure in failures) == ["item-0", "item-1"]
    assert {failure.reference for failure in failures} == {"right 0", "right 1"}
    assert all(failure.messages[-1]["content"] == "wrong" for failure in failures)
    assert export_id(failures) == export_id(failures[::-1])
    # Records of an earlier version have no messages.
    old = {0: {key: value for key, value in answer(0).items() if key != "messages"}}
    (failure,) = collect_failures({"as it is": old}, ["as it is"], reference, 0)
    assert failure.messages == ({"role": "assistant", "content": "wrong"},)


def test_the_page_and_the_export_hold_hostile_text_as_data(tmp_path):
    answers = {"as it is": {0: answer(0, HOSTILE)}}
    failures = collect_failures(answers, answers, lambda index: HOSTILE, 0)
    page = label_page(failures, HOSTILE)
    assert HOSTILE not in page
    assert page.count("</script>") == 2
    assert "rule" not in json.loads(page.split('id="data">')[1].split("</script>")[0])["failures"][0]
    write_failures(failures, "title", tmp_path)
    (line,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][1]["content"] == HOSTILE
    assert json.loads(line)["rule"] == CUT_OFF


def test_two_annotators_count_where_they_agree_and_are_compared_with_each_other_and_the_rules():
    found = [answer(0, failure=WRONG_FORMAT), answer(1, failure=INVALID_ACTION), answer(2), answer(3)]
    failures = collect_failures({"as it is": dict(enumerate(found))}, ["as it is"], reference, 0)
    ids = [failure_id(record) for record in found]
    first = labels(failures, "A", dict(zip(ids, [FORMATTING, PARSING, BELIEF, PLANNING], strict=True)))
    second = labels(failures, "B", dict(zip(ids, [FORMATTING, PLANNING, BELIEF], strict=False)))
    found = combine(failures, [first, second])
    assert found.types == {ids[0]: FORMATTING, ids[2]: BELIEF}
    assert (found.failures, found.agreed) == (4, 2)
    between, ours, theirs = found.agreements
    assert (between.failures, between.share) == (3, pytest.approx(2 / 3))
    assert between.kappa == pytest.approx(
        cohen_kappa_score([FORMATTING, PARSING, BELIEF], [FORMATTING, PLANNING, BELIEF])
    )
    # The rules say cut off of both others, which is none of the paper's types.
    assert (ours.second, ours.share, ours.kappa) == ("rules", 1.0, 1.0)
    expected = cohen_kappa_score([FORMATTING, "other", "other"], [FORMATTING, PARSING, "other"])
    assert theirs.kappa == pytest.approx(expected)
    alone = combine(failures, [first])
    assert alone.types == first.labels
    assert [agreement.second for agreement in alone.agreements] == ["rules"]


def test_labels_of_people_are_the_types_of_the_causal_table():
    right = {i: answer(i, failure=None) for i in range(10)}
    wrong = {i: answer(i) if i < 6 else answer(i, failure=None) for i in range(10)}
    answers = {"as it is": right, "removed": wrong, "noise": wrong}
    ids = [failure_id(wrong[i]) for i in range(6)]
    types = {**dict.fromkeys(ids[:4], PLANNING), ids[4]: NONE}
    changed = relabelled(answers, types, ["as it is", "removed"])
    assert changed["removed"][5]["failure"] == UNLABELLED
    measured = outcomes(list(changed.values()))
    assert [outcome.name for outcome in measured] == ["reward", f"failure: {PLANNING}"]
    found = {
        (effect.condition, effect.outcome.name): effect
        for effect in effects([("removed", "as it is"), ("noise", "as it is")], changed, measured)
    }
    planning = found["removed", f"failure: {PLANNING}"]
    # One failure has no label and does not count; the one of another kind counts as an item without this type.
    assert (planning.items, planning.difference.mean) == (9, pytest.approx(4 / 9))
    assert found["removed", "reward"].items == 10
    # Failures under noise were not labelled, so nothing is said of their types.
    assert ("noise", f"failure: {PLANNING}") not in found
    assert ("noise", "reward") in found


def test_labels_that_cannot_be_used_are_refused(tmp_path):
    failures = collect_failures({"as it is": {0: answer(0)}}, ["as it is"], reference, 0)
    own = labels(failures, "A", {})
    with pytest.raises(ValueError, match="labels are of one annotator or two, got 3 files"):
        combine(failures, [own, own, own])
    with pytest.raises(ValueError, match="both files of labels are of annotator 'A'"):
        combine(failures, [own, own])
    with pytest.raises(ValueError, match="the labels of 'A' are of other failures than this analysis has"):
        combine([], [own])
    path = tmp_path / "labels.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_labels(path)
    record = {"format": "memgen labels 1", "export": "e", "annotator": "A", "labels": {"x": PLANNING}}
    for text, message in (
        ("no json", "is no file of labels"),
        ("[1]", "is no file of labels"),
        (json.dumps({**record, "format": "2"}), "format is '2'"),
        (
            json.dumps({**record, "labels": {"x": "boredom"}}),
            "has the type 'boredom'; there are planning failure",
        ),
        (json.dumps({**record, "more": 1}), "more is not a key"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(path)
    path.write_text(json.dumps(record))
    assert read_labels(path).labels == {"x": PLANNING}
