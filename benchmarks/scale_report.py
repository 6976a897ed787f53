"""Tables of docs/scale.md from the recorded figures and the formulas: `python -m benchmarks.scale_report`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.performance_report import fill_places, markdown, provenance
from benchmarks.scale import (
    BACKBONES,
    FLOAT32,
    GIB,
    H100,
    STRATEGIES,
    Decoder,
    Strategy,
    WeaverSize,
    Workload,
    gathered_weights,
    memory_needs,
    times,
    traffic,
)
from memgen.bench.tables import Rows

logger = logging.getLogger(__name__)

RESULTS = Path("docs/results/scale/runs.json")
DOCUMENT = Path("docs/scale.md")
RANKS = (8, 64, 512)
ON_PAPER: tuple[Strategy, ...] = ("ddp", "zero2", "zero3")
MIB = 1 << 20


def run_rows(content: Mapping[str, Any]) -> Rows:
    """Every stage under every strategy against the single process."""
    header = ["stage", "strategy", "processes", "losses differ by", "weights differ by"]
    header += ["after SIGKILL", "adapters", ".ckpt", "peak memory"]
    rows = [
        [
            case["stage"],
            case["strategy"],
            str(case["ranks"]),
            _difference(case["largest_loss_difference"]),
            _difference(case["largest_weight_difference"]),
            "identical"
            if case["resumed_loss_difference"] == case["resumed_weight_difference"] == 0
            else _difference(max(case["resumed_loss_difference"], case["resumed_weight_difference"])),
            f"{case['adapter_checkpoint_bytes'] / MIB:.2f} MiB",
            f"{case['resume_checkpoint_bytes'] / MIB:.2f} MiB",
            " / ".join(f"{peak / MIB:.0f}" for peak in case["peak_above_start_bytes"]) + " MiB",
        ]
        for case in content["cases"]
    ]
    return header, rows


def _difference(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def shape_of(content: Mapping[str, Any]) -> tuple[Decoder, WeaverSize]:
    """The base and the weaver that were measured."""
    saved = content["memory"]
    return Decoder(**content["base"]), WeaverSize(**{**saved, "targets": tuple(saved["targets"])})


def held_rows(content: Mapping[str, Any]) -> Rows:
    """Bytes that a rank held in weaver SFT, measured and by formula."""
    base, weaver = shape_of(content)
    header = ["strategy", "kind", "measured", "by formula"]
    rows = []
    for case in content["cases"]:
        if case["stage"] != "weaver SFT" or case["strategy"] not in STRATEGIES:
            continue
        needs = memory_needs(base, weaver, Workload(), case["strategy"], case["ranks"], FLOAT32)
        held = case["held_bytes"][0]
        rows += [
            [case["strategy"], "base between steps", f"{held['frozen']:,}", f"{needs.frozen:,.0f}"],
            [case["strategy"], "moments", f"{held['optimizer']:,}", f"{needs.optimizer:,.0f}"],
        ]
        if case["strategy"] == "zero3":
            without, with_gradient = case["passes"][0][-1]
            formula = gathered_weights(base, weaver, without, with_gradient, FLOAT32)
            rows.append(
                [
                    case["strategy"],
                    f"gathered in the last step ({without} + {with_gradient} passes)",
                    f"{case['gathered_bytes'][0][-1]:,}",
                    f"{formula:,.0f}",
                ]
            )
    return header, rows


def memory_rows() -> Rows:
    """GiB on one device, by part."""
    workload, weaver = Workload(), WeaverSize()
    header = ["base", "strategy", "devices", "base", "+ pass", "+ rollout", "trained", "gradients"]
    header += ["moments", "activations", "caches", "update", "rollout", "fits 80 GB"]
    rows = []
    for name, base in BACKBONES.items():
        for strategy in ON_PAPER:
            for ranks in RANKS:
                needs = memory_needs(base, weaver, workload, strategy, ranks)
                parts = [needs.frozen, needs.gathered, needs.rollout, needs.trained, needs.gradients]
                parts += [needs.optimizer, needs.activations, needs.cache, needs.update, needs.decoding]
                fits = [
                    what
                    for what, size in (("update", needs.update), ("rollout", needs.decoding))
                    if size <= 0.92 * H100.memory
                ]
                rows.append(
                    [name, strategy, str(ranks)]
                    + [f"{part / GIB:.2f}" if part < 10 * GIB else f"{part / GIB:.0f}" for part in parts]
                    + [" and ".join(fits) or "neither"]
                )
    return header, rows


def traffic_rows() -> Rows:
    """Messages and seconds of a cycle of weaver GRPO."""
    workload, weaver = Workload(), WeaverSize()
    header = ["base", "strategy", "devices", "gradients, GB", "passes, GB", "rollout, GB"]
    header += ["decoding, s", "update, s", "messages, s", "rollout's share"]
    rows = []
    for name, base in BACKBONES.items():
        for strategy in ON_PAPER:
            for ranks in RANKS:
                moved = traffic(base, weaver, workload, strategy, ranks)
                spent = times(base, weaver, workload, strategy, ranks)
                rows.append(
                    [
                        name,
                        strategy,
                        str(ranks),
                        f"{moved.gradients / 1e9:.2f}",
                        f"{moved.weights / 1e9:.0f}",
                        f"{moved.rollout / 1e9:.0f}",
                        f"{spent.decoding:.1f}",
                        f"{spent.update:.1f}",
                        f"{spent.messages:.1f}",
                        f"{100 * spent.rollout_share:.0f} %",
                    ]
                )
    return header, rows


def fill(document: str, content: Mapping[str, Any]) -> str:
    """The document with its tables made anew.

    Args:
        document: text with places.
        content: the figures.

    Raises:
        ValueError: if a place has an unknown name.
    """
    tables: dict[str, Callable[[], str]] = {
        "runs": lambda: markdown(run_rows(content)) + "\n\n" + provenance(content),
        "held": lambda: markdown(held_rows(content)),
        "paper_memory": lambda: markdown(memory_rows()),
        "paper_traffic": lambda: markdown(traffic_rows()),
    }
    return fill_places(document, DOCUMENT, tables)


def main(argv: Sequence[str] | None = None) -> int:
    """Fills the document.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the figures")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="the document to fill")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    content = json.loads(options.results.read_text(encoding="utf-8"))
    if not content["complete"]:
        raise ValueError(f"{options.results} is of a run that was interrupted; run `make bench-scale` again")
    text = options.document.read_text(encoding="utf-8")
    options.document.write_text(fill(text, content), encoding="utf-8")
    logger.info("%s filled from %s", options.document, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
