"""What an evaluation measures on answers, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from memgen.environments.base import Reward
from memgen.model.weaver import WeaverConfig
from memgen.types import Generation, InsertionKind

_FIELDS = (
    "reward",
    "exact_match",
    "finished",
    "answer_tokens",
    "insertions_per_answer",
    "latents_per_answer",
    "invoked_at_prompt_end",
)


@final
class AnswerMetrics(Metric):
    """Means over answers: reward and its parts, exact match, finished share, length, insertions.

    `exact_match` is the share of answers with a total reward of at least 1. Parts are averaged over the answers
    that have them. Ranks may differ in their number of answers.

    Args:
        weaver: how many latents an insertion has.
    """

    full_state_update = False
    totals: Tensor
    count: Tensor

    def __init__(self, weaver: WeaverConfig) -> None:
        super().__init__()
        self.weaver = weaver
        self.add_state("totals", default=torch.zeros(len(_FIELDS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        # Names of parts are known only from the rewards, so they travel as objects, not as states.
        self._part_sums: Counter[str] = Counter()
        self._part_counts: Counter[str] = Counter()

    @override
    def update(self, generation: Generation, rewards: Sequence[Reward]) -> None:
        """Adds a batch of answers and their rewards."""
        kinds = [[InsertionKind(kind) for _, kind in row] for row in generation.plan.rows()]
        rows = [
            (
                reward.total,
                float(reward.total >= 1.0),
                float(finished),
                float(length),
                float(len(row_kinds)),
                float(sum(self.weaver.latents(kind) for kind in row_kinds)),
                float(InsertionKind.PROMPT in row_kinds),
            )
            for reward, finished, length, row_kinds in zip(
                rewards, generation.finished.tolist(), generation.lengths.tolist(), kinds, strict=True
            )
        ]
        self.totals += torch.tensor(rows, dtype=torch.float64).sum(dim=0).to(self.totals.device)
        self.count += len(rows)
        for reward in rewards:
            for name, value in reward.parts.items():
                self._part_sums[name] += value  # type: ignore[assignment]
                self._part_counts[name] += 1

    @override
    def compute(self) -> dict[str, Tensor]:
        """The means by name (`reward_<part>` for parts); empty if there was no answer."""
        if self.count == 0:
            return {}
        means = dict(zip(_FIELDS, (self.totals / self.count).float(), strict=True))
        sums, counts = self._gathered_parts()
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
