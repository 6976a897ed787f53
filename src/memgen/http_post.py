"""Requests to an HTTP server that end in time: a limit on each as a whole, and repetition where that may help.

`requests` and urllib3's `Retry` do neither: their timeout limits each read (a server that sends a byte every 0.1 s holds a
request with a timeout of 0.3 s for as long as it likes), and they do not repeat a request whose answer is unusable.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import TypeVar, final

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

MAX_RESPONSE_BYTES = 256 << 20
"""A longer answer of a server is a failure."""
LONGEST_PAUSE_S = 30.0
"""Between two attempts."""
_ALWAYS_REPEATED = (408, 425, 429)
"""HTTP statuses below 500 after which a request is repeated."""


class HttpFailure(Exception):
    """Why an attempt failed; `temporary` if another one may succeed."""

    def __init__(self, reason: str, *, temporary: bool = True) -> None:
        super().__init__(reason)
        self.temporary = temporary


def split_address(url: str, example: str) -> urllib.parse.SplitResult:
    """The parts of a server's address.

    Args:
        url: the address.
        example: what one looks like, for the error.

    Raises:
        ValueError: if it is no http or https address, or has a query or a fragment.
    """
    address = urllib.parse.urlsplit(url)
    try:
        _ = address.port
    except ValueError as error:
        raise ValueError(f"url has no usable port: {url!r}") from error
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise ValueError(f"url must look like {example}, got {url!r}")
    return address


@final
class HttpServer:
    """A server that answers POST requests. Proxies named in the environment are not used, redirections not followed."""

    def __init__(self, url: str, what: str, timeout_s: float, retries: int, backoff_s: float) -> None:
        """Asks nothing yet.

        Args:
            url: address of the requests, path included; `split_address` has checked it.
            what: what the server is, for warnings.
            timeout_s: seconds that a request may take from the connection to the last byte.
            retries: further attempts after a failure that may be temporary: no connection, no answer in time, a
                status that says so (5xx, 429), an answer that cannot be used.
            backoff_s: pause before the second attempt; each further pause is twice as long, up to 30 s.

        Raises:
            ValueError: if a setting is not usable.
        """
        if retries < 0:
            raise ValueError(f"retries must be at least 0, got {retries}")
        if not timeout_s > 0 or not backoff_s >= 0:
            raise ValueError(
                f"timeout_s must be positive and backoff_s not negative, got {timeout_s}, {backoff_s}"
            )
        address = urllib.parse.urlsplit(url)
        assert address.hostname is not None, "split_address has checked the address"
        self.url = url
        self.what = what
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self._https = address.scheme == "https"
        self._host, self._port = address.hostname, address.port
        self._path = address.path or "/"

    def ask(
        self, body: bytes, read: Callable[[bytes], Answer], headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Posts a JSON document until an answer can be read.

        Args:
            body: the document.
            read: what the answer's bytes say; raises `HttpFailure` where they cannot be used.
            headers: besides the content type.

        Raises:
            HttpFailure: if no attempt was answered usably; the message says why the last one was not, and how many there were.
        """
        pause = self.backoff_s
        for attempt in range(1, self.retries + 2):
            try:
                return read(self._post(body, {"Content-Type": "application/json", **(headers or {})}))
            except HttpFailure as failure:
                if not failure.temporary or attempt > self.retries:
                    attempts = f"{attempt} attempt{'s' if attempt > 1 else ''}"
                    raise HttpFailure(f"{failure} ({attempts})", temporary=failure.temporary) from failure
                logger.warning("%s %s: %s; next attempt in %g s", self.what, self.url, failure, pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The body of the answer to one request, within the time limit."""
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout_s)
        deadline = time.monotonic() + self.timeout_s
        guard: threading.Timer | None = None
        response: http.client.HTTPResponse | None = None
        try:
            connection.connect()
            # A socket's timeout limits one read; a server that sends a byte now and then would never reach it.
            guard = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [connection.sock])
            guard.daemon = True
            guard.start()
            connection.request("POST", self._path, body, dict(headers))
            response = connection.getresponse()
            content = response.read(MAX_RESPONSE_BYTES + 1)
            # `length` counts down: the bytes that were announced and have not come.
            if response.length and len(content) <= MAX_RESPONSE_BYTES:
                raise http.client.IncompleteRead(content, response.length)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline or isinstance(error, TimeoutError):
                raise HttpFailure(f"no complete answer within {self.timeout_s:g} s") from error
            reason = str(error) or type(error).__name__
            raise HttpFailure(f"no complete answer: {reason:.200}") from error
        finally:
            if guard is not None:
                guard.cancel()
            if response is not None:  # It may have taken the socket over.
                response.close()
            connection.close()
        if time.monotonic() >= deadline:  # A read without a length takes the guard's shutdown for the end.
            raise HttpFailure(f"no complete answer within {self.timeout_s:g} s")
        if len(content) > MAX_RESPONSE_BYTES:
            raise HttpFailure(f"the answer is longer than {MAX_RESPONSE_BYTES} bytes")
        if response.status != 200:
            told = " ".join(content[:200].decode("utf-8", "replace").split())
            raise HttpFailure(
                f"HTTP status {response.status} {response.reason}: {told}",
                temporary=response.status >= 500 or response.status in _ALWAYS_REPEATED,
            )
        return content


def _shut_down(connection: socket.socket) -> None:
    """Ends another thread's wait for this connection."""
    with contextlib.suppress(OSError):  # It may be closed already.
        connection.shutdown(socket.SHUT_RDWR)
