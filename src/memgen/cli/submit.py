"""`memgen submit`: `memgen fit` as a SLURM job.

The configuration is checked first. Script, configuration files and log are kept in the run's folder, so later edits
of the originals do not change a waiting job. Everything that is not an option below goes to `memgen fit`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from typing_extensions import override

from memgen.cli import slurm
from memgen.cli.config import Request
from memgen.cli.errors import UsageError, nearest
from memgen.cli.options import take_options
from memgen.cli.slurm import (
    DEFAULT_SITE,
    JOB_FILE,
    JOB_FOLDER,
    OVERRIDES,
    POINTS,
    SCRIPT,
    Job,
    Site,
    Submission,
)
from memgen.files import timed_path
from memgen.running.interrupt import seconds_of

if TYPE_CHECKING:
    from memgen.tracking.run_description import RunDescription
    from memgen.tracking.run_logger import RunLogger

VALUED = ("--nodes", "--gpus", "--tasks", "--time", "--array", "--sbatch", "--site", "--name", "--run")
FLAGS = ("--dry-run", "--test")
RUN_LOGGER = "memgen.tracking.run_logger.run_logger"


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str]) -> int:
    """Submits a job.

    Args:
        argv: the arguments after `memgen submit`.

    Returns:
        The exit status.

    Raises:
        UsageError: if an option or the configuration is refused, or SLURM refuses the job.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        _parser().print_help()
        return 0
    own, rest = take_options(joined(argv), VALUED, FLAGS)
    _require_known(rest)
    options = _parser().parse_args(own)
    site = slurm.read_site(options.site) if options.site else _default_site()
    extra = tuple(shlex.split(options.sbatch or ""))
    slurm.require_free([*site.sbatch, *extra])
    try:
        limit = seconds_of(options.time)
    except ValueError as error:
        raise UsageError(f"--time: {error}") from error
    if limit < 2 * site.warn_seconds:
        raise UsageError(
            f"--time {options.time} leaves less than half of it for work before SLURM's warning, {site.warn_seconds} s "
            "before the end; raise --time or lower warn_seconds of the site"
        )
    tasks = options.tasks or options.gpus or 1
    if options.gpus and options.tasks not in (None, options.gpus):
        raise UsageError(
            f"a process has one GPU: leave --tasks {options.tasks} out, or set it to --gpus {options.gpus}"
        )
    machine = (
        f"--trainer.num_nodes={options.nodes}",
        f"--trainer.devices={tasks}",
        f"--trainer.accelerator={'gpu' if options.gpus else 'cpu'}",
    )
    request = Request.from_argv([*rest, *machine])
    points = slurm.read_sweep(options.array) if options.array else None
    description = check_points(request, [*rest, *machine], points)

    stage = description.resolved["model"]["class_path"].split(".")
    name = options.name or (stage[-2] if len(stage) > 1 else stage[-1])
    run = (options.run or _new_folder(_root(description.resolved), name, dry=options.dry_run)).absolute()
    job = Job(
        name=name,
        run=run,
        work=Path.cwd(),
        nodes=options.nodes,
        gpus=options.gpus,
        tasks=tasks,
        time=options.time,
        arguments=(*_copied(request, rest, run), *machine),
        points=points,
        sbatch=extra,
        submitted=shlex.join(["memgen", "submit", *argv]),
        tests=options.test,
    )
    if options.dry_run:
        print(_script(job, site), end="")
        print(f"# {run / JOB_FOLDER / SCRIPT}: not written, nothing submitted (--dry-run)", file=sys.stderr)
        return 0
    return _submit(job, site, request, description)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="memgen submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="memgen submit --config FILE [--config OVERLAY ...] [--key value ...] --time LIMIT [options]",
    )
    parser.add_argument("--nodes", type=_count(1), default=1, help="default: %(default)s")
    parser.add_argument(
        "--gpus", type=_count(0), default=0, help="of EACH node, a process for each; default: none"
    )
    parser.add_argument("--tasks", type=_count(1), help="processes of each node without GPUs; default: 1")
    parser.add_argument(
        "--time", required=True, help="time limit of the job, as sbatch takes it; it is requeued"
    )
    parser.add_argument("--array", type=Path, help="a sweep: a file with a line of overrides for each point")
    parser.add_argument("--sbatch", help='more options of sbatch, in one text: --sbatch "--exclusive -w n1"')
    parser.add_argument(
        "--site", type=Path, help=f"the cluster's options; default: {DEFAULT_SITE} if it exists"
    )
    parser.add_argument("--name", help="of job and folder; default: the stage")
    parser.add_argument("--run", type=Path, help="the run's folder; one that has checkpoints goes on")
    parser.add_argument(
        "--test", action="store_true", help="test the trained checkpoint afterwards; records: RUN/test"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print the script and stop")
    return parser


def joined(argv: list[str]) -> list[str]:
    """`--sbatch TEXT` as `--sbatch=TEXT`: the text looks like an option itself."""
    joined: list[str] = []
    remaining = list(argv)
    while remaining:
        token = remaining.pop(0)
        joined.append(f"{token}={remaining.pop(0)}" if token == "--sbatch" and remaining else token)
    return joined


def _count(least: int) -> Any:
    def count(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a number, at least {least}, got {text!r}")
        return number

    return count


def _require_known(rest: list[str]) -> None:
    """Refuses unknown options: those of the configuration have a dot or are listed here."""
    for token in rest:
        name = token.partition("=")[0]
        plain = name.startswith("--") and "." not in name
        if plain and name not in (
            "--config",
            "--checkpoint",
            "--seed_everything",
            "--ckpt_path",
            "--model",
            "--data",
        ):
            known = (*VALUED, *FLAGS, "--config", "--checkpoint")
            guess = nearest(name, known)
            raise UsageError(
                f"unknown option {name}; "
                + (f"did you mean {guess}?" if guess else f"known are {', '.join(known)}")
            )


def _default_site() -> Site:
    return slurm.read_site(DEFAULT_SITE) if DEFAULT_SITE.is_file() else Site()


def check_points(
    request: Request, arguments: Sequence[str], points: Sequence[Sequence[str]] | None
) -> RunDescription:
    """Builds the configuration of the run, and of every point of a sweep.

    Raises:
        UsageError: if one is refused; it names the point.
    """
    from memgen.cli.run import describe

    description = describe(request)
    for number, point in enumerate(points or ()):
        try:
            describe(Request.from_argv([*arguments, *point]))
        except UsageError as error:
            raise UsageError(f"point {number} of the sweep ({shlex.join(point)}): {error}") from error
    return description


def _root(resolved: Mapping[str, Any]) -> Path:
    """The folder of the stage's runs."""
    for callback in (resolved.get("trainer") or {}).get("callbacks") or []:
        if isinstance(callback, dict) and callback.get("class_path", "").endswith(".AdapterCheckpoint"):
            return Path(callback["root"])
    return Path("runs")


def _new_folder(root: Path, name: str, *, dry: bool) -> Path:
    if dry:
        return root / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    return timed_path(root, f"-{name}", folder=True)


def _copied(request: Request, rest: list[str], run: Path) -> list[str]:
    """The arguments, with the files' copies in their place."""
    copies = iter(_copies(request, run).values())
    arguments: list[str] = []
    remaining = list(rest)
    while remaining:
        token = remaining.pop(0)
        if token in ("--config", "-c"):
            remaining.pop(0)
            arguments += ["--config", str(next(copies))]
        elif token.startswith("--config="):
            arguments += ["--config", str(next(copies))]
        else:
            arguments.append(token)
    return arguments


def _copies(request: Request, run: Path) -> dict[Path, Path]:
    """The path of each configuration file's copy."""
    folder = run / JOB_FOLDER / "config"
    return {path: folder / f"{index:02d}_{path.name}" for index, path in enumerate(request.files)}


def _script(job: Job, site: Site) -> str:
    command = site.command if site.command is not None else (sys.executable, "-m", "memgen.cli.main")
    return slurm.script(job, site, slurm.find_requeue_exit(site), command)


def _submit(job: Job, site: Site, request: Request, description: RunDescription) -> int:
    folder = job.run / JOB_FOLDER
    (folder / "config").mkdir(parents=True, exist_ok=True)
    for path, copy in _copies(request, job.run).items():
        shutil.copyfile(path, copy)
    for number, point in enumerate(job.points or ()):
        place = job.run / POINTS / f"{number:03d}"
        place.mkdir(parents=True, exist_ok=True)
        if any("\n" in word for word in point):
            raise UsageError(f"point {number} of the sweep has a value with a line break")
        (place / OVERRIDES).write_text("".join(f"{word}\n" for word in point), encoding="utf-8")
    record = _record(job, description)
    if job.points is not None and record is not None:
        job = Job(**{**vars(job), "parent": record[0]})
    link = None if record is None else record[1]
    path = folder / SCRIPT
    path.write_text(_script(job, site), encoding="utf-8")
    path.chmod(0o755)
    identity = slurm.sbatch(path)
    ranks = job.nodes * job.tasks
    log = job.log.replace("%j", identity).replace("%A", identity)
    count = None if job.points is None else len(job.points)
    Submission(identity, job.name, time.time(), job.nodes, ranks, count, log, link).write(job.run)
    what = f"{job.nodes} x {job.gpus} GPUs" if job.gpus else f"{job.nodes} x {job.tasks} processes"
    print(f"job {identity}: {job.name}, {what}, {job.time}" + (f", {count} points" if count else ""))
    print(f"run:    {job.run}")
    print(f"log:    {log.replace('%a', 'POINT')}")
    print(f"mlflow: {link or 'no answer now; the run makes its record when it starts'}")
    return 0


def _record(job: Job, description: RunDescription) -> tuple[str, str] | None:
    """Makes the run's record in MLflow before it starts.

    Returns:
        The record's id and its address; None if the run has no record, or MLflow does not answer.
    """
    from memgen.tracking.run_description import run_name, run_tags
    from memgen.tracking.run_file import RUN_FILE
    from memgen.tracking.run_logger import open_parent

    logger = logger_of(description.resolved)
    if logger is None:
        return None
    if (job.run / RUN_FILE).exists():
        # A run that is submitted again has one.
        earlier = Submission.read(job.run).link if (job.run / JOB_FOLDER / JOB_FILE).exists() else None
        identity = json.loads((job.run / RUN_FILE).read_text(encoding="utf-8"))["run_id"]
        return identity, earlier or f"run {identity} in {logger.address.uri}"
    if job.points is None:
        logger.describe(run_name(description), run_tags(description))
        logger.log_run_folder(job.run)
    else:
        logger = open_parent(f"{job.name} sweep of {len(job.points)}", "sweep", logger)
        logger.log_run_folder(job.run)
    identity = logger.run_id
    experiment = logger.store.experiment_id
    logger.end_as("SCHEDULED" if job.points is None else "FINISHED")
    logger.finalize()
    if identity is None:
        return None
    page = f"#/experiments/{experiment}/runs/{identity}"
    uri = logger.address.uri
    if re.match(r"https?://", uri):
        return identity, f"{uri.rstrip('/')}/{page}"
    return identity, f"http://127.0.0.1:5000/{page} (after: memgen ui --store {uri})"


def logger_of(resolved: Mapping[str, Any]) -> RunLogger | None:
    """The RunLogger that a configuration asks for, without one for the machine's load; None if it asks for none."""
    from memgen.tracking.run_logger import run_logger

    chosen = (resolved.get("trainer") or {}).get("logger")
    if isinstance(chosen, list):  # MLflow beside other trackers.
        chosen = next(
            (one for one in chosen if isinstance(one, dict) and one["class_path"] == RUN_LOGGER), False
        )
    if chosen is False:
        return None
    settings: dict[str, Any] = {}
    if isinstance(chosen, dict):
        if chosen.get("class_path") != RUN_LOGGER:
            return None
        settings = {key: value for key, value in chosen.items() if key != "class_path"}
    elif chosen not in (None, True):
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return run_logger(**{**settings, "system_seconds": 0.0})
