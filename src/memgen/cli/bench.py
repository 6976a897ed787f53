"""`memgen bench`: cost of latent memory in time and space, against plain work measured in the same process."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memgen.cli.errors import UsageError

if TYPE_CHECKING:
    from memgen.bench.record import Recorder
    from memgen.bench.shapes import ModelSettings
    from memgen.bench.tables import Rows

EXAMPLES = """\
examples:
  memgen bench generation                                    # small model, batch 1, 8 and 32
  memgen bench generation --model small medium --batch 8 --memory always --json bench.json
  memgen bench training --model small medium                 # a weaver step against a plain LoRA step
  memgen bench memory --batch 8 32                           # peak memory, each side in its own process
  memgen bench kernels                                       # fused operations against plain torch
  memgen bench generation --model qwen2.5-1.5b --device cuda --dtype bfloat16 --batch 1 8 32 128

Models have real shapes and random weights. Every ratio is to plain Hugging Face work on the same weights, measured in
turn with ours; 1.3 means 1.3 times plain's time. docs/performance.md explains the columns. --json keeps everything:
it is rewritten after each case, so an interrupted run leaves its finished cases and "complete": false.
"""


@dataclass(frozen=True)
class _Session:
    """Options of the command, and where results and progress go."""

    options: argparse.Namespace
    recorder: Recorder
    tick: Callable[[], None]

    def settings(self, model: str) -> ModelSettings:
        """The model as the options ask for it."""
        from memgen.bench.shapes import ModelSettings

        options = self.options
        return ModelSettings(
            model=model,
            device=options.device,
            dtype=options.dtype,
            seed=options.seed,
            **{name: getattr(options, name) for name in ("latents", "cap") if hasattr(options, name)},
        )


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if the device is absent, or the model is too large for it.
        ValueError: if a model or size cannot be used.
    """
    options = _parser().parse_args(argv)

    import torch
    from rich.console import Console

    from memgen.bench.record import Recorder
    from memgen.bench.tables import notes, table

    _check(options)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    recorder = Recorder(options.json, shlex.join(["memgen", "bench", *argv]), options.device)
    kind: _Kind = options.kind
    try:
        with _progress(kind.runs(options)) as tick:
            kind.measure(_Session(options, recorder, tick))
    except KeyboardInterrupt:
        if options.json is not None and recorder.cases:
            print(f"finished cases kept in {options.json}: {len(recorder.cases)}", file=sys.stderr)
        raise
    finally:
        torch.set_num_threads(before)
    # Where output goes to a file or a pipe there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 100)
    for title, rows in kind.tables(options, recorder.cases):
        console.print(table(title, rows))
    for note in [*kind.remarks(options), *notes(recorder.cases)]:
        console.print(f"Note: {note}", highlight=False)
    if options.json is not None:
        console.print(f"Figures: {options.json}")
    return 0


@dataclass(frozen=True)
class _Kind:
    """One benchmark."""

    runs: Callable[[argparse.Namespace], int]
    """How many times `tick` will be called."""
    measure: Callable[[_Session], None]
    tables: Callable[[argparse.Namespace, list[dict[str, Any]]], list[tuple[str, Rows]]]
    remarks: Callable[[argparse.Namespace], list[str]] = lambda options: []


def _check(options: argparse.Namespace) -> None:
    """Refuses options that would fail later, or take hours.

    Raises:
        UsageError: saying what to change.
    """
    import torch

    from memgen.bench.shapes import find_shape

    if options.threads < 1 or options.repeats < 1:
        raise UsageError(
            f"--threads and --repeats must be at least 1, got {options.threads} and {options.repeats}"
        )
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise UsageError(f"--device {options.device} is no device; try cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {options.device}: only cpu and cuda are measured")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device}: this machine has no CUDA device that torch can use")
    for name in getattr(options, "model", []):
        if find_shape(name).accelerator_only and device.type == "cpu" and not options.force:
            raise UsageError(
                f"{name} is too large to be measured on a CPU; use --device cuda --dtype bfloat16, or --force"
            )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error; it disappears when the table is printed."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda: progress.advance(task)


# generation


def _measure_generation(session: _Session) -> None:
    from memgen.bench.generation import Decoding, DecodingWorkload, decoding_case, measure_decoding
    from memgen.bench.kernels import copy_bandwidth
    from memgen.bench.timing import ProcessMeter

    options, meter = session.options, ProcessMeter(session.options.device)
    bandwidth = copy_bandwidth(options.device, meter) if meter.cuda else None
    for model in options.model:
        decoding = Decoding(session.settings(model))
        for batch in options.batch:
            workload = DecodingWorkload(batch=batch, prompt=options.prompt, new=options.new)
            measured = measure_decoding(
                decoding, workload, options.memory, options.repeats, meter, session.tick
            )
            for mode in options.memory:
                session.recorder.add(decoding_case(decoding, workload, mode, measured, bandwidth))
    session.recorder.finish()


def _generation_runs(options: argparse.Namespace) -> int:
    from memgen.bench.generation import sides
    from memgen.bench.shapes import ModelSettings

    passes: int = options.repeats + 1
    own = sides(ModelSettings(device=options.device), options.memory)
    return len(options.model) * len(options.batch) * own * passes


def _generation_tables(options: argparse.Namespace, cases: list[dict[str, Any]]) -> list[tuple[str, Rows]]:
    from memgen.bench.tables import generation_rows

    title = (
        f"Decoding against plain Hugging Face generate: prompt {options.prompt}, {options.new} new tokens, "
        f"K = {options.latents}, cap {options.cap}"
    )
    return [(title, generation_rows(cases))]


GENERATION = _Kind(runs=_generation_runs, measure=_measure_generation, tables=_generation_tables)


# training


def _measure_training(session: _Session) -> None:
    from memgen.bench.timing import ProcessMeter
    from memgen.bench.training import TrainingWorkload, measure_training

    options = session.options
    for model in options.model:
        for case in measure_training(
            session.settings(model),
            TrainingWorkload(
                options.batch, options.length, options.prompt, options.points, options.group_size
            ),
            options.stage,
            options.repeats,
            ProcessMeter(options.device),
            session.tick,
            memory=not options.no_memory,
        ):
            session.recorder.add(case)
    session.recorder.finish()


def _training_tables(options: argparse.Namespace, cases: list[dict[str, Any]]) -> list[tuple[str, Rows]]:
    from memgen.bench.tables import training_rows

    title = (
        f"A training step against a plain LoRA step: {options.batch} x {options.length} tokens, "
        f"prompt {options.prompt}, {options.points} points per row"
    )
    return [(title, training_rows(cases))]


TRAINING = _Kind(
    runs=lambda options: (
        len(options.model) * len(options.stage) * 2 * (options.repeats + 1 + (not options.no_memory))
    ),
    measure=_measure_training,
    tables=_training_tables,
)


# kernels


def _measure_kernels(session: _Session) -> None:
    from memgen.bench.kernels import measure_kernels
    from memgen.bench.timing import ProcessMeter

    options = session.options
    for case in measure_kernels(
        options.device,
        options.dtype,
        options.repeats,
        ProcessMeter(options.device),
        options.seed,
        session.tick,
    ):
        session.recorder.add(case)
    session.recorder.finish()


def _kernel_tables(options: argparse.Namespace, cases: list[dict[str, Any]]) -> list[tuple[str, Rows]]:
    from memgen.bench.tables import kernel_rows

    return [(f"Fused operations on {options.device}, {options.dtype}", kernel_rows(cases))]


def _kernel_runs(options: argparse.Namespace) -> int:
    from memgen.bench.kernels import runs_of

    return runs_of(options.device, options.repeats)


def _kernel_remarks(options: argparse.Namespace) -> list[str]:
    if options.device.startswith("cuda"):
        return []
    return [
        "on a CPU only the plain-torch forms and the copy bandwidth are measured; the Triton kernels need a CUDA "
        "device (memgen bench kernels --device cuda --dtype bfloat16)"
    ]


KERNELS = _Kind(runs=_kernel_runs, measure=_measure_kernels, tables=_kernel_tables, remarks=_kernel_remarks)


# memory


def _measure_memory(session: _Session) -> None:
    from memgen.bench.generation import DecodingWorkload
    from memgen.bench.memory import measure_decoding_memory, measure_training_memory
    from memgen.bench.training import TrainingWorkload

    options = session.options
    for model in options.model:
        settings = session.settings(model)
        for batch in options.batch:
            for new in options.new:
                workload = DecodingWorkload(batch=batch, prompt=options.prompt, new=new)
                for case in measure_decoding_memory(settings, workload, session.tick):
                    session.recorder.add(case)
        for length in options.length:
            step = TrainingWorkload(
                batch=options.train_batch, length=length, prompt=min(options.prompt, length // 4)
            )
            for case in measure_training_memory(settings, step, session.tick):
                session.recorder.add(case)
    session.recorder.finish()


def _memory_runs(options: argparse.Namespace) -> int:
    from memgen.bench.memory import DECODING_SIDES

    decoding = len(options.batch) * len(options.new) * len(DECODING_SIDES)
    return len(options.model) * (decoding + 2 * len(options.length))


def _memory_tables(options: argparse.Namespace, cases: list[dict[str, Any]]) -> list[tuple[str, Rows]]:
    from memgen.bench.tables import memory_rows

    return [("Peak memory, each side in a process of its own", memory_rows(cases))]


MEMORY = _Kind(
    runs=_memory_runs,
    measure=_measure_memory,
    tables=_memory_tables,
)


# options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen bench",
        description="What memory costs, against plain work on the same weights in the same process.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(metavar="generation|training|kernels|memory", required=True)
    _generation_options(_subparser(kinds, "generation", GENERATION, "decoding with and without memory"))
    _training_options(_subparser(kinds, "training", TRAINING, "a weaver step against a plain LoRA step"))
    _subparser(kinds, "kernels", KERNELS, "fused operations against plain torch and copy bandwidth")
    _memory_options(_subparser(kinds, "memory", MEMORY, "peak memory of decoding and training"))
    return parser


def _subparser(kinds: Any, name: str, kind: _Kind, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=summary,
        description=f"Measures {summary}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(kind=kind)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write machine and cases here; always a whole file"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="counted passes (7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's CPU threads (1)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (cpu)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (float32)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs (0)")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", default=["small"], metavar="NAME", help="small, medium, qwen2.5-1.5b (small)"
    )
    parser.add_argument("--latents", type=int, default=8, metavar="K", help="latents per insertion (8)")
    parser.add_argument("--force", action="store_true", help="measure a large model on a CPU all the same")


def _generation_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="rows (1 8 32)")
    parser.add_argument(
        "--memory",
        nargs="+",
        default=["never", "always", "trigger"],
        choices=("never", "always", "trigger"),
        help="never: our engine alone; always: at every boundary; trigger: a learned one decides (all three)",
    )
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of each prompt (128)")
    parser.add_argument("--new", type=int, default=128, metavar="N", help="new tokens of each row (128)")
    parser.add_argument("--cap", type=int, default=5, metavar="N", help="insertions inside an answer (5)")


def _training_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument(
        "--stage",
        nargs="+",
        default=["sft", "grpo"],
        choices=("sft", "grpo"),
        help="sft: loss on answers; grpo: log-probabilities and a policy gradient (both)",
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows (8)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens per row (512)")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="of them the prompt's (128)")
    parser.add_argument("--points", type=int, default=6, metavar="N", help="insertions per row (6)")
    parser.add_argument(
        "--group-size",
        type=int,
        default=1,
        metavar="N",
        help="rows that answer one prompt, which is read once (1)",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")


def _memory_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], metavar="N", help="decoding (8 32)")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of each prompt (128)")
    parser.add_argument(
        "--new", type=int, nargs="+", default=[128, 256], metavar="N", help="new tokens (128 256)"
    )
    parser.add_argument("--cap", type=int, default=5, metavar="N", help="insertions inside an answer (5)")
    parser.add_argument("--train-batch", type=int, default=8, metavar="N", help="rows of a step (8)")
    parser.add_argument(
        "--length",
        type=int,
        nargs="+",
        default=[256, 512, 1024],
        metavar="N",
        help="of a step (256 512 1024)",
    )
