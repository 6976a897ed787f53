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


def oracle():
    """As `oracle.json`, of a checkpoint without a trained trigger."""

    def score(name, mean, insertions):
        return {"name": name, "accuracy": {"mean": mean}, "insertions": insertions}

    share = {"count": 3, "total": 4, "low": 0.3, "high": 0.95}
    return {
        "settings": {}, "environment": "lab", "items": 8, "never": score("never", 0.0, 0.0), "always": score("always", 0.5, 4.0),
        "rescued": {"never": share, "always": share}, "broken": {"never": share, "always": share}, "policies": [{}],
        "shared": score("boundary 1 alone", 0.75, 1.0), "optimum": score("upper bound", 1.0, 1.2), "trigger": None,
        "details": [{}], "headline": "", "sentences": [],
    }  # fmt: skip


def ablation(conditions):
    """As `ablation.json`: memory is worth 0.9, everything else 0.2."""
    costs = {
        "latents": 4.0,
        "insertions": 1.0,
        "positions": 30.0,
        "tokens": 11.0,
        "seconds": 0.01,
        "cpu_seconds": 0.002,
    }
    rewards = {name: 0.9 if name in ("trained", "always") else 0.2 for name in conditions}
    memory = "trained" if "trained" in rewards else "always"
    return {
        "title": "Ablation", "environment": "lab", "of": "", "items": 50, "temperature": 0.0, "seed": 0, "first": conditions[0],
        "memory": memory, "by_task": [], "notes": [],
        "lines": [
            {"name": name, "items": 50, "faulted": 0, "reward": {"mean": reward}, "finished": 1.0, "samples": 1.0, "costs": costs}
            for name, reward in rewards.items()
        ],
        "against_first": [effect(name, conditions[0], rewards[name] - 0.2, 0.001) for name in conditions[1:]],
        "of_memory": [effect(memory, name, 0.9 - rewards[name], 0.001) for name in conditions if name != memory],
    }  # fmt: skip


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run. Weaver seed 1 has faculties, others have none."""
    asked: list[list[str]] = []

    def run_memgen(*arguments, stdout):
        asked.append(list(arguments))
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True)
        analysed = analysis(faculties="seed1" in out.parent.name)
        conditions = (
            arguments[arguments.index("--conditions") + 1].split(",") if arguments[0] == "ablate" else [""]
        )
        made = {
            "analyze": ("analysis", analysed),
            "ablate": ("ablation", ablation(conditions)),
            "oracle": ("oracle", oracle()),
        }
        name, found = made[arguments[0]]
        (out / f"{name}.json").write_text(json.dumps(found))

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
    assert "- bill/base1_seed2: analyze, ablate, oracle\n" in text
    assert "- bill/base1_seed0: ablate, oracle\n" in text
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


def test_each_condition_is_compared_with_the_first_and_with_memory(commands, tmp_path):
    text = run(tmp_path, "--only", "ablate", "--tasks", "bill", "text_world", "--weaver-seeds", "0")
    bills = [command for command in commands if "trained/bill_trigger" in command]
    assert len(bills) == 2
    assert all(any(word.endswith("lab_bill_mix.yaml") for word in command) for command in bills)
    # The text world has no trained trigger.
    assert (
        sum("trained" in command[command.index("--conditions") + 1].split(",") for command in commands) == 2
    )
    bill, world = text.split("### Bill of six items among tasks that need no memory (2 runs, 50 items each)")[
        1
    ].split("### ")
    assert (
        "| swapped | 20.0 (20.0 to 20.0) | 0.0 (0.0 to 0.0) | 2 of 2 | 4.0 (4.0 to 4.0) | 30 (30 to 30) |"
        in bill
    )
    assert "| always | 90.0 (90.0 to 90.0) | 70.0 (70.0 to 70.0) | 0 of 2 |" in bill
    assert "| always | 90.0 (90.0 to 90.0) | 70.0 (70.0 to 70.0) |  |" in world


def test_the_oracle_stands_beside_what_a_policy_of_all_items_reaches(commands, tmp_path):
    text = run(
        tmp_path,
        "--only",
        "oracle",
        "--tasks",
        "text_world",
        "shop",
        "--weaver-seeds",
        "2",
        "--base-seeds",
        "0",
    )
    world, shop = commands
    # The shop has a trained trigger, and is asked alone.
    assert shop[shop.index("--checkpoint") + 1] == "trained/trigger"
    assert [Path(shop[place + 1]).name for place, word in enumerate(shop) if word == "--config"] == [
        "trigger_rl.yaml",
        "lab.yaml",
    ]
    assert world[world.index("--checkpoint") + 1] == "trained/text_world"
    (row,) = [line for line in text.splitlines() if line.startswith("| Text world |")]
    assert row.startswith(
        "| Text world | 0 | 2 | 0.0 (0.0) | 50.0 (4.0) | 75.0 (1.0), boundary 1 alone | 100.0 (1.2) |  | 3 of 4 |"
    )


def test_without_a_cell_the_report_says_so(tmp_path):
    text = run(tmp_path, "--report")
    assert "no day yet" in text
    assert "## Clusters and interventions" not in text
    cells = [*memory.cells(list(memory.PARTS), [*memory.SUBJECTS, memory.CHAIN], [0, 1], [0, 1, 2])]
    assert f"{len(cells)}:" in text


def test_on_smollm2_one_weaver_is_looked_at_with_the_files_of_its_demo(commands, tmp_path):
    text = run(tmp_path, "--only", "oracle", "ablate", "--tasks", "english")
    oracle_command, ablate_command = commands
    for command, items in ((oracle_command, "lab_english.yaml"), (ablate_command, "lab_english_mix.yaml")):
        assert [
            Path(command[place + 1]).name for place, word in enumerate(command) if word == "--config"
        ] == [
            "trigger_rl.yaml",
            "smollm2-135m.yaml",
            items,
            "trigger_rl.yaml",
        ]
        assert command[command.index("--checkpoint") + 1] == "trained/smollm2_trigger_rl"
        assert "--model.memgen.backbone.name" not in command
    assert "cot" in ablate_command[ablate_command.index("--conditions") + 1].split(",")
    assert "| English shop on SmolLM2-135M | SmolLM2 | 0 | 0.0 (0.0) |" in text
    assert "- english/base0_seed0: analyze\n" in text
    assert "english/base1" not in text
