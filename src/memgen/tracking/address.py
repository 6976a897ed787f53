"""Names of stores: which one is meant, and where it lies."""

from __future__ import annotations

from pathlib import Path

STORE_VARIABLE = "MLFLOW_TRACKING_URI"
"""The environment's word for the store."""
SQLITE = "sqlite:///"
"""What the URI of a database in a file begins with."""
DEFAULT_STORE = f"{SQLITE}runs/mlflow.db"
"""Where runs are recorded if nobody names another store."""


def absolute_uri(uri: str) -> str:
    """The same store, whatever the working directory.

    MLflow keeps one connection for each URI as it is spelled: a relative sqlite path would stay with the file of the
    directory in which a process used it first.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.is_absolute() or str(path) in {".", ":memory:"}:
        return uri
    return f"{SQLITE}{path.absolute()}"


def is_missing(uri: str) -> bool:
    """Whether a URI names a database in a file that is not there. MLflow would make an empty one."""
    return uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file()
