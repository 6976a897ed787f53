"""What a command knows of a run and its configuration does not say, handed to the Trainer once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import final

from lightning.pytorch import Callback, Trainer


def no_assets(name: str) -> str:
    """Resolves names of the hub and directories only, which are returned unchanged.

    Raises:
        ValueError: if the name asks for an asset that has to be built.
    """
    if name.startswith(("lab:", "tiny:")) or name.endswith(".gguf"):
        raise ValueError(
            f"{name!r} is an asset that is built on first use; outside the `memgen` command, give the Trainer the "
            "callback RunContext(resolve_asset=...), or name a directory"
        )
    return name


@final
class RunContext(Callback):
    """A callback that does nothing: the data module and other callbacks read it by `run_context(trainer)`.

    Args:
        folder: the run's folder; None: AdapterCheckpoint chooses one.
        resumed_from: the .ckpt that the run is resumed from. The Trainer itself knows it only after set-up.
        resolve_asset: turns the name of an asset (`lab:reasoner`) into a directory; other names pass through.
        configuration: the resolved configuration as YAML, to be kept with the run; None: there is none.
    """

    def __init__(
        self,
        folder: Path | None = None,
        resumed_from: Path | None = None,
        resolve_asset: Callable[[str], str] = no_assets,
        configuration: str | None = None,
    ) -> None:
        self.folder = folder
        self.resumed_from = resumed_from
        self.resolve_asset = resolve_asset
        self.configuration = configuration


def run_context(trainer: Trainer | None) -> RunContext:
    """The context of a Trainer's run; one without any knowledge if it was given none."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return next((found for found in callbacks if isinstance(found, RunContext)), RunContext())
