"""Standard output and error that do not end a command: characters they lack are escaped, a reader may leave."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


VERBOSE = "MEMGEN_VERBOSE"
"""Environment variable that `--verbose` sets, so that the processes that a command starts have it too."""


def keep_libraries_quiet() -> None:
    """Shows of libraries their warnings and errors, and bars of downloads, unless `VERBOSE` is set.

    They set their own levels when they are imported, so this imports them. MLflow's is set by `main`.
    """
    if os.environ.get(VERBOSE):
        return
    import lightning.pytorch

    for library in (lightning.fabric, lightning.pytorch):
        logging.getLogger(library.__name__).setLevel(logging.WARNING)
    keep_model_loading_quiet()


def keep_model_loading_quiet() -> None:
    """The part of `keep_libraries_quiet` that a command without a Trainer needs."""
    if os.environ.get(VERBOSE):
        return
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # Over the weights of a model; over downloads too, which is not meant.
    enable_progress_bars()


@final
class _UntilItsReaderLeaves(io.FileIO):
    """A file descriptor that becomes /dev/null once nothing reads it any more (`2>&1 | head`)."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            return super().write(data)


def escape_what_cannot_be_shown() -> None:
    """Writes a character that the terminal's encoding lacks as its escape, as standard error does anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def outlive_readers() -> None:
    """Goes on when the reader of standard output or error leaves. To be called before anything else holds them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # None, or another's: left as it is.
            continue
        stream.flush()
        raw = _UntilItsReaderLeaves(stream.fileno(), "w", closefd=False)
        lasting = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)
