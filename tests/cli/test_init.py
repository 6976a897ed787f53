"""The configuration files in a folder that has none of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from memgen.cli.main import main
from memgen.conf_files import CONF, conf_file

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def empty(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def test_init_copies_every_configuration_file_and_replaces_none(empty, capsys):
    assert main(["init"]) == 0
    assert files(empty / "conf") == files(ROOT / "conf")
    assert f"{len(files(CONF))} configuration files" in capsys.readouterr().out
    (empty / "conf" / "weaver_sft.yaml").write_text("changed: true\n")
    assert main(["init"]) == 2
    assert "conf exists already" in capsys.readouterr().err
    assert files(empty / "conf")["weaver_sft.yaml"] == "changed: true\n"
    assert main(["init", "other"]) == 0
    assert files(empty / "other" / "conf") == files(CONF)


def test_a_file_that_is_not_here_is_the_packages_own_and_that_is_said(empty, capsys):
    assert main(["fit", "--config", "conf/weaver_sft.yaml", "--print_config"]) == 0
    found = capsys.readouterr()
    assert "WeaverSFT" in found.out
    assert (
        f"conf/weaver_sft.yaml is not here; taken from the package: {CONF / 'weaver_sft.yaml'}" in found.err
    )
    # One's own goes first, without a word.
    assert main(["init"]) == 0
    own = empty / "conf" / "weaver_sft.yaml"
    own.write_text(own.read_text().replace("seed_everything: 0", "seed_everything: 41"))
    capsys.readouterr()
    assert main(["fit", "--config", "conf/weaver_sft.yaml", "--print_config"]) == 0
    found = capsys.readouterr()
    assert "seed_everything: 41" in found.out
    assert "package" not in found.err


def test_a_missing_file_is_named_before_anything_heavy_is_imported(empty):
    code = (
        "import sys; from memgen.cli.main import main\n"
        "print(main(['fit', '--config', 'conf/weaver_stf.yaml']), *{'torch', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "2\n"
    assert "did you mean conf/weaver_sft.yaml?" in done.stderr


@pytest.mark.parametrize(
    "given", ["conf/weaver_sfd.yaml", "conf/data/gsm8.yaml", "conf/../conf/weaver_sft.yaml"]
)
def test_a_name_that_the_package_lacks_too_is_refused(empty, capsys, given):
    assert main(["fit", "--config", given]) == 2
    error = capsys.readouterr().err
    assert f"{given} does not exist" in error
    if ".." not in given:
        assert f"did you mean {given[:-6]}" in error or "did you mean" in error


def test_a_file_of_the_package_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no conf/weaver_none\.yaml in the package"):
        conf_file("weaver_none.yaml")


def test_a_wheel_holds_every_configuration_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("src", "conf"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    script = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"  # What pip calls.
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=source,
        check=True,
        capture_output=True,
        env=os.environ,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {
            name.removeprefix("memgen/conf/"): archive.read(name).decode()
            for name in archive.namelist()
            if name.startswith("memgen/conf/")
        }
    assert held == files(ROOT / "conf")
