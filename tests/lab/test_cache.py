import json
import os
import signal
import subprocess
import sys
import time

import pytest

from memgen.lab.cache import MANIFEST, build_once, memgen_home

RECIPE = {"steps": 3, "rate": 0.5}


def write_greeting(directory):
    (directory / "inner").mkdir()
    (directory / "inner" / "greeting.txt").write_text("hello")


def refuse(directory):
    raise AssertionError("nothing should be built")


def test_a_second_request_builds_nothing(tmp_path):
    built = build_once(tmp_path, "thing", RECIPE, write_greeting)
    assert build_once(tmp_path, "thing", RECIPE, refuse) == built
    assert (built / "inner" / "greeting.txt").read_text() == "hello"
    assert built.is_absolute()


def test_another_recipe_is_another_directory(tmp_path):
    first = build_once(tmp_path, "thing", RECIPE, write_greeting)
    second = build_once(tmp_path, "thing", {**RECIPE, "steps": 4}, write_greeting)
    assert first != second
    assert build_once(tmp_path, "thing", RECIPE, refuse) == first


def test_the_manifest_tells_the_recipe(tmp_path):
    built = build_once(tmp_path, "thing", RECIPE, write_greeting)
    assert json.loads((built / MANIFEST).read_text())["recipe"] == RECIPE


def remove(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def alter(file):
    file.write_text("jello")


@pytest.mark.parametrize("damage", [remove, truncate, alter])
def test_a_damaged_directory_is_built_again(tmp_path, damage):
    built = build_once(tmp_path, "thing", RECIPE, write_greeting)
    damage(built / "inner" / "greeting.txt")
    assert build_once(tmp_path, "thing", RECIPE, write_greeting) == built
    assert (built / "inner" / "greeting.txt").read_text() == "hello"


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"files": {}}'], ids=str)
def test_a_damaged_manifest_means_a_damaged_directory(tmp_path, content):
    built = build_once(tmp_path, "thing", RECIPE, write_greeting)
    (built / MANIFEST).unlink()
    (built / "inner" / "greeting.txt").unlink()
    if content is not None:
        (built / MANIFEST).write_text(content)
    build_once(tmp_path, "thing", RECIPE, write_greeting)
    assert (built / "inner" / "greeting.txt").read_text() == "hello"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(directory):
        write_greeting(directory)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build_once(tmp_path, "thing", RECIPE, fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert build_once(tmp_path, "thing", RECIPE, write_greeting).is_dir()


def test_the_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "here"))
    assert memgen_home() == tmp_path / "here"
    monkeypatch.delenv("MEMGEN_HOME")
    assert memgen_home().name == "memgen"


# Builds slowly, and appends a line to `count` for every build that begins.
SLOW_BUILD = """
import sys, time
from pathlib import Path
from memgen.lab.cache import build_once

root, seconds = Path(sys.argv[1]), float(sys.argv[2])

def build(directory):
    (directory / "half.txt").write_text("half")
    with (root / "count").open("a") as count:
        count.write("build\\n")
    time.sleep(seconds)
    (directory / "whole.txt").write_text("whole")

print(build_once(root, "slow", {"steps": 1}, build))
"""


def start(root, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(root), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_that_ask_at_once_build_once(tmp_path):
    processes = [start(tmp_path, 1.0) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] != ""
    assert (tmp_path / "count").read_text() == "build\n"


def test_a_killed_build_leaves_nothing_that_resolves(tmp_path):
    process = start(tmp_path, 600.0)
    wait_for(tmp_path / "count")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (leftover,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert leftover.name.startswith(".slow-")

    again = start(tmp_path, 0.0)
    built = again.communicate(timeout=120)[0].strip()
    assert again.returncode == 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [tmp_path / built]
    assert (tmp_path / built / "whole.txt").read_text() == "whole"
