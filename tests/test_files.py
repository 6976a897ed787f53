"""Files and folders are written whole or not at all, and what killed writers left is removed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memgen import files
from memgen.files import (
    current,
    lock,
    new_file,
    new_folder,
    point_to,
    remove,
    remove_leftovers,
    write_whole,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("data", "raw"), [("ä", "ä".encode()), (b"\0\1", b"\0\1")], ids=["text", "bytes"])
def test_a_file_is_written_and_replaced(tmp_path, data, raw):
    path = tmp_path / "deep" / "file"
    write_whole(path, "old")
    write_whole(path, data)
    assert path.read_bytes() == raw
    assert names(path.parent) == {"file"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "file", "old")
    with pytest.raises(TypeError), new_file(tmp_path / "file") as temporary:
        temporary.write_text(42)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(TypeError), new_folder(tmp_path / "folder") as temporary:
        (temporary / "two").write_text(42)
    assert names(tmp_path / "folder") == {"one"}
    assert names(tmp_path) == {"folder"}


def test_a_folder_replaces_a_folder(tmp_path):
    for name in ("one", "two"):
        with new_folder(tmp_path / "folder") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / name).write_text(name)
    assert names(tmp_path / "folder" / "deep") == {"two"}
    assert names(tmp_path) == {"folder"}


def test_a_folder_replaces_a_link_to_a_folder_and_not_its_target(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "folder").symlink_to("target")
    with new_folder(tmp_path / "folder") as temporary:
        (temporary / "one").write_text("1")
    assert names(tmp_path / "folder") == {"one"}
    assert names(tmp_path / "target") == set()
    assert names(tmp_path) == {"folder", "target"}


def test_the_backup_of_a_killed_writer_is_current_until_the_next_write(tmp_path):
    folder, backup = tmp_path / "folder", tmp_path / ".folder.old"
    assert current(folder) == folder
    backup.mkdir()
    assert current(folder) == backup
    with new_folder(folder):
        assert current(folder) == backup
    assert current(folder) == folder
    assert names(tmp_path) == {"folder"}


def test_a_link_is_moved_in_one_step(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        point_to(tmp_path / "latest", tmp_path / name)
        assert os.readlink(tmp_path / "latest") == name
    assert names(tmp_path) == {"one", "two", "latest"}


def test_what_is_removed_is_gone(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    remove(tmp_path / "folder")
    remove(tmp_path / "file")
    assert names(tmp_path) == set()


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_are_not(tmp_path):
    host = socket.gethostname()
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other,
        new_folder(tmp_path / "last") as mine,
    ):
        living = tmp_path / f".last.new-{host}-{other.pid}-00000000"
        elsewhere = tmp_path / ".last.new-another-host-1-00000000"
        abandoned = tmp_path / ".last.new-another-host-2-00000000"
        reborn = tmp_path / f".last.new-{host}-{os.getpid()}-00000000"
        for path in (living, elsewhere, abandoned, reborn, tmp_path / ".last.new-of-a-person"):
            path.mkdir()
        os.utime(abandoned, (0, 0))
        assert remove_leftovers(tmp_path, "best") == []
        assert set(remove_leftovers(tmp_path, "last")) == {abandoned, reborn}
        other.communicate(b"\n")
        other.wait()
        assert mine.exists()
        assert remove_leftovers(tmp_path) == [living]
    assert names(tmp_path) == {"last", elsewhere.name, ".last.new-of-a-person"}


def test_a_lock_is_waited_for(tmp_path, caplog):
    order = []

    def second() -> None:
        with lock(tmp_path / "index"):
            order.append("second")

    with lock(tmp_path / "index"):
        thread = threading.Thread(target=second)
        thread.start()
        while "another process is building" not in caplog.text:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# Folders that one process writes to


HOLDER = """
import os, sys, time
from pathlib import Path
from memgen import files
files.hold(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_it_ends_however_it_ends(tmp_path, monkeypatch):
    """Also by kill -9, and while a worker that it forked lives on."""
    monkeypatch.setattr(files, "HOLD_SECONDS", 0.1)
    held = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(held)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(
            OSError, match=r"another process is running in .*run, and two would mix their files"
        ):
            files.hold(held)
        process.kill()
        process.wait()
        files.hold(held)
        files.hold(held)
        files.release(held)
        files.release(held)
        os.killpg(process.pid, signal.SIGKILL)
    assert list(held.iterdir()) == []


def test_names_after_the_time_are_given_once(tmp_path):
    folders = {files.timed_path(tmp_path, "-a", folder=True) for _ in range(5)}
    assert len(folders) == 5
    assert all(path.is_dir() for path in folders)
    paths = {files.timed_path(tmp_path / "new", ".jsonl") for _ in range(3)}
    assert len(paths) == 3
    assert all(path.suffix == ".jsonl" for path in paths)
