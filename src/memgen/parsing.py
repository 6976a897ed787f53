"""Values of a JSON or YAML document as a typed record (a frozen dataclass), checked by pydantic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


class UnknownKeyError(ValueError):
    """A document has a key that the record does not.

    Attributes:
        key: the full key.
        record: name of the class.
        known: the keys that it has.
    """

    def __init__(self, key: str, record: str, known: list[str]) -> None:
        super().__init__(f"{key} is not a key of {record}; known: {known}")
        self.key = key
        self.record = record
        self.known = known


def parse(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """Builds a record; nested mappings become the records that its fields are typed with, lists become tuples.

    A value must have its field's type: "3" is no number. Keys that are absent take the field's default.

    Args:
        kind: a dataclass.
        values: what a JSON or YAML document holds.

    Raises:
        UnknownKeyError: if a key is not a field.
        ValueError: naming the first key whose value does not fit, the type it must have, and the value.
    """
    _require_known(kind, values, "")
    try:
        # pydantic's JSON mode: an array is a tuple, and otherwise nothing is converted.
        record: Record = TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raised = first.get("ctx", {}).get("error")
        if raised is not None:  # by the record's own __post_init__
            raise ValueError(str(raised)) from error
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].replace("Input should be", "must be")
        raise ValueError(f"{key} {message}, got {first['input']!r}") from error
    return record


def _require_known(kind: Any, values: Any, prefix: str) -> None:
    if get_origin(kind) is dict and isinstance(values, Mapping):  # its keys are names of the user's
        for key, value in values.items():
            _require_known(get_args(kind)[1], value, f"{prefix}{key}.")
        return
    records = [found for found in (kind, *get_args(kind)) if isinstance(found, type) and is_dataclass(found)]
    if not records or not isinstance(values, Mapping):
        return
    hints = get_type_hints(records[0])
    known = [field.name for field in fields(records[0])]
    for key, value in values.items():
        if key not in known:
            raise UnknownKeyError(f"{prefix}{key}", records[0].__name__, known)
        _require_known(hints[key], value, f"{prefix}{key}.")
