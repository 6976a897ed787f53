"""System metrics of the machine and the process, under the names that MLflow's page of system metrics shows.

Not MLflow's own `SystemMetricsMonitor`: it sends to the store from its thread and ends for good at the first request that
fails; it has neither the process's memory and CPU nor network rates, measures the disk of `/` instead of the working
directory's, and needs nvidia-ml-py for GPUs.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import final

import psutil

logger = logging.getLogger(__name__)

MEGABYTE = 1e6
_GPU_FIELDS = {
    "utilization.gpu": "utilization_percentage",
    "memory.used": "memory_usage_megabytes",
    "power.draw": "power_usage_watts",
}


@final
class SystemMonitor:
    """Measures in a background thread.

    Args:
        report: called with the measurements by name.
        seconds: seconds between two measurements.
    """

    def __init__(self, report: Callable[[Mapping[str, float]], None], seconds: float) -> None:
        self._report = report
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread, unless it runs."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="memgen-system", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Measures once more, so that a short run has an entry, and ends the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        measure = Measurements()
        while not self._stop.wait(self._seconds):
            self._report(measure())
        self._report(measure())


@final
class Measurements:
    """Measures machine, process and GPUs. Rates are averages since the previous call."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._traffic = psutil.net_io_counters()
        self._time = time.monotonic()
        self._smi = shutil.which("nvidia-smi")
        psutil.cpu_percent()
        self._process.cpu_percent()

    def __call__(self) -> dict[str, float]:
        """The measurements by name."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.getcwd())
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/disk_usage_percentage": disk.percent,
            "system/disk_available_megabytes": disk.free / MEGABYTE,
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / MEGABYTE,
        }
        traffic, now = psutil.net_io_counters(), time.monotonic()
        if traffic is not None and self._traffic is not None:
            seconds = max(1e-3, now - self._time)
            received = traffic.bytes_recv - self._traffic.bytes_recv
            sent = traffic.bytes_sent - self._traffic.bytes_sent
            values["system/network_receive_megabytes_per_second"] = received / MEGABYTE / seconds
            values["system/network_transmit_megabytes_per_second"] = sent / MEGABYTE / seconds
        self._traffic, self._time = traffic, now
        return values | self._gpus()

    def _gpus(self) -> dict[str, float]:
        if self._smi is None:
            return {}
        command = [self._smi, f"--query-gpu=index,{','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("nvidia-smi failed, so there are no GPU metrics: %s", error)
            self._smi = None
            return {}
        return parse_gpus(done.stdout)


def parse_gpus(table: str) -> dict[str, float]:
    """Metrics from nvidia-smi's table; values that a GPU does not report are left out."""
    values = {}
    for line in table.splitlines():
        index, *cells = [cell.strip() for cell in line.split(",")]
        for name, cell in zip(_GPU_FIELDS.values(), cells, strict=True):
            if cell.replace(".", "", 1).isdigit():
                values[f"system/gpu_{index}_{name}"] = float(cell)
    return values
