"""The benchmark of what the memory does: its cells with commands that leave made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory
from memgen.analysis.effects import REWARD


def effect(condition, against, mean, adjusted):
    return {
        "condition": condition,
        "against": against,
        "outcome": {"name": REWARD, "task": None, "failure": None},
        "items": 50,
        "difference": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 50},
        "test": "McNemar, exact",
        "p_value": adjusted,
        "adjusted": adjusted,
    }


def analysis(*, faculties: bool):
    """As `analysis.json`: two clusters, whose removals do more than random ones if there are faculties."""
    names = {rule: [f"cluster {j} ({rule})" for j in (1, 2)] for rule in ("nearest", "top_k")}
    results = [
        {
            "cluster": number, "clusters": 2, "rule": rule, "condition": name, "rate": 0.5, "control": f"random: {name}",
            "control_rate": 0.48,
        }
        for rule, conditions in names.items()
        for number, name in enumerate(conditions)
    ]  # fmt: skip
    harmful = -0.4 if faculties else -0.02
    p = 0.001 if faculties else 0.9
    conditions = {
        "trained": {"items": 50.0, "reward": 0.9, "filter_rate": 0.0, "failure: wrong answer": 0.1},
        "remove all": {"items": 50.0, "reward": 0.05, "filter_rate": 1.0, "failure: wrong answer": 0.95},
    }
    for result in results:
        conditions[result["condition"]] = {"items": 50.0, "reward": 0.4, "filter_rate": 0.5}
        conditions[result["control"]] = {"items": 50.0, "reward": 0.8, "filter_rate": 0.48}
    return {
        "settings": {}, "environment": "lab", "items": 100, "blocks": 400, "latents": {"prompt": 4}, "fitting": 50,
        "scoring": 50, "reward": {"mean": 0.9, "low": 0.8, "high": 1.0, "count": 50}, "conditions": conditions,
        "geometry": {}, "probes": [], "clusters": [], "assigned": {}, "notes": [],
        "study": {
            "blocks": 200, "spread": 0.5, "best": 2, "p_value": 0.025,
            "counts": [{"clusters": 2, "silhouette": 0.6, "null_silhouette": 0.1, "stability": 1.0}],
        },
        "overall": [effect("remove all", "trained", -0.85, 1e-6)],
        "removals": [
            {
                "clusters": 2,
                "results": results,
                "beyond_random": [effect(r["condition"], r["control"], harmful, p) for r in results],
                "between": [
                    # Each cluster's removal is worse than the other's: possible only on different items, but numbers are numbers.
                    effect(a["condition"], b["condition"], harmful, p)
                    for a in results
                    for b in results
                    if a is not b and a["rule"] == b["rule"]
                ],
                "agreement": {"boundary": 0.99 if faculties else 0.1},
            }
        ],
        "verdict": {
            "headline": "", "sentences": [], "clusters_found": True, "clusters": 2 if faculties else None,
            "faculties": {"1": [REWARD], "2": [REWARD]} if faculties else {},
        },
    }  # fmt: skip


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run. Weaver seed 1 has faculties, others have none."""
    asked: list[list[str]] = []

    def run_memgen(*arguments, stdout):
        asked.append(list(arguments))
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        found = analysis(faculties="seed1" in out.parent.name)
        (out / "analysis.json").write_text(json.dumps(found))

    monkeypatch.setattr(memory, "run_memgen", run_memgen)
    monkeypatch.setattr(memory.Bench, "checkpoint", lambda bench, cell, training: Path("trained") / training)
    return asked


def run(tmp_path, *more):
    assert memory.main(["--root", str(tmp_path / "cells"), "--out", str(tmp_path / "out"), *more]) == 0
    return (tmp_path / "out" / "memory.md").read_text()


def test_a_part_is_measured_once_and_the_rest_is_named_as_missing(commands, tmp_path):
    some = ("--only", "analyze", "--tasks", "bill", "--weaver-seeds", "0", "1", "--base-seeds", "1")
    text = run(tmp_path, *some)
    assert [command[0] for command in commands] == ["analyze"] * 2
    (first, _) = commands
    assert first[first.index("--checkpoint") + 1] == "trained/bill"
    assert first[first.index("--model.memgen.backbone.name") + 1] == "lab:reasoner?seed=1"
    assert sum(argument.endswith("lab_bill.yaml") for argument in first) == 1
    assert "- bill/base1_seed2/analyze\n" in text
    assert "- bill/base1_seed0/analyze\n" not in text
    assert run(tmp_path, *some) == text
    assert len(commands) == 2
    assert run(tmp_path, "--report") == text
    assert len(commands) == 2


def test_the_conclusion_counts_what_the_runs_found(commands, tmp_path):
    text = run(tmp_path, "--only", "analyze", "--tasks", "shop")
    assert "Yes in 2 of 6 runs" in text
    (line,) = [line for line in text.splitlines() if line.startswith("- **Closed-book shop** (6 runs)")]
    assert (
        "form clusters in 6; removing some cluster does more harm than a random removal at the same rate in 2;"
        in line
    )
    assert "functions of their own in 2." in line
    assert "the kind of insertion in 2." in line
    assert line.endswith("whatever the cluster, in 0.")
    rows = [line for line in text.splitlines() if "| nearest centroid |" in line]
    assert rows[0] == "| 0 | 0 | 2 | nearest centroid | 50 / 50 | 40 / 40 | 80 / 80 | none | none |"
    assert (
        rows[1]
        == "| 0 | 1 | 2 | nearest centroid | 50 / 50 | 40 / 40 | 80 / 80 | 1, 2 | 1: reward; 2: reward |"
    )
    assert "| remove all | 5.0 (5.0 to 5.0) | -85.0 (-85.0 to -85.0) | 6 of 6 | wrong answer 95 % |" in text


def test_without_a_cell_the_report_says_so(tmp_path):
    text = run(tmp_path, "--report")
    assert "no day yet" in text
    assert "## Clusters and interventions" not in text
    assert f"{len(memory.PARTS) * 18}:" in text
