"""What may stand in conf/study/*.yaml, and which cells it makes."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from memgen.memories.base import TextMemory
from memgen.study.session import memory_class
from memgen.study.settings import MEMORIES, Cell, cells, filled, read_settings

GOOD = {"methods": {"vanilla": {}, "rag": {"memory": {"method": "exp_rag"}}}, "tasks": {"a": {}, "b": {}}}


def test_every_memory_is_found_by_the_name_that_it_has():
    for name, path in MEMORIES.items():
        kind = memory_class(name)
        assert issubclass(kind, TextMemory)
        assert kind.method == name
        assert memory_class(path) is kind
        assert getattr(import_module(kind.__module__), kind.__name__) is kind


def test_a_method_that_keeps_nothing_is_played_once_for_all_protocols_and_seeds():
    methods = {
        **GOOD["methods"],
        "shots": {"examples": 2},
        "own": {"checkpoint": "runs/{seed}/best", "tasks": ["a"]},
        "bank": {"checkpoint": "c", "learns": True},
    }
    settings = read_settings({**GOOD, "methods": methods, "seeds": [4, 5]})
    found = [cell for cell in cells(settings, sampled=False) if cell.task == "a"]
    assert [cell.name for cell in found] == [
        "a/vanilla/4",
        "a/rag/online-4", "a/rag/frozen-4", "a/rag/online-5", "a/rag/frozen-5",
        "a/shots/4", "a/shots/5",
        "a/own/4", "a/own/5",
        "a/bank/online-4", "a/bank/online-5",
    ]  # fmt: skip
    assert Cell("own", "b", 4, None) not in cells(settings, sampled=False)
    # Sampled answers differ by their seed.
    assert Cell("vanilla", "a", 5, None) in cells(settings, sampled=True)


def test_marks_are_filled_in_wherever_they_stand():
    values = {"a": ["{task}/{seed}", 3], "b": {"c": "{memory}"}}
    marks = {"{task}": "shop", "{seed}": "1", "{memory}": "/m"}
    assert filled(values, marks) == {"a": ["shop/1", 3], "b": {"c": "/m"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": None}, "methods is not set"),
        ({"methods": {"vanilla": None}}, "methods is empty; name one at least"),
        ({"tasks": {"../a": {}}}, "tasks.../a: a name is a folder's"),
        ({"seeds": [1, 1]}, "seeds must be different ones, at least one, got [1, 1]"),
        ({"protocols": []}, "protocols must be different ones"),
        ({"protocols": ["offline"]}, "protocols.0 must be 'online' or 'frozen', got 'offline'"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"methods": {"a": {"tasks": ["a"]}}}, "methods.a is what all others are compared with"),
        ({"methods": {"a": {}, "b": {"tasks": ["c"]}}}, "methods.b.tasks names 'c', which is none of a, b"),
        ({"methods": {"a": {"examples": -1}}}, "examples must be 0 or more, got -1"),
        ({"methods": {"a": {"memory": {"method": "exprag"}}}}, "memory.method must be one of exp_recent, exp_rag"),
        ({"methods": {"a": {"examples": 1, "memory": {"method": "exp_rag"}}}}, "worked examples or a memory, not both"),
        ({"methods": {"a": {"control": "random"}}}, "control random is of a memory in the prompt"),
        ({"methods": {"a": {"control": "shuffled"}}}, "control shuffled is of a memory"),
        ({"methods": {"a": {"control": "swapped"}}}, "control swapped is of a checkpoint without a text memory"),
        ({"methods": {"a": {"control": "pause", "checkpoint": "c"}}}, "control pause is new pause tokens"),
        ({"methods": {"a": {"control": "oracle", "examples": 1}}}, "control oracle puts the solution"),
        ({"methods": {"a": {"memory": {"method": "exp_rag", "into": "weaver"}}}}, "needs a checkpoint of a latent source"),
        ({"methods": {"a": {"learns": True}}}, "learns is of a checkpoint's latent source"),
        ({"methods": {"a": {"recall": {}}}}, "methods.a.recall is not a key of MethodSettings"),
        ({"scribe": {"kind": "http"}}, "scribe.kind http needs scribe.url and scribe.model"),
        ({"scribe": {"url": "http://h/v1"}}, "scribe.url and scribe.model are for scribe.kind http, but it is none"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_study_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings({**GOOD, **change})
