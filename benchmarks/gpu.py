"""What memgen does on one large GPU, within eight minutes: `make bench-gpu`.

Without make, in the repository's root:

    PYTHONPATH=src python3 -m benchmarks.gpu --out FOLDER

It needs torch, triton and transformers, and beside them what the model itself imports (peft, accelerate, jaxtyping, numpy,
safetensors, filelock, psutil): no Lightning, no MLflow, nothing that reads configuration, and no
installation of memgen. The first part needs pytest and hypothesis too; without them it says so, and the others run.

The parts, in this order, each in a process of its own, so that one that crashes takes no other along:

- `tests`: the tests that only a GPU can run (kernels compiled, recorded steps, bfloat16), file by file.
- `decoding`: the shape of Qwen2.5-1.5B with random weights in bfloat16, 128 prompt and 128 new tokens, batch 32, 8, 1 and
  128: our engine without and with memory (K = 8, cap 5), with steps of a fixed shape and without, Hugging Face's `generate`
  with a growing and with a static cache. `x floor` is the time over that of reading the weights, and half of the full KV
  cache, once per step at the bandwidth of a large copy.
- `training`: time and peak memory of a weaver SFT step and of a GRPO update, 8 x 2,048 tokens, against a plain PEFT LoRA
  step; and one whole GRPO step, rollout and update, on 8 answers to one prompt.
- `kernels`: each operation in plain torch and in Triton, against a large copy's bandwidth.
- `compiled`: Hugging Face's static cache once more, with the step compiled.

How results leave: as files in FOLDER, one JSON per part that is replaced as a whole after every case, so a run that is cut
keeps what it has; `tests.log`, pytest's output; and `summary.json`, which parts ran to their end and which goals were met.
These are at most seven files of some kilobytes and no folder below FOLDER. Each case is also a line on standard output. So
a runner that only brings back a folder, or only the output, brings back everything. A part ends when its time is up, and
the whole after `--seconds`. Exit status 0 only if every part ran to its end and nothing failed.

`--device cpu --tiny` rehearses all of it in seconds, on a small model: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from memgen.bench.generation import (
    Decoding,
    DecodingWorkload,
    InsertionMode,
    cache_bytes,
    describe,
    insertions,
    step_bytes_floor,
)
from memgen.bench.kernels import InterleaveSize, LogprobSize, copy_bandwidth, measure_kernels
from memgen.bench.record import Recorder
from memgen.bench.shapes import ModelSettings, memgen_components, plain_model, random_ids, weight_bytes
from memgen.bench.timing import ProcessMeter, Timing, measure_in_turn
from memgen.bench.training import MemGenStep, PlainStep, TrainingStep, TrainingWorkload, policy_gradient
from memgen.files import write_whole
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.trigger import ConstantTrigger
from memgen.types import Generation

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 450.0
"""Of the whole; with what a process needs to start and end, less than eight minutes."""
LIMITS = {"tests": 110.0, "decoding": 190.0, "training": 80.0, "kernels": 40.0, "compiled": 60.0}
"""Most seconds of each part, in their order. What one leaves over goes to the later ones that need it."""
TEST_FILES = ("tests/generation/test_static_step.py", "tests/parity/test_optimisations.py", "tests/kernels")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    model: ModelSettings
    batches: tuple[int, ...]
    """Of decoding; the first is the one that goals are about."""
    decoding: DecodingWorkload
    """Of one row."""
    training: TrainingWorkload
    repeats: int
    """Counted passes behind the one that warms up."""
    kernels: tuple[Any, ...] | None = None
    """Sizes of the operations; None: the device's."""
    tests: tuple[str, ...] = TEST_FILES

    @classmethod
    def of(cls, device: str, *, tiny: bool) -> Sizes:
        """Those of a GPU, or of a rehearsal."""
        if tiny:
            return cls(
                model=ModelSettings(model="small", device=device, latents=2, cap=2, spacing=4),
                batches=(2, 1),
                decoding=DecodingWorkload(1, 6, 8),
                training=TrainingWorkload(2, 32, 8, 3),
                repeats=1,
                kernels=(
                    InterleaveSize(rows=2, length=20, points=2, hidden=8, vocabulary=32),
                    LogprobSize(16, 8, 32),
                ),
                tests=TEST_FILES[1:2],
            )
        return cls(
            model=ModelSettings(model="qwen2.5-1.5b", device=device, dtype="bfloat16"),
            batches=(32, 8, 1, 128),
            decoding=DecodingWorkload(1, 128, 128),
            training=TrainingWorkload(8, 2048, 256, 6),
            repeats=3,
        )


@dataclass(frozen=True)
class Session:
    """One part: what it measures, and where its cases go."""

    sizes: Sizes
    recorder: Recorder
    log: Path

    @property
    def meter(self) -> ProcessMeter:
        """The clocks of the device."""
        return ProcessMeter(self.sizes.model.device)

    def attempt(self, case: str, work: Callable[[], dict[str, Any]]) -> None:
        """Records a case; one that raises is recorded too, and the next goes on."""
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever one case runs into, the others are still to be measured
            found = raised(error)
        self.add({"case": case, **found})
        if self.meter.cuda:
            torch.cuda.empty_cache()

    def add(self, case: dict[str, Any]) -> None:
        """Records a case and shows it."""
        self.recorder.add(case)
        print(json.dumps(case), flush=True)


def raised(error: Exception) -> dict[str, Any]:
    """An error as a case has it."""
    text = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}", "traceback": text[-2000:]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all parts, or one.

    Returns:
        The exit status: 0 only if every part ran to its end and nothing failed.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument(
        "--device", default="cuda", metavar="NAME", help="cuda, or cpu for a rehearsal (cuda)"
    )
    parser.add_argument("--tiny", action="store_true", help="a small model and small sizes: a rehearsal")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of the whole ({SECONDS:.0f})")
    parser.add_argument("--part", choices=LIMITS, help="measure this part here, in this process")
    options = parser.parse_args(argv)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: this machine has no CUDA device that torch can use")
    if not on_gpu and not options.tiny:
        parser.error("the full sizes take hours on a CPU; add --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return run_part(options.part, options.out, options.device, tiny=options.tiny)
    parts = [part for part in options.parts if on_gpu or part != "compiled"]
    given = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    # A rehearsal's parts need little more than the start of a process, which a busy machine may take its time for.
    limits = {part: options.seconds if options.tiny else LIMITS[part] for part in parts}
    return run_parts(limits, options.out, given, options.seconds)


def run_parts(limits: Mapping[str, float], out: Path, given: Sequence[str], seconds: float) -> int:
    """Runs parts one after another, each in a process of its own.

    Args:
        limits: most seconds of each, by its name.
        out: folder of the results.
        given: arguments for every part.
        seconds: of all of them together.

    Returns:
        The exit status.
    """
    begin = time.monotonic()
    ended: dict[str, str] = {}
    for part in limits:
        (out / f"{part}.json").unlink(missing_ok=True)
    for part, limit in limits.items():
        left = seconds - (time.monotonic() - begin)
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--part",
            part,
            "--out",
            str(out.resolve()),
            *given,
        ]
        ended[part] = limited(command, min(left, limit)) if left > 0 else "not begun: no time left"
        summary = summarise(out, ended)
        write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary), flush=True)
    good = all(end == "finished" for end in ended.values()) and not summary["failures"]
    return 0 if good else 1


def limited(command: Sequence[str], seconds: float) -> str:
    """Runs a command for so long at most, and ends all processes that it has started with it.

    Returns:
        How it ended: finished, cut, or its exit status.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"cut after {seconds:.0f} s"
        raise
    return "finished" if status == 0 else f"exit status {status}"


def run_part(part: str, out: Path, device: str, *, tiny: bool) -> int:
    """Measures a part in this process.

    Returns:
        The exit status.
    """
    command = shlex.join(["python", "-m", "benchmarks.gpu", "--part", part, "--device", device])
    recorder = Recorder(out / f"{part}.json", command, device)
    session = Session(Sizes.of(device, tiny=tiny), recorder, out / f"{part}.log")
    try:
        PARTS[part](session)
    except Exception as error:  # noqa: BLE001 - kept with the cases before it
        session.add({"case": part, **raised(error)})
        return 1
    recorder.finish()
    return 0


# tests


def run_tests(session: Session) -> None:
    """The tests that are marked `gpu`."""
    session.log.unlink(missing_ok=True)
    for file in session.sizes.tests:
        session.attempt(file, lambda file=file: gpu_tests(file, session.log))  # type: ignore[misc]


def gpu_tests(file: str, log: Path) -> dict[str, Any]:
    """Runs the GPU tests of a file or folder; a failure is no error of the case.

    Raises:
        RuntimeError: if pytest cannot run them.
    """
    # The hook that checks shapes is left out (it needs beartype), and so are warnings as errors: other versions of
    # libraries give other warnings.
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-o", "addopts=", "-o", "filterwarnings=",
        "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "-rfE", "--tb=short", file,
    ]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    with log.open("a") as written:
        written.write(f"{shlex.join(command)}\n{done.stdout}\n")
    counts = counted(done.stdout)
    if not counts:
        raise RuntimeError(f"pytest gave no summary (exit status {done.returncode}): {done.stdout[-500:]}")
    named = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return {**counts, "failures": named, "seconds": round(time.monotonic() - begin, 1)}


def counted(output: str) -> dict[str, int]:
    """What pytest's last line counts."""
    last = (output.strip().splitlines() or [""])[-1]
    return {
        name.rstrip("s"): int(count)
        for count, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    }


# decoding


def measure_decoding(session: Session) -> None:
    """All sides at each batch size."""
    sizes, meter = session.sizes, session.meter
    decoding = Decoding(sizes.model)
    bandwidth = copy_bandwidth(sizes.model.device, meter)
    session.add({"case": "copy", "bandwidth_bytes_per_second": round(bandwidth)})
    for batch in sizes.batches:
        workload = replace(sizes.decoding, batch=batch)
        for static, mode in ((s, m) for s in ("on", "off") for m in ("never", "always")):
            session.attempt(
                f"{batch} {mode}, static step {static}",
                lambda w=workload, m=mode, s=static: our_decoding(session, decoding, w, m, s, bandwidth),  # type: ignore[misc]
            )
        for static_cache in (False, True):
            session.attempt(
                f"{batch} Hugging Face, {'static' if static_cache else 'growing'} cache",
                lambda w=workload, s=static_cache: plain_decoding(  # type: ignore[misc]
                    session, decoding, w, static=s, compiled=False
                ),
            )


def our_decoding(
    session: Session,
    decoding: Decoding,
    workload: DecodingWorkload,
    mode: InsertionMode,
    static: Any,
    bandwidth: float,
) -> dict[str, Any]:
    """Our engine, with or without memory."""
    kept: list[Generation] = []

    def run() -> None:
        kept[:] = [decoding.ours(workload, decoding.models[mode], static_step=static)]

    timing = timed(session, run)
    (generation,) = kept
    latents = insertions(generation) * decoding.settings.latents
    cache = cache_bytes(decoding.settings, generation.work, latents)
    floor = step_bytes_floor(weight_bytes(decoding.plain), cache, workload.new, bandwidth)
    return {
        "side": "ours",
        "memory": mode,
        "static_step": static,
        **rates(workload.batch * workload.new, timing),
        "floor_seconds": round(floor, 6),
        "x_floor": round(median(timing.wall) / floor, 4),
        "insertions": insertions(generation),
        "work": vars(generation.work),
        **workload_of(decoding.settings, workload, timing),
    }


def plain_decoding(
    session: Session, decoding: Decoding, workload: DecodingWorkload, *, static: bool, compiled: bool
) -> dict[str, Any]:
    """Hugging Face's `generate`."""
    timing = timed(session, lambda: decoding.huggingface(workload, static=static, compiled=compiled))
    return {
        "side": "huggingface",
        "cache": "static" if static else "growing",
        "compiled": compiled,
        **rates(workload.batch * workload.new, timing),
        **workload_of(decoding.settings, workload, timing),
    }


def measure_compiled(session: Session) -> None:
    """Hugging Face's static cache with a compiled step, at the first batch and at the smallest."""
    decoding = Decoding(session.sizes.model)
    batches = session.sizes.batches
    for batch in (batches[0], min(batches)):
        workload = replace(session.sizes.decoding, batch=batch)
        session.attempt(
            f"{batch} Hugging Face, static cache, compiled",
            lambda w=workload: plain_decoding(session, decoding, w, static=True, compiled=True),  # type: ignore[misc]
        )


# training


def measure_training(session: Session) -> None:
    """Training steps of both sides, and a whole GRPO step."""
    sides: dict[str, type[TrainingStep]] = {"ours": MemGenStep, "plain": PlainStep}
    for stage in ("sft", "grpo"):
        for side, make in sides.items():
            session.attempt(f"{stage} {side}", lambda s=stage, m=make: training_step(session, s, m))  # type: ignore[misc]
    session.attempt("grpo step ours", lambda: grpo_step(session))


def training_step(session: Session, stage: Any, make: type[TrainingStep]) -> dict[str, Any]:
    """Forward and backward of one side. GRPO's rows answer one prompt."""
    work = session.sizes.training
    work = replace(work, group=work.batch) if stage == "grpo" else work
    step = make(session.sizes.model, work)
    held = session.meter.held()
    timing = timed(session, lambda: step.step(stage))
    case = {
        "stage": stage,
        **rates(work.batch * work.length, timing),
        "peak_above_weights_bytes": above(timing, held),
        **vars(work),
        "repeats": len(timing.samples),
    }
    return {**case, "work": vars(step.done)} if isinstance(step, MemGenStep) else case


def grpo_step(session: Session) -> dict[str, Any]:
    """A rollout of one group, and an update on it under its own plan."""
    work = replace(session.sizes.training, group=session.sizes.training.batch)
    settings = replace(session.sizes.model, cap=work.points - 1)
    model = memgen_components(plain_model(settings), settings).model(ConstantTrigger(1.0))
    model.train_only(model.weaver)
    held = session.meter.held()
    kept: list[Generation] = []
    sampling = GenerationSettings(
        max_new_tokens=work.length - work.prompt, temperature=1.0, group_size=work.group
    )

    def rollout() -> None:
        kept[:] = [generate(model, random_ids(1, work.prompt, settings), sampling)]

    def update() -> None:
        batch = replace(
            kept[0].as_batch(),
            group=torch.zeros(work.batch, dtype=torch.int64),
            shared=torch.full((work.batch,), work.prompt),
        )
        logprobs, _ = model.label_logprobs(batch, kept[0].plan)
        advantages = torch.linspace(-1, 1, work.batch, device=model.device)
        policy_gradient(
            logprobs, advantages.repeat_interleave(len(logprobs) // work.batch, output_size=len(logprobs))
        ).backward()
        model.zero_grad(set_to_none=True)

    rolled, updated = timed(session, rollout), timed(session, update)
    return {
        "rollout": rates(work.batch * sampling.max_new_tokens, rolled),
        "update": rates(work.batch * work.length, updated),
        "wall_seconds_median": round(median(rolled.wall) + median(updated.wall), 6),
        "peak_above_weights_bytes": above(updated, held),
        "insertions": insertions(kept[0]),
        **vars(work),
        "repeats": len(rolled.samples),
    }


# kernels


def measure_operations(session: Session) -> None:
    """Every operation in all its forms."""
    sizes = session.sizes
    for case in measure_kernels(
        sizes.model.device, sizes.model.dtype, 2 * sizes.repeats + 1, session.meter, sizes=sizes.kernels
    ):
        session.add({"case": " ".join(case[key] for key in ("kernel", "direction") if key in case), **case})


# Shared by the parts


def timed(session: Session, run: Callable[[], object]) -> Timing:
    """A pass that is not counted, and the counted ones."""
    return measure_in_turn({"run": run}, session.sizes.repeats, session.meter)["run"]


def rates(tokens: int, timing: Timing) -> dict[str, Any]:
    """Times and tokens per second."""
    return {**timing.as_dict(), "tokens_per_second": round(tokens / median(timing.wall), 1)}


def above(timing: Timing, held: int | None) -> int | None:
    """Peak memory above what was held before."""
    return None if held is None or timing.peak_bytes is None else timing.peak_bytes - held


def workload_of(settings: ModelSettings, workload: DecodingWorkload, timing: Timing) -> dict[str, Any]:
    """Settings of a decoding case."""
    return {"batch": workload.batch, **describe(settings, workload, len(timing.samples))}


PARTS: dict[str, Callable[[Session], None]] = {
    "tests": run_tests,
    "decoding": measure_decoding,
    "training": measure_training,
    "kernels": measure_operations,
    "compiled": measure_compiled,
}


# The summary


def summarise(out: Path, ended: dict[str, str]) -> dict[str, Any]:
    """How the parts ended, what failed, and which goals were met, from the parts' files.

    Args:
        out: their folder.
        ended: how each part ended.
    """
    cases = {part: read_cases(out / f"{part}.json") for part in ended}
    failures = [
        f"{part}: {case['case']}: {case['error']}"
        for part, found in cases.items()
        for case in found
        if "error" in case
    ]
    failures += [name for case in cases.get("tests", []) for name in case.get("failures", [])]
    return {
        "parts": ended,
        "cases": {part: len(found) for part, found in cases.items()},
        "failures": failures,
        "goals": [*decoding_goals(cases.get("decoding", [])), *kernel_goals(cases.get("kernels", []))],
    }


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a part; none if it has left no file."""
    if not path.is_file():
        return []
    cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    return cases


def decoding_goals(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Memory on at 85 % of memory off, at every batch; within twice the floor at the first batch."""
    ours = {(c["batch"], c["memory"]): c for c in cases if c.get("static_step") == "on" and "x_floor" in c}
    goals = []
    for batch in dict.fromkeys(batch for batch, _ in ours):
        if {(batch, "never"), (batch, "always")} <= ours.keys():
            share = ours[batch, "always"]["tokens_per_second"] / ours[batch, "never"]["tokens_per_second"]
            goals.append(_goal(f"memory on / memory off, batch {batch}", share, 0.85))
    if ours:
        first = next(iter(ours.values()))
        goals += [
            _goal(f"time over the floor, memory {mode}, batch {batch}", case["x_floor"], 2.0, most=True)
            for (batch, mode), case in ours.items()
            if batch == first["batch"]
        ]
    return goals


def kernel_goals(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The latent insertion at 80 % of a copy's bandwidth; the other operation is a matrix product."""
    return [
        _goal(
            f"interleave {case['direction']}, share of copy bandwidth",
            case["forms"]["triton"]["share_of_copy_bandwidth"],
            0.8,
        )
        for case in cases
        if case.get("kernel") == "interleave" and "triton" in case["forms"]
    ]


def _goal(name: str, value: float, wanted: float, *, most: bool = False) -> dict[str, Any]:
    met = value <= wanted if most else value >= wanted
    return {
        "goal": name,
        "value": round(value, 4),
        "wanted": f"{'<=' if most else '>='} {wanted}",
        "met": met,
    }


if __name__ == "__main__":
    sys.exit(main())
