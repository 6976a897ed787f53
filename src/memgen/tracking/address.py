"""MLflow tracking URIs: the default store, and paths of sqlite stores."""

from __future__ import annotations

from pathlib import Path

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
"""Environment variable with the store's URI."""
SQLITE = "sqlite:///"
"""Prefix of the URI of a sqlite store."""
DEFAULT_ROOT = "runs"
"""Default folder of runs and their records."""
DEFAULT_STORE = f"{SQLITE}{DEFAULT_ROOT}/mlflow.db"
"""Store that is used by default."""
DEFAULT_OUTBOX = Path(DEFAULT_ROOT) / "outbox"
"""Folder of undelivered records by default."""


def absolute_uri(uri: str) -> str:
    """The URI with the path of a sqlite store made absolute.

    MLflow caches one connection per URI string, so a relative sqlite path would keep pointing to the file in the directory
    where the process used it first.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.is_absolute() or str(path) in {".", ":memory:"}:
        return uri
    return f"{SQLITE}{path.absolute()}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for another store, or one in memory."""
    path = uri.removeprefix(SQLITE)
    return Path(path) if uri.startswith(SQLITE) and path not in {"", ":memory:"} else None


def is_missing(uri: str) -> bool:
    """Whether a URI names a sqlite file that does not exist. MLflow would create an empty one."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file()
