"""Breaks short runs of every stage at random, and judges what each run says, what it keeps and how it goes on.

    python -m benchmarks.soak --faults 50 --seed 0 --out soak.json

The faults: a reward or a learning rate that ruins numbers, SIGTERM to all processes of a run with loader workers, one
validation item for two ranks, a broken tracking store, two runs in one folder, kill -9. A run that was stopped is started
again by the same command, and must end with the weights of a run that nothing happened to. Each verdict is written as
soon as it is known, and a fault that `--out` already has is not tried again. The exit status is 1 if a verdict is bad;
the folder of such a run is kept.

Everything runs on the CPU in float32 through `memgen fit`, from a small random base.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from benchmarks.equality import configuration
from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.lab.environment import Lab

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
"""Optimizer steps of a run. Half way it validates, and every second step it writes a checkpoint to resume from."""
LINES = 5
"""So many lines at most may a run say about its fault."""
SECONDS = 300.0
"""A run that takes longer hangs."""
STAGES = ("weaver_sft", "weaver_grpo", "trigger_tokens")
REWARDS: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "none": None, "text": "good"}
KINDS: dict[str, Sequence[str]] = {
    "number": (
        "learning rate",
        *(f"{name} {action}" for action in ("leave_out", "stop") for name in REWARDS),
    ),
    "terminated": ("1", "2"),
    "one item": ("2 ranks",),
    "store": ("corrupt", "locked", "folder", "address", "deleted"),
    "two runs": ("one folder",),
    "killed": ("-9",),
}
"""The variants of each kind of fault; of `terminated` the number of loader workers."""


@final
class FaultyLab(Environment):
    """The lab's items, with rewards that a random base gets, one of them bad.

    Args:
        tasks: as of `Lab`.
        train_size: as of `Lab`.
        val_size: as of `Lab`.
        test_size: as of `Lab`.
        bad: a key of `REWARDS`, or None for none.
        at: which of the process's rewards is bad, from 0 on.
        pause: seconds that a reward takes.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        train_size: int,
        val_size: int,
        test_size: int,
        bad: Literal["nan", "inf", "none", "text"] | None = None,
        at: int = 0,
        pause: float = 0.0,
    ) -> None:
        self.lab = Lab(tasks, train_size=train_size, val_size=val_size, test_size=test_size)
        self.name = "faulty_lab"
        self.bad = bad
        self.left = at
        self.pause = pause

    @override
    def examples(self, split: Split) -> Sequence[Example]:
        return self.lab.examples(split)

    @override
    def messages(self, example: Example) -> list[Message]:
        return self.lab.messages(example)

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        self.left -= 1
        time.sleep(self.pause)
        if self.bad is not None and self.left == -1:
            return Reward(REWARDS[self.bad])
        # Of a random base's answers none is right, and GRPO learns nothing from equal rewards.
        return Reward(sum(answer.encode()) % 7 / 7)


@dataclass(frozen=True)
class Fault:
    """What happens to a run."""

    stage: str
    """One of `STAGES`."""
    kind: str
    """A key of `KINDS`."""
    variant: str
    """One of the kind's variants."""
    moment: float
    """When it happens, in [0, 1) of the time or of the rewards of a run."""

    @classmethod
    def sample(cls, seed: int, index: int) -> Fault:
        """The fault of that number: all kinds in all stages come in turns, in the seed's order."""
        pairs = list(itertools.product(STAGES, KINDS))
        random.Random(seed).shuffle(pairs)
        stage, kind = pairs[index % len(pairs)]
        source = random.Random(f"{seed}/{index}")
        return cls(stage, kind, source.choice(KINDS[kind]), round(source.random(), 3))


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to."""

    weights: Mapping[str, str]
    """sha256 of each file of its last checkpoint."""
    said: frozenset[str]
    """What every run says: its lines, with `#` for numbers."""
    seconds: float
    """From when the run has taken its folder to its end."""


class Run:
    """The processes of one `memgen fit` in a session of their own.

    Args:
        place: folder of the configuration, the log and the run's own folder, `run`.
        configs: the configuration files.
    """

    def __init__(self, place: Path, configs: Sequence[Path]) -> None:
        self.folder = place / "run"
        self.log = place / f"log-{len(list(place.glob('log-*')))}"
        command = [sys.executable, "-m", "memgen.cli.main", "fit", "--run", str(self.folder)]
        for config in configs:
            command += ["--config", str(config)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["MEMGEN_HOME"] = str(place.parent / "home")
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=place, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(self, name: str) -> None:
        """Waits until the run's folder has a file, or the run has ended."""
        end = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < end and not (self.folder / name).exists():
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Signals all processes of the run."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> int | None:
        """Waits for the exit status; None: the run hung and was killed."""
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends what is left of the run."""
        self.send(signal.SIGKILL)
        self.process.wait()

    def lines(self) -> list[str]:
        """What the run said, without a library's INFO lines."""
        text = self.log.read_text(errors="replace").replace(str(self.log.parent), "PLACE")
        return [
            line for line in text.splitlines() if line.strip() and not re.search(r"\bINFO\b|^Restor", line)
        ]


class Soak:
    """Runs and judges faults.

    Args:
        folder: the runs' folders are made here.

    Attributes:
        ended: the exit status of each run of the last fault and what it said about the fault.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[tuple[str, int], Reference] = {}
        self.started: list[Run] = []
        self.ended: list[tuple[int | None, list[str]]] = []
        text = "\n".join(
            f"{a} plus {b} is {a + b}; open the door, then go." for a in range(40) for b in range(9)
        )
        (folder / "text.txt").write_text(text)

    def run(self, faults: int, seed: int, out: Path) -> list[str]:
        """Judges the faults that the file does not have yet; the names of the bad ones."""
        results = json.loads(out.read_text()) if out.exists() else {}
        names = [f"{seed}-{index}" for index in range(faults)]
        for index, name in enumerate(names):
            if name in results:
                continue
            fault = Fault.sample(seed, index)
            problems = self.judge(name, fault)
            results[name] = {**asdict(fault), "problems": problems, "ended": self.ended}
            out.write_text(json.dumps(results, indent=1))
            statuses = ", ".join(str(status) for status, _ in self.ended)
            print(
                f"{name} {fault.stage}, {fault.kind}: {fault.variant} at {fault.moment}; exit {statuses}:",
                "; ".join(problems) or "good",
                flush=True,
            )
        return [name for name in names if results[name]["problems"]]

    def close(self) -> None:
        """Ends the runs that have not ended, after an interruption of the soak."""
        for run in self.started:
            if run.process.poll() is None:
                run.kill()

    def judge(self, name: str, fault: Fault) -> list[str]:
        """What is wrong with the run of a fault. The folder of a run that nothing is wrong with is removed."""
        place = self.folder / name
        # A seed's earlier attempt may have been interrupted.
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.ended = []
        reference = self.reference(fault.stage, 2 if fault.kind == "one item" else 1)
        problems = [*self._happens(place, fault, reference), *unreadable(place / "run")]
        # A reward that reinforcement leaves out is not learned from, and 1e30 is another learning rate.
        other = fault.variant == "learning rate"
        other |= fault.variant.endswith("leave_out") and fault.stage != "weaver_sft"
        if not problems and not other and weights(place / "run") != reference.weights:
            problems.append("the weights are not those of the undisturbed run")
        if not problems:
            shutil.rmtree(place)
        return problems

    def reference(self, stage: str, devices: int) -> Reference:
        """The undisturbed run of a stage, made once."""
        if (stage, devices) not in self.references:
            place = self.folder / f"{stage}-{devices}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            run = self._start(place, stage, devices=devices)
            run.wait_for(".lock")
            begin = time.monotonic()
            if run.end() != 0 or not weights(run.folder):
                raise SystemExit(f"a run that nothing happens to fails:\n{run.log.read_text()[-4000:]}")
            self.references[stage, devices] = Reference(
                weights(run.folder), frozenset(map(_usual, run.lines())), time.monotonic() - begin
            )
        return self.references[stage, devices]

    def _start(
        self, place: Path, stage: str, changes: Mapping[str, Any] | None = None, devices: int = 1
    ) -> Run:
        """Starts a run; `changes` are settings by their keys."""
        settings = configuration(stage, f"tiny:{self.folder}/text.txt", place, devices)
        settings["data"]["environment"]["class_path"] = "benchmarks.soak.FaultyLab"
        settings["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS // 2, "logger": False}
        settings["trainer"]["callbacks"].append(
            {"class_path": "memgen.running.resume.ResumeCheckpoint", "init_args": {"every_n_steps": 2}}
        )
        changed = OmegaConf.create(settings)
        for key, value in (changes or {}).items():
            OmegaConf.update(changed, key, value, merge=False)
        path = place / "run.yaml"
        OmegaConf.save(changed, path)
        run = Run(place, [ROOT / "conf" / "trainer" / "ddp.yaml", path] if devices > 1 else [path])
        self.started.append(run)
        return run

    def _happens(self, place: Path, fault: Fault, reference: Reference) -> Iterator[str]:
        """Lets the fault happen; what is wrong with the exit status and the messages."""
        stage = fault.stage
        # SFT scores only the eight items of each of two validations; a rollout has 16, and GRPO's serves two steps.
        rewards = 16 if stage == "weaver_sft" else STEPS * 8
        environment = "data.environment.init_args."
        if fault.kind == "number" and fault.variant == "learning rate":
            yield from self._check(self._start(place, stage, {"model.optimizer.lr": 1e30}), reference, 2)
        elif fault.kind == "number":
            bad, action = fault.variant.split()
            changes = {f"{environment}bad": bad, f"{environment}at": int(fault.moment * rewards)}
            run = self._start(place, stage, {**changes, "model.episodes.bad_rewards": action})
            yield from self._check(run, reference, 2 if action == "stop" else 0)
            if not any("faulty_lab" in line for line in self.ended[-1][1]):
                yield "the message does not name the environment"
            if action == "stop":
                yield from unreadable(place / "run")
                yield from self._check(self._start(place, stage), reference, 0)
        elif fault.kind in ("terminated", "killed"):
            changes = {"data.num_workers": int(fault.variant)} if fault.kind == "terminated" else {}
            run = self._start(place, stage, changes)
            run.wait_for(".lock")
            time.sleep(fault.moment * reference.seconds)
            run.send(signal.SIGTERM if fault.kind == "terminated" else signal.SIGKILL)
            # Before training begins and behind its last step there is nothing to save, and SIGTERM just ends the program.
            resume = place / "run" / "resume"
            training = (resume / "last.ckpt").exists() and not (resume / f"step_{STEPS:06d}.ckpt").exists()
            ended = {143} if training else {143, -signal.SIGTERM}
            expected = ended if fault.kind == "terminated" else {-signal.SIGKILL}
            yield from self._check(run, reference, 0, *expected)
            if run.process.returncode == 143 and not (place / "run" / "resume" / "last.ckpt").exists():
                yield "exit status 143, but nothing is saved"
            yield from unreadable(place / "run")
            yield from self._check(self._start(place, stage, changes), reference, 0)
        elif fault.kind == "one item":
            run = self._start(place, stage, {f"{environment}val_size": 1}, devices=2)
            yield from self._check(run, reference, 0)
        elif fault.kind == "two runs":
            # The later one is refused, or goes on with what the other has finished within a few seconds.
            lasts = {f"{environment}pause": fault.moment * 20 / rewards}
            runs = [self._start(place, stage, lasts), self._start(place, stage, lasts)]
            for run in runs:
                yield from self._check(run, reference, 0, 2)
            if all(run.process.returncode for run in runs):
                yield "both runs are refused"
        else:
            yield from self._store(place, fault, reference)

    def _store(self, place: Path, fault: Fault, reference: Reference) -> Iterator[str]:
        store = place / "store.db"
        uri = f"sqlite:///{store}"
        with contextlib.ExitStack() as stack:
            if fault.variant == "corrupt":
                store.write_bytes(bytes(range(1, 256)) * 40)
            elif fault.variant == "locked":
                database = stack.enter_context(contextlib.closing(sqlite3.connect(store)))
                database.execute("create table runs(a)")
                database.execute("BEGIN EXCLUSIVE")
            elif fault.variant in ("folder", "address"):
                uri = str(place / "mlruns") if fault.variant == "folder" else "htp://example.org"
            settings = {"root": str(place / "records"), "tracking_uri": uri, "flush_seconds": 1.0}
            logger = {"class_path": "memgen.tracking.run_logger.run_logger", "init_args": settings}
            run = self._start(place, fault.stage, {"trainer.logger": logger})
            if fault.variant == "deleted":
                run.wait_for("resume/last.ckpt")
                store.unlink(missing_ok=True)
            yield from self._check(run, reference, 0)
        kept = "".join(path.read_text() for path in place.glob("records/outbox/*.jsonl"))
        if "train/loss" not in kept:
            yield "the records that the store did not take are lost"

    def _check(self, run: Run, reference: Reference, *expected: int) -> Iterator[str]:
        """Waits for a run's end; what is wrong with its exit status and what it said."""
        status = run.end()
        if status not in expected:
            yield f"exit status {status}, not {' or '.join(map(str, expected))} ({run.log.name})"
        said = [line for line in run.lines() if _usual(line) not in reference.said]
        self.ended.append((status, said))
        if len(said) > LINES or any("Traceback" in line for line in said):
            yield f"{len(said)} lines ({run.log.name}): {said[:8]}"
        if status not in (0, -signal.SIGKILL, -signal.SIGTERM) and not said:
            yield f"exit status {status} without a word ({run.log.name})"


def _usual(line: str) -> str:
    return re.sub(r"[\d.]+", "#", line)


def weights(run: Path) -> dict[str, str]:
    """sha256 of each safetensors file of a run's last checkpoint."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "last").glob("**/*.safetensors"))
    }


def unreadable(run: Path) -> Iterator[str]:
    """The checkpoints of a run that cannot be read or hold numbers that are not finite."""
    for path in sorted(run.glob("**/*")):
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if hidden or path.suffix not in (".safetensors", ".ckpt"):
            continue
        try:
            ckpt = path.suffix == ".ckpt"
            found = torch.load(path, "cpu", weights_only=True) if ckpt else load_file(path)
            tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                yield f"{path.relative_to(run)} is not finite"
        except Exception as error:  # noqa: BLE001 - whatever a broken file raises is its verdict
            yield f"{path.relative_to(run)} cannot be read: {error}"


def main() -> int:
    """Tries the faults that `--out` does not have yet.

    Returns:
        The exit status: 1 if a verdict is bad.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="decides which")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the verdicts")
    parser.add_argument("--folder", type=Path, help="where the runs are; default: a temporary folder")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    soak = Soak(folder.resolve())
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        bad = soak.run(arguments.faults, arguments.seed, arguments.out)
    finally:
        soak.close()
    if not bad and arguments.folder is None:
        shutil.rmtree(folder)
    print(f"{arguments.faults} faults, {len(bad)} bad{f': {bad}; see {folder}' if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
