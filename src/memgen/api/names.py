"""Names that may stand for a directory, on the command line, in configurations and in `memgen.load`."""

from __future__ import annotations

from memgen.api.hub import fetch_from_hub, is_on_hub
from memgen.lab.assets import resolve_asset


def resolve_name(name: str, store: str | None = None) -> str:
    """Turns a name into a directory, or into something that `from_pretrained` takes.

    Args:
        name: `hf://ORG/NAME` or `hf://ORG/NAME@REVISION` of the Hugging Face hub; `models:/NAME/VERSION`,
            `models:/NAME@ALIAS` or `runs:/RUN_ID[/PATH]` of MLflow; an asset of the lab; or anything else, which is
            returned unchanged.
        store: MLflow's tracking URI; None: MLFLOW_TRACKING_URI, else the store below `runs`.

    Raises:
        ValueError: if it names something that does not exist.
        ConnectionError: if the hub or MLflow does not answer.
    """
    from memgen.tracking.artifacts import fetch_checkpoint, is_recorded

    if is_on_hub(name):
        return str(fetch_from_hub(name))
    if is_recorded(name):
        return str(fetch_checkpoint(name, store))
    return resolve_asset(name)
