"""The list of all keys: help and docs/configuration.md."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from memgen.cli import reference
from memgen.cli.main import main
from memgen.conf_files import CONF

ROOT = Path(__file__).resolve().parents[2]
KEYS = {key.name: key for found in reference.sections().values() for key in found}


def leaves(values, prefix=""):
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in KEYS:
            yield from leaves(value, f"{key}.")
        else:
            yield key


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_that_a_file_of_ours_sets_is_in_the_list(path):
    values = yaml.safe_load(path.read_text())
    given = {section: values[section] for section in ("model", "data") if section in values}
    set_ = {
        key
        for key in leaves(given)
        if not key.startswith("data.environment.") and not key.endswith(".class_path")
    }
    assert set_ <= set(KEYS)


def test_every_key_says_what_it_means_in_one_line():
    assert len(KEYS) > 100
    for key in KEYS.values():
        assert key.meaning, key
        assert "\n" not in key.meaning + key.default


def test_defaults_are_those_of_the_class_that_takes_the_key():
    assert KEYS["model.optimizer.lr"].default == "1e-05"
    assert KEYS["model.init_from"].default == "null"
    assert KEYS["data.environment"].default == "required"
    assert KEYS["model.memgen.boundaries.delimiters"].default == r"[',', '.', '\n']"
    assert KEYS["model.memgen.backbone.dtype"].kind == "one of 'float32', 'bfloat16', 'float16'"
    # A record whose default is not its class's own: what the stage has counts.
    (rollout,) = [
        key
        for key in reference.keys(reference.WeaverGRPO, "model")
        if key.name == "model.rollout.temperature"
    ]
    assert rollout.default == "1"


def test_the_document_has_the_list_as_it_is(tmp_path):
    path = shutil.copy(ROOT / "docs" / "configuration.md", tmp_path)
    reference.update(Path(path))
    assert Path(path).read_text() == (ROOT / "docs" / "configuration.md").read_text(), (
        "run python -m memgen.cli.reference docs/configuration.md"
    )


def test_help_shows_our_options_first_and_the_trainers_apart(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: memgen fit --config FILE")
    assert "--run DIR" in text
    assert "--model.optimizer.lr  float, 1e-05\n        Peak learning rate." in text
    assert "--trainer.max_steps" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("  --")) <= 110
    assert main(["test", "-h"]) == 0
    text = capsys.readouterr().out
    assert "--records DIR" in text
    assert "--run DIR" not in text
    assert main(["fit", "--help-trainer"]) == 0
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_help_of_a_class_lists_its_own_keys(capsys):
    assert main(["fit", "--data.environment.help", "memgen.environments.qa.gsm8k.GSM8K"]) == 0
    text = capsys.readouterr().out
    assert "  --data.environment.target_style  one of 'boxed', 'released', 'hashes', boxed\n" in text
    for wrong, said in (("", "takes the import path"), ("memgen.data.EnvironmentDate", "did you mean")):
        assert main(["fit", "--data.help", *([wrong] if wrong else [])]) == 2
        assert said in capsys.readouterr().err
