"""A real MLflow server in processes of its own, which tests may kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HEALTHY_SECONDS = 240


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(uri: str, process: subprocess.Popen[bytes]) -> bool:
    """Waits until a server is healthy; False if its process ends or that takes too long."""
    deadline = time.monotonic() + HEALTHY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    return False


class Server:
    """`mlflow server` on a sqlite store below a folder. Its processes form a group, which ends with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, without waiting."""
        assert self._process is None
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Seven more processes that take a minute to start and that nothing here needs.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Waits until it answers."""
        assert self._process is not None, "started"
        if answers(self.uri, self._process):
            return
        log = (self.folder / "server.log").read_text()[-3000:]
        self.kill()
        raise AssertionError(f"mlflow server does not answer:\n{log}")

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to all its processes."""
        assert self._process is not None, "started"
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kills it without a warning."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait(timeout=20)
            self._process = None
