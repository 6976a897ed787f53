"""Names that may stand for a directory, in a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from memgen.api.names import resolve_name

NAMED = ("init_from", "tokenizer")
"""Keys of a configuration whose value is such a name; besides, the `name` of every `backbone`."""


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
