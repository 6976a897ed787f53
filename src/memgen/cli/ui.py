"""`memgen ui`: MLflow's user interface for the recorded runs."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from memgen.cli.errors import UsageError
from memgen.tracking.address import DEFAULT_STORE, STORE_VARIABLE, is_missing

OUTBOX = Path("runs/outbox")


def main(argv: list[str]) -> int:
    """Starts `mlflow ui` on the store that runs are recorded in, and waits until it is stopped.

    Args:
        argv: the arguments after `memgen ui`.

    Returns:
        The exit status of MLflow.

    Raises:
        UsageError: if the store does not exist yet.
    """
    parser = argparse.ArgumentParser(prog="memgen ui", description=__doc__)
    parser.add_argument(
        "--store",
        default=os.environ.get(STORE_VARIABLE) or DEFAULT_STORE,
        help="tracking URI; default: MLFLOW_TRACKING_URI, else %(default)s",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on; default: %(default)s")
    parser.add_argument("--print", action="store_true", help="print MLflow's command and stop")
    options = parser.parse_args(argv)

    if options.store.startswith(("http://", "https://")):
        print(f"The runs are on a server with its own user interface: {options.store}")
        return 0
    if is_missing(options.store):
        raise UsageError(
            f"{options.store} does not exist in {Path.cwd()}; run `memgen fit` or `memgen demo` first, "
            "or name another store with --store"
        )
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", options.store]
    command += ["--host", options.host, "--port", str(options.port), "--workers", "1"]
    if options.print:
        print(shlex.join(["mlflow", *command[3:]]))
        return 0
    print(f"MLflow on http://{options.host}:{options.port} in about 20 seconds (Ctrl-C stops it)")
    if list(OUTBOX.glob("*.jsonl")):
        print(f"{OUTBOX} holds undelivered records: `memgen deliver` sends them")
    # MLflow's jobs (judges, prompt optimisation) would take seven more processes and a minute to start.
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **os.environ,
    }
    return subprocess.run(command, env=environment, check=False).returncode
