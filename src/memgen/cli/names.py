"""Names that may stand for a directory on the command line and in configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from memgen.lab.assets import resolve_asset
from memgen.tracking.artifacts import fetch_checkpoint, is_recorded

NAMED = ("init_from", "tokenizer")
"""Keys of a configuration whose value is such a name; besides, the `name` of every `backbone`."""


def resolve_name(name: str, store: str | None = None) -> str:
    """Turns a name into a directory, or into something that `from_pretrained` takes.

    Args:
        name: `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/RUN_ID[/PATH]` of MLflow, an asset of the lab, or
            anything else, which is returned unchanged.
        store: MLflow's tracking URI; None: MLFLOW_TRACKING_URI, else the store below `runs`.

    Raises:
        ValueError: if it names something that does not exist.
    """
    if is_recorded(name):
        return str(fetch_checkpoint(name, store))
    return resolve_asset(name)


@final
class Resolver:
    """Resolves names, each of them once.

    Args:
        store: MLflow's tracking URI, as for `resolve_name`.
    """

    def __init__(self, store: str | None) -> None:
        self.store = store
        self.found: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """As `resolve_name`; the first call builds, trains or fetches what is missing."""
        if name not in self.found:
            self.found[name] = resolve_name(name, self.store)
        return self.found[name]


def names_in(settings: Mapping[str, Any]) -> Iterator[str]:
    """The names in a resolved configuration.

    Args:
        settings: nested mappings, such as the sections `model` and `data`.
    """
    for key, value in settings.items():
        if key in NAMED and isinstance(value, str):
            yield value
        if isinstance(value, Mapping):
            if key == "backbone" and isinstance(value.get("name"), str):
                yield value["name"]
            yield from names_in(value)
