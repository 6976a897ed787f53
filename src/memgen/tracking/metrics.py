"""What an evaluation measures on answers, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from memgen.model.weaver import WeaverConfig
from memgen.types import InsertionKind, Trajectory

_FIELDS = (
    "reward",
    "exact_match",
    "finished",
    "answer_tokens",
    "turns",
    "insertions_per_answer",
    "latents_per_answer",
    "invoked_at_prompt_end",
)


@final
class AnswerMetrics(Metric):
    """Means over answers: reward and its parts, exact match, finished share, length, turns, insertions.

    `exact_match` is the share of answers with a total reward of at least 1. Parts are averaged over the answers
    that have them. Episodes that the environment failed count for nothing but `faulted`, their share. Ranks may
    differ in their number of answers.

    Args:
        weaver: how many latents an insertion has.
    """

    full_state_update = False
    totals: Tensor
    count: Tensor
    faults: Tensor

    def __init__(self, weaver: WeaverConfig) -> None:
        super().__init__()
        self.weaver = weaver
        self.add_state("totals", default=torch.zeros(len(_FIELDS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("faults", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Names of parts are known only from the rewards, so they travel as objects, not as states.
        self._part_sums: Counter[str] = Counter()
        self._part_counts: Counter[str] = Counter()

    @override
    def update(self, trajectories: Sequence[Trajectory]) -> None:
        """Adds a batch of answers."""
        valid = [trajectory for trajectory in trajectories if trajectory.fault is None]
        self.faults += len(trajectories) - len(valid)
        rows = []
        for trajectory in valid:
            kinds = [InsertionKind(kind) for turn in trajectory.turns for _, kind in turn.insertions]
            rows.append(
                (
                    trajectory.reward,
                    float(trajectory.reward >= 1.0),
                    float(not trajectory.truncated),
                    float(trajectory.tokens),
                    float(len(trajectory.turns)),
                    float(len(kinds)),
                    float(sum(self.weaver.latents(kind) for kind in kinds)),
                    float(InsertionKind.PROMPT in kinds),
                )
            )
            for name, value in trajectory.parts.items():
                self._part_sums[name] += value  # type: ignore[assignment]
                self._part_counts[name] += 1
        if rows:
            self.totals += torch.tensor(rows, dtype=torch.float64).sum(dim=0).to(self.totals.device)
            self.count += len(rows)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The means by name (`reward_<part>` for parts); empty if there was no answer."""
        sums, counts = self._gathered_parts()
        if self.count + self.faults == 0:
            return {}
        means = {"faulted": (self.faults / (self.count + self.faults)).float()} if self.faults else {}
        if self.count == 0:
            return means
        means |= dict(zip(_FIELDS, (self.totals / self.count).float(), strict=True))
        return means | {f"reward_{name}": torch.tensor(sums[name] / counts[name]) for name in sorted(counts)}

    @override
    def reset(self) -> None:
        """Forgets all answers."""
        super().reset()
        self._part_sums, self._part_counts = Counter(), Counter()

    def _gathered_parts(self) -> tuple[Counter[str], Counter[str]]:
        mine = (self._part_sums, self._part_counts)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return mine
        everyone: list[tuple[Counter[str], Counter[str]]] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        sums, counts = Counter[str](), Counter[str]()
        for rank_sums, rank_counts in everyone:
            for name in rank_counts:
                sums[name] += rank_sums[name]
                counts[name] += rank_counts[name]
        return sums, counts
