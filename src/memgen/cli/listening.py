"""Addresses that a command listens on."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from memgen.cli.errors import UsageError

T = TypeVar("T")


def listening(step: Callable[[], T], host: str, port: int) -> T:
    """Binds an address or listens on it.

    Args:
        step: does it.
        host: the address.
        port: the port.

    Raises:
        UsageError: if the port is in use, or the address is not this machine's.
    """
    try:
        return step()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} of {host} is in use; choose another with --port") from error
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def shown_host(host: str) -> str:
    """A host as addresses have it."""
    return f"[{host}]" if ":" in host else host
