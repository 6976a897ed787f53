"""Dockerfile and environment.yml install what `make setup` installs: the pins of constraints.txt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import memgen

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def pins() -> dict[str, Version]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    found = {}
    for line in filter(None, lines):
        name, _, number = line.partition("==")
        assert number, f"{line} is no pin"
        found[canonicalize_name(name)] = Version(number)
    return found


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    split = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in split]


def arguments(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in (*PROJECT["dependencies"], *extras["dev"])]


def test_hadolint_has_nothing_to_say_about_the_dockerfile():
    found = Path(sys.executable).with_name("hadolint")
    program = str(found) if found.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint: pip install -c constraints.txt -e .[dev]")
    done = subprocess.run(
        [program, "--no-color", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_image_has_cuda_s_run_time_at_a_fixed_version():
    (base,) = arguments("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", base)


def test_the_container_s_user_is_not_root_and_its_entry_point_is_the_command():
    assert arguments("USER") == ["memgen"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("COPY")
    assert arguments("ENTRYPOINT") == ['["memgen"]']
    assert PROJECT["scripts"]["memgen"] == "memgen.cli.main:main"


def test_the_image_installs_the_pins_before_the_source():
    installs = [rest for rest in arguments("RUN") if "pip install" in rest]
    assert [re.findall(r"pip install [^&]*", rest) for rest in installs] == [
        ["pip install -c constraints.txt -e ."]
    ]
    order = [rest for name, rest in instructions() if name in ("RUN", "COPY")]
    assert order.index(installs[0]) < next(i for i, rest in enumerate(order) if " src " in rest)


def test_what_the_image_copies_is_there_and_reaches_the_builder():
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for rest in arguments("COPY"):
        *sources, _ = [part for part in rest.split() if not part.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in allowed, f"{source} is kept from the builder by .dockerignore"


def test_conda_installs_the_pins_through_pip_and_nothing_beside_them():
    conda = [item for item in ENVIRONMENT["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in ENVIRONMENT["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    versions = dict(re.fullmatch(r"([\w-]+)(?:[=<>]+(.+))?", item).groups() for item in conda)
    python = versions.pop("python")
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])
    pinned = pins()
    for name, number in versions.items():
        assert number is None or Version(number) == pinned.get(canonicalize_name(name)), name
    # A package from both would be two packages.
    assert not {canonicalize_name(name) for name in versions} - {"pip"} & set(pinned)


def test_every_direct_requirement_has_a_pin_within_its_range():
    pinned = pins()
    for requirement in direct_requirements():
        # torch's CUDA wheel brings the triton that fits it.
        if requirement.name == "triton":
            assert "triton" not in pinned
            continue
        assert canonicalize_name(requirement.name) in pinned, (
            f"{requirement.name} has no pin in constraints.txt"
        )
        number = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(number), f"{requirement} against the pin {number}"


def test_a_fresh_environment_has_the_pins_and_its_command_runs():
    """Continuous integration makes its environment from the lock, so it is the clean environment to look at."""
    if os.environ.get("CI") != "true":
        pytest.skip("not in continuous integration: this environment may have been made in another way")
    other = {}
    for name, number in pins().items():
        try:
            installed = Version(version(name))
        except PackageNotFoundError:
            continue
        if installed.public != number.public:
            other[name] = f"{installed} instead of {number}"
    assert other == {}
    command = Path(sys.executable).with_name("memgen")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"memgen {memgen.__version__}\n"
