"""Trainers killed with -9 during a rollout, an update and a save, and then resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from launched import statuses
from memgen.running.resume import RESUME, last_checkpoint
from sft_runs import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 9
CASES = [
    (kind, phase)
    for kind in ("sft", "grpo", "trigger")
    for phase in ("rollout", "update", "save", "rename")
    if (kind, phase) != ("sft", "rollout")
]
WORKER = Path(__file__).with_name("killed_worker.py")


class Trainer:
    """Trains in processes of their own, on one base."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_tiny(folder / "base")
        self.log = folder / "log"
        self.whole: dict[str, Path] = {}

    def train(self, run: Path, kind: str, **how) -> int:
        """The exit status, negative for a signal."""
        order = json.dumps({"run": str(run), "kind": kind, **how})
        (status,) = statuses(WORKER, 1, [str(self.base), order], self.log, seconds=600)
        return status

    def uninterrupted(self, kind: str) -> Path:
        """The run of a stage that nobody killed."""
        if kind not in self.whole:
            run = self.folder / kind
            assert self.train(run, kind) == 0, self.log.read_text()[-3000:]
            self.whole[kind] = run
        return self.whole[kind]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("trainer"))


def losses(run: Path) -> list[tuple[int, str]]:
    rows = [line.split() for line in (run / "losses").read_text().splitlines()]
    return [(int(step), loss) for step, loss in rows]


@pytest.mark.parametrize(("kind", "phase"), CASES)
def test_a_trainer_killed_in_any_phase_goes_on_to_the_bit(kind, phase, trainer, tmp_path):
    uninterrupted = trainer.uninterrupted(kind)
    run = tmp_path / "run"
    # Twice in one run: during the first phase of its kind after step 3, and after step 6 of the resumed run.
    for step, seed in ((3, 1), (6, 2)):
        status = trainer.train(run, kind, phase=phase, step=step, seed=seed)
        assert status == -signal.SIGKILL, f"{status}\n{trainer.log.read_text()[-3000:]}"
        saved = last_checkpoint(run)
        assert saved is not None
        assert torch.load(saved, weights_only=True)["global_step"] >= 2
    assert trainer.train(run, kind) == 0, trainer.log.read_text()[-3000:]

    expected = dict(losses(uninterrupted))
    told = losses(run)
    assert len(expected) == STEPS
    assert {step for step, _ in told} == set(expected)
    assert len(told) > STEPS - 1
    assert all(loss == expected[step] for step, loss in told)
    ours, theirs = (torch.load(path / "trained", weights_only=True) for path in (run, uninterrupted))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    # Nothing of the killed processes is left.
    assert sorted(path.name for path in (run / RESUME).iterdir()) == [
        "last.ckpt", "progress.json", f"step_{STEPS:06d}.ckpt", f"step_{STEPS:06d}.json",
    ]  # fmt: skip
