"""Old class paths and keys go on working for one release, with a warning that names the new one."""

from __future__ import annotations

import importlib

import pytest

from memgen.cli import config, renamed
from memgen.cli.config import Request
from memgen.cli.errors import UsageError

OLD, NEW = "memgen.environments.gsm8k.GSM8K", "memgen.environments.qa.gsm8k.GSM8K"


def read(*argv: str) -> config.Document:
    layers = Request.from_argv(argv).layers()
    return config.resolve(config.merge(layers), layers)


@pytest.mark.parametrize("new", renamed.MOVED.values(), ids=list(renamed.MOVED))
def test_every_new_name_exists(new):
    module, _, name = new.rpartition(".")
    assert (
        importlib.util.find_spec(new)
        if name[0].islower() and name != "run_logger"
        else hasattr(importlib.import_module(module), name)
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OLD, NEW),
        (
            "memgen.environments.search.SearchServer",
            "memgen.environments.search.retrieval.SearchServer",
        ),
        ("memgen.environments.search.popqa.PopQA", "memgen.environments.search.popqa.PopQA"),
        ("memgen.training.strategy.ZeroStrategy", "memgen.distributed.zero.ZeroStrategy"),
        ("memgen.training.resume.ResumeCheckpoint", "memgen.running.resume.ResumeCheckpoint"),
        ("ResumeCheckpoint", "ResumeCheckpoint"),
        ("tasks.Letters", "tasks.Letters"),
    ],
)
def test_a_class_path_has_one_present_name(old, new):
    assert renamed.class_path(old) == new


def test_an_old_class_path_in_a_file_is_read_as_the_new_one(folder):
    (folder / "a.yaml").write_text(
        f"data: {{environment: {{class_path: {NEW}, x: 1}}}}\n"
        "trainer: {callbacks: [{class_path: memgen.training.resume.ResumeCheckpoint}]}\n"
    )
    (folder / "b.yaml").write_text(f"data: {{environment: {{class_path: {OLD}, y: 2}}}}\n")
    with pytest.warns(FutureWarning) as told:
        document = read("-c", "a.yaml", "-c", "b.yaml")
    assert document["data"]["environment"] == {"class_path": NEW, "x": 1, "y": 2}
    assert document["trainer"]["callbacks"] == [{"class_path": "memgen.running.resume.ResumeCheckpoint"}]
    assert f"{OLD} is now {NEW}; the old name is accepted for one release" in [
        str(warning.message) for warning in told
    ]


@pytest.mark.parametrize("key", ["--data.environment.class_path", "--data.environment"])
def test_an_old_class_path_on_the_command_line_is_read_as_the_new_one(folder, key):
    (folder / "a.yaml").write_text("data: {}\n")
    with pytest.warns(FutureWarning, match=f"is now {NEW}"):
        document = read("-c", "a.yaml", key, OLD)
    environment = document["data"]["environment"]
    assert environment in (NEW, {"class_path": NEW})


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setattr(
        renamed,
        "KEYS",
        {"model.rollout.old": "model.rollout.new", "trainer.callbacks.*.was": "trainer.callbacks.*.is"},
    )


def test_an_old_key_is_read_as_the_new_one(folder, keys):
    (folder / "a.yaml").write_text(
        "model: {rollout: {old: 3, other: 1}, size: '${model.rollout.old}'}\n"
        "trainer: {callbacks: [{class_path: A, was: 1}, {class_path: B}]}\n"
    )
    with pytest.warns(FutureWarning) as told:
        document = read("-c", "a.yaml", "--model.rollout.old", "4", "--trainer.callbacks.1.was", "2")
    assert "model.rollout.old is now model.rollout.new" in str(told[0].message)
    assert document == {
        "model": {"rollout": {"other": 1, "new": 4}, "size": 4},
        "trainer": {"callbacks": [{"class_path": "A", "is": 1}, {"class_path": "B", "is": 2}]},
    }


def test_a_key_under_both_names_is_refused(folder, keys):
    (folder / "a.yaml").write_text("model: {rollout: {old: 3, new: 1}}\n")
    with (
        pytest.warns(FutureWarning),
        pytest.raises(UsageError, match="both are set: remove"),
    ):
        read("-c", "a.yaml")
