"""`memgen serve-search`: offers a passage file to agents, under the protocol of Search-R1's retrieval server.

`POST /retrieve {"queries": [...], "topk": k, "return_scores": true}` answers `{"result": [[{"document": {"id",
"title", "text", "contents"}, "score"}, ...], ...]}`; without scores the list holds the documents themselves.
`GET /health` answers when the server is ready. A request that cannot be answered gets a status and `{"error": ...}`.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, final

from memgen.cli.errors import UsageError
from memgen.cli.listening import listening, shown_host
from memgen.environments.search.retrieval import Hit, PassageIndex, SearchError

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 20
MAX_TOPK = 1000
IDLE_S = 60.0
"""Seconds after which an idle connection is closed."""


def main(argv: Sequence[str]) -> int:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if there is no such file, or the address cannot be listened on.
    """
    options = _parser().parse_args(argv)
    if options.topk < 1 or options.topk > MAX_TOPK:
        raise UsageError(f"--topk must be between 1 and {MAX_TOPK}, got {options.topk}")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port must be between 0 and 65535, got {options.port}")
    if not options.passages.is_file():
        raise UsageError(f"there is no passage file {options.passages}")
    index_dir = None if options.index_dir is None else str(options.index_dir)
    index = PassageIndex(str(options.passages), topk=options.topk, index_dir=index_dir)
    with SearchHTTPServer(index, options.host, options.port) as server:
        # The port is bound before the index is built, which may take long, so that a used port is reported at once.
        # Connections are accepted only afterwards: a client repeats a refused one, but would wait for a silent one.
        listening(server.server_bind, options.host, options.port)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            print(f"Opening {options.passages}; the first time, its index is built.", flush=True)
            passages = len(index)
            listening(server.server_activate, options.host, options.port)
            print(
                f"Search over {passages} passages on http://{shown_host(options.host)}:{server.server_port}/retrieve (Ctrl-C stops it)",
                flush=True,
            )
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nStopped.", flush=True)
        finally:
            index.close()
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@final
class SearchHTTPServer(ThreadingHTTPServer):
    """Answers the protocol from an index; one thread per connection."""

    request_queue_size = 256
    """All ranks of a training run ask at the same time."""

    def __init__(self, index: PassageIndex, host: str, port: int) -> None:
        """Neither binds nor listens yet.

        Args:
            index: the passages.
            host: address to listen on.
            port: port to listen on; 0 takes a free one, and `server_port` then says which.
        """
        self.index = index
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler, bind_and_activate=False)

    def server_bind(self) -> None:
        """Binds the port, without the standard library's look-up of the host name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a client that disconnects before its answer."""
        if isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            logger.debug("%s has left", client_address)
        else:
            super().handle_error(request, client_address)


@final
class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "memgen-search"
    timeout = IDLE_S
    server: SearchHTTPServer

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/health":
            self._refuse(404, f"there is no {self.path}; ask GET /health or POST /retrieve")
            return
        self._answer(
            200,
            {"status": "ok", "passages": len(self.server.index), "topk": self.server.index.topk},
        )

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._refuse(411, "the request has no Content-Length")
            return
        if int(length) > MAX_REQUEST_BYTES:
            self._refuse(413, f"the request is longer than {MAX_REQUEST_BYTES} bytes")
            return
        body = self.rfile.read(int(length))
        if self.path.partition("?")[0].rstrip("/") != "/retrieve":
            self._refuse(404, f"there is no {self.path}; ask GET /health or POST /retrieve")
            return
        try:
            request = _Request.from_json(body, self.server.index.topk)
        except ValueError as error:
            self._refuse(422, str(error))
            return
        try:
            found = [self.server.index.hits(query, request.topk) for query in request.queries]
        except SearchError as error:
            logger.error("%s", error)  # noqa: TRY400 - the message says it all
            self._refuse(500, str(error))
            return
        result = [[_document(hit, request.return_scores) for hit in hits] for hits in found]
        self._answer(200, {"result": result})

    def _refuse(self, status: int, reason: str) -> None:
        # Unread bytes of this request would be taken for the next one.
        self.close_connection = True
        self._answer(status, {"error": reason})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


@dataclass(frozen=True)
class _Request:
    queries: list[str]
    topk: int
    return_scores: bool

    @classmethod
    def from_json(cls, body: bytes, default_topk: int) -> _Request:
        """Raises ValueError, with what is expected, if the body does not follow the protocol."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the request is no JSON: {error}") from error
        queries = content.get("queries") if isinstance(content, dict) else None
        if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
            raise ValueError(
                'expected {"queries": [text, ...], "topk": number, "return_scores": true or false}'
            )
        topk = content.get("topk")
        topk = default_topk if topk is None else topk
        if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= MAX_TOPK:
            raise ValueError(f'"topk" must be a number between 1 and {MAX_TOPK}, or null; got {topk!r:.40}')
        return_scores = content.get("return_scores", False)
        if not isinstance(return_scores, bool):
            message = f'"return_scores" must be true or false, got {return_scores!r:.40}'
            raise ValueError(message)  # noqa: TRY004 - the request is wrong, not the call
        return cls(queries, topk, return_scores)


def _document(hit: Hit, with_score: bool) -> dict[str, Any]:
    passage = hit.passage
    document = {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": passage.contents,
    }
    return {"document": document, "score": hit.score} if with_score else document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen serve-search",
        description="Offer a passage file under the protocol of Search-R1's retrieval server: POST /retrieve, and "
        "GET /health. An environment asks it with memgen.environments.search.retrieval.SearchServer.",
    )
    parser.add_argument(
        "--passages",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl (id, title, text or contents), .tsv (id, text, title) or .json; also .gz",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument(
        "--port", type=int, default=8001, help="port to listen on, 0 for a free one; default: %(default)s"
    )
    parser.add_argument(
        "--topk",
        type=int,
        default=3,
        help="passages per query if a request does not say; default: %(default)s",
    )
    parser.add_argument(
        "--index-dir",
        type=Path,
        metavar="DIR",
        help="where the index is kept; default: search/ in MEMGEN_HOME, else in the user's cache directory",
    )
    return parser
