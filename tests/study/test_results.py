"""The numbers of a study: items are paired over seeds, orders are compared as wholes, costs are means."""

from __future__ import annotations

import json
import re

import pytest

from memgen.results import statistics
from memgen.study import report
from memgen.study.results import Played, tables
from memgen.study.settings import Cell, read_settings

NOTHING = dict.fromkeys(("positions", "scribe_calls", "scribe_tokens", "seconds"), 0.0)
ITEMS = 10


def played(rewards, *, name="method", fault=(), parameters=0, **costs):
    rows = [
        {
            "index": index, "id": str(index), "reward": reward, "fault": "lost" if index in fault else None, "finished": True,
            "reasoner_positions": 10, "weaver_positions": 5, "trigger_positions": 0, "prompt_tokens": 7, "tokens": 3,
            "retrievals": 0, "scribe_calls": 0, "scribe_tokens": 0, "fallbacks": 0, "seconds": 0.5, "memory_bytes": 0, **costs,
        }
        for index, reward in enumerate(rewards)
    ]  # fmt: skip
    return Played(rows, name, parameters, {f"learning_{key}": value for key, value in NOTHING.items()})


@pytest.fixture
def study(monkeypatch):
    """Three orders of one task: a memory that is right twice under every order, at another time each."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    settings = read_settings(
        {
            "methods": {
                "vanilla": {},
                "rag": {"memory": {"method": "exp_rag"}},
                "empty": {"memory": {"method": "exp_rag"}, "control": "empty"},
                "weaver": {"checkpoint": "c", "tasks": ["a"]},
            },
            "tasks": {"a": {}, "b": {}},
            "protocols": ["online"],
        }
    )
    found = {}
    for task in "ab":
        found[Cell("vanilla", task, 0, None)] = played([0.0] * ITEMS)
        for seed in settings.seeds:
            right = [float(task == "a" and index in (seed, seed + 1)) for index in range(ITEMS)]
            found[Cell("rag", task, seed, "online")] = played(
                right, name="rag/df" if seed == 1 else "rag", fault=(9,) if seed == 2 else (), retrievals=seed
            )
            found[Cell("empty", task, seed, "online")] = played([0.0] * ITEMS)
    found[Cell("weaver", "a", 0, None)] = played([1.0] * ITEMS, parameters=1000)
    return settings, tables(settings, found, title="Study", of="base", temperature=0.0)


def test_an_item_counts_once_whatever_the_number_of_seeds(study):
    _, (table,) = study
    lines = {line.name: line for line in table.matrix.lines}
    assert list(lines) == ["vanilla", "rag/df", "empty", "weaver"]
    assert lines["rag/df"].items == 2 * ITEMS
    # Two right items of ten under each of three orders, on one of two tasks; an item is left out where it failed.
    assert lines["rag/df"].reward.mean == pytest.approx(
        (2 / 3 + 2 * 2 / 3 + 1 / 3 + 1 / 3 - 2 / 3 + 0) / 20, abs=0.1
    )
    assert table.of_task["rag/df"]["b"] == 0.0
    assert table.of_task["weaver"] == {"a": 1.0}
    assert lines["rag/df"].costs["retrievals"] == pytest.approx((1.0 * 18 + 0.5 * 2) / 20)
    assert lines["rag/df"].costs["positions"] == 15.0
    assert lines["weaver"].costs["trained_parameters"] == 1000.0


def test_differences_are_paired_corrected_and_tested_over_orders(study):
    _, (table,) = study
    effects = {effect.condition: effect for effect in table.matrix.against_first}
    assert effects["weaver"].items == ITEMS
    assert effects["weaver"].test == "McNemar, exact"
    assert effects["weaver"].adjusted == pytest.approx(3 * 2 / 2**ITEMS)
    assert effects["empty"].p_value == 1.0
    orders = {found.method: found for found in table.orders}
    assert orders["rag/df"].differences == pytest.approx((0.1, 0.1, 2 / 18))
    # Three orders of one sign: the least p-value that three can have.
    assert orders["rag/df"].p_value == pytest.approx(0.25)
    # Means of 0 and 1 are no single answers for McNemar's test.
    assert orders["weaver"].differences == (1.0, 1.0, 1.0)
    assert orders["weaver"].test == "sign-flip permutation"
    assert orders["weaver"].p_value == pytest.approx(0.25)


def test_the_report_says_what_was_compared_and_needs_nothing_from_outside(study, tmp_path):
    settings, found = study
    texts = report.write(found, settings, "memgen study --config a.yaml", tmp_path)
    text = texts["study.md"]
    assert "memgen study --config a.yaml" in text
    assert "| rag/df |" in text
    assert "empty has the rewards and positions of vanilla on every item." in text
    assert "weaver did not play every task" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths[:6])) == 1
    figure = (tmp_path / "study.svg").read_text()
    assert figure.startswith("<svg")
    assert not [x for x in re.findall(r'href="([^"]+)"', figure) if not x.startswith("#")]
    numbers = json.loads((tmp_path / "study.json").read_text())
    assert numbers["tables"][0]["protocol"] == "online"
    assert report.write(found, settings, "memgen study --config a.yaml", tmp_path) == texts
