"""Two processes on two network namespaces train over a real link, which goes down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from letters_stage import STAGE, write_stage
from memgen.tracking.store import client_of

pytestmark = [pytest.mark.netns, pytest.mark.timeout(2400)]

TIMEOUT = 20
"""Seconds after which a process gives up waiting for another: the strategy's setting."""
GRACE = 100
"""Seconds that a busy machine may take to end a process on top of that."""
START = 900
"""Seconds for two processes to import, build and train a few steps; tens of them on an idle machine."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Link:
    """Two namespaces and what lies between them."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def set(self, state: str) -> None:
        """Turns the link up or down, at both ends."""
        for name in self.names:
            ip("-n", name, "link", "set", f"{name}v", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def link():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = (f"mg{os.getpid()}a", f"mg{os.getpid()}b")
    made = Link(names, ("10.213.7.1", "10.213.7.2"))
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            f"{names[0]}v",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            f"{names[1]}v",
            "netns",
            names[1],
        )
        for name, address in zip(names, made.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", "lo", "up")
        made.set("up")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Ranks:
    """Both processes of a run, each in its namespace, on one file system."""

    def __init__(self, link: Link, folder: Path, *arguments: str) -> None:
        self.logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, name in enumerate(link.names):
            inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
            environment = inherited | {
                "MASTER_ADDR": link.addresses[0],
                "MASTER_PORT": "29571",
                "NODE_RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "GLOO_SOCKET_IFNAME": f"{name}v",
                "PYTHONPATH": str(ROOT / "tests"),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            }
            command = [
                "ip", "netns", "exec", name, sys.executable, "-m", "memgen.cli.main", "fit", "--config", "stage.yaml",
                "--trainer.num_nodes=2", "--trainer.devices=1", "--run", "run", *arguments,
            ]  # fmt: skip
            with self.logs[rank].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
                )

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses. Fails if a process still runs then."""
        deadline = time.monotonic() + seconds
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.processes]

    def text(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in self.logs)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=20)


def step_of(folder: Path) -> int:
    """The step of the run's last checkpoint, 0 if there is none."""
    last = folder / "run" / "resume" / "last.ckpt"
    found = re.search(r"step_(\d+)", os.readlink(last)) if last.is_symlink() else None
    return int(found[1]) if found else 0


STRATEGIES = {
    "ddp": {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "process_group_backend": "gloo",
        "timeout": f"0:00:{TIMEOUT:02d}",
    },
    "zero2": {
        "class_path": "memgen.distributed.zero.ZeroStrategy",
        "stage": 2,
        "timeout": f"0:00:{TIMEOUT:02d}",
    },
}


@pytest.fixture(params=STRATEGIES.values(), ids=STRATEGIES)
def folder(tmp_path, request) -> Path:
    callbacks = [
        *STAGE["trainer"]["callbacks"],
        {"class_path": "memgen.running.resume.ResumeCheckpoint", "every_n_steps": 5},
        {"class_path": "netns_pace.Pace"},
    ]
    write_stage(tmp_path, callbacks=callbacks, strategy=request.param, max_steps=5000, limit_val_batches=0)
    return tmp_path


def test_a_lost_link_ends_both_processes_and_the_run_goes_on_over_a_new_one(link, folder):
    ranks = Ranks(link, folder)
    try:
        deadline = time.monotonic() + START
        while step_of(folder) < 10:
            assert all(process.poll() is None for process in ranks.processes), ranks.text()
            assert time.monotonic() < deadline, ranks.text()
            time.sleep(0.2)
        link.set("down")
        begin = time.monotonic()
        statuses = ranks.wait(TIMEOUT + GRACE)
        assert all(statuses), ranks.text()
        assert time.monotonic() - begin < TIMEOUT + GRACE
        for log in ranks.logs:
            assert "lost its connection to another process of this run" in log.read_text(), ranks.text()
            assert "Traceback" not in log.read_text(), ranks.text()
    finally:
        ranks.kill()

    saved = step_of(folder)
    assert saved >= 10
    link.set("up")
    again = Ranks(link, folder, f"--trainer.max_steps={saved + 5}")
    try:
        assert again.wait(START) == [0, 0], again.text()
        assert step_of(folder) == saved + 5
        assert f"the run goes on from step {saved} (" in again.logs[0].read_text(), again.text()
        client = client_of(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("memgen")
        (record,) = client.search_runs([experiment.experiment_id])
        assert record.info.status == "FINISHED"
    finally:
        again.kill()
