"""What a frozen real model needs so that a weaver learns: one setting changed at a time, `python -m benchmarks.learning`.

Weaver SFT on the shop in English, from the files of `memgen demo --backbone lab:smollm2`. Each variant changes what its name
says, sees the same problems in the same order, and is validated on the same items of the val split. A cell is a variant with a
seed; it is kept as a JSON file below `--root`, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from benchmarks.kept import kept
from benchmarks.lab_report import machine
from memgen.conf_files import conf_file
from memgen.files import write_whole
from memgen.lab.trained import children_cpu, fit, stage_file

FILES = ("backbone/smollm2-135m.yaml", "data/lab_english.yaml", "smollm2/weaver_sft.yaml")
VARIANTS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "random maps": {"model.memgen.weaver.map_init": "random"},
    "batch 16": {"data.batch_size": 16},
    "batch 16, rate 2e-3": {"data.batch_size": 16, "model.optimizer.lr": 2e-3},
    "rate 3e-4": {"model.optimizer.lr": 3e-4},
    "rate 3e-3": {"model.optimizer.lr": 3e-3},
    "2 latents": {"model.memgen.weaver.prompt_latents": 2},
    "16 latents": {"model.memgen.weaver.prompt_latents": 16},
    "LoRA on q_proj and v_proj": {"model.memgen.weaver.lora.target_modules": ["q_proj", "v_proj"]},
    "reads hidden states": {"model.memgen.weaver.reads": "hidden_states"},
    "float32": {"model.memgen.backbone.dtype": "float32"},
    "latents at commas too": {
        "model.memgen.boundaries.delimiters": [","],
        "model.memgen.boundaries.max_inference_insertions": 5,
        "model.curriculum": {"first": 0.0, "all": 0.8, "random": 0.2, "none": 0.0},
    },
    "400 problems, repeated": {"data.environment.train_size": 400},
}
"""Values by key on top of the files, by the variant's name."""
VALIDATIONS = 4


def overlay(variant: str, seed: int, problems: int, folder: Path) -> dict[str, Any]:
    """The configuration of a cell on top of the files.

    Args:
        variant: one of `VARIANTS`.
        seed: of initial weights and the order of the data.
        problems: seen in all.
        folder: for the run's metrics.
    """
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder), "name": "metrics"}
    steps = problems // batch_size(variant)
    values: dict[str, Any] = {
        "seed_everything": seed,
        "model.seed": seed,
        "data.seed": seed,
        "trainer.logger": logger,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps // VALIDATIONS,
        "data.environment.val_size": 48,
        **VARIANTS[variant],
    }
    found = OmegaConf.create()
    for key, value in values.items():
        OmegaConf.update(found, key, value)
    nested: dict[str, Any] = OmegaConf.to_container(found)  # type: ignore[assignment]
    return nested


def batch_size(variant: str) -> int:
    """Problems of an optimizer step."""
    found: int = VARIANTS[variant].get("data.batch_size") or _configured("data", "batch_size")
    return found


def _configured(*keys: str) -> Any:
    value: Any = yaml.safe_load(conf_file(FILES[0]).read_text(encoding="utf-8"))
    for key in keys:
        value = value[key]
    return value


def cell(variant: str, seed: int, problems: int, folder: Path) -> dict[str, Any]:
    """Trains a variant: its validations, and what the training took."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "overlay.yaml"
    write_whole(settings, yaml.safe_dump(overlay(variant, seed, problems, folder)))
    clock, begin = children_cpu(), time.perf_counter()
    fit([stage_file("weaver_sft"), *map(conf_file, FILES), settings], {}, folder / "run")
    return {
        "validations": validations(folder / "metrics", batch_size(variant)),
        "cpu_seconds": round(children_cpu() - clock, 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def validations(metrics: Path, batch: int) -> list[dict[str, float]]:
    """Problems seen, loss, and shares of right price lists and answers at each validation, of all parts of a run.

    Args:
        metrics: folder of the versions that Lightning's CSVLogger wrote.
        batch: problems of an optimizer step.
    """
    found = {}
    for file in sorted(metrics.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with file.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                if row.get("val/loss"):
                    seen = (int(row["step"]) + 1) * batch
                    names = {"loss": "val/loss", "prices": "val/reward_prices", "exact": "val/exact_match"}
                    found[seen] = {"problems": seen, **{name: float(row[key]) for name, key in names.items()}}
    return [found[seen] for seen in sorted(found)]


def report(cells: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The table as Markdown: a row for each variant and seed.

    Args:
        cells: by "variant/seed".
        seeds: those that were asked for; cells that are not there are named.
    """
    counts = sorted({int(found["problems"]) for one in cells.values() for found in one["validations"]})
    lines = [
        "# What a frozen real model needs so that a weaver learns",
        "",
        "`python -m benchmarks.learning`: weaver SFT of SmolLM2-135M-Instruct on the shop in English, prompt-end latents; right price "
        "lists of 48 items of the val split, in per cent, after so many problems. Each row changes one thing of the first.",
        "",
        "| variant | seed | " + " | ".join(f"{count:,}" for count in counts) + " | exact | CPU minutes |",
        "|---|---|" + "---|" * (len(counts) + 2),
    ]
    missing = []
    for variant in VARIANTS:
        for seed in seeds:
            found = cells.get(f"{variant}/{seed}")
            if found is None:
                missing.append(f"{variant}, seed {seed}")
                continue
            at = {int(one["problems"]): one for one in found["validations"]}
            prices = [f"{100 * at[count]['prices']:.0f}" if count in at else "" for count in counts]
            exact = 100 * found["validations"][-1]["exact"]
            minutes = found["cpu_seconds"] / 60
            lines.append(f"| {variant} | {seed} | {' | '.join(prices)} | {exact:.0f} | {minutes:.1f} |")
    for machine_and_date in sorted({f"{one['machine']}, {one['date']}" for one in cells.values()}):
        lines += ["", f"Measured on {machine_and_date}."]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the missing cells and writes the report.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"make cells of these ({', '.join(VARIANTS)})")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of these seeds (0)")
    parser.add_argument("--problems", type=int, default=1600, metavar="N", help="seen by each (1600)")
    parser.add_argument("--report", action="store_true", help="make no cell, write the report of those there")
    parser.add_argument("--root", type=Path, default=Path("runs/bench_learning"), help="folder of the cells")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the report")
    options = parser.parse_args(argv)
    if options.problems < 16 * VALIDATIONS:
        parser.error(f"--problems must be at least {16 * VALIDATIONS}, got {options.problems}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cells = {}
    for variant in VARIANTS:
        for seed in options.seeds:
            folder = options.root / f"{variant.replace(' ', '_').replace(',', '')}-{seed}-{options.problems}"
            path = folder.with_suffix(".json")
            if path.is_file() or (variant in options.variants and not options.report):
                made = kept(path, lambda v=variant, s=seed, f=folder: cell(v, s, options.problems, f))  # type: ignore[misc]
                cells[f"{variant}/{seed}"] = made
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "learning.json", json.dumps(cells, indent=1) + "\n")
    write_whole(options.out / "learning.md", report(cells, options.seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
