"""Peak memory of one workload, in a process of its own: `python -m memgen.bench.probe REQUEST`.

Memory that a process held before, and that its allocator kept, would hide part of a peak. So each side of a comparison
has a fresh process: it makes the model, warms up on a tiny workload (libraries allocate on first use), and then runs
once. Reported is the peak above the memory that was held before, which is the weights.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from memgen.bench.generation import Decoding, DecodingWorkload
from memgen.bench.shapes import ModelSettings
from memgen.bench.timing import ProcessMeter
from memgen.bench.training import MemGenStep, PlainStep, TrainingStep, TrainingWorkload


def training_work(request: dict[str, Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up and a training step."""
    settings, work = ModelSettings(**request["settings"]), TrainingWorkload(**request["work"])
    sides: dict[str, type[TrainingStep]] = {"plain": PlainStep, "ours": MemGenStep}
    side = sides[request["side"]]
    measured = side(settings, work)

    def warm_up() -> None:
        tiny = replace(work, batch=1, group=1, prompt=4, length=48, points=1)
        side(replace(settings, model="small"), tiny).step(request["stage"])

    return warm_up, lambda: measured.step(request["stage"])


def generation_work(request: dict[str, Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """A warm-up and a decoding."""
    settings, work = ModelSettings(**request["settings"]), DecodingWorkload(**request["work"])
    decoding = Decoding(settings)

    def run(task: DecodingWorkload) -> object:
        if request["side"] == "plain":
            return decoding.huggingface(task)
        return decoding.ours(task, decoding.models[request["side"]])

    return lambda: run(DecodingWorkload(batch=1, prompt=4, new=4)), lambda: run(work)


def main(argv: list[str]) -> int:
    """Measures one request and writes the result to standard output as a line of JSON.

    Args:
        argv: the request, JSON.

    Returns:
        The exit status.
    """
    request = json.loads(argv[0])
    torch.set_num_threads(int(request["threads"]))
    warm_up, work = {"training": training_work, "generation": generation_work}[request["kind"]](request)
    warm_up()
    gc.collect()
    _return_free_memory()
    meter = ProcessMeter(request["settings"]["device"])
    meter.reset_peak()
    before = meter.held()
    sample = meter.measure(work)
    above = None if before is None or sample.peak_bytes is None else sample.peak_bytes - before
    result = {"peak_above_weights_bytes": above, "held_before_bytes": before}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _return_free_memory() -> None:
    """Returns free memory that the C library keeps to the system, where the library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
