"""`memgen serve` as a process: it answers, and a signal lets it finish what it has accepted."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from memgen.cli import main as front_end
from saved_agent import save_agent, save_base

pytest.importorskip("uvicorn")


def test_a_served_checkpoint_answers_and_sigterm_lets_it_finish(tmp_path):
    checkpoint = save_agent(tmp_path / "agent", save_base(tmp_path / "base"))
    command = [
        sys.executable,
        "-m",
        "memgen.cli.main",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--name",
        "a b",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            port = int(
                re.fullmatch(r"Serving a b on http://127\.0\.0\.1:(\d+)/v1 \(Ctrl-C stops it\)\n", line)[1]
            )
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            content = {"model": "a b", "prompt": "a", "max_tokens": 300, "temperature": 0, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(content))
            response = connection.getresponse()
            assert response.readline().startswith(b"data: {")
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
            connection.close()
            assert process.stdout.read() == "Stopped.\n"
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_what_cannot_be_served_is_refused_in_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert front_end.main(["serve", "--checkpoint", str(tmp_path), "--port", port]) == 2
    assert (
        capsys.readouterr().err
        == f"memgen serve: port {port} of 127.0.0.1 is in use; choose another with --port\n"
    )
    assert front_end.main(["serve", "--checkpoint", str(tmp_path), "--max-batch", "0"]) == 2
    assert "--max-batch must be at least 1, got 0" in capsys.readouterr().err
    assert front_end.main(["serve", "--checkpoint", str(tmp_path), "--port", "0"]) == 2
    assert "it has no memgen.json" in capsys.readouterr().err
