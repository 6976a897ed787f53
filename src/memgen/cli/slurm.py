"""SLURM: a site's options, the job script, and the states of jobs.

The script is plain bash that may be read and submitted again by hand. Its counterpart is `memgen.running.interrupt`:
exit status 75 of a run means "saved, to be continued".
"""

from __future__ import annotations

import getpass
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator

from memgen.cli.config import present
from memgen.cli.errors import UsageError, nearest
from memgen.parsing import UnknownKeyError, parse
from memgen.running.interrupt import CONTINUES, END_TIME, seconds_of

DEFAULT_SITE = Path("conf/slurm/default.yaml")
JOB_FOLDER = "slurm"
"""Folder of a run for its job: script, configuration files, job number, logs."""
JOB_FILE = "job.json"
SCRIPT = "job.sh"
POINTS = "points"
"""Folder of a sweep's run for the runs of its points."""
TEST = "test"
"""Folder of a run for the records of its test, where the job makes one."""
OVERRIDES = "overrides.txt"
"""In a point's folder: its overrides, one argument per line."""
ARRAY_TASK = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
"""The number of one point's job. One of them has the array's number as its SLURM_JOB_ID, which means the whole array."""
TIMEOUT_SECONDS = 60.0
OURS = (
    "nodes", "ntasks", "ntasks-per-node", "time", "array", "signal", "requeue", "no-requeue", "output", "open-mode",
    "export",
)  # fmt: skip
"""Options of sbatch that the script sets itself."""
SHORT = {"N": "nodes", "n": "ntasks", "t": "time", "a": "array", "o": "output"}


@dataclass(frozen=True)
class Site:
    """Options of a cluster for its job scripts; a file of `conf/slurm/`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    """Cores of each process."""
    memory: str | None = None
    """Memory of each node, as --mem takes it."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """How GPUs are requested: --gpus-per-node=8 or --gres=gpu:8."""
    gpu_type: str | None = None
    """Kind of GPU, if the cluster has several: --gpus-per-node=h200:8."""
    warn_seconds: int = 300
    """How long before the time limit SLURM warns the run. More than a step and a save take; SLURM's own clock is up to a
    minute off."""
    requeue: Literal["auto", "exit", "scontrol"] = "auto"
    """How a saved run is continued: by an exit status that the cluster requeues (RequeueExit), or by `scontrol requeue` on
    the job's first node. auto: the first if `scontrol show config` has one."""
    requeue_exit: int | None = None
    """The cluster's RequeueExit; auto finds it."""
    max_requeues: int = 100
    """Requeues after which the job fails."""
    array_parallel: int | None = None
    """Points of a sweep that run at a time; None: no limit."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch."""
    srun: tuple[str, ...] = ()
    """More options of srun, such as --container-image of pyxis."""
    setup: tuple[str, ...] = ()
    """Lines of the script before the run: modules, a virtual environment."""
    environment: Mapping[str, Annotated[str, BeforeValidator(str)]] = field(default_factory=dict)
    """Variables of the run."""
    container: tuple[str, ...] = ()
    """Prefix of the command in every task: `apptainer exec --nv IMAGE`."""
    command: tuple[str, ...] | None = None
    """How `memgen` is called on the nodes; None: by the interpreter that submits."""

    def __post_init__(self) -> None:
        for name, least in (
            ("warn_seconds", 1),
            ("max_requeues", 0),
            ("cpus_per_task", 1),
            ("array_parallel", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        if self.requeue == "exit" and self.requeue_exit is None:
            raise UsageError(
                "requeue: exit needs requeue_exit, one of the cluster's RequeueExit (scontrol show config)"
            )


def read_site(path: Path) -> Site:
    """A site's options.

    Raises:
        UsageError: if the file cannot be read, or has an option that does not exist or a value of the wrong kind.
    """
    path = present(path)
    if not path.is_file():
        others = sorted(str(found) for found in path.parent.glob("*.yaml"))
        hint = f"; there are {', '.join(others)}" if others else ""
        raise UsageError(f"{path} does not exist (--site){hint}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a site's options are a mapping of keys to values")
    try:
        return parse(Site, {str(key): value for key, value in values.items()})
    except UnknownKeyError as error:
        guess = nearest(error.key, error.known)
        meant = f"did you mean {guess}?" if guess else f"known are {', '.join(sorted(error.known))}"
        raise UsageError(f"{path}: unknown option {error.key}; {meant}") from error
    except (UsageError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Job:
    """A job to submit.

    Attributes:
        name: of the job.
        run: the run's folder, absolute.
        work: where the command runs, absolute.
        nodes: how many.
        gpus: of each node; 0: none.
        tasks: processes of each node.
        time: the limit, as --time takes it.
        arguments: of `memgen fit`, without the run's folder.
        points: of a sweep, each with its overrides; None: no sweep.
        sbatch: more options of sbatch.
        parent: MLflow run whose children the points become.
        submitted: the command line that asked for it.
        tests: whether `memgen test` scores the trained checkpoint afterwards, with its records in `TEST` of the run.
    """

    name: str
    run: Path
    work: Path
    nodes: int
    gpus: int
    tasks: int
    time: str
    arguments: tuple[str, ...]
    points: tuple[tuple[str, ...], ...] | None = None
    sbatch: tuple[str, ...] = ()
    parent: str | None = None
    submitted: str = ""
    tests: bool = False

    @property
    def log(self) -> str:
        """The log, with SLURM's place-holders."""
        return str(self.run / JOB_FOLDER / ("%A_%a.log" if self.points is not None else "%j.log"))


def require_free(options: Sequence[str]) -> None:
    """Refuses options of sbatch that the job script sets itself.

    Raises:
        UsageError: which names the option.
    """
    for option in options:
        match = re.match(r"--([\w-]+)|-(\w)", option)
        if match is None:
            continue
        name = match[1] or SHORT.get(match[2], match[2])
        if name in OURS:
            raise UsageError(
                f"--sbatch {option}: the job script sets --{name} itself; use memgen's own options "
                "(--nodes, --gpus, --tasks, --time, --array)"
            )


def script(job: Job, site: Site, requeue_exit: int | None, command: Sequence[str]) -> str:
    """The job script.

    Args:
        job: what to run.
        site: the cluster's options.
        requeue_exit: exit status that the cluster requeues; None: `scontrol requeue` on the first node.
        command: how `memgen` is called on a node.
    """
    options = _options(job, site)
    header = [
        "#!/usr/bin/env bash",
        f"# {job.submitted}",
        "# This script may be submitted again as it is: the run goes on from its last checkpoint.",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        "",
        f"cd {shlex.quote(str(job.work))}",
        *site.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()),
        "# When SLURM will end the job: the run saves itself before.",
        f"export {END_TIME}=$(( $(date +%s) + {int(seconds_of(job.time))} ))",
    ]
    if job.parent is not None:
        header.append(f"export MEMGEN_PARENT_RUN={job.parent}")
    run = shlex.quote(str(job.run))
    if job.points is None:
        header.append(f"run={run}")
    else:
        header += [
            f'run={run}/{POINTS}/$(printf %03d "$SLURM_ARRAY_TASK_ID")',
            f'mapfile -t overrides < "$run/{OVERRIDES}"',
        ]
    overrides = "" if job.points is None else ' "${overrides[@]}"'
    launch = " ".join(["srun", "--kill-on-bad-exit=0", "--wait=300", *site.srun, 'bash -c "$task" task \\'])
    words = [*site.container, *command]
    body = [
        "",
        "# A task ignores SLURM's warning until memgen listens to it; it would die of it in between.",
        'task=\'trap "" USR1; exec "$@"\'',
        "status=0",
        "# The tasks are terminated too, and end first; their status counts.",
        "trap 'true' TERM",
        launch,
        f"  {shlex.join([*words, 'fit'])} \\",
        *(f"  {line} \\" for line in _lines(job.arguments)),
        f'  --run "$run"{overrides} || status=$?',
        "",
    ]
    if job.tests:
        body += [
            'if [ "$status" -eq 0 ]; then',
            '  trained="$run/best"',
            '  [ -d "$trained" ] || trained="$run/last"',
            f"  {launch}",
            f"    {shlex.join([*words, 'test'])} \\",
            *(f"    {line} \\" for line in _lines(job.arguments)),
            f'   {overrides} --checkpoint "$trained" --records "$run/{TEST}" || status=$?',
            "fi",
            "",
        ]
    body += [
        f'if [ "$status" -eq {CONTINUES} ]; then',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {site.max_requeues} ]; then',
        f'    echo "saved, but not continued: requeued {site.max_requeues} times (max_requeues)" >&2',
        '    exit "$status"',
        "  fi",
        '  echo "saved, to be continued by job $SLURM_JOB_ID (restart $(( ${SLURM_RESTART_COUNT:-0} + 1 )))"',
    ]
    if requeue_exit is not None:
        body += [
            "  # This cluster requeues a job that ends with this status (RequeueExit).",
            f"  exit {requeue_exit}",
        ]
    else:
        body += [
            f'  scontrol requeue "{"$SLURM_JOB_ID" if job.points is None else ARRAY_TASK}"',
            "  # SLURM ends this script now.",
            "  sleep 60",
        ]
    return "\n".join([*header, *body, "fi", 'exit "$status"', ""])


def _options(job: Job, site: Site) -> list[str]:
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks}",
        f"--time={job.time}",
        f"--output={job.log}",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{site.warn_seconds}",
    ]
    if job.gpus:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        name = "gpus-per-node=" if site.gpu_option == "gpus-per-node" else "gres=gpu:"
        options.append(f"--{name}{kind}{job.gpus}")
    settings = {
        "cpus-per-task": site.cpus_per_task,
        "mem": site.memory,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
    }
    options += [f"--{name}={value}" for name, value in settings.items() if value is not None]
    if job.points is not None:
        parallel = f"%{site.array_parallel}" if site.array_parallel else ""
        options.append(f"--array=0-{len(job.points) - 1}{parallel}")
    return [*options, *site.sbatch, *job.sbatch]


def _lines(arguments: Sequence[str]) -> list[str]:
    """Arguments for a shell, an option and its value on a line of their own."""
    lines: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not lines or len(lines[-1]) > 1:
            lines.append([argument])
        else:
            lines[-1].append(argument)
    return [shlex.join(line) for line in lines]


def read_sweep(path: Path) -> tuple[tuple[str, ...], ...]:
    """The points of a sweep: a line of overrides each, written as on a command line; # begins a comment.

    Raises:
        UsageError: if the file is absent or empty, or a line cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist (--array)")
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: {error}") from error
        if words:
            points.append(tuple(words))
    if not points:
        raise UsageError(
            f"{path} has no point; write a line of overrides for each: --model.optimizer.lr 1e-4"
        )
    return tuple(points)


# Talking to SLURM


def ask(command: Sequence[str]) -> str:
    """The output of a SLURM program.

    Raises:
        UsageError: if it is not there, fails or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise UsageError(
            f"{command[0]} was not found: is this a machine of a SLURM cluster? (--dry-run needs none)"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{command[0]} did not answer within {TIMEOUT_SECONDS:.0f} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UsageError(f"{command[0]} refuses: {said[-1] if said else f'exit status {done.returncode}'}")
    return done.stdout


def find_requeue_exit(site: Site) -> int | None:
    """Exit status that the cluster requeues, if the site wants to use it and there is one."""
    if site.requeue == "scontrol":
        return None
    if site.requeue_exit is not None:
        return site.requeue_exit
    try:
        config = ask(["scontrol", "show", "config"])
    except UsageError:
        return None
    found = re.search(r"^RequeueExit\s*=\s*(\d+)", config, re.MULTILINE)
    # 0 is what a SLURM without any prints in some versions.
    return int(found[1]) if found and int(found[1]) else None


def sbatch(path: Path) -> str:
    """Submits a script.

    Returns:
        The job's number.
    """
    return ask(["sbatch", "--parsable", str(path)]).strip().split(";")[0]


def states(jobs: Sequence[str]) -> dict[str, str]:
    """States of jobs, by number (and `number_index` for the points of a sweep).

    From squeue for jobs that wait or run; from sacct, or else scontrol, for those that have ended. Unknown jobs are
    left out.
    """
    found: dict[str, str] = {}
    if not jobs:
        return found
    listing = ask(["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%F|%K|%T|%r"])
    for line in listing.splitlines():
        job, index, state, reason = (part.strip() for part in line.split("|", 3))
        text = f"{state} ({reason})" if state == "PENDING" and reason not in ("", "None") else state
        found[job if index in ("N/A", "") else f"{job}_{index}"] = text
    for job in jobs:
        if not any(key == job or key.startswith(f"{job}_") for key in found):
            found |= _ended(job)
    return found


def _ended(job: str) -> dict[str, str]:
    try:
        rows = ask(["sacct", "-n", "-P", "-X", "-j", job, "-o", "JobID,State"]).splitlines()
        return {row.split("|")[0]: row.split("|")[1] for row in rows if "|" in row}
    except UsageError:  # No accounting here, or not now.
        pass
    try:
        text = ask(["scontrol", "-o", "show", "job", job])
    except UsageError:
        return {}
    found = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobState" in values:
            index = values.get("ArrayTaskId")
            key = f"{values['ArrayJobId']}_{index}" if index else values["JobId"]
            found[key] = values["JobState"]
    return found


# The record of a submitted job


@dataclass(frozen=True)
class Submission:
    """The record of a job in its run's folder."""

    job: str
    name: str
    submitted_at: float
    nodes: int
    ranks: int
    points: int | None
    log: str
    link: str | None = None

    def write(self, run: Path) -> None:
        """Writes the record."""
        (run / JOB_FOLDER / JOB_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, run: Path) -> Submission:
        """Reads the record.

        Raises:
            UsageError: if it cannot be read.
        """
        path = run / JOB_FOLDER / JOB_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is broken: {error}") from error
