"""The results of a benchmark for a terminal: one table per kind of case, narrow enough for 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

DELIMITER_RANGE = (0.03, 0.09)
"""Share of delimiters among new tokens that texts in natural languages have; other texts insert unusually often."""

Cells = list[str]
Rows = tuple[Cells, list[Cells]]
"""Header and rows."""


def generation_rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Decoding cases: ratios to plain Hugging Face decoding, medians of paired repeats."""
    header = ["model", "batch", "memory", "CPU x", "wall x", "floor x", "gap", "tokens/s", "plain"]
    rows = [
        [
            case["model"],
            str(case["batch"]),
            case["memory"],
            f"{case['cpu_ratio']:.2f}",
            f"{case['wall_ratio']:.2f}",
            f"{case['floor_cpu_ratio']:.2f}",
            f"{case['gap_to_floor']:.2f}",
            f"{case['ours']['tokens_per_second']:.0f}",
            f"{case['plain']['tokens_per_second']:.0f}",
        ]
        for case in cases
    ]
    return header, rows


def training_rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Training cases: ratios to a plain LoRA step."""
    header = [
        "model",
        "stage",
        "CPU x",
        "wall x",
        "memory x",
        "floor x",
        "positions x",
        "CPU s",
        "plain s",
        "MB",
    ]
    rows = []
    for case in cases:
        memory = case["memory_ratio"]
        peak = case["ours"].get("peak_above_weights_bytes")
        rows.append(
            [
                case["model"],
                case["stage"],
                f"{case['cpu_ratio']:.2f}",
                f"{case['wall_ratio']:.2f}",
                "-" if memory is None else f"{memory:.2f}",
                f"{case['floor_work_ratio']:.2f}",
                f"{case['floor_position_ratio']:.2f}",
                f"{case['ours']['cpu_seconds_median']:.2f}",
                f"{case['plain']['cpu_seconds_median']:.2f}",
                "-" if peak is None else f"{peak / 1e6:.0f}",
            ]
        )
    return header, rows


def kernel_rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Operations: every form's time and its share of the copy bandwidth."""
    header = ["operation", "direction", "form", "ms", "x naive", "of copy"]
    rows = []
    for case in cases:
        if case["kernel"] == "copy":
            rows.append(["copy", "", "", "", "", f"{case['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"])
            continue
        naive = case["forms"]["naive"]["wall_seconds_median"]
        for name, form in case["forms"].items():
            seconds = form["wall_seconds_median"]
            rows.append(
                [
                    case["kernel"],
                    case["direction"],
                    name,
                    f"{1000 * seconds:.2f}",
                    f"{seconds / naive:.2f}",
                    f"{100 * form['share_of_copy_bandwidth']:.1f} %",
                ]
            )
    return header, rows


def memory_rows(cases: Sequence[Mapping[str, Any]]) -> Rows:
    """Peak memory, each side in its own process."""
    header = [
        "model",
        "work",
        "batch",
        "tokens",
        "side",
        "MB above weights",
        "x plain",
        "cache MB",
        "needed MB",
    ]
    rows = []
    for case in cases:
        peak, ratio = case["peak_above_weights_bytes"], case["memory_ratio"]
        held = case.get("cache_bytes_held")
        tokens = f"{case['prompt']}+{case['new']}" if case["work"] == "decode" else str(case["length"])
        rows.append(
            [
                case["model"],
                case["work"],
                str(case["batch"]),
                tokens,
                case["side"],
                "-" if peak is None else f"{peak / 1e6:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
                "" if held is None else f"{held / 1e6:.1f}",
                "" if held is None else f"{case['cache_bytes_needed'] / 1e6:.1f}",
            ]
        )
    return header, rows


def notes(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Remarks below the table: texts with unusually many or few delimiters, and so insertions."""
    found = []
    for case in cases:
        name = " ".join(
            str(case[key]) for key in ("model", "stage", "batch", "memory", "sweep", "x") if key in case
        )
        rate = case.get("delimiter_rate")
        low, high = DELIMITER_RANGE
        if rate is not None and case.get("sweep") != "insertions" and not low <= rate <= high:
            found.append(
                f"{name}: delimiters are {100 * rate:.1f} % of its text, not {100 * low:.0f} to {100 * high:.0f} %"
            )
    return found


def table(title: str, rows: Rows) -> Table:
    """For a terminal. Columns that begin with a word are left-aligned, numbers right."""
    header, lines = rows
    made = Table(title=title, box=SIMPLE_HEAD)
    for index, name in enumerate(header):
        numbers = all(not line[index] or line[index][0].isdigit() or line[index][0] == "-" for line in lines)
        made.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for line in lines:
        made.add_row(*line)
    return made
