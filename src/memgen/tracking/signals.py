"""Metrics of a rollout, and warnings with advice for the user."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import final

import numpy as np
import psutil
import torch
from torch import Tensor

from memgen.model.weaver import WeaverConfig
from memgen.types import Decision, InsertionKind, Trajectory

logger = logging.getLogger(__name__)


def rollout_sums(trajectories: Sequence[Trajectory], weaver: WeaverConfig) -> dict[str, Tensor]:
    """Sums over a rank's episodes, to be reduced over ranks and passed to `rollout_means`.

    Names ending in `_min` or `_max` are reduced by minimum or maximum. Episodes with an environment error count only in
    `faults`.
    """
    valid = [t for t in trajectories if t.fault is None]
    rewards = [t.reward for t in valid]
    sums: dict[str, float] = {
        "episodes": len(valid),
        "faults": len(trajectories) - len(valid),
        "reward": sum(rewards),
        "reward_square": sum(r * r for r in rewards),
        "exact_match": sum(r >= 1.0 for r in rewards),
        "truncated": sum(t.truncated for t in valid),
        "turns": sum(len(t.turns) for t in valid),
        "tokens": sum(t.tokens for t in valid),
        "tokens_max": max((t.tokens for t in valid), default=-np.inf),
        "tokens_min": min((t.tokens for t in valid), default=np.inf),
        "insertions": sum(len(turn.insertions) for t in valid for turn in t.turns),
    }
    for kind in InsertionKind:
        asked = invoked = 0
        for t in valid:
            for turn in t.turns:
                # The decision before a turn's first token belongs to the end of the prompt.
                decisions = turn.decisions[:1] if kind == InsertionKind.PROMPT else turn.decisions[1:]
                asked += sum(d != Decision.NOT_ASKED for d in decisions)
                invoked += sum(d == Decision.INVOKE for d in decisions)
        sums[f"asked_{kind.name.lower()}"] = asked
        sums[f"invoked_{kind.name.lower()}"] = invoked
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in sums.items()}


def rollout_means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Metrics from the reduced `rollout_sums`."""
    values = {name: float(value) for name, value in sums.items()}
    count = values["episodes"]
    metrics = {"rollout/faults": values["faults"]} if values["faults"] else {}
    if not count:
        return metrics
    mean = values["reward"] / count
    metrics |= {
        "rollout/reward": mean,
        "rollout/reward_std": max(0.0, values["reward_square"] / count - mean * mean) ** 0.5,
        "rollout/exact_match": values["exact_match"] / count,
        "rollout/truncated": values["truncated"] / count,
        "rollout/turns": values["turns"] / count,
        "rollout/tokens": values["tokens"] / count,
        "rollout/tokens_max": values["tokens_max"],
        "rollout/tokens_min": values["tokens_min"],
        "rollout/insertions": values["insertions"] / count,
    }
    asked, invoked = 0.0, 0.0
    for kind in InsertionKind:
        name = kind.name.lower()
        asked += values[f"asked_{name}"]
        invoked += values[f"invoked_{name}"]
        if values[f"asked_{name}"]:
            metrics[f"trigger/invocation_rate_{name}"] = values[f"invoked_{name}"] / values[f"asked_{name}"]
    if asked:
        metrics["trigger/invocation_rate"] = invoked / asked
        metrics["trigger/invocations"] = invoked / count
        metrics["trigger/offered"] = asked / count
    return metrics


def values_of_some(trajectories: Sequence[Trajectory]) -> dict[str, list[float]]:
    """Values that only some of a rank's episodes have, by metric.

    `rollout/reward_NAME` is a reward component. A component named KIND/NAME tells the kind of the item (a task of a
    mixture); `trigger/invocations_KIND` is the number of invocations in such an episode.
    """
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.fault is not None:
            continue
        for name, value in trajectory.parts.items():
            values.setdefault(f"rollout/reward_{name}", []).append(value)
        for kind in sorted({name.partition("/")[0] for name in trajectory.parts if "/" in name}):
            values.setdefault(f"trigger/invocations_{kind}", []).append(float(trajectory.invocations))
    return values


@torch.no_grad()
def latent_metrics(latents: Sequence[Tensor], embedding: Tensor) -> dict[str, float]:
    """Norms and similarity of woven latents. Diverging norms, or slots that become equal, are early signs of trouble.

    Args:
        latents: latents of each insertion, (K, H) each.
        embedding: the reasoner's embedding table, (V, H).

    Returns:
        `latents/norm`, its ratio to the mean norm of token embeddings, and `latents/slot_cosine`, the mean cosine
        between two latents of an insertion. Empty if there are no latents.
    """
    if not latents:
        return {}
    every = torch.cat([block.float() for block in latents])
    sample = embedding[:: max(1, embedding.shape[0] // 1024)].float()
    norm = float(every.norm(dim=-1).mean())
    metrics = {"latents/norm": norm, "latents/norm_over_embedding": norm / float(sample.norm(dim=-1).mean())}
    cosines = []
    for block in latents:
        slots = block.shape[0]
        if slots > 1:
            unit = torch.nn.functional.normalize(block.float(), dim=-1)
            cosines.append((float((unit @ unit.T).sum()) - slots) / (slots * (slots - 1)))
    return metrics | ({"latents/slot_cosine": float(np.mean(cosines))} if cosines else {})


def memory_metrics() -> dict[str, float]:
    """RAM of this process, and peak memory of its GPU if it has one, in bytes."""
    metrics = {"perf/process_memory_bytes": float(psutil.Process().memory_info().rss)}
    if torch.cuda.is_available():
        metrics["perf/gpu_peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
    return metrics


@final
class Advice:
    """Warns once per topic when training shows a known problem, and says what to change."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, topic: str, message: str, *arguments: object) -> None:
        """Logs a warning the first time that a topic comes up."""
        if topic not in self._said:
            self._said.add(topic)
            logger.warning(message, *arguments)

    def on_rollout(self, metrics: dict[str, float], *, teaches: bool, greedy: bool) -> None:
        """Checks the metrics of a rollout.

        Args:
            metrics: means over its episodes.
            teaches: whether any episode has a non-zero advantage.
            greedy: whether nothing in it was sampled.
        """
        reward = metrics.get("rollout/reward")
        if not teaches and reward is not None:
            if greedy:
                reason = "nothing is sampled (rollout.temperature 0), so all answers to an item are equal"
            elif reward >= 1.0:
                reason = "all answers are correct"
            elif reward <= 0.0:
                reason = "all answers are wrong"
            else:
                reason = "the answers to an item are all correct, or all wrong"
            self.say(
                "dead groups",
                "every group of this rollout has equal rewards, so there is nothing to learn from it (mean reward %.3f): "
                "%s. Change the task's difficulty, start from another checkpoint, raise rollout.group_size, or set "
                "update.dynamic_sampling",
                reward,
                reason,
            )
        if metrics.get("rollout/truncated", 0.0) > 0.5:
            self.say(
                "truncated",
                "%.0f %% of the episodes were truncated at their limit: raise rollout.max_new_tokens (or episodes.max_turns), or "
                "check that the end-of-turn token is the one that the model writes",
                100 * metrics["rollout/truncated"],
            )
        if metrics.get("rollout/faults"):
            self.say(
                "faults",
                "%d episodes had an environment error; they are neither trained on nor scored",
                int(metrics["rollout/faults"]),
            )

    def on_decisions(self, rate: float | None) -> None:
        """Checks the invocation rate of a trigger in training."""
        if rate in (0.0, 1.0):
            self.say(
                "constant trigger",
                "the trigger %s at every boundary of this rollout, so the other decision is never tried: change "
                "trigger.initial_invoke_bias, or policy.entropy_bonus",
                "invokes" if rate else "skips",
            )
        if rate is None:
            self.say(
                "no decisions",
                "the trigger was not asked once in this rollout: weaver.prompt_latents and weaver.inference_latents (with "
                "boundaries.max_inference_insertions) enable its boundaries",
            )

    def on_update(self, loss: float, gradient_norm: float, *, first_pass: bool) -> None:
        """Explains a loss or gradient of about 0."""
        if gradient_norm == 0.0:
            self.say(
                "no gradient",
                "the gradient is exactly 0: all advantages or masks of this step are 0 (rollout/dead_groups, "
                "rollout/truncated say which)",
            )
        elif abs(loss) < 1e-6 and first_pass:
            self.say(
                "zero loss",
                "train/loss is about 0, as it must be at the first update on a rollout: the ratio is 1 and advantages add "
                "up to 0. The gradient is not 0 (norm %.2e); watch rollout/reward instead",
                gradient_norm,
            )
