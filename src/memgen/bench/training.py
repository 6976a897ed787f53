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

from memgen.bench.counts import Counts, stream_counts
from memgen.bench.shapes import ModelSettings, memory_parts, plain_model, weight_bytes
from memgen.bench.timing import Meter, Timing, interleave, paired_ratio
from memgen.model.trigger import ConstantTrigger
from memgen.objectives.sft import token_loss
from memgen.types import InsertionPlan, TokenBatch, WorkCount

# B rows, L tokens per row, V vocabulary

Stage = Literal["sft", "grpo"]
"""What is learnt from: reference answers, or answers of the model's own with advantages."""

STAGES: tuple[Stage, ...] = ("sft", "grpo")


@dataclass(frozen=True)
class StepWork:
    """One batch of a training step."""

    batch: int = 8
    """Rows."""
    length: int = 512
    """Tokens per row, prompt included."""
    prompt: int = 128
    """Tokens of each row's prompt, which are no targets."""
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
        """Targets in the batch."""
        return self.batch * (self.length - self.prompt)


def training_batch(settings: ModelSettings, work: StepWork) -> TokenBatch:
    """Random rows whose tokens behind the prompt are supervised.

    Every `spacing`-th token id is a delimiter, so delimiters come as often as in the decoded texts.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(settings.shape.vocabulary, (work.batch, work.length), generator=generator)
    leaders = torch.arange(work.batch) // work.group * work.group
    ids[:, : work.prompt] = ids[leaders, : work.prompt]
    supervised = torch.zeros_like(ids, dtype=torch.bool)
    supervised[:, work.prompt :] = True
    together = work.group > 1
    return TokenBatch(
        ids=ids,
        lengths=torch.full((work.batch,), work.length),
        supervised=supervised,
        group=leaders if together else None,
        shared=torch.full((work.batch,), work.prompt) if together else None,
    ).to(settings.device)


def policy_gradient(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The gradient of a GRPO update's first step: ratio to what was sampled, times advantage."""
    return -((logprobs - logprobs.detach()).exp() * advantages).mean()


class Step(ABC):
    """One side: a batch, its advantages, and a training step on it."""

    def __init__(self, settings: ModelSettings, work: StepWork) -> None:
        self.work = work
        self.batch = training_batch(settings, work)
        generator = torch.Generator().manual_seed(settings.seed + 1)
        per_row = torch.randn(work.batch, generator=generator)
        self.advantages = per_row.repeat_interleave(work.length - work.prompt).to(settings.device)

    @abstractmethod
    def step(self, stage: Stage) -> Tensor:
        """Forward and backward; returns the loss."""


@final
class PlainStep(Step):
    """A PEFT LoRA model on Hugging Face's own modules.

    Args:
        settings: the model.
        work: the batch.
    """

    def __init__(self, settings: ModelSettings, work: StepWork) -> None:
        super().__init__(settings, work)
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that transformers has replaced.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            self.model = get_peft_model(plain_model(settings), config)
        self.model.train()
        self.labels = self.batch.ids.masked_fill(~self.batch.supervised, -100)

    @override
    def step(self, stage: Stage) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        if stage == "sft":
            loss = self.model(input_ids=self.batch.ids, labels=self.labels, use_cache=False).loss
        else:
            answer = self.batch.ids[:, self.work.prompt :]
            kept = answer.shape[1] + 1
            logits = self.model(input_ids=self.batch.ids, logits_to_keep=kept, use_cache=False).logits[:, :-1]
            chosen = logits.gather(-1, answer[..., None]).squeeze(-1)
            logprobs = (chosen - logits.logsumexp(dim=-1)).float()
            loss = policy_gradient(logprobs.flatten(), self.advantages)
        loss.backward()
        return cast(Tensor, loss.detach())


@final
class MemoryStep(Step):
    """MemGen's teacher-forced forward and its backward, into the weaver.

    Args:
        settings: the model.
        work: the batch.

    Raises:
        ValueError: if some row has too few delimiters for the points asked for.
    """

    def __init__(self, settings: ModelSettings, work: StepWork) -> None:
        settings = replace(settings, cap=work.points - 1)
        super().__init__(settings, work)
        self.parts = memory_parts(plain_model(settings), settings)
        self.model = self.parts.model(ConstantTrigger(1.0))
        self.model.train_only(self.model.weaver)
        self.model.train()
        self.plan: InsertionPlan = self.model.boundaries.plan(self.batch)
        fewest = min(self.plan.counts)
        if fewest < work.points:
            raise ValueError(
                f"some row has only {fewest} places for latents, but {work.points} points per row were asked for; "
                "lower --points or raise --length"
            )
        self.done = WorkCount()

    @override
    def step(self, stage: Stage) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        logprobs, woven = self.model.label_logprobs(self.batch, self.plan)
        self.done = woven.work
        if stage == "sft":
            loss = token_loss(logprobs, self.work.labels)
        else:
            loss = policy_gradient(logprobs, self.advantages)
        loss.backward()
        return loss.detach()

    def counts(self) -> Counts:
        """The work that one forward should take."""
        work = self.work
        counts = stream_counts(
            [work.length] * work.batch,
            [work.prompt] * work.batch,
            self.plan.rows(),
            self.parts.weaver.config.latents,
        )
        spared = work.prompt * (work.batch - work.batch // work.group)
        return replace(
            counts,
            reasoner_positions=counts.reasoner_positions - spared,
            # The weaver's reading of the prompt is shared as well.
            weaver_positions=counts.weaver_positions - spared,
        )

    def free_positions(self) -> int:
        """Reasoner positions before a row's first latent: they keep no activations and need no backward."""
        firsts = sum(row[0][0] for row in self.plan.rows())
        return firsts - self.work.prompt * (self.work.batch - self.work.batch // self.work.group)


def measure_training(
    settings: ModelSettings,
    work: StepWork,
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
        work: the batch.
        stages: which.
        repeats: counted passes over both sides.
        meter: the clocks.
        progress: called after each run and each memory probe.
        memory: whether to measure peak memory too, each side in a process of its own.
    """
    plain, ours = PlainStep(settings, work), MemoryStep(settings, work)
    weights = weight_bytes(plain.model)
    for stage in stages:
        runs: dict[str, Callable[[], object]] = {
            "plain": lambda stage=stage: plain.step(stage),  # type: ignore[misc]
            "ours": lambda stage=stage: ours.step(stage),  # type: ignore[misc]
        }
        timings = interleave(runs, repeats, meter, progress)
        peaks: dict[str, dict[str, Any]] = {}
        for side in ("plain", "ours") if memory else ():
            peaks[side] = peak_in_own_process(
                {"kind": "training", "side": side, "stage": stage, "settings": settings, "work": work}
            )
            progress()
        yield _case(settings, work, stage, timings, peaks, ours, weights)


def _case(
    settings: ModelSettings,
    work: StepWork,
    stage: Stage,
    timings: dict[str, Timing],
    peaks: dict[str, dict[str, Any]],
    step: MemoryStep,
    weights: int,
) -> dict[str, Any]:
    ours, plain = timings["ours"], timings["plain"]
    done, counts = step.done, step.counts()
    positions = work.batch * work.length
    tokens = work.batch * work.length
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
        "counts_match_formula": (done.reasoner_positions, done.weaver_positions)
        == (counts.reasoner_positions, counts.weaver_positions),
        "insertions": counts.insertions,
        "labels": work.labels,
        "weight_bytes": weights,
        "ours": ours.as_dict()
        | {"tokens_per_second": round(tokens / median(ours.wall), 2)}
        | peaks.get("ours", {}),
        "plain": plain.as_dict()
        | {"tokens_per_second": round(tokens / median(plain.wall), 2), "forwards": 1, "positions": positions}
        | peaks.get("plain", {}),
        **asdict(work),
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
        done: our work.
        free: positions without gradient among the reasoner's.
        plain_positions: of the plain step.
    """
    priced = 2 * (done.reasoner_positions + done.weaver_positions) - free
    return priced / (2 * plain_positions)


def peak_in_own_process(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one side, measured where nothing else has run.

    Args:
        request: what `memgen.bench.probe` understands.

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
