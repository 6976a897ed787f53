"""Every file below conf/ is a configuration that parses, and prints as one that says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from memgen.cli import main as front_end
from memgen.conf_files import conf_file
from memgen.lab.trained import TRAINED, stage_file

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
# Every other file at the top is of a command of its own.
STAGES = sorted(
    path for path in CONF.glob("*.yaml") if "class_path" in yaml.safe_load(path.read_text()).get("model", {})
)
COMPLETE = sorted((CONF / "published").glob("**/*.yaml"))
OVERLAYS = sorted(
    path for path in CONF.glob("*/*.yaml") if path.parent.name not in ("published", "slurm", "study")
)
NEEDS = {CONF / "backbone" / "tiny.yaml": [CONF / "data" / "gsm8k.yaml"]}
"""Overlays that refer to what another overlay sets."""
ONLY = {"cache_augmentation": "weaver_sft", "lora_sft": "weaver_sft", "lora_grpo": "weaver_grpo"}
ONLY |= {"lora_reinforce": "weaver_grpo", "lora_reinforce_pp": "weaver_grpo"}
"""Baselines of one stage."""
CHAINS = [[path] for path in [*STAGES, *COMPLETE]]
CHAINS += [
    [stage, path, *NEEDS.get(path, [])]
    for stage in STAGES
    for path in OVERLAYS
    # Only supervised training chooses where latents go; SmolLM2's are each for the stage that they are named after.
    if (stage.stem == "weaver_sft" or path.parent.name != "curriculum")
    and ONLY.get(path.stem, stage.stem) == stage.stem
    and (path.parent.name != "smollm2" or path.stem == stage.stem)
]
CHAINS += [
    [stage_file(asset.stage), *map(conf_file, asset.overlays)] for asset in TRAINED.values() if asset.overlays
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


MAY_STAY = {
    "what is trained, and the task": (
        "model.class_path", "model.memgen.trigger.kind", "data.class_path", "data.learn_from", "data.environment.",
        "data.tokenizer", "data.keep_turn_latents", "model.memgen.boundaries.keep_turn_latents",
    ),
    "the algorithm": (
        "model.policy.", "model.update.", "model.rollout.", "model.objective.scope", "model.curriculum.probability",
    ),
    "the machine and the record": (
        "seed_everything", "trainer.accelerator", "trainer.devices", "trainer.accumulate_grad_batches",
        "trainer.num_sanity_val_steps", "trainer.log_every_n_steps", "trainer.use_distributed_sampler",
        "trainer.enable_model_summary", "trainer.callbacks",
    ),
}  # fmt: skip
"""Keys of a stage file that a backbone's file need not set (and all keys below those that end in a full stop)."""


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
        )
    return found


@pytest.mark.parametrize("backbone", sorted((CONF / "backbone").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("stage", STAGES, ids=lambda path: path.stem)
def test_a_backbone_sets_everything_of_a_stage_that_belongs_to_a_backbone(stage, backbone):
    ours = leaves(yaml.safe_load(stage.read_text()))
    theirs = leaves(yaml.safe_load(backbone.read_text()))
    allowed = [key for keys in MAY_STAY.values() for key in keys]
    # A reference stands for the key that it names.
    named = {key: re.fullmatch(r"\$\{(.+)\}", str(value)) for key, value in ours.items()}
    stays = [
        key
        for key in ours
        if (key if named[key] is None else named[key][1]) not in theirs
        and not any(key == may or (may.endswith(".") and key.startswith(may)) for may in allowed)
    ]
    assert stays == []


def test_the_labs_trigger_and_curriculum_do_not_reach_a_real_model(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    backbone = CONF / "backbone" / "qwen2.5-1.5b.yaml"
    model = yaml.safe_load(printed(capsys, [CONF / "trigger_rl.yaml", backbone]))["model"]
    trigger = model["memgen"]["trigger"]
    assert (trigger["kind"], trigger["initial_invoke_bias"], trigger["lora"]["r"]) == ("tokens", 0.0, 16)
    assert trigger["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert (model["objective"]["penalty"], model["init_from"]) == (0.1, None)
    model = yaml.safe_load(printed(capsys, [CONF / "weaver_sft.yaml", backbone]))["model"]
    assert (model["curriculum"]["first"], model["curriculum"]["none"]) == (1.0, 0.0)


def test_an_overlay_changes_what_it_says_it_does(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(printed(capsys, [CONF / "weaver_sft.yaml", CONF / "trainer" / "cpu.yaml"]))
    assert values["trainer"]["accelerator"] == "cpu"
