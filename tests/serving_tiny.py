"""A server of a tiny agent in a thread of the test's process."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest

from memgen.api.agent import Agent
from memgen.chat import CHATML
from memgen.serving.app import ServerSettings, build_app
from memgen.serving.engine import Engine
from memgen.training.checkpoint import TextSettings
from tiny import byte_tokenizer, tiny_memgen

uvicorn = pytest.importorskip("uvicorn")


def tiny_agent(**settings) -> Agent:
    model = tiny_memgen(**settings)
    return Agent(model, model.config, byte_tokenizer(), TextSettings(CHATML, model.reasoner.end_ids))


class Client:
    """Plain HTTP requests."""

    def __init__(self, port: int, engine: Engine) -> None:
        self.port, self.engine = port, engine

    def ask(self, method, path, content=None, headers=None):
        """Status, body as text, headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers
        finally:
            connection.close()

    def post(self, path, status=200, headers=None, **content):
        found, body, _ = self.ask("POST", path, {"model": "tiny", **content}, headers)
        assert found == status, body
        return json.loads(body)

    def chat(self, question, **settings):
        messages = [{"role": "user", "content": question}]
        return self.post("/v1/chat/completions", messages=messages, **settings)

    def events(self, path, **content):
        """The chunks of a stream."""
        status, body, headers = self.ask("POST", path, {"model": "tiny", "stream": True, **content})
        assert status == 200, body
        assert headers["Content-Type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def leave(self, path, **content):
        """Sends a request and closes the connection once the engine works at it."""
        body = json.dumps({"model": "tiny", **content}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: self.engine.running)


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(agent, rows=4, waiting=64, **settings):
    engine = Engine(rows, waiting)
    app = build_app(agent, "tiny", engine, ServerSettings(**settings))
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Client(bound.getsockname()[1], engine)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
