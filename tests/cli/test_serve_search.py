"""The command as a real process: what it serves is what the embedded index finds."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memgen.cli import main as front_end
from memgen.environments.search.retrieval import PassageIndex, SearchServer

PASSAGES = [
    {"id": f"p{i}", "title": f'Land "{i}"', "text": f"The capital of land {i}\nis city {i} 🦓."}
    for i in range(50)
]


@pytest.fixture
def passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    file = tmp_path / "passages.jsonl"
    file.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    return file


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    command = [sys.executable, "-m", "memgen.cli.main", "serve-search", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = ""
        while (port := re.search(r"on http://\S+:(\d+)/retrieve", told)) is None:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            told += line
        yield process, int(port[1]), told
    finally:
        process.kill()
        process.communicate()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_the_client_finds_at_the_server_what_the_index_finds(passages):
    queries = ["capital of land 7", "city 49 🦓", "", "nothing known", '"quoted" AND', "land " * 500]
    index = PassageIndex(str(passages), topk=5)
    with serving("--passages", str(passages)) as (_, port, told):
        assert "Search over 50 passages on http://127.0.0.1:" in told
        assert "Ctrl-C" in told
        server = SearchServer(f"http://127.0.0.1:{port}", topk=5)
        assert server.search(queries) == index.search(queries)
        results: list[bool] = []
        threads = [
            threading.Thread(
                target=lambda i=i: results.append(server.search([f"land {i}"]) == index.search([f"land {i}"]))
            )
            for i in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 16
    index.close()


def test_the_protocol_is_search_r1s(passages):
    with serving("--passages", str(passages), "--topk", "2") as (_, port, _told):
        assert ask(port, "GET", "/health") == (200, {"status": "ok", "passages": 50, "topk": 2})
        query = {"queries": ["land 3", "zzz"], "topk": None}
        status, scored = ask(port, "POST", "/retrieve", json.dumps({**query, "return_scores": True}).encode())
        assert status == 200
        assert [len(documents) for documents in scored["result"]] == [2, 0]
        best = scored["result"][0][0]
        assert best["score"] >= scored["result"][0][1]["score"]
        assert best["document"]["id"] == "p3"
        assert best["document"]["contents"] == '"Land "3""\nThe capital of land 3\nis city 3 🦓.'
        status, bare = ask(port, "POST", "/retrieve", json.dumps(query).encode())
        assert bare["result"][0][0] == best["document"]
        assert len(ask(port, "POST", "/retrieve", b'{"queries": ["land"], "topk": 7}')[1]["result"][0]) == 7
        assert ask(port, "POST", "/retrieve", b'{"queries": []}') == (200, {"result": []})


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/retrieve", b"<html>", 422, "no JSON"),
        ("POST", "/retrieve", b"[" * 100_000, 422, "no JSON"),
        ("POST", "/retrieve", b"[]", 422, "expected"),
        ("POST", "/retrieve", b'{"queries": "text"}', 422, "expected"),
        ("POST", "/retrieve", b'{"queries": [1]}', 422, "expected"),
        ("POST", "/retrieve", b'{"queries": [], "topk": 0}', 422, "topk"),
        ("POST", "/retrieve", b'{"queries": [], "topk": true}', 422, "topk"),
        ("POST", "/retrieve", b'{"queries": [], "return_scores": 1}', 422, "return_scores"),
        ("POST", "/elsewhere", b"{}", 404, "POST /retrieve"),
        ("GET", "/retrieve", None, 404, "POST /retrieve"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(served, method, path, body, status, message):
    got, answer = ask(served, method, path, body)
    assert got == status
    assert message in answer["error"]


def test_a_request_of_unknown_or_absurd_length_is_refused_unread(served):
    assert ask(served, "POST", "/retrieve", None, **{"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(served, "POST", "/retrieve", b"{}", **{"Content-Length": "99999999999"})[0] == 413
    assert ask(served, "GET", "/health")[0] == 200, "the server goes on"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("served")
    file = folder / "passages.jsonl"
    file.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    with serving("--passages", str(file), "--index-dir", str(folder / "index")) as (_, port, _told):
        yield port


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_cleanly(passages, stop):
    with serving("--passages", str(passages)) as (process, port, _):
        open_connection = socket.create_connection(("127.0.0.1", port))
        assert ask(port, "GET", "/health")[0] == 200
        process.send_signal(stop)
        out, err = process.communicate(timeout=10)
        open_connection.close()
    assert (process.returncode, out, err) == (0, "\nStopped.\n", "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_port_in_use_is_one_line_and_status_2(passages, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert front_end.main(["serve-search", "--passages", str(passages), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"memgen serve-search: port {port} of 127.0.0.1 is in use; choose another with --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passages", "nowhere.jsonl"], "no passage file nowhere.jsonl"),
        (["--passages", "{}", "--topk", "0"], "--topk must be between 1 and"),
        (["--passages", "{}", "--port", "99999"], "--port must be between 0 and 65535"),
        (["--passages", "{}", "--port", "0", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--passages", "{}", "--port", "0", "--host", "no.such.host.invalid"], "cannot listen on no.such"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_2(passages, capsys, arguments, message):
    assert front_end.main(["serve-search", *(a.format(passages) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_broken_passage_file_is_one_line_and_status_2(passages, capsys):
    passages.write_text('{"text": "a"}\nnonsense\n')
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert front_end.main(["serve-search", "--passages", str(passages), "--port", "0"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"{passages}, line 2: not a JSON object" in capsys.readouterr().err


def test_it_starts_without_torch(passages):
    code = "import sys, memgen.cli.serve_search; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "False\n"
