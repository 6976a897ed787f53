"""memgen ablate --sweep: the grid, its points as runs, and the job that trains and tests them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cli.played import CONFIG, prepare
from memgen.cli import main as front_end
from memgen.cli import submit, sweep
from memgen.cli.errors import UsageError
from memgen.cli.slurm import OVERRIDES, Job, Site, script
from memgen.lab import trained
from memgen.results import statistics
from memgen.results.score_files import read_records

GRID = ("--sweep", "weaver.prompt_latents=1,3")
QUICK = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0")
ADAPTERS = (
    "--trainer.callbacks",
    "[{class_path: memgen.training.callbacks.AdapterCheckpoint, monitor: null}]",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory whose points are trained and tested in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    monkeypatch.setattr(trained, "run_memgen", in_process)
    prepare(tmp_path)
    return tmp_path


COMMANDS: list[tuple[str, ...]] = []


def in_process(*arguments: str) -> None:
    COMMANDS.append(arguments)
    assert front_end.main(list(arguments)) == 0


def run(*extra: str) -> int:
    COMMANDS.clear()
    return front_end.main(["ablate", *GRID, *CONFIG, *QUICK, *ADAPTERS, "--out", "found", *extra])


def test_every_point_is_trained_and_tested_and_nothing_twice(folder, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert [command[0] for command in COMMANDS] == ["fit", "test", "fit", "test"]
    numbers = json.loads((folder / "found" / "ablation.json").read_text())
    assert [line["name"] for line in numbers["lines"]] == [
        "weaver.prompt_latents=1",
        "weaver.prompt_latents=3",
    ]
    latents = [line["costs"]["latents"] for line in numbers["lines"]]
    # Two turns with a block at the end of each prompt.
    assert latents == [2.0, 6.0]
    assert numbers["memory"] is None
    assert [effect["against"] for effect in numbers["against_first"]] == ["weaver.prompt_latents=1"]
    settings = read_records(folder / "found" / "points" / "001" / "test").settings
    assert settings["agent"]["weaver"]["prompt_latents"] == 3
    assert (
        folder / "found" / "points" / "001" / OVERRIDES
    ).read_text() == "--model.memgen.weaver.prompt_latents=3\n"

    (folder / "found" / "points" / "001" / "test" / "summary.json").unlink()
    assert run() == 0
    assert [command[0] for command in COMMANDS] == ["fit", "test"]
    table = out[out.index("6 items of letter_game") :]
    assert capsys.readouterr().out.endswith(table)

    assert run("--data.seed", "1") == 2
    assert "was begun as another sweep: arguments was" in capsys.readouterr().err


def test_a_point_that_cannot_be_built_stops_the_sweep_before_any_is_trained(folder, capsys):
    assert front_end.main(["ablate", "--sweep", "weaver.prompt_latents=1,-3", *CONFIG, "--out", "found"]) == 2
    assert "point 1 of the sweep" in capsys.readouterr().err
    assert not (folder / "found").exists()


def test_submit_makes_an_array_of_the_same_points(folder, monkeypatch):
    given = []
    monkeypatch.setattr(submit, "main", lambda argv: given.append(argv) or 0)
    assert run("--submit", "--time", "02:00:00", "--gpus", "8", "--sbatch", "--exclusive -w n1") == 0
    (argv,) = given
    place = folder / "found"
    assert argv[: len(argv) - 10] == [*CONFIG, *QUICK, *ADAPTERS]
    assert argv[-10:] == [
        "--array", str(place / "sweep.txt"), "--run", str(place), "--test", "--time", "02:00:00", "--gpus", "8",
        "--sbatch=--exclusive -w n1",
    ]  # fmt: skip
    lines = (place / "sweep.txt").read_text().splitlines()
    assert lines == [f"--model.memgen.weaver.prompt_latents={k}" for k in (1, 3)]
    assert not COMMANDS


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["weaver.prompt_latents"], "write KEY=V1,V2,..."),
        (["weaver.prompt_latents=2,,4"], "write KEY=V1,V2,..."),
        (["weaver.prompt_latents=2"], "a sweep needs at least two points"),
        (["a=1,1"], "has a value twice"),
        (["a=1,2", "a=3,4"], "--sweep a is given twice"),
    ],
)
def test_a_grid_that_is_none_is_refused(texts, message):
    with pytest.raises(UsageError, match=message):
        sweep.read_grid(texts)


def test_a_grid_has_every_combination_and_short_keys_are_those_of_the_model():
    points = sweep.read_grid(["weaver.prompt_latents=2,4", "model.optimizer.lr=1e-3,5e-3"])
    assert [sweep.name(point) for point in points][1] == "weaver.prompt_latents=2, model.optimizer.lr=5e-3"
    assert len(points) == 4
    assert sweep.overrides(points[3]) == [
        "--model.memgen.weaver.prompt_latents=4",
        "--model.optimizer.lr=5e-3",
    ]


def test_conditions_and_a_sweep_exclude_each_other(folder, capsys):
    assert run("--conditions", "vanilla") == 2
    assert "--conditions plays one checkpoint, --sweep trains one for each point" in capsys.readouterr().err


def test_a_sweep_that_keeps_no_weights_is_refused(folder, capsys):
    assert front_end.main(["ablate", *GRID, *CONFIG, "--out", "found"]) == 2
    assert "add memgen.training.callbacks.AdapterCheckpoint to trainer.callbacks" in capsys.readouterr().err


def test_submit_without_a_sweep_is_refused(folder, capsys):
    assert front_end.main(["ablate", *CONFIG, "--submit"]) == 2
    assert "--submit is for a sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fits", "said"), [(True, ["fit", "test"]), (False, ["fit"])], ids=["trained", "failed"]
)
def test_the_job_tests_what_it_has_trained(tmp_path, fits, said):
    """The script itself, on programs that stand for SLURM's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nshift 2\nexec "$@"\n')
    failure = "" if fits else '[ "$1" = test ] || exit 3\n'
    (tmp_path / "bin" / "memgen").write_text(
        f'#!/bin/bash\nprintf "%s " "$@" >> {tmp_path}/said\necho >> {tmp_path}/said\n{failure}'
    )
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    point = tmp_path / "points" / "001"
    (point / "last").mkdir(parents=True)
    (point / OVERRIDES).write_text("--model.x=2\n")
    job = Job(
        name="sweep", run=tmp_path, work=tmp_path, nodes=1, gpus=0, tasks=1, time="01:00:00",
        arguments=("--config", "a.yaml"), points=(("--model.x=1",), ("--model.x=2",)), tests=True,
    )  # fmt: skip
    text = script(job, Site(), requeue_exit=None, command=["memgen"])
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash"], input=text, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == (0 if fits else 3), done.stderr
    lines = (tmp_path / "said").read_text().splitlines()
    assert [line.split()[0] for line in lines] == said
    if fits:
        tested = (
            f"test --config a.yaml --model.x=2 --checkpoint {Path(point, 'last')} --records {point / 'test'}"
        )
        assert lines[1].strip() == tested
