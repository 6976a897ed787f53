"""`memgen serve`: an agent behind an OpenAI-compatible server (docs/serving.md)."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

from memgen.cli.errors import UsageError
from memgen.cli.listening import listening, shown_host
from memgen.cli.output import keep_model_loading_quiet

KEY_VARIABLE = "MEMGEN_API_KEY"
"""Environment variable with the key: a command line can be read by every user of a machine."""
LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> int:
    """Serves until Ctrl-C or SIGTERM, and then answers what it has accepted.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if an option is out of range, the address cannot be listened on, or the extra is missing.
        ValueError: if the checkpoint cannot be loaded.
    """
    options = _parser().parse_args(argv)
    for name, least in (("max_batch", 1), ("max_waiting", 1), ("timeout", 0.001), ("port", 0)):
        if getattr(options, name) < least:
            raise UsageError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}"
            )
    uvicorn = _uvicorn()
    # Before the model is loaded, which may take long.
    bound = listening(lambda: _bind(options.host, options.port), options.host, options.port)
    with bound:
        from memgen.api.agent import Agent
        from memgen.serving.app import ServerSettings, build_app
        from memgen.serving.engine import Engine
        from memgen.training.threads import choose_threads

        def load(name: str) -> Agent:
            return Agent.from_pretrained(name, device=options.device)

        keep_model_loading_quiet()
        agent = load(options.checkpoint)
        choose_threads(agent.model)
        key = os.environ.get(KEY_VARIABLE) or None
        name = options.name or options.checkpoint
        settings = ServerSettings(options.timeout, key, load if options.allow_load else None)
        app = build_app(agent, name, Engine(options.max_batch, options.max_waiting), settings)
        address = f"http://{shown_host(options.host)}:{bound.getsockname()[1]}"
        print(f"Serving {name} on {address}/v1 (Ctrl-C stops it)", flush=True)
        if options.host not in LOCAL and key is None:
            print(
                f"Anyone who reaches {options.host} can use it; set {KEY_VARIABLE} to ask for a key.",
                flush=True,
            )
        config = uvicorn.Config(
            app, log_level="warning", lifespan="on", timeout_graceful_shutdown=options.drain, access_log=False
        )
        # When it has stopped, uvicorn raises the signal that stopped it once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)
        uvicorn.Server(config).run(sockets=[bound])
    print("Stopped.", flush=True)
    return 0


def _uvicorn() -> Any:
    try:
        import fastapi  # noqa: F401 - the application needs it
        import uvicorn
    except ImportError as error:
        raise UsageError(f"needs the extra: pip install 'memgen[serve]' ({error})") from error
    return uvicorn


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=256)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen serve",
        description="Answer OpenAI-compatible requests: /v1/models, /v1/chat/completions, /v1/completions, /metrics, /healthz.",
        epilog=f"{KEY_VARIABLE}: a key that requests must give as Authorization: Bearer KEY.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a checkpoint's folder (memgen.json) or a run's, models:/NAME/VERSION of MLflow, or hf://ORG/NAME of the hub",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one; default: %(default)s")
    parser.add_argument("--name", help="the model's name in requests; default: what --checkpoint says")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--max-batch",
        type=int,
        default=16,
        metavar="N",
        help="answers written at the same time; default: %(default)s",
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait; others get status 429; default: %(default)s",
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds of a request; default: %(default)s"
    )
    parser.add_argument(
        "--drain",
        type=int,
        default=30,
        metavar="S",
        help="seconds that accepted requests get when the server is stopped; default: %(default)s",
    )
    parser.add_argument(
        "--allow-load", action="store_true", help="POST /v1/load swaps the checkpoint (off by default)"
    )
    return parser
