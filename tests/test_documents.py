"""What README and documents tell to type: every command is read by the command itself, every file and key is there.

A command is a line of a fenced block that begins with `memgen`, `make`, `python -m` or `pip install`; a block of `text` is a
record. Commands of memgen run up to the point where work would begin: options are parsed, files found and merged, keys
accepted. What a block leaves out (`...`) or leaves to the reader (`DIR`) is filled in. tests/lab/test_pipeline.py runs
README's first block to its end.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from memgen.cli import reference
from memgen.cli import run as trainer_commands
from memgen.cli.config import OPTIONS
from memgen.cli.main import COMMANDS, main
from memgen.conf_files import CONF
from memgen.continual.settings import ContinualSettings
from memgen.study.settings import read_settings as read_study
from saved_agent import save_agent, save_base

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
COMMAND = re.compile(r"(?:\w+=\S* )*(memgen|make|python -m|pip install)\s+(\S.*)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
ELIDED = {"submit": "--config conf/weaver_grpo.yaml --time 01:00:00", "": "--config conf/weaver_sft.yaml"}
"""What `...` stands for, by command."""
FILLED = {
    "OVERLAY": "conf/data/lab_mix.yaml",
    "conf/STAGE.yaml": "conf/trigger_rl.yaml",
    "LIMIT": "01:00:00",
    "N": "8",
}
"""What some words in capitals stand for; others are taken as they are."""
CHECKPOINTS = (
    "DIR",
    "runs/weaver_sft/latest/best",
    "runs/weaver_grpo/latest/best",
    "runs/trigger_rl/latest/best",
    "runs/lora_sft/best",
)


class Typed(NamedTuple):
    place: str
    program: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.place} {self.program} {shlex.join(self.words)}"


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    for found in FENCE.finditer(path.read_text(encoding="utf-8")):
        yield found[2], found[3]


def typed() -> Iterator[Typed]:
    for path in DOCUMENTS:
        for language, text in blocks(path):
            if language not in ("", "bash"):
                continue
            for line in text.replace("\\\n", " ").splitlines():
                if found := COMMAND.match(line.strip()):
                    words = shlex.split(found[2], comments=True)
                    yield Typed(str(path.relative_to(ROOT)), found[1], words)


TYPED = list(typed())
OURS = list({str(t.words): t for t in TYPED if t.program == "memgen"}.values())


class Read(Exception):
    """A command was read; its work would begin now."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_agent(tmp_path_factory.mktemp("agent"), save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def folder(tmp_path, checkpoint, monkeypatch):
    """A user's folder, with what the documents say is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in CHECKPOINTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(checkpoint)
    for language, text in blocks(ROOT / "docs" / "environments.md"):
        if language == "python" and "class Capitals" in text:
            (tmp_path / "capitals.py").write_text(text)
    (tmp_path / "sweep.txt").write_text("--model.optimizer.lr 1e-3\n")
    return tmp_path


def filled(words: list[str]) -> list[str]:
    """A command line without the signs of a document."""
    words = [word.strip("[]") if word.startswith("[--") else word for word in words]
    words = [word.removesuffix("]") if "[" not in word else word for word in words]
    given: list[str] = []
    for word in words:
        given += shlex.split(ELIDED.get(words[0], ELIDED[""])) if word == "..." else [FILLED.get(word, word)]
    return given


def read(words: list[str], monkeypatch) -> None:
    """Runs a command until its work would begin."""
    configured = COMMANDS[words[0]].trainer or hasattr(
        importlib.import_module(COMMANDS[words[0]].module), "take_options"
    )
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *arguments, **named):
        found = parse(self, *arguments, **named)
        if configured:
            return found
        raise Read

    def stop(self):
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(trainer_commands.TrainerCommand, "before_instantiate_classes", stop)
    with pytest.raises(Read):
        assert main(words) == 0


def test_there_are_commands():
    assert len(OURS) > 60
    assert {t.words[0] for t in OURS} >= set(COMMANDS) - {"validate", "predict", "init", "demo"}


@pytest.mark.parametrize("command", OURS, ids=map(str, OURS))
def test_a_command_is_accepted_by_the_command_line(command, folder, monkeypatch, capsys):
    words = filled(command.words)
    if words[0] in ("--help", "--version"):
        assert main(words) == 0
    else:
        read(words, monkeypatch)


@cache
def options_of(command: str) -> set[str]:
    """The options of a command's help, and keys at the top of a configuration."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([command, "--help"])
    keys = [field.name for field in fields(ContinualSettings)] if command == "continual" else ["ckpt_path"]
    return {*re.findall(r"--[a-z_-]+", printed.getvalue()), *(f"--{name}" for name in (*keys, *OPTIONS))}


def test_targets_modules_and_extras_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    checked = 0
    for command in TYPED:
        named = next((word for word in command.words if not word.startswith("-")), "")
        if command.program == "make":
            assert named in targets, command
        elif command.program == "python -m":
            assert importlib.util.find_spec(command.words[0]) is not None, command
        elif command.program == "pip install":
            for word in command.words:
                for extra in re.findall(r"\[([\w,-]+)\]", word):
                    assert set(extra.split(",")) <= set(extras), command
        checked += command.program != "memgen"
    assert checked > 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_in_a_sentence_exists(path):
    """Commands, their options, configuration files and make's targets."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for code in INLINE.findall(text):
        words = code.split()
        if words[0] == "make":
            assert words[1] in targets, code
        if words[0] == "memgen" and len(words) > 1 and words[1][0].isalpha() and "|" not in code:
            assert words[1] in COMMANDS, code
            options = re.findall(r"--[a-z_-]+(?![\w.-])", code)
            assert not options or set(options) <= options_of(words[1]), code
    shown = FENCE.sub(lambda block: "" if block[2] == "text" else block[0], path.read_text(encoding="utf-8"))
    for named in re.findall(r"\bconf/[\w./-]+\.yaml", shown):
        assert (CONF / named.removeprefix("conf/")).is_file() or named in FILLED, named


def settings_in_documents() -> Iterator[tuple[str, str]]:
    for path in DOCUMENTS:
        for language, text in blocks(path):
            if language == "yaml":
                yield str(path.relative_to(ROOT)), text


@pytest.mark.parametrize(
    ("place", "text"), list(settings_in_documents()), ids=lambda value: value[:20].replace("\n", " ")
)
def test_settings_in_a_block_are_accepted(place, text, folder, monkeypatch):
    document = yaml.safe_load(text)
    if "methods" in document:  # its checkpoints and classes are the reader's
        assert read_study({"tasks": {"shop": {}}, **document}).methods.keys() == document["methods"].keys()
        return
    (folder / "block.yaml").write_text(text)
    chain = "chain" in document
    stage = (
        ["continual", "--config", "conf/continual.yaml"]
        if chain
        else ["fit", "--config", "conf/weaver_sft.yaml"]
    )
    read([*stage, "--config", "block.yaml"], monkeypatch)


KEYS = {key.name for found in reference.sections().values() for key in found}


def free(key: str) -> bool:
    """Whether a key is of a class or of a record that the list of keys names as a whole."""
    parts = key.split(".")
    above = {".".join(parts[:count]) for count in range(2, len(parts))}
    return parts[-1] == "class_path" or bool(above & KEYS)


def test_a_key_that_is_named_in_a_sentence_exists():
    sections = {".".join(key.split(".")[:count]) for key in KEYS for count in range(1, key.count(".") + 1)}
    wrong = []
    for path in DOCUMENTS:
        for code in INLINE.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
            found = re.fullmatch(r"((?:model|data)(?:\.[a-z_]+)+)(?:[:=].*)?", code)
            if found and found[1] not in KEYS | sections and not free(found[1]):
                wrong.append((path.name, code))
    assert not wrong
