"""What a command plays: the agent and its task as they were configured, and where the records go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memgen.data import EnvironmentData
from memgen.generation.rollout import EpisodeSettings
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenConfig


@dataclass(frozen=True)
class Subject:
    """The agent, its task, and the place of its records.

    Attributes:
        memgen: the model.
        data: the items; its test split is played.
        generation: sampling settings.
        episodes: limits of episodes.
        init_from: a checkpoint directory or an asset's name; None: a new weaver.
        environment: the environment's settings, so that others are noticed.
        resolve_asset: turns an asset's name into a directory.
        root: the folder of runs.
        out: another folder for the records than the command's own below `root`.
    """

    memgen: MemGenConfig
    data: EnvironmentData
    generation: GenerationSettings
    episodes: EpisodeSettings
    init_from: str | None
    environment: Mapping[str, Any]
    resolve_asset: Callable[[str], str]
    root: Path
    out: Path | None = None
