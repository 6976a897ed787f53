"""`memgen submit` and `memgen status` without a SLURM: the script, what is refused, and what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from memgen.cli import main as front_end
from memgen.cli import slurm
from memgen.cli.errors import UsageError
from memgen.cli.slurm import Job, Site, Submission, read_site, read_sweep, script

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ("--config", "stage.yaml")
TIME = ("--time", "04:00:00")

GOLDEN = """\
#!/usr/bin/env bash
# memgen submit --config stage.yaml --nodes 2 --gpus 8
# This script may be submitted again as it is: the run goes on from its last checkpoint.
#SBATCH --job-name=weaver_grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=04:00:00
#SBATCH --output=/runs/a b/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --gpus-per-node=h200:8
#SBATCH --cpus-per-task=8
#SBATCH --partition=gpu
#SBATCH --exclusive
set -euo pipefail

cd /work
module load cuda
source .venv/bin/activate
export OMP_NUM_THREADS=8
# When SLURM will end the job: the run saves itself before.
export SLURM_JOB_END_TIME=$(( $(date +%s) + 14400 ))
run='/runs/a b'

# A task ignores SLURM's warning until memgen listens to it; it would die of it in between.
task='trap "" USR1; exec "$@"'
status=0
# The tasks are terminated too, and end first; their status counts.
trap 'true' TERM
srun --kill-on-bad-exit=0 --wait=300 bash -c "$task" task \\
  apptainer exec --nv image.sif memgen fit \\
  --config '/runs/a b/slurm/config/00_stage.yaml' \\
  --model.optimizer.lr 1e-4 \\
  --trainer.devices=8 \\
  --run "$run" || status=$?

if [ "$status" -eq 75 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
    echo "saved, but not continued: requeued 100 times (max_requeues)" >&2
    exit "$status"
  fi
  echo "saved, to be continued by job $SLURM_JOB_ID (restart $(( ${SLURM_RESTART_COUNT:-0} + 1 )))"
  # This cluster requeues a job that ends with this status (RequeueExit).
  exit 99
fi
exit "$status"
"""
SITE = Site(
    partition="gpu",
    cpus_per_task=8,
    gpu_type="h200",
    setup=("module load cuda", "source .venv/bin/activate"),
    environment={"OMP_NUM_THREADS": "8"},
    container=("apptainer", "exec", "--nv", "image.sif"),
)


def job(**changes) -> Job:
    settings = {
        "name": "weaver_grpo",
        "run": Path("/runs/a b"),
        "work": Path("/work"),
        "nodes": 2,
        "gpus": 8,
        "tasks": 8,
        "time": "04:00:00",
        "arguments": (
            "--config", "/runs/a b/slurm/config/00_stage.yaml", "--model.optimizer.lr", "1e-4", "--trainer.devices=8",
        ),
        "sbatch": ("--exclusive",),
        "submitted": "memgen submit --config stage.yaml --nodes 2 --gpus 8",
    }  # fmt: skip
    return Job(**(settings | changes))


def bash_reads(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script_is_the_one_that_a_person_would_write():
    ours = script(job(), SITE, requeue_exit=99, command=["memgen"])
    assert ours == GOLDEN
    bash_reads(ours)


def test_a_sweep_reads_each_points_overrides_from_its_folder():
    points = (("--model.x", "1"), ("--model.x", "2"), ("--model.x", "a b"))
    site = Site(array_parallel=2)
    ours = script(job(points=points, parent="abc"), site, requeue_exit=None, command=["memgen"])
    bash_reads(ours)
    assert "#SBATCH --array=0-2%2\n" in ours
    assert "slurm/%A_%a.log\n" in ours
    assert "export MEMGEN_PARENT_RUN=abc\n" in ours
    assert "run='/runs/a b'/points/$(printf %03d \"$SLURM_ARRAY_TASK_ID\")\n" in ours
    assert '--run "$run" "${overrides[@]}" || status=$?\n' in ours
    # One of the points has the array's own number as its SLURM_JOB_ID.
    assert '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"\n' in ours
    alone = script(job(), site, requeue_exit=None, command=["memgen"])
    assert '  scontrol requeue "$SLURM_JOB_ID"\n' in alone


@pytest.mark.parametrize("status", [0, 1, 75, 143], ids=["done", "failed", "to be continued", "terminated"])
def test_the_scripts_status_is_the_runs_unless_it_wants_to_go_on(tmp_path, status):
    """The script itself, on programs that stand for SLURM's."""
    (tmp_path / "bin").mkdir()
    # What srun would start on the nodes.
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nshift 2\nexec "$@"\n')
    (tmp_path / "bin" / "memgen").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/said\ntrap > {tmp_path}/traps\nexit {status}\n'
    )
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    run = tmp_path / "points" / "001"
    run.mkdir(parents=True)
    (run / slurm.OVERRIDES).write_text("--model.text\n$HOME `x` 'y' *\n")
    settings = {
        "run": tmp_path,
        "work": tmp_path,
        "points": (("a",), ("b",)),
        "arguments": ("--config", "x y"),
    }
    text = script(job(**settings), Site(), requeue_exit=99, command=["memgen"])
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(
        ["bash"],
        input=text,
        env=environment | {"SLURM_JOB_ID": "7"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == {75: 99}.get(status, status), done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["fit", "--config", "x y", "--run", str(run), "--model.text", "$HOME `x` 'y' *"]
    assert "SIGUSR1" in (tmp_path / "traps").read_text()
    tired = environment | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "100"}
    done = subprocess.run(["bash"], input=text, env=tired, text=True, capture_output=True, check=False)
    assert done.returncode == status


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "slurm").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_site_files_are_read(file):
    bash_reads(script(job(), read_site(file), requeue_exit=None, command=["memgen"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown option partitoin; did you mean partition?"),
        ("cpus_per_task: many", "cpus_per_task must be a valid integer, got 'many'"),
        ("setup: module load", "setup must be a valid array, got 'module load'"),
        ("requeue: never", "requeue must be 'auto', 'exit' or 'scontrol', got 'never'"),
        ("requeue: exit", "requeue: exit needs requeue_exit"),
        ("warn_seconds: 0", "warn_seconds must be at least 1, got 0"),
        ("[]", "a site's options are a mapping"),
        ("a: [", "site.yaml"),
    ],
)
def test_a_site_file_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UsageError, match=message.replace("?", r"\?").replace("[", r"\[")):
        read_site(tmp_path / "site.yaml")


def test_sweeps_are_lines_of_overrides(tmp_path):
    path = tmp_path / "sweep.txt"
    path.write_text("# learning rates\n--a.b 1 --c 'x y'\n\n--a.b=2 # larger\n")
    assert read_sweep(path) == (("--a.b", "1", "--c", "x y"), ("--a.b=2",))
    path.write_text("--a 'open\n")
    with pytest.raises(UsageError, match=r"sweep.txt:1: No closing quotation"):
        read_sweep(path)
    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="has no point"):
        read_sweep(path)


def refusal(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert front_end.main(["submit", *argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*CONFIG, *TIME, "--nods", "2"), "unknown option --nods; did you mean --nodes?"),
        ((*CONFIG, *TIME, "--nodes", "0"), "argument --nodes: must be a number, at least 1, got '0'"),
        ((*CONFIG,), "the following arguments are required: --time"),
        ((*CONFIG, "--time", "x"), "--time: 'x' is no duration"),
        ((*CONFIG, "--time", "5"), "--time 5 leaves less than half of it for work"),
        ((*CONFIG, *TIME, "--gpus", "8", "--tasks", "4"), "a process has one GPU"),
        ((*CONFIG, *TIME, "--sbatch", "--nodes=4"), "--sbatch --nodes=4: the job script sets --nodes itself"),
        ((*CONFIG, *TIME, "--sbatch", "-t5"), "the job script sets --time itself"),
        ((*CONFIG, *TIME, "--site", "nowhere.yaml"), "nowhere.yaml does not exist (--site)"),
        ((*CONFIG, *TIME, "--array", "nowhere.txt"), "nowhere.txt does not exist (--array)"),
        ((*CONFIG, *TIME, "--model.lerning_rate", "1"), "the nearest valid one is model.learning_rate"),
        ((*CONFIG, *TIME, "--model.memgen.weaver.inference_latents", "-3"), "must be at least 0, got -3"),
        ((*TIME,), "--config is missing"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_cannot_be_run_is_not_submitted(folder, capsys, argv, message):
    assert message in refusal(capsys, *argv)
    assert not (folder / "runs").exists()


def test_a_point_of_a_sweep_that_cannot_be_run_is_named(folder, capsys):
    (folder / "sweep.txt").write_text("--model.learning_rate 1\n--model.learning_rate x\n")
    message = refusal(capsys, *CONFIG, *TIME, "--array", "sweep.txt")
    assert "point 1 of the sweep (--model.learning_rate x): model.learning_rate" in message


def test_a_dry_run_prints_the_script_and_leaves_nothing(folder, capsys):
    argv = [
        "submit",
        *CONFIG,
        *TIME,
        "--nodes",
        "2",
        "--dry-run",
        "--model.learning_rate=3",
        "--sbatch",
        "--exclusive",
    ]
    assert front_end.main(argv) == 0
    out = capsys.readouterr().out
    bash_reads(out)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --exclusive",
        "  --model.learning_rate=3 \\",
        "  --trainer.num_nodes=2 \\",
    ):
        assert f"{line}\n" in out
    assert not (folder / "runs").exists()


FAKE = """\
#!/usr/bin/env python3
import os, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "sbatch":
    if os.environ.get("REFUSES"):
        sys.exit("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified")
    print("41;cluster")
elif name == "squeue":
    print("41|0|RUNNING|None\\n41|1|PENDING|JobArrayTaskLimit\\n43|N/A|PENDING|BeginTime")
elif name == "scontrol" and arguments[:2] == ["show", "config"]:
    print("SlurmctldPort = 1\\nRequeueExit             = 99,100\\n")
elif name == "scontrol":
    print("JobId=40 JobName=x JobState=COMPLETED Reason=None")
else:
    sys.exit("Slurm accounting storage is disabled")
"""


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "sacct"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_what_was_submitted_is_kept_in_the_runs_folder(folder, capsys, fake_slurm):
    argv = [
        "submit",
        *CONFIG,
        *TIME,
        "--run",
        "here",
        "--name",
        "mine",
        "--tasks",
        "2",
        "--trainer.logger=false",
    ]
    assert front_end.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    run = folder / "here"
    assert out[-4:] == [
        "job 41: mine, 1 x 2 processes, 04:00:00",
        f"run:    {run}",
        f"log:    {run}/slurm/41.log",
        "mlflow: no answer now; the run makes its record when it starts",
    ]
    text = (run / "slurm" / "job.sh").read_text()
    assert "  exit 99\n" in text
    assert os.access(run / "slurm" / "job.sh", os.X_OK)
    # A later change of the file does not change the job.
    kept = run / "slurm" / "config" / "00_stage.yaml"
    assert kept.read_text() == (folder / "stage.yaml").read_text()
    assert f"--config {kept}" in text
    assert Submission.read(run).job == "41"


def test_what_slurm_refuses_is_told_in_one_line(folder, capsys, fake_slurm, monkeypatch):
    monkeypatch.setenv("REFUSES", "1")
    message = refusal(capsys, *CONFIG, *TIME, "--trainer.logger=false")
    assert "sbatch refuses: sbatch: error: Batch job submission failed: Invalid account" in message


def test_without_slurm_there_is_a_hint(folder, capsys, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    message = refusal(capsys, *CONFIG, *TIME, "--trainer.logger=false")
    assert "sbatch was not found: is this a machine of a SLURM cluster?" in message


def test_status_joins_what_slurm_and_the_runs_say(folder, capsys, fake_slurm):
    for name, number, points in (
        ("sweep", "41", 2),
        ("done", "40", None),
        ("waiting", "43", None),
        ("lost", "44", None),
    ):
        run = folder / "runs" / "stage" / name
        (run / "slurm").mkdir(parents=True)
        Submission(number, name, float(number), 1, 1, points, "log").write(run)
    progress = {
        "step": 5,
        "max_steps": 9,
        "time": time.time() - 200,
        "metrics": {"train/loss": 0.25, "reward": 1},
    }
    point = folder / "runs" / "stage" / "sweep" / "points" / "000" / "resume"
    point.mkdir(parents=True)
    (point / "progress.json").write_text(json.dumps(progress))
    (folder / "runs" / "stage" / "latest").symlink_to("sweep")
    assert front_end.main(["status"]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[:6] for row in cells[1:]] == [
        ["40", "COMPLETED", "done", "-", "-", "-"],
        ["41_0", "RUNNING", "sweep", "5/9", "train/loss 0.25", "3 min ago"],
        ["41_1", "PENDING (JobArrayTaskLimit)", "sweep", "-", "-", "-"],
        ["43", "PENDING (BeginTime)", "waiting", "-", "-", "-"],
        # The fake scontrol knows one job only, and gives it as the answer.
        ["44", "unknown", "lost", "-", "-", "-"],
    ]


def test_status_of_nothing_says_so(folder, capsys):
    assert front_end.main(["status"]) == 2
    assert "runs is no folder" in capsys.readouterr().err
    (folder / "runs").mkdir()
    assert front_end.main(["status"]) == 0
    assert "holds no run that was submitted" in capsys.readouterr().out
