"""Metrics of an evaluation over answers, reduced over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from memgen.model.weaver import WeaverConfig
from memgen.types import InsertionKind, Trajectory

SUCCESS = 1.0
"""Total reward from which an answer counts as correct, in `exact_match` and pass@k."""

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


@dataclass(frozen=True)
class Measured:
    """Measurements of one answer; they can be written and read as JSON values.

    Attributes:
        reward: total reward.
        parts: reward components by name.
        finished: whether neither a turn nor the episode was truncated.
        tokens: number of tokens that the agent wrote.
        turns: number of its turns.
        insertions: number of latent insertions.
        latents: number of inserted latents.
        invoked_at_prompt_end: whether latents were inserted at the end of a prompt.
        fault: environment error, or None. Answers with one are left out of all means.
        ruled_out: boundaries that settings ruled out, by the reason (`AgentTurn.ruled_out`).
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    finished: bool = True
    tokens: int = 0
    turns: int = 1
    insertions: int = 0
    latents: int = 0
    invoked_at_prompt_end: bool = False
    fault: str | None = None
    ruled_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, trajectory: Trajectory, weaver: WeaverConfig) -> Measured:
        """Measures an episode."""
        kinds = [InsertionKind(kind) for turn in trajectory.turns for _, kind in turn.insertions]
        ruled_out = Counter[str]()
        for turn in trajectory.turns:
            ruled_out.update(turn.ruled_out)
        return cls(
            reward=trajectory.reward,
            parts=dict(trajectory.parts),
            finished=not trajectory.truncated,
            tokens=trajectory.tokens,
            turns=len(trajectory.turns),
            insertions=len(kinds),
            latents=sum(weaver.latents(kind) for kind in kinds),
            invoked_at_prompt_end=InsertionKind.PROMPT in kinds,
            fault=trajectory.fault,
            ruled_out=dict(ruled_out),
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Measured:
        """The measurements in a record of `dataclasses.asdict`, which may have further keys."""
        # Records that were made before boundaries could be ruled out go on.
        values = {"ruled_out": {}, **record}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @property
    def right(self) -> bool:
        """Whether the answer counts as correct."""
        return self.reward >= SUCCESS


@final
class AnswerMetrics(Metric):
    """Means over answers: reward and its components, exact match, finished share, length, turns, insertions.

    `exact_match` is the share of answers with a total reward of at least `SUCCESS`. Reward components are averaged over the
    answers that have them, and so are counts of boundaries that settings ruled out. Episodes with an environment error count only in `faulted`, their share. Ranks may have
    different numbers of answers.

    Args:
        weaver: tells how many latents an insertion of each kind has.
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
        # Names of reward components are known only from the rewards, so they are gathered as objects, not as states.
        self._named_sums: Counter[str] = Counter()
        self._named_counts: Counter[str] = Counter()

    @override
    def update(self, answers: Sequence[Trajectory | Measured]) -> None:
        """Adds a batch of answers."""
        measured = [a if isinstance(a, Measured) else Measured.of(a, self.weaver) for a in answers]
        valid = [answer for answer in measured if answer.fault is None]
        self.faults += len(measured) - len(valid)
        rows = []
        for answer in valid:
            rows.append(
                (
                    answer.reward,
                    float(answer.right),
                    float(answer.finished),
                    float(answer.tokens),
                    float(answer.turns),
                    float(answer.insertions),
                    float(answer.latents),
                    float(answer.invoked_at_prompt_end),
                )
            )
            named = {f"reward_{name}": value for name, value in answer.parts.items()}
            named |= {f"ruled_out_{reason}": float(count) for reason, count in answer.ruled_out.items()}
            for name, value in named.items():
                self._named_sums[name] += value  # type: ignore[assignment]
                self._named_counts[name] += 1
        if rows:
            self.totals += torch.tensor(rows, dtype=torch.float64).sum(dim=0).to(self.totals.device)
            self.count += len(rows)

    @override
    def compute(self) -> dict[str, Tensor]:
        """The means by name (`reward_<name>` for reward components, `ruled_out_<reason>`); empty if there was no answer."""
        sums, counts = self._gathered_by_name()
        if self.count + self.faults == 0:
            return {}
        means = {"faulted": (self.faults / (self.count + self.faults)).float()} if self.faults else {}
        if self.count == 0:
            return means
        means |= dict(zip(_FIELDS, (self.totals / self.count).float(), strict=True))
        return means | {name: torch.tensor(sums[name] / counts[name]) for name in sorted(counts)}

    @override
    def reset(self) -> None:
        """Resets all sums."""
        super().reset()
        self._named_sums, self._named_counts = Counter(), Counter()

    def _gathered_by_name(self) -> tuple[Counter[str], Counter[str]]:
        mine = (self._named_sums, self._named_counts)
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
