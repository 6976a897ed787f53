"""Every file below conf/ is a configuration that parses, and prints as one that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from memgen.cli import main as front_end

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
STAGES = sorted(CONF.glob("*.yaml"))
COMPLETE = sorted((CONF / "published").glob("**/*.yaml"))
OVERLAYS = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name not in ("published", "slurm"))
NEEDS = {CONF / "backbone" / "tiny.yaml": [CONF / "data" / "gsm8k.yaml"]}
"""Overlays that refer to what another overlay sets."""
CHAINS = [[path] for path in [*STAGES, *COMPLETE]]
CHAINS += [
    [stage, path, *NEEDS.get(path, [])]
    for stage in STAGES
    for path in OVERLAYS
    # Only supervised training chooses where latents go.
    if stage.stem == "weaver_sft" or path.parent.name != "curriculum"
]


def printed(capsys, paths: list[Path]) -> str:
    argv = [token for path in paths for token in ("--config", str(path))]
    capsys.readouterr()
    assert front_end.main(["fit", *argv, "--print_config"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "chain", CHAINS, ids=["+".join(str(p.relative_to(CONF)) for p in chain) for chain in CHAINS]
)
def test_a_chain_of_files_parses_and_round_trips(chain, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, chain)
    (tmp_path / "printed.yaml").write_text(text)
    assert printed(capsys, [tmp_path / "printed.yaml"]) == text
    assert "memgen" in yaml.safe_load(text)["model"]


def test_an_overlay_changes_what_it_says_it_does(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(printed(capsys, [CONF / "weaver_sft.yaml", CONF / "trainer" / "cpu.yaml"]))
    assert values["trainer"]["accelerator"] == "cpu"
