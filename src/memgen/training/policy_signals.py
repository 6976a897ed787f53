"""Metrics of a reinforcement stage's rollouts and updates. Functions that reduce over ranks must be called by all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from memgen.distributed.collectives import objects_of_all_ranks, over_ranks, stats_over_ranks
from memgen.generation.rollout import Rollouts
from memgen.model.memgen import MemGenModel
from memgen.objectives.policy_gradient import read_stats
from memgen.tracking.signals import (
    latent_metrics,
    memory_metrics,
    rollout_means,
    rollout_sums,
    values_of_some,
)
from memgen.types import Trajectory


def rollout_metrics(rollouts: Rollouts, model: MemGenModel) -> dict[str, float]:
    """Means over the episodes of all ranks, sizes of this rank's latents, times and memory. Reduces over ranks."""
    sums = stats_over_ranks(rollout_sums(rollouts.trajectories, model.weaver.config))
    metrics = rollout_means(sums) | _means_of_some(rollouts.trajectories)
    seconds = max(rollouts.seconds, 1e-9)
    metrics["perf/rollout_tokens_per_second"] = float(sums.get("tokens", torch.tensor(0.0))) / seconds
    metrics["perf/environment_seconds"] = rollouts.environment_seconds
    if rollouts.latents is not None:
        blocks = [block for row in rollouts.latents for block in row]
        metrics |= latent_metrics(blocks, model.reasoner.backbone.embedding)
    return metrics | memory_metrics()


def _means_of_some(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means and spreads of what only some episodes have, over all ranks: they may have seen other names."""
    mine = values_of_some(trajectories)
    names = sorted({name for found in objects_of_all_ranks(sorted(mine)) for name in found})
    if not names:
        return {}
    totals = [
        [sum(values), sum(v * v for v in values), float(len(values))]
        for values in (mine.get(name, []) for name in names)
    ]
    metrics: dict[str, float] = {}
    for name, (total, squares, count) in zip(
        names, over_ranks(torch.tensor(totals, dtype=torch.float64), "sum").tolist(), strict=True
    ):
        mean = total / count
        metrics |= {name: mean, f"{name}_std": max(0.0, squares / count - mean * mean) ** 0.5}
    return metrics


def update_metrics(stats: dict[str, Tensor], *, rollout_weights: bool) -> dict[str, float]:
    """Metrics of an update from a micro-batch's statistics. Reduces over ranks.

    Args:
        stats: of `memgen.objectives.policy_gradient.policy_loss`.
        rollout_weights: whether the update starts from the weights that rolled out: later in a cycle they have moved,
            and the difference of log-probabilities is no longer the engine's.

    Returns:
        Empty if no rank has a trained unit.
    """
    values = read_stats(stats_over_ranks(stats))
    if "ratio" not in values:
        return {}
    drift = {name: values.pop(name) for name in ("drift", "drift_max") if name in values}
    metrics = {f"train/{name}": value for name, value in values.items() if name not in ("tokens", "episodes")}
    if rollout_weights:
        metrics |= {f"rollout/logprob_{name}": value for name, value in drift.items()}
    return metrics


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """Norm of all gradients together; None if the strategy keeps them to itself (DeepSpeed)."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return None
    return float(torch.stack([grad.detach().float().norm() for grad in grads]).norm())


@final
class UpdateSpeed:
    """Times training steps from the end of the rollout to the end of the optimizer step, and counts their tokens."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._seconds = 0.0
        self._tokens = 0

    def begin(self, trajectories: Sequence[Trajectory]) -> None:
        """Starts the clock of a training step on these episodes."""
        self._began = time.perf_counter()
        self._tokens += sum(trajectory.tokens for trajectory in trajectories)

    def end(self) -> None:
        """Stops the clock."""
        if self._began is not None:
            self._seconds += time.perf_counter() - self._began
            self._began = None

    def read(self) -> float | None:
        """The agent's tokens a second since the last reading, over all ranks; None before the first update.

        Observations do not count. Reduces over ranks.
        """
        tokens = over_ranks(torch.tensor([float(self._tokens)], dtype=torch.float64), "sum")
        seconds = over_ranks(torch.tensor([self._seconds], dtype=torch.float64), "max")
        self._seconds, self._tokens = 0.0, 0
        return float(tokens / seconds) if seconds > 0 else None
