"""Name, tags and parameters of a run, from its configuration and from where it runs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import memgen

PARAMETER_LENGTH = 500
"""Longest parameter value that MLflow's stores accept; longer ones are truncated (config/resolved.yaml has them in full)."""


@dataclass(frozen=True)
class RunDescription:
    """Command and configuration of a run.

    Attributes:
        command: the Trainer's method.
        arguments: the command line as it was typed.
        raw: text of each configuration file as it was read, by file name, in the order of merging.
        resolved_yaml: the complete configuration, defaults included.
        resolved: the same as nested mappings.
    """

    command: str
    arguments: Sequence[str] = ()
    raw: Mapping[str, str] = field(default_factory=dict)
    resolved_yaml: str = ""
    resolved: Mapping[str, Any] = field(default_factory=dict)


def run_name(description: RunDescription) -> str:
    """Default name of a run: command (unless it trains), stage, environment, backbone, seed."""
    tags = run_tags(description)
    parts = [description.command] if description.command != "fit" else []
    parts += [tags[key] for key in ("stage", "environment", "backbone") if key in tags]
    if "seed" in tags:
        parts.append(f"seed {tags['seed']}")
    return " ".join(parts)


def model_name(description: RunDescription) -> str | None:
    """Registered model that gets a run's checkpoints as versions; None if the run does not train."""
    tags = run_tags(description)
    if description.command != "fit" or "stage" not in tags:
        return None
    name = "-".join(tags[key] for key in ("stage", "environment", "backbone") if key in tags)
    # MLflow accepts neither slashes nor colons.
    return re.sub(r"[^\w.-]+", "-", name)


def slurm_tags() -> dict[str, str]:
    """The SLURM job of this process; empty outside of SLURM."""
    names = {
        "slurm.job_id": "SLURM_JOB_ID",
        "slurm.job_name": "SLURM_JOB_NAME",
        "slurm.array_job_id": "SLURM_ARRAY_JOB_ID",
        "slurm.array_task_id": "SLURM_ARRAY_TASK_ID",
        "slurm.nodes": "SLURM_JOB_NODELIST",
        "slurm.restarts": "SLURM_RESTART_COUNT",
    }
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def run_tags(description: RunDescription) -> dict[str, str]:
    """Tags to filter runs by: stage, backbone, environment, code revision, seed, versions."""
    model = _mapping(description.resolved.get("model"))
    data = _mapping(description.resolved.get("data"))
    memgen_settings = _mapping(model.get("memgen"))
    tags = {
        "command": description.command,
        "stage": _stage_name(model.get("class_path")),
        "backbone": _mapping(memgen_settings.get("backbone")).get("name"),
        "environment": _class_name(data.get("environment")),
        "seed": description.resolved.get("seed_everything"),
        "memgen.version": memgen.__version__,
        "python.version": platform.python_version(),
        "torch.version": torch.__version__,
        "init_from": model.get("init_from"),
        **slurm_tags(),
        **git_revision(),
    }
    return {name: str(value) for name, value in tags.items() if value is not None}


def git_revision() -> dict[str, str]:
    """Git commit of the package's source and whether it has changes; empty if the source is not tracked by git."""
    source = Path(memgen.__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside a foreign repository.
    if git("ls-files", "--error-unmatch", source.name) is None:
        return {}
    revision = git("rev-parse", "HEAD")
    if revision is None:
        return {}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git.revision": revision,
        "git.dirty": "unknown" if changes is None else str(bool(changes)).lower(),
    }


def installed_packages() -> str:
    """The environment as `name==version` lines, sorted."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def flatten_parameters(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, values as text of at most 500 characters.

    Empty lists and mappings keep their name; a list's items are numbered if one of them is nested.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, list | tuple) and any(
            isinstance(item, Mapping | list | tuple) for item in value
        ):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat.update(flatten_parameters(value, f"{key}."))
        else:
            text = str(value)
            flat[key] = text if len(text) <= PARAMETER_LENGTH else f"{text[: PARAMETER_LENGTH - 3]}..."
    return flat


def _stage_name(class_path: Any) -> str | None:
    """weaver_sft for memgen.training.weaver_sft.WeaverSFT: the module is named after the stage."""
    if not isinstance(class_path, str):
        return None
    parts = class_path.split(".")
    return parts[-2] if len(parts) > 1 else parts[-1]


def _class_name(value: Any) -> str | None:
    """Name of the class that a setting chooses, or the setting itself if it is a name."""
    if isinstance(value, Mapping):
        value = value.get("class_path")
    return None if value is None else str(value).rpartition(".")[2]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
