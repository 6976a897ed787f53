"""What an evaluation looks like in one figure: rewards, where the trigger invokes, how large latents are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from memgen.types import Decision, Trajectory

BINS = 10
"""Stretches of an answer, and of the range of rewards."""


@dataclass(frozen=True)
class EvaluationCounts:
    """What the figure shows.

    Attributes:
        asked: how often the trigger was asked, by stretch of the turn.
        invoked: how often it invoked.
        rewards: total reward of each episode that the environment did not fail.
        norms: norm of each latent that was looked at, by its place within its insertion.
        embedding_norm: mean norm of the reasoner's token embeddings.
    """

    asked: np.ndarray
    invoked: np.ndarray
    rewards: np.ndarray
    norms: list[np.ndarray]
    embedding_norm: float


@final
class PlaceCounts(Metric):
    """How often the trigger was asked and how often it invoked, by relative position in a turn, over all ranks.

    The boundary at a prompt's end counts as position 0.
    """

    full_state_update = False
    asked: Tensor
    invoked: Tensor
    rewards: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("asked", "invoked"):
            self.add_state(name, default=torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rewards", default=[], dist_reduce_fx="cat")

    @override
    def update(self, trajectories: Sequence[Trajectory]) -> None:
        """Adds episodes."""
        asked, invoked = np.zeros(BINS), np.zeros(BINS)
        for trajectory in trajectories:
            for turn in trajectory.turns:
                for place, decision in enumerate(turn.decisions):
                    if decision != Decision.NOT_ASKED:
                        stretch = place * BINS // len(turn.decisions)
                        asked[stretch] += 1
                        invoked[stretch] += decision == Decision.INVOKE
        self.asked += torch.from_numpy(asked).to(self.asked.device)
        self.invoked += torch.from_numpy(invoked).to(self.invoked.device)
        rewards = [trajectory.reward for trajectory in trajectories if trajectory.fault is None]
        self.rewards.append(torch.tensor(rewards, dtype=torch.float32, device=self.asked.device))

    @override
    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Asked, invoked, rewards."""
        rewards = (
            self.rewards if isinstance(self.rewards, Tensor) else torch.cat([*self.rewards, torch.zeros(0)])
        )
        return self.asked, self.invoked, rewards


def evaluation_figure(counts: EvaluationCounts, title: str) -> bytes:
    """The figure as PNG.

    Args:
        counts: what it shows. A panel without data says so.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # About as wide as high, as the cards are in which MLflow shows it.
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplot_mosaic("RN;PP")
    _rewards(panels["R"], counts.rewards)
    _norms(panels["N"], counts.norms, counts.embedding_norm)
    _places(panels["P"], counts.asked, counts.invoked)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _rewards(axes: Any, rewards: np.ndarray) -> None:
    axes.set(xlabel="reward", ylabel="episodes", title="rewards")
    if not len(rewards):
        _nothing(axes, "no episode")
        return
    axes.hist(rewards, bins=BINS)
    axes.axvline(rewards.mean(), color="black", linestyle="--", label=f"mean {rewards.mean():.3f}")
    axes.legend()


def _places(axes: Any, asked: np.ndarray, invoked: np.ndarray) -> None:
    axes.set(xlabel="relative position in the turn", ylabel="invocation rate", title="invocations")
    if not asked.sum():
        _nothing(axes, "the trigger was not asked")
        return
    rate = np.divide(invoked, asked, out=np.zeros(BINS), where=asked > 0)
    middle = (np.arange(BINS) + 0.5) / BINS
    axes.bar(middle, rate, width=0.9 / BINS, color="#d9a400")
    for x, y, count in zip(middle, rate, asked, strict=True):
        if count:
            axes.annotate(f"{int(count)}", (x, y), ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(0, 1.1))


def _norms(axes: Any, norms: Sequence[np.ndarray], embedding_norm: float) -> None:
    axes.set(xlabel="latent within its insertion", ylabel="norm", title="latents")
    if not norms:
        _nothing(axes, "no latent was woven")
        return
    axes.boxplot(list(norms), tick_labels=[str(place + 1) for place in range(len(norms))], showfliers=False)
    axes.axhline(embedding_norm, color="black", linestyle="--", label="token embeddings, mean")
    axes.legend()


def _nothing(axes: Any, reason: str) -> None:
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes)


def latent_norms(blocks: Sequence[Tensor]) -> list[np.ndarray]:
    """Norms of latents by their place within their insertion; insertions of several lengths may be mixed.

    Args:
        blocks: latents of an insertion each, (K, H).
    """
    norms = [block.detach().float().norm(dim=-1).cpu().numpy() for block in blocks]
    longest = max((len(row) for row in norms), default=0)
    return [np.array([row[place] for row in norms if place < len(row)]) for place in range(longest)]
