"""Records of the data that a run used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memgen.environments.base import Environment, Example


@dataclass(frozen=True)
class DatasetRecord:
    """MLflow's record of a split.

    Attributes:
        name: environment and split.
        digest: hash of all items, so that equal data is recognised.
        source_type: kind of `source`.
        source: origin of the data, as JSON.
        schema: fields of an item, as JSON.
        profile: number of items, as JSON.
        context: use of the data: training, validation, test.
    """

    name: str
    digest: str
    source_type: str
    source: str
    schema: str
    profile: str
    context: str


def dataset_record(
    environment: Environment, path: str | None, split: str, examples: Sequence[Example]
) -> DatasetRecord:
    """Makes the record of a split's items.

    Args:
        environment: the environment they belong to.
        path: file or folder that they were read from, if any.
        split: train, val or test.
        examples: the items.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.question, example.target, example.answer]).encode())
    kind = type(environment)
    columns = [
        {"type": "string", "name": name, "required": True} for name in ("id", "question", "target", "answer")
    ]
    source = (
        {"uri": str(Path(path).absolute())} if path else {"code": f"{kind.__module__}.{kind.__qualname__}"}
    )
    return DatasetRecord(
        name=f"{getattr(environment, 'name', kind.__name__)}-{split}",
        digest=digest.hexdigest()[:12],
        source_type="local" if path else "code",
        source=json.dumps(source),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": len(examples)}),
        context={"train": "training", "val": "validation"}.get(split, split),
    )
