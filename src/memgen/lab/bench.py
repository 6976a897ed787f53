"""`make bench-lab`: the lab's weaver SFT over several weaver and base seeds, written to docs/results/.

Settings were chosen on the validation split; what is written here is from the test split. Each run is the command
`memgen fit --config conf/weaver_sft.yaml` in a process of its own, with its seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memgen.lab.assets import resolve_asset
from memgen.lab.environment import Lab
from memgen.lab.report import LabReport, base_hash, report_on_weaver
from memgen.model.backbone import BackboneConfig, load_backbone

logger = logging.getLogger(__name__)

STAGE = "conf/weaver_sft.yaml"


@dataclass(frozen=True)
class Run:
    """One trained weaver.

    Attributes:
        base_seed: which reasoner.
        weaver_seed: seed of the weaver's initial weights, data order and curriculum.
        fit_cpu_seconds: process CPU time of the whole `memgen fit` command, start-up and validation included.
        report: scores.
        base_unchanged: whether the frozen weights' hash is what it was before.
    """

    base_seed: int
    weaver_seed: int
    fit_cpu_seconds: float
    report: LabReport
    base_unchanged: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "base_seed": self.base_seed,
            "weaver_seed": self.weaver_seed,
            "fit_cpu_seconds": round(self.fit_cpu_seconds, 1),
            "base_unchanged": self.base_unchanged,
            **self.report.as_dict(),
        }


def run_one(base_seed: int, weaver_seed: int, root: Path) -> Run:
    """Trains and scores one weaver.

    Raises:
        RuntimeError: if the training command fails.
    """
    name = "lab:reasoner" if base_seed == 0 else f"lab:reasoner?seed={base_seed}"
    resolve_asset(name)
    before = base_hash(load_backbone(BackboneConfig(name), resolve_asset))
    folder = root / f"base{base_seed}_weaver{weaver_seed}"
    overrides = {
        "model.memgen.backbone.name": name,
        "seed_everything": weaver_seed,
        "model.seed": weaver_seed,
        "data.seed": weaver_seed,
        "trainer.callbacks.0.init_args.root": folder,
    }
    clock = _children_cpu()
    command = [sys.executable, "-m", "memgen.cli.main", "fit", "--config", STAGE]
    done = subprocess.run([*command, *(f"--{k}={v}" for k, v in overrides.items())], check=False)
    if done.returncode:
        raise RuntimeError(
            f"memgen fit failed for {name}, seed {weaver_seed} (exit status {done.returncode})"
        )
    report = report_on_weaver(folder / "latest" / "best", Lab(), "test")
    return Run(
        base_seed, weaver_seed, _children_cpu() - clock, report, base_unchanged=report.base_hash == before
    )


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def markdown(runs: Sequence[Run], command: str) -> str:
    """The report for people: every run, and the spread over runs."""
    first = runs[0].report
    names = [outcome.name for outcome in first.outcomes]
    lines = [
        "# Weaver SFT on the lab",
        "",
        f"Exact match (price list and answer) in per cent on {first.items} held-out items of the closed-book shop,",
        f"greedy decoding, {first.split} split; settings were chosen on the val split. In brackets the 95 % bootstrap",
        "interval over items.",
        "",
        f"Made by `{command}` on {date.today().isoformat()}: {machine()}.",
        "",
        f"Best constant completion: {100 * first.constant.total:.1f} %; best constant answer, price list ignored: "
        f"{100 * first.constant.answer_accuracy:.1f} %.",
        "",
        "| base seed | weaver seed | " + " | ".join(names) + " | fit CPU s | base unchanged |",
        "|---" * (len(names) + 4) + "|",
    ]
    for run in runs:
        cells = []
        for outcome in run.report.outcomes:
            low, high = outcome.interval()
            cells.append(f"{100 * outcome.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})")
        unchanged = "yes" if run.base_unchanged else "NO"
        lines.append(
            f"| {run.base_seed} | {run.weaver_seed} | {' | '.join(cells)} | {run.fit_cpu_seconds:.0f} | {unchanged} |"
        )
    means = np.array([[outcome.mean for outcome in run.report.outcomes] for run in runs]) * 100
    spread = [
        f"{m:.1f} ({low:.1f} to {high:.1f})"
        for m, low, high in zip(means.mean(0), means.min(0), means.max(0), strict=True)
    ]
    cpu = np.mean([run.fit_cpu_seconds for run in runs])
    lines.append(f"| mean | (range) | {' | '.join(spread)} | {cpu:.0f} | |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Processor, versions and threads."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = found[0] if found else model
    return f"{model}, Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all seeds and writes the report.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="make bench-lab", description=__doc__.split("\n")[0])
    parser.add_argument("--weaver-seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--base-seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--root", type=Path, default=Path("runs/bench_lab"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begin = time.perf_counter()
    runs = []
    for base_seed in options.base_seeds:
        for weaver_seed in options.weaver_seeds:
            runs.append(run_one(base_seed, weaver_seed, options.root))
            best = runs[-1].report.outcomes[2]
            logger.info("base %d, weaver %d: %s %.1f %%", base_seed, weaver_seed, best.name, 100 * best.mean)
    options.out.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine(), "runs": [run.as_dict() for run in runs]}
    (options.out / "lab_weaver_sft.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (options.out / "lab_weaver_sft.md").write_text(markdown(runs, "make bench-lab"), encoding="utf-8")
    logger.info("written to %s in %.0f s", options.out, time.perf_counter() - begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
