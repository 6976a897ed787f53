"""`memgen bench training`: a training step with memory against a plain LoRA step on the same weights.

Stages: "sft" is the loss on reference answers, forward and backward; the plain side is a PEFT LoRA model called with
labels. "grpo" is what an update of weaver GRPO does: log-probabilities of given answers under a given plan, a policy
gradient on them, forward and backward; the plain side takes log-probabilities from logits that it computes for answers
only. Both sides have LoRA of rank 16 on q_proj and v_proj, without dropout, and no optimizer step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal, cast, final

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from typing_extensions import override

from memgen.bench.shapes import ModelSettings, memgen_components, plain_model, weight_bytes
from memgen.bench.timing import Meter, Timing, measure_in_turn, paired_ratio
from memgen.model.trigger import ConstantTrigger
from memgen.objectives.sft import token_loss
from memgen.types import InsertionPlan, TokenBatch, WorkCount

# B rows, L tokens per row, V vocabulary

Stage = Literal["sft", "grpo"]
"""Training stage: sft learns from reference answers, grpo from the model's own answers with advantages."""

STAGES: tuple[Stage, ...] = ("sft", "grpo")


@dataclass(frozen=True)
class TrainingWorkload:
    """Size of a training batch."""

    batch: int = 8
    """Rows."""
    length: int = 512
    """Tokens per row, prompt included."""
    prompt: int = 128
    """Tokens of each row's prompt, which are not supervised."""
    points: int = 6
    """Insertions per row, the one at the prompt's end included."""
    group: int = 1
    """Rows that answer the same prompt. More than one lets our side read the prompt once."""

    def __post_init__(self) -> None:
        if not 1 <= self.prompt < self.length:
            raise ValueError(
                f"prompt must be at least 1 and below length, got {self.prompt} and {self.length}"
            )
        if self.batch < 1 or self.group < 1 or self.batch % self.group:
            raise ValueError(f"group must divide batch, got {self.group} and {self.batch}")
        if self.points < 1:
            raise ValueError(f"points must be at least 1 (the prompt's end), got {self.points}")

    @property
    def labels(self) -> int:
        """Supervised tokens in the batch."""
        return self.batch * (self.length - self.prompt)


def training_batch(settings: ModelSettings, workload: TrainingWorkload) -> TokenBatch:
    """Random rows whose tokens behind the prompt are supervised.

    Every `spacing`-th token id is a delimiter, so delimiters come as often as in the decoded texts.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(settings.shape.vocabulary, (workload.batch, workload.length), generator=generator)
    leaders = torch.arange(workload.batch) // workload.group * workload.group
    ids[:, : workload.prompt] = ids[leaders, : workload.prompt]
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[:, workload.prompt :] = True
    together = workload.group > 1
    return TokenBatch(
        ids=ids,
        lengths=torch.full((workload.batch,), workload.length),
        supervised=supervised,
        group=leaders if together else None,
        shared=torch.full((workload.batch,), workload.prompt) if together else None,
    )


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss of a GRPO update's first step: ratio to the sampling policy, times advantage."""
    return -((logprobs - logprobs.detach()).exp() * advantages).mean()


class TrainingStep(ABC):
    """One side: a batch, its advantages, and a training step on it."""

    def __init__(self, settings: ModelSettings, workload: TrainingWorkload) -> None:
        self.workload = workload
        self.batch = training_batch(settings, workload)
        generator = torch.Generator().manual_seed(settings.seed + 1)
        per_row = torch.randn(workload.batch, generator=generator)
        self.advantages = per_row.repeat_interleave(workload.length - workload.prompt).to(settings.device)

    @abstractmethod
    def step(self, stage: Stage) -> Tensor:
        """Forward and backward; returns the loss."""


@final
class PlainStep(TrainingStep):
    """A PEFT LoRA model on Hugging Face's own modules.

    Args:
        settings: the model.
        workload: the batch.
    """

    def __init__(self, settings: ModelSettings, workload: TrainingWorkload) -> None:
        super().__init__(settings, workload)
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that transformers has replaced.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self.model = get_peft_model(plain_model(settings), config)
        self.model.train()
        self.ids = self.batch.ids.to(settings.device)
        self.labels = self.ids.masked_fill(~self.batch.supervised.to(settings.device), -100)

    @override
    def step(self, stage: Stage) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        if stage == "sft":
            loss = self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss
        else:
            answer = self.ids[:, self.workload.prompt :]
            kept = answer.shape[1] + 1
            logits = self.model(input_ids=self.ids, logits_to_keep=kept, use_cache=False).logits[:, :-1]
            chosen = logits.gather(-1, answer[..., None]).squeeze(-1)
            logprobs = (chosen - logits.logsumexp(dim=-1)).float()
            loss = policy_gradient(logprobs.flatten(), self.advantages)
        loss.backward()
        return cast(Tensor, loss.detach())


@final
class MemGenStep(TrainingStep):
    """MemGen's teacher-forced forward and its backward, into the weaver.

    Args:
        settings: the model.
        workload: the batch.

    Raises:
        ValueError: if some row has too few delimiters for the points asked for.
    """

    def __init__(self, settings: ModelSettings, workload: TrainingWorkload) -> None:
        settings = replace(settings, cap=workload.points - 1)
        super().__init__(settings, workload)
        self.components = memgen_components(plain_model(settings), settings)
        self.model = self.components.model(ConstantTrigger(1.0))
        self.model.train_only(self.model.weaver)
        self.model.train()
        self.plan: InsertionPlan = self.model.boundaries.plan(self.batch)
        fewest = min(self.plan.counts)
        if fewest < workload.points:
            raise ValueError(
                f"some row has only {fewest} places for latents, but {workload.points} points per row were asked for; "
                "lower --points or raise --length"
            )
        self.done = WorkCount()

    @override
    def step(self, stage: Stage) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        logprobs, woven = self.model.label_logprobs(self.batch, self.plan)
        self.done = woven.work
        if stage == "sft":
            loss = token_loss(logprobs, self.workload.labels)
        else:
            loss = policy_gradient(logprobs, self.advantages)
        loss.backward()
        return loss.detach()

    def free_positions(self) -> int:
        """Reasoner positions before a row's first latent: they keep no activations and need no backward."""
        firsts = sum(row[0][0] for row in self.plan.rows())
        return firsts - self.workload.prompt * (
            self.workload.batch - self.workload.batch // self.workload.group
        )


def measure_training(
    settings: ModelSettings,
    workload: TrainingWorkload,
    stages: Sequence[Stage],
    repeats: int,
    meter: Meter,
    progress: Callable[[], None] = lambda: None,
    *,
    memory: bool = True,
) -> Iterator[dict[str, Any]]:
    """One case per stage, each as soon as it is measured.

    Args:
        settings: the model.
        workload: the batch.
        stages: which.
        repeats: counted passes over both sides.
        meter: the clocks.
        progress: called after each run and each memory probe.
        memory: whether to measure peak memory too, each side in a process of its own.
    """
    plain, ours = PlainStep(settings, workload), MemGenStep(settings, workload)
    weights = weight_bytes(plain.model)
    for stage in stages:
        runs: dict[str, Callable[[], object]] = {
            "plain": lambda stage=stage: plain.step(stage),  # type: ignore[misc]
            "ours": lambda stage=stage: ours.step(stage),  # type: ignore[misc]
        }
        timings = measure_in_turn(runs, repeats, meter, progress)
        peaks: dict[str, dict[str, Any]] = {}
        for side in ("plain", "ours") if memory else ():
            peaks[side] = peak_in_own_process(
                {"kind": "training", "side": side, "stage": stage, "settings": settings, "work": workload}
            )
            progress()
        yield _case(settings, workload, stage, timings, peaks, ours, weights)


def _case(
    settings: ModelSettings,
    workload: TrainingWorkload,
    stage: Stage,
    timings: dict[str, Timing],
    peaks: dict[str, dict[str, Any]],
    step: MemGenStep,
    weights: int,
) -> dict[str, Any]:
    ours, plain = timings["ours"], timings["plain"]
    done = step.done
    positions = workload.batch * workload.length
    tokens = workload.batch * workload.length
    extra = {side: peaks[side]["peak_above_weights_bytes"] for side in peaks}
    known = len(extra) == 2 and all(value is not None for value in extra.values())
    return {
        "model": settings.model,
        "stage": stage,
        "wall_ratio": round(paired_ratio(ours.wall, plain.wall), 4),
        "cpu_ratio": round(paired_ratio(ours.cpu, plain.cpu), 4),
        "memory_ratio": round(extra["ours"] / extra["plain"], 4) if known else None,
        "wall_ratio_of_minima": round(min(ours.wall) / min(plain.wall), 4),
        "cpu_ratio_of_minima": round(min(ours.cpu) / min(plain.cpu), 4),
        "floor_position_ratio": round((done.reasoner_positions + done.weaver_positions) / positions, 4),
        "floor_work_ratio": round(work_floor(done, step.free_positions(), positions), 4),
        "reasoner_forwards": done.reasoner_forwards,
        "reasoner_positions": done.reasoner_positions,
        "reasoner_positions_without_gradient": step.free_positions(),
        "weaver_forwards": done.weaver_forwards,
        "weaver_positions": done.weaver_positions,
        "insertions": sum(len(row) for row in step.plan.rows()),
        "labels": workload.labels,
        "weight_bytes": weights,
        "ours": ours.as_dict()
        | {"tokens_per_second": round(tokens / median(ours.wall), 2)}
        | peaks.get("ours", {}),
        "plain": plain.as_dict()
        | {"tokens_per_second": round(tokens / median(plain.wall), 2), "forwards": 1, "positions": positions}
        | peaks.get("plain", {}),
        **asdict(workload),
        "latents": settings.latents,
        "dtype": settings.dtype,
        "device": settings.device,
        "seed": settings.seed,
        "repeats": len(ours.samples),
    }


def work_floor(done: WorkCount, free: int, plain_positions: int) -> float:
    """Our positions at plain training's price, where a forward alone is half of forward and backward.

    A frozen matrix needs no weight gradient, so its backward costs one forward and not two, on both sides.

    Args:
        done: our work counts.
        free: positions without gradient among the reasoner's.
        plain_positions: of the plain step.
    """
    priced = 2 * (done.reasoner_positions + done.weaver_positions) - free
    return priced / (2 * plain_positions)


def peak_in_own_process(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one side, measured in a new process.

    Args:
        request: arguments of `memgen.bench.probe`.

    Raises:
        RuntimeError: if the process fails.
    """
    plain: dict[str, Any] = {
        key: value if isinstance(value, str) else asdict(value) for key, value in request.items()
    }
    plain["threads"] = torch.get_num_threads()
    done = subprocess.run(
        [sys.executable, "-m", "memgen.bench.probe", json.dumps(plain)],
        capture_output=True,
        text=True,
        check=False,
        # glibc keeps freed blocks below a threshold that it raises as it goes, so the same work shows other peaks from
        # run to run. At a fixed threshold every tensor of size goes back at once, and a peak is what is in use.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
    )
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise RuntimeError(
            f"the process that measures memory failed with exit status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
