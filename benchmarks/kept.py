"""Results of a benchmark's parts as JSON files, each computed once: an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memgen.files import write_whole

logger = logging.getLogger(__name__)


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result: the file's, or computed and written to it."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    logger.info("%s", path.with_suffix(""))
    result = make()
    write_whole(path, json.dumps(result))
    return result
