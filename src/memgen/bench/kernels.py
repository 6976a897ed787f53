"""`memgen bench kernels`: every fused operation against its plain-torch form and against a large copy's bandwidth.

Forms of an operation: "triton" is the kernel and needs a CUDA device, so elsewhere only the others and the bandwidth are
measured; "reference" is its plain-torch definition, which also runs on a CPU; "naive" is the obvious code without
the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from memgen.bench.timing import Meter, Timing, measure_in_turn
from memgen.kernels import Implementation, forced, interleave, linear_logprob

# B rows, T packed positions, M latents, H hidden, N labels, V vocabulary

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Size of the tensor that is copied: larger than any cache."""

Direction = Literal["forward", "forward+backward"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")


@dataclass(frozen=True)
class Problem:
    """One operation on one size.

    Attributes:
        kernel: name of the operation.
        direction: with or without the gradient.
        size: axes, for the record.
        least_bytes: bytes that any form must read and write at least.
        forms: the forms to time, by name.
    """

    kernel: str
    direction: Direction
    size: dict[str, int]
    least_bytes: int
    forms: dict[str, Callable[[], object]]


@dataclass(frozen=True)
class InterleaveSize:
    """Rows of tokens with latents between them."""

    rows: int = 8
    length: int = 512
    points: int = 6
    """Insertions per row."""
    latents: int = 8
    """Per insertion."""
    hidden: int = 1536
    vocabulary: int = 32768


@dataclass(frozen=True)
class LogprobSize:
    """Labels over classes."""

    labels: int
    hidden: int
    vocabulary: int


INTERLEAVE_SIZES = {"cpu": InterleaveSize(), "cuda": InterleaveSize(rows=128, length=4096)}
"""By type of device: on a CPU a training step's of a model of 1.5 billion parameters, on a GPU what takes long enough for
the launch not to count."""

LOGPROB_SIZES = {"cpu": LogprobSize(2048, 512, 32768), "cuda": LogprobSize(8192, 1536, 151936)}
"""By type of device: a training step's on a GPU, and on a CPU what takes a second or two."""


def copy_bandwidth(device: str, meter: Meter, repeats: int = 5) -> float:
    """Bytes per second of a large copy, reading and writing counted; the fastest of several."""
    size = COPY_BYTES[torch.device(device).type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure_in_turn({"copy": lambda: target.copy_(source)}, repeats, meter)["copy"]
    return 2 * size / min(timing.wall)


def interleave_problem(
    device: str, dtype: torch.dtype, direction: Direction, seed: int, size: InterleaveSize | None = None
) -> Problem:
    """Latents between the tokens of packed rows, each row at random points."""
    size = size or INTERLEAVE_SIZES[torch.device(device).type]
    generator = torch.Generator().manual_seed(seed)
    sources: list[int] = []
    tokens: list[int] = []
    inserted = 0
    for _ in range(size.rows):
        row = torch.randint(size.vocabulary, (size.length,), generator=generator).tolist()
        points = set(torch.randperm(size.length, generator=generator)[: size.points].tolist())
        for point, token in enumerate(row):
            if point in points:
                sources += range(inserted, inserted + size.latents)
                tokens += [0] * size.latents
                inserted += size.latents
            sources.append(-1)
            tokens.append(token)
    table, latents = _tables(size, device, dtype, generator)
    ids, index = torch.tensor(tokens, device=device), torch.tensor(sources, device=device)
    grad = torch.randn(len(tokens), size.hidden, generator=generator).to(device, dtype)

    def naive() -> Tensor:
        is_latent = (index >= 0)[:, None]
        return torch.where(is_latent, latents.to(dtype)[index.clamp(min=0)], table[ids])

    return Problem(
        kernel="interleave",
        direction=direction,
        size={"positions": len(tokens), "latents": latents.shape[0], "hidden": size.hidden},
        # Token ids and sources, and the interleaved embeddings.
        least_bytes=16 * len(tokens) + _interleave_bytes(len(tokens), latents, dtype, direction),
        forms=_forms(device, naive, lambda: interleave(table, ids, latents, index), latents, grad, direction),
    )


def _tables(
    size: InterleaveSize, device: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An embedding table, and latents that require a gradient."""
    table = torch.randn(size.vocabulary, size.hidden, generator=generator).to(device, dtype)
    count = size.rows * size.points * size.latents
    latents = torch.randn(count, size.hidden, generator=generator).to(device)
    return table, latents.requires_grad_()


def _interleave_bytes(positions: int, latents: Tensor, dtype: torch.dtype, direction: Direction) -> int:
    """Embeddings and latents read and written once; backward, the latents' gradients likewise."""
    count, hidden = latents.shape
    forward = (2 * positions - count) * hidden * dtype.itemsize + count * hidden * latents.element_size()
    backward = count * hidden * (dtype.itemsize + latents.element_size())
    return forward if direction == "forward" else forward + backward


def logprob_problem(
    device: str, dtype: torch.dtype, direction: Direction, seed: int, size: LogprobSize | None = None
) -> Problem:
    """Log-probability of one class under a linear map."""
    size = size or LOGPROB_SIZES[torch.device(device).type]
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(size.labels, size.hidden, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(size.vocabulary, size.hidden, generator=generator) * size.hidden**-0.5
    weight = weight.to(device, dtype)
    targets = torch.randint(size.vocabulary, (size.labels,), generator=generator).to(device)
    grad = torch.randn(size.labels, generator=generator).to(device)

    def naive() -> Tensor:
        logits = torch.nn.functional.linear(states, weight).float()
        return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)

    passes = 1 if direction == "forward" else 2
    return Problem(
        kernel="linear_logprob",
        direction=direction,
        size={"labels": size.labels, "hidden": size.hidden, "vocabulary": size.vocabulary},
        least_bytes=passes * (size.vocabulary + size.labels) * size.hidden * dtype.itemsize,
        forms=_forms(device, naive, lambda: linear_logprob(states, weight, targets), states, grad, direction),
    )


def _forms(
    device: str,
    naive: Callable[[], Tensor],
    fused: Callable[[], Tensor],
    leaf: Tensor,
    grad: Tensor,
    direction: Direction,
) -> dict[str, Callable[[], object]]:
    """The naive form, and the operation in every implementation that the device can run."""
    forms = {"naive": _directed(naive, leaf, grad, direction)}
    for implementation in implementations(device):
        forms[implementation] = _in(implementation, _directed(fused, leaf, grad, direction))
    return forms


def _in(implementation: Implementation, run: Callable[[], object]) -> Callable[[], object]:
    def inside() -> object:
        with forced(implementation):
            return run()

    return inside


def _directed(
    run: Callable[[], Tensor], leaf: Tensor, grad: Tensor, direction: Direction
) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return run()

    def both() -> object:
        leaf.grad = None
        run().backward(grad)
        return leaf.grad

    return forward if direction == "forward" else both


PROBLEMS: tuple[Callable[..., Problem], ...] = (interleave_problem, logprob_problem)


def implementations(device: str) -> tuple[Implementation, ...]:
    """The implementations of an operation that a device can run at speed."""
    if torch.device(device).type == "cuda" and find_spec("triton") is not None:
        return ("reference", "triton")
    return ("reference",)


def runs_of(device: str, repeats: int) -> int:
    """How often `measure_kernels` calls `progress`."""
    return len(PROBLEMS) * len(DIRECTIONS) * (1 + len(implementations(device))) * (repeats + 1)


def measure_kernels(
    device: str,
    dtype: str,
    repeats: int,
    meter: Meter,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    sizes: Sequence[Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """One case for the copy and one per operation and direction, each as soon as it is measured.

    Args:
        device: where.
        dtype: of weights and states.
        repeats: counted passes over all forms.
        meter: the clocks.
        seed: of the inputs.
        progress: called after each run.
        sizes: of the operations, in the order of `PROBLEMS`. Default: by type of device.
    """
    bandwidth = copy_bandwidth(device, meter)
    yield {
        "kernel": "copy",
        "device": device,
        "bytes": COPY_BYTES[torch.device(device).type],
        "bandwidth_bytes_per_second": round(bandwidth),
    }
    for make, size in zip(PROBLEMS, sizes or [None] * len(PROBLEMS), strict=True):
        for direction in DIRECTIONS:
            problem = make(device, getattr(torch, dtype), direction, seed, size)
            timings = measure_in_turn(problem.forms, repeats, meter, progress)
            yield _case(problem, timings, bandwidth, device, dtype, seed)


def _case(
    problem: Problem, timings: dict[str, Timing], bandwidth: float, device: str, dtype: str, seed: int
) -> dict[str, Any]:
    copy = problem.least_bytes / bandwidth
    return {
        "kernel": problem.kernel,
        "direction": problem.direction,
        "size": problem.size,
        "least_bytes": problem.least_bytes,
        "copy_seconds": round(copy, 8),
        "forms": {
            name: timing.as_dict() | {"share_of_copy_bandwidth": round(copy / median(timing.wall), 4)}
            for name, timing in timings.items()
        },
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "repeats": len(timings["reference"].samples),
    }
