"""CONTRIBUTING.md gives the order of imports that import-linter checks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_contributing_and_the_import_contracts_give_one_order():
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    written = re.search(r"`(cli > [^`]+)`", text)
    assert written is not None, "CONTRIBUTING.md has a line `cli > ... > types | files`"
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    order = [{room.strip() for room in layer.split("|")} for layer in written[1].split(">")]
    assert order == [{room.strip() for room in layer.split("|")} for layer in layers]


def test_every_room_has_a_place_in_the_order():
    package = ROOT / "src" / "memgen"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.stem for path in package.glob("*.py")} - {"__init__"}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert rooms == {room.strip() for layer in layers for room in layer.split("|")}
