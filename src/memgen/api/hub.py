"""Checkpoints on the Hugging Face hub: `hf://ORG/NAME`. A repository holds the files of a checkpoint folder and its card."""

from __future__ import annotations

import re
from pathlib import Path

SCHEME = "hf://"
FILES = ("*.json", "*.safetensors", "README.md")
"""What is fetched of a repository."""


def is_on_hub(name: str) -> bool:
    """Whether a name refers to the hub."""
    return name.startswith(SCHEME)


def fetch_from_hub(name: str) -> Path:
    """Local folder of a checkpoint on the hub, downloaded unless it is in the hub's cache and has not changed.

    Args:
        name: `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`.

    Raises:
        ValueError: if the name is of another form, or there is no such repository or revision.
        ConnectionError: if the hub does not answer and the repository is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise ValueError(f"{name} is not of the form hf://ORG/NAME or hf://ORG/NAME@REVISION")
    repository, revision = match.groups()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no {name} on the hub, or it may only be read after `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name}: the repository has no revision {revision}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"{name} could not be fetched from the hub: {reason}") from error


def upload(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Uploads the files of a folder as one commit, into a repository that is made if it does not exist.

    Args:
        folder: with the files.
        repository: ORG/NAME.
        private: whether a new repository is private.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ValueError: if the name is of another form.
        ConnectionError: if the hub refuses or does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a repository, ORG/NAME") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(f"{repository} could not be uploaded to the hub: {reason}") from error
    return str(commit.commit_url)
