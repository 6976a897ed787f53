"""Names that may stand for a directory on the command line and in configurations."""

from __future__ import annotations

from memgen.lab.assets import resolve_asset
from memgen.tracking.artifacts import fetch_checkpoint, is_recorded


def resolve_name(name: str, store: str | None = None) -> str:
    """Turns a name into a directory, or into what `from_pretrained` takes.

    Args:
        name: `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/RUN_ID[/PATH]` of MLflow, a name of the lab, or anything else,
            which stands for itself.
        store: MLflow's tracking URI; None: MLFLOW_TRACKING_URI, else the store below `runs`.

    Raises:
        ValueError: if it names something that does not exist.
    """
    if is_recorded(name):
        return str(fetch_checkpoint(name, store))
    return resolve_asset(name)
