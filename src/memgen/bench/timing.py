"""Timing of all sides of a comparison in turn, several times, in one process.

A machine's speed drifts. So the sides alternate within each repeat, every other repeat runs them in reverse order, a
ratio is taken within a repeat, and the median over repeats is reported. The first pass warms up and is dropped.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from typing_extensions import override

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Sample:
    """One run."""

    wall: float
    """Seconds on the clock."""
    cpu: float
    """Seconds of this process's threads."""
    peak_bytes: int | None
    """Peak memory during the run, weights included; None where the system does not report it."""


@dataclass(frozen=True)
class Timing:
    """All counted runs of one side, in order."""

    samples: tuple[Sample, ...]

    @property
    def wall(self) -> list[float]:
        """Seconds on the clock of each run."""
        return [sample.wall for sample in self.samples]

    @property
    def cpu(self) -> list[float]:
        """Process CPU seconds of each run."""
        return [sample.cpu for sample in self.samples]

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory over all runs."""
        peaks = [sample.peak_bytes for sample in self.samples if sample.peak_bytes is not None]
        return max(peaks) if peaks else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "wall_seconds_min": round(min(self.wall), 6),
            "wall_seconds_median": round(median(self.wall), 6),
            "cpu_seconds_min": round(min(self.cpu), 6),
            "cpu_seconds_median": round(median(self.cpu), 6),
            "peak_memory_bytes": self.peak_bytes,
        }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over repeats of ours / theirs within a repeat."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


class Meter(ABC):
    """Measures time and memory of a function."""

    @abstractmethod
    def measure(self, work: Callable[[], object]) -> Sample:
        """Calls it once."""


@final
class ProcessMeter(Meter):
    """The clocks and the memory of this process.

    Args:
        device: synchronised before and after the work; a CUDA device's memory is measured instead of the process's.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.device = device

    @override
    def measure(self, work: Callable[[], object]) -> Sample:
        gc.collect()
        self.reset_peak()
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        self._wait()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Sample(wall=wall, cpu=cpu, peak_bytes=self.peak())

    def reset_peak(self) -> None:
        """Resets the peak to the current memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            CLEAR.write_text("5")

    def held(self) -> int | None:
        """Bytes held now."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else _status("VmRSS")

    def peak(self) -> int | None:
        """Most bytes held since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else _status("VmHWM")

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes, or None where there is none (not Linux)."""
    if not (STATUS.exists() and CLEAR.exists()):
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def measure_in_turn(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    meter: Meter,
    progress: Callable[[], None] = lambda: None,
    *,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Measures all sides in turn.

    Args:
        sides: the work of each.
        repeats: counted passes over all sides.
        meter: runs the work.
        progress: called after each run.
        warm_up: whether one more pass comes first and is dropped.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for repeat in range(0 if warm_up else 1, repeats + 1):
        names = list(sides)
        if repeat % 2 == 0:
            names.reverse()
        for name in names:
            sample = meter.measure(sides[name])
            if repeat:
                samples[name].append(sample)
            progress()
    return {name: Timing(tuple(runs)) for name, runs in samples.items()}
