"""The JSON file of a benchmark, replaced as a whole whenever a case is finished.

An interrupted run leaves valid JSON with its finished cases and `"complete": false`; a run that is stopped before its
first case leaves no file.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import psutil
import torch

import memgen
from memgen.files import write_whole


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, memory, versions, threads and load average, for the record of a measurement."""
    described: dict[str, Any] = {
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "memgen": memgen.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": load_average(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["accelerator"] = properties.name
        described["accelerator_memory_bytes"] = properties.total_memory
        described["cuda"] = torch.version.cuda
    return described


def load_average() -> list[float] | None:
    """Runnable processes on average over 1, 5 and 15 minutes; None where the system does not count them."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def processor() -> str:
    """Name of the processor's model."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@final
class Recorder:
    """Collects cases and keeps the file up to date.

    Args:
        path: the file, or None to keep the cases in memory only.
        command: the command line.
        device: described with the machine.

    Raises:
        ValueError: if the file's folder does not exist.
    """

    def __init__(self, path: Path | None, command: str, device: str = "cpu") -> None:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent} is not a folder; create it, or name another file with --json")
        self.path = path
        self.content: dict[str, Any] = {
            "machine": machine(device),
            "command": command,
            "complete": False,
            "cases": [],
        }

    @property
    def cases(self) -> list[dict[str, Any]]:
        """All finished cases."""
        cases: list[dict[str, Any]] = self.content["cases"]
        return cases

    def add(self, case: dict[str, Any]) -> None:
        """Records a finished case."""
        self.cases.append({**case, "load_average": load_average()})
        self._write()

    def finish(self, **more: Any) -> None:
        """Marks the run as complete.

        Args:
            more: results over all cases.
        """
        self.content |= {**more, "complete": True}
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_whole(self.path, json.dumps(self.content, indent=1) + "\n")
