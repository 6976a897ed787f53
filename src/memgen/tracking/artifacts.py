"""Fetches checkpoints from MLflow by `models:/NAME/VERSION` or `runs:/RUN_ID/PATH`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from memgen.tracking.address import DEFAULT_STORE, STORE_VARIABLE, absolute_uri, is_missing
from memgen.tracking.store import client_of

SCHEMES = ("models:/", "runs:/")
CHECKPOINTS = "checkpoints"
"""Folder among a run's artifacts that holds its checkpoints."""


def is_recorded(name: str) -> bool:
    """Whether a name refers to a checkpoint in MLflow."""
    return name.startswith(SCHEMES)


def fetch_checkpoint(name: str, store: str | None = None) -> Path:
    """Local directory of a checkpoint in MLflow; downloaded if the store is not on this machine.

    Args:
        name: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `models:/NAME/latest`, `runs:/RUN_ID/PATH`, or `runs:/RUN_ID` for the last
            checkpoint of a run.
        store: tracking URI; None: MLFLOW_TRACKING_URI, else the store below `runs`.

    Raises:
        ValueError: if the name is not of these forms, or there is no such checkpoint.
        ConnectionError: if the store does not answer.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uri = store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE
    if is_missing(uri):
        raise ValueError(
            f"{name} is looked for in {uri}, which does not exist in {Path.cwd()}; set MLFLOW_TRACKING_URI to the store"
        )
    try:
        source = _source(name, uri)
        found = Path(download_artifacts(artifact_uri=source, tracking_uri=absolute_uri(uri)))
    except MlflowException as error:
        reason = error.message.splitlines()[0]
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise ValueError(f"there is no {name} in {uri}: {reason}") from error
        raise ConnectionError(f"{uri} does not deliver {name}: {reason}") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be fetched from {uri}: {error}") from error
    return found


def _source(name: str, uri: str) -> str:
    """The artifact URI that a name refers to."""
    client = client_of(uri)
    if name.startswith("runs:/"):
        run_id, _, path = name.removeprefix("runs:/").partition("/")
        run = client.get_run(run_id)
        if not path:
            present = [item.path for item in client.list_artifacts(run_id, CHECKPOINTS)]
            if not present:
                raise ValueError(f"{name}: the run has no checkpoints: it has not ended, or it did not train")
            # Named by their step.
            path = max(present)
        return f"{run.info.artifact_uri}/{path}"
    match = re.fullmatch(r"models:/([^/@]+)(?:/([^/]+)|@([^/]+))", name)
    if match is None:
        raise ValueError(f"{name} is not of the form models:/NAME/VERSION or models:/NAME@ALIAS")
    model, version, alias = match.groups()
    if alias is not None:
        return str(client.get_model_version_by_alias(model, alias).source)
    if version == "latest":
        found = client.search_model_versions(f"name='{model}'")
        if not found:
            raise ValueError(f"{name}: there is no model of this name in {uri}")
        return str(max(found, key=lambda item: int(item.version)).source)
    return str(client.get_model_version(model, version).source)
