"""The benchmark of what makes a weaver learn: its settings exist, and its table says what was measured and what was not."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.learning import FILES, VARIANTS, batch_size, main, overlay, report, validations
from memgen.cli import main as front_end
from memgen.conf_files import conf_file
from memgen.lab.trained import stage_file

CSV = "step,train/loss,val/loss,val/reward_prices,val/exact_match\n9,0.5,,,\n9,,0.4,0.25,0.125\n19,,0.1,1.0,0.5\n"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_configuration_with_the_values_that_it_names(variant, tmp_path, capsys, monkeypatch):
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay(variant, 3, 640, tmp_path)))
    files = [stage_file("weaver_sft"), *map(conf_file, FILES), path]
    monkeypatch.chdir(tmp_path)
    arguments = [token for file in files for token in ("--config", str(file))]
    assert front_end.main(["fit", *arguments, "--print_config"]) == 0, capsys.readouterr().err
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["data"]["batch_size"] == batch_size(variant)
    assert found["trainer"]["max_steps"] * batch_size(variant) == 640
    assert found["seed_everything"] == found["data"]["seed"] == 3
    for key, value in VARIANTS[variant].items():
        section = found
        for part in key.split("."):
            section = section[part]
        chosen = {name: section[name] for name in value} if isinstance(value, dict) else section
        assert chosen == value, key


def test_validations_are_read_from_all_parts_of_a_run(tmp_path):
    for version, text in (("version_0", CSV), ("version_1", CSV.replace("19,", "29,"))):
        (tmp_path / version).mkdir()
        (tmp_path / version / "metrics.csv").write_text(text)
    found = validations(tmp_path, 4)
    assert [one["problems"] for one in found] == [40, 80, 120]
    assert found[0] == {"problems": 40, "loss": 0.4, "prices": 0.25, "exact": 0.125}


def test_the_table_has_a_row_for_each_cell_and_names_those_that_are_missing():
    cell = {
        "validations": [{"problems": 40, "loss": 0.4, "prices": 0.25, "exact": 0.125}],
        "cpu_seconds": 90.0,
        "machine": "two cores",
        "date": "2026-11-30",
    }
    text = report({"random maps/0": cell}, [0])
    assert "| random maps | 0 | 25 | 12 | 1.5 |" in text
    assert "Measured on two cores, 2026-11-30." in text
    assert "Not measured yet: as configured, seed 0; batch 16, seed 0" in text


def test_too_few_problems_and_unknown_variants_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--problems", "10"])
    assert "--problems must be at least 64, got 10" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--variants", "none"])
    assert "invalid choice: 'none'" in capsys.readouterr().err
