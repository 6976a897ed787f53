"""The configuration that a run was begun with, kept with it, and what a run that is resumed may change of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from memgen.training.checkpoint import FIXED_KEYS, FIXED_TRIGGER_KEYS, CheckpointError

CONFIGURATION = "config.yaml"
"""File beside a run's checkpoints with its resolved configuration."""
KEPT = (
    "seed_everything",
    "model.init_from",
    "model.optimizer.lr",
    "model.optimizer.weight_decay",
    "model.optimizer.betas",
    "model.optimizer.eps",
)
"""What a checkpoint brings along, so that another value would change nothing."""
FIXED = (
    "model.class_path",
    "data.environment.class_path",
    "trainer.callbacks.AdapterCheckpoint.monitor",
    "trainer.callbacks.AdapterCheckpoint.mode",
    *(f"model.memgen.{key}" for key in FIXED_KEYS + FIXED_TRIGGER_KEYS),
)
"""What a checkpoint means nothing without."""
FREE = (
    "ckpt_path",
    "weights_only",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "trainer.num_nodes",
)
"""What changes nothing that is learned, or is checked elsewhere."""


def recorded_configuration(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration kept beside a .ckpt; None if there is none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = checkpoint.resolve().parent / CONFIGURATION
    if not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read: {reason}; remove it to resume without it") from error
    return found if isinstance(found, dict) else None


def changed_settings(checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compares the configuration of a run that is resumed with the one that it was begun with.

    Args:
        checkpoint: what it is resumed from.
        before: the configuration that the run was begun with.
        now: the configuration of this process. Both are complete and without `init_args`.

    Returns:
        For each setting that is changed, its key and both values.

    Raises:
        CheckpointError: if one of them cannot change in a run.
    """
    old, new = _flat(before), _flat(now)
    changed = sorted(
        key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not key.startswith(FREE)
    )
    phrases = {key: f"{key} is {_shown(new, key)} (was {_shown(old, key)})" for key in changed}
    # A key that only one of them has is one that another version of the code added or removed.
    refused = [phrases[key] for key in changed if key in old and key in new and key.startswith(FIXED + KEPT)]
    if refused:
        weights = checkpoint.resolve().parent.parent / "last"
        raise CheckpointError(
            f"a resumed run keeps its settings, but {'; '.join(refused)}. Set them as they were, or start a new run "
            f"from its weights: --checkpoint {weights}, without --ckpt_path and in another folder"
        )
    return list(phrases.values())


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full keys; objects in a list by the name of their class, so that order does not matter."""
    if isinstance(value, Mapping) and value:
        items = {str(key): inner for key, inner in value.items()}
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = {_name(item, place): item for place, item in enumerate(value)}
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _name(item: Any, place: int) -> str:
    chosen = item.get("class_path") if isinstance(item, Mapping) else None
    return str(place) if chosen is None else str(chosen).rpartition(".")[2]


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"
