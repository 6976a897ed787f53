"""Runs on a real SLURM: submitted, warned, requeued, continued. `cluster.sh` makes one of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from memgen.cli.slurm import Job, Site, script
from memgen.lab.saving import save_backbone
from tiny import byte_tokenizer, tiny_causal_lm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SITE = """\
warn_seconds: 30
requeue: {requeue}
environment:
  # The nodes of this cluster have names that nobody can look up.
  MASTER_ADDR: 127.0.0.1
  OMP_NUM_THREADS: "1"
  PYTHONPATH: {path}
"""
OVERLAY = """\
data:
  batch_size: 2
  environment:
    validation_fraction: 0.2
model:
  memgen:
    weaver:
      lora:
        dropout: 0.2
  generation:
    max_new_tokens: 4
trainer:
  max_steps: {steps}
  val_check_interval: 16
  log_every_n_steps: 1
  enable_progress_bar: false
"""


def call(*command: str, timeout: float = 300, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def answers() -> bool:
    return shutil.which("sinfo") is not None and not call("sinfo", "-h", timeout=30, check=False).returncode


@pytest.fixture(scope="module")
def cluster():
    """A SLURM that answers: the one that runs here, or one that is started for these tests."""
    if "SLURM_CONF" in os.environ and answers():
        yield
        return
    script = str(Path(__file__).with_name("cluster.sh"))
    hold = 'echo "up $SLURM_CONF"; read -r'
    with subprocess.Popen(
        [script, "with", "2", "bash", "-c", hold],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if said[:1] != ["up"]:
            pytest.skip(process.communicate()[1].strip().splitlines()[-1])
        os.environ["SLURM_CONF"] = said[1]
        yield
        # It has jobs that are left killed, and its daemons ended.
        process.communicate("\n", timeout=120)
        del os.environ["SLURM_CONF"]


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch) -> Path:
    """A working directory with a tiny reasoner, a few problems, a site file, and no variables of a job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PL_GLOBAL_SEED")) and name != "SLURM_CONF":
            monkeypatch.delenv(name)
    (tmp_path / "base").mkdir()
    save_backbone(tiny_causal_lm(max_position_embeddings=2048), byte_tokenizer(), tmp_path / "base")
    (tmp_path / "data").mkdir()
    lines = [
        json.dumps({"question": f"Tom finds {n} nuts twice?", "answer": f"{n}+{n}={2 * n}.\n#### {2 * n}"})
        for n in range(1, 25)
    ]
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    path = Path(__file__).parent
    (tmp_path / "exit.yaml").write_text(SITE.format(requeue="auto", path=path))
    (tmp_path / "scontrol.yaml").write_text(SITE.format(requeue="scontrol", path=path))
    (tmp_path / "small.yaml").write_text(OVERLAY.format(steps=STEPS))
    return tmp_path


def configuration(folder: Path, beacon: str, seconds: float = 0.0) -> list[str]:
    files = ["conf/weaver_sft.yaml", "conf/backbone/tiny.yaml", "conf/data/gsm8k.yaml"]
    arguments = [word for file in files for word in ("--config", str(ROOT / file))]
    return [
        *arguments,
        *("--config", "small.yaml", "--data.path", str(folder / "data")),
        *("--model.memgen.backbone.name", str(folder / "base")),
        "--trainer.callbacks.2.class_path=beacon.Beacon",
        f"--trainer.callbacks.2.folder={folder / beacon}",
        f"--trainer.callbacks.2.seconds={seconds}",
    ]


def memgen(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    try:
        return call(sys.executable, "-m", "memgen.cli.main", *arguments, check=check)
    finally:
        del os.environ["PYTHONPATH"]


def submit(folder: Path, *arguments: str, site: str = "exit.yaml") -> tuple[str, Path, str]:
    """Number, run folder and link of a job."""
    out = memgen("submit", *arguments, "--site", site, "--time", "10").stdout
    found = re.match(r"job (\d+): .*\nrun:    (.+)\nlog:    (.+)\nmlflow: (.+)\n", out)
    assert found is not None, out
    return found[1], Path(found[2]), found[4]


def fields(job: str) -> dict[str, str]:
    text = call("scontrol", "-o", "show", "job", job).stdout
    return dict(re.findall(r"(\w+)=(\S*)", text))


def wait(what: str, condition, job: str, log: Path, seconds: float = 300) -> None:
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > seconds:
            said = log.read_text()[-3000:] if log.exists() else "no log"
            pytest.fail(f"waited {seconds:.0f} s in vain: {what}\n{fields(job)}\n{said}")
        time.sleep(0.3)


def ended(job: str) -> bool:
    return fields(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


def steps(folder: Path, beacon: str, rank: int = 0) -> dict[int, str]:
    path = folder / beacon / f"rank_{rank}"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return {int(step): loss for step, loss in rows}


def strategy(name: str) -> tuple[str, str]:
    return ("--config", str(ROOT / "conf" / "trainer" / f"{name}.yaml"))


def reference(folder: Path, strategy: Sequence[str]) -> dict[str, torch.Tensor]:
    """Two processes of this machine that nobody interrupts; the weights that they end with."""
    run = folder / "whole"
    memgen(
        "fit", *configuration(folder, "whole_steps"), *strategy, "--run", str(run), "--trainer.logger=false",
        "--trainer.accelerator=cpu", "--trainer.devices=2",
    )  # fmt: skip
    return load_file(run / "last" / "weaver.safetensors")


def test_a_warned_job_on_two_nodes_is_requeued_and_ends_as_if_it_never_was(folder):
    overlay = strategy("zero2")
    job, run, link = submit(folder, *configuration(folder, "steps", 0.3), *overlay, "--nodes", "2")
    log = run / "slurm" / f"{job}.log"
    assert "/runs/" in link

    # During start-up: before Python has imported anything, let alone trained.
    wait("the job runs", lambda: fields(job)["JobState"] == "RUNNING", job, log)
    time.sleep(3)
    call("scancel", "--signal=USR1", job)
    wait("first requeue", lambda: fields(job)["Restarts"] == "1", job, log)
    assert sorted(steps(folder, "steps")) == [1]

    wait("the middle", lambda: len(steps(folder, "steps")) >= 10, job, log)
    call("scancel", "--signal=USR1", job)
    wait("second requeue", lambda: fields(job)["Restarts"] == "2", job, log)
    wait("the end", lambda: ended(job), job, log)
    assert fields(job)["JobState"] == "COMPLETED", log.read_text()[-3000:]
    assert log.read_text().count("saved, to be continued by job") == 2

    whole = reference(folder, overlay)
    for rank in (0, 1):
        assert steps(folder, "steps", rank) == steps(folder, "whole_steps", rank)
        path = folder / "steps" / f"rank_{rank}"
        assert [int(line.split()[0]) for line in path.read_text().splitlines()] == [*range(1, STEPS + 1)]
    resumed = load_file(run / "last" / "weaver.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (record,) = client.search_runs([client.get_experiment_by_name("memgen").experiment_id])
    assert record.info.run_id in link
    assert record.info.status == "FINISHED"
    logged = [point.step for point in client.get_metric_history(record.info.run_id, "train/loss")]
    assert logged == sorted(set(logged))
    assert len(logged) == STEPS

    shown = memgen("status").stdout
    assert re.search(rf"{job} +COMPLETED +weaver_sft +{STEPS}/{STEPS} ", shown), shown


def test_a_sweep_is_an_array_whose_points_are_children_of_one_record(folder):
    (folder / "sweep.txt").write_text("--model.optimizer.lr 1e-3\n--model.optimizer.lr 2e-3 # faster\n")
    job, run, link = submit(
        folder,
        *configuration(folder, "points"),
        "--array",
        "sweep.txt",
        "--trainer.max_steps=4",
        site="scontrol.yaml",
    )
    log = run / "slurm" / f"{job}_0.log"
    wait(
        "both points",
        lambda: (
            "COMPLETED" in call("scontrol", "-o", "show", "job", job).stdout
            and not call("squeue", "-h", "-j", job).stdout
        ),
        job,
        log,
    )
    shown = memgen("status").stdout
    assert len(re.findall(rf"{job}_[01] +COMPLETED +weaver_sft +4/4 ", shown)) == 2, (
        shown + log.read_text()[-2000:]
    )
    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    records = client.search_runs([client.get_experiment_by_name("memgen").experiment_id])
    (parent,) = [record for record in records if "mlflow.parentRunId" not in record.data.tags]
    children = [record for record in records if record is not parent]
    assert parent.info.run_id in link
    assert {record.data.tags["mlflow.parentRunId"] for record in children} == {parent.info.run_id}
    assert {float(record.data.params["model.optimizer.lr"]) for record in children} == {1e-3, 2e-3}
    for point in ("000", "001"):
        assert (run / "points" / point / "last" / "weaver.safetensors").is_file()


def test_a_terminated_job_on_two_nodes_has_saved_and_goes_on_when_it_is_submitted_again(folder):
    arguments = (*configuration(folder, "steps", 0.3), *strategy("ddp"), "--trainer.max_steps=14")
    job, run, _ = submit(folder, *arguments, "--nodes", "2", "--name", "once", site="scontrol.yaml")
    log = run / "slurm" / f"{job}.log"
    wait("a few steps", lambda: len(steps(folder, "steps")) >= 3, job, log)
    call("scancel", f"--signal={signal.SIGTERM.name[3:]}", job)
    wait("the end", lambda: ended(job), job, log)
    assert fields(job)["JobState"] == "FAILED"
    assert fields(job)["ExitCode"] == "143:0"
    before = max(steps(folder, "steps"))
    assert f"asked to stop: saved at step {before} " in log.read_text()

    # By hand, and warned once: requeued by scontrol, where no exit status does it.
    again = call("sbatch", "--parsable", str(run / "slurm" / "job.sh")).stdout.strip()
    log = run / "slurm" / f"{again}.log"
    wait("further steps", lambda: max(steps(folder, "steps")) > before + 1, again, log)
    call("scancel", "--signal=USR1", again)
    wait("the requeue", lambda: fields(again)["Restarts"] == "1", again, log)
    wait("the end", lambda: ended(again), again, log)
    assert fields(again)["JobState"] == "COMPLETED", log.read_text()[-3000:]
    for rank in (0, 1):
        path = folder / "steps" / f"rank_{rank}"
        assert [int(line.split()[0]) for line in path.read_text().splitlines()] == [*range(1, 15)]


def test_the_point_that_has_the_arrays_own_number_is_requeued_alone(folder):
    """A program stands for the run: at its first start that point's wants to be continued, the other one works on."""
    (folder / "point.sh").write_text(
        "#!/bin/bash\n"
        f'echo "$SLURM_ARRAY_TASK_ID ${{SLURM_RESTART_COUNT:-0}}" >> {folder}/starts\n'
        'if [ "$SLURM_JOB_ID" != "$SLURM_ARRAY_JOB_ID" ]; then sleep 25; exit 0; fi\n'
        f"echo $SLURM_ARRAY_TASK_ID > {folder}/own\n"
        '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || exit 75\n'
    )
    (folder / "point.sh").chmod(0o755)
    job = Job(
        name="points", run=folder, work=folder, nodes=1, gpus=0, tasks=1, time="5", arguments=(),
        points=((), ()), sbatch=(), submitted="a test",
    )  # fmt: skip
    for point in ("000", "001"):
        (folder / "points" / point).mkdir(parents=True)
        (folder / "points" / point / "overrides.txt").write_text("")
    (folder / "slurm").mkdir()
    path = folder / "slurm" / "job.sh"
    path.write_text(script(job, Site(warn_seconds=30), None, [str(folder / "point.sh")]))
    number = call("sbatch", "--parsable", str(path)).stdout.strip()
    log = folder / "slurm" / f"{number}_0.log"
    starts = folder / "starts"
    wait("the points", lambda: starts.exists() and starts.read_text().count("\n") >= 3, number, log)
    wait("the end", lambda: not call("squeue", "-h", "-j", number, check=False).stdout, number, log)
    own = (folder / "own").read_text().strip()
    other = "1" if own == "0" else "0"
    assert sorted(starts.read_text().splitlines()) == sorted([f"{own} 0", f"{own} 1", f"{other} 0"])
