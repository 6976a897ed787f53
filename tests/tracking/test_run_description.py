"""Tags and parameters of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import memgen
from memgen.tracking.run_description import RunDescription, flatten_parameters, git_revision, run_tags
from tracking.described import DESCRIPTION, RESOLVED


def test_a_job_of_slurm_is_named_in_the_tags(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    tags = run_tags(DESCRIPTION)
    assert (tags["slurm.job_id"], tags["slurm.array_task_id"]) == ("12", "3")


def test_parameters_are_flat_text_of_at_most_500_characters():
    flat = flatten_parameters(RESOLVED)
    assert flat["seed_everything"] == "7"
    assert flat["model.memgen.boundaries.delimiters"] == "[',', '.']"
    assert flat["trainer.callbacks.1"] == "B"
    assert flat["trainer.plugins"] == "[]"
    long = flat["data.environment.init_args.path"]
    assert len(long) == 500
    assert long.endswith("x...")


def test_tags_say_what_a_person_filters_by():
    tags = run_tags(DESCRIPTION)
    expected = {
        "command": "fit",
        "stage": "weaver_sft",
        "backbone": "lab:reasoner",
        "environment": "GSM8K",
        "seed": "7",
        "memgen.version": memgen.__version__,
    }
    assert expected.items() <= tags.items()


def test_tags_leave_out_what_is_not_known():
    tags = run_tags(RunDescription(command="test"))
    assert not {"stage", "backbone", "environment", "seed"} & set(tags)


def repository(folder: Path, *, tracked: bool) -> Path:
    """A git repository around a copy of the package's first file."""

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(folder), *arguments],
            check=True,
            capture_output=True,
        )

    source = folder / "memgen" / "__init__.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    (folder / "other").write_text("")
    git("init", "-q")
    git("add", "." if tracked else "other")
    git("commit", "-q", "-m", "first")
    return source


def test_the_revision_of_the_source_is_recorded_with_its_changes(tmp_path, monkeypatch):
    source = repository(tmp_path, tracked=True)
    monkeypatch.setattr(memgen, "__file__", str(source))
    clean = git_revision()
    assert len(clean["git.revision"]) == 40
    assert clean["git.dirty"] == "false"
    source.write_text("a = 2\n")
    assert git_revision() == {**clean, "git.dirty": "true"}


def test_an_installed_package_inside_a_foreign_repository_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(memgen, "__file__", str(repository(tmp_path, tracked=False)))
    assert git_revision() == {}
