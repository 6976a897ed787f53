"""`memgen bench generation`: decoding with and without latents against Hugging Face's `generate` on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, cast, final

import torch
from transformers import GenerationConfig

from memgen.bench.shapes import ModelSettings, memgen_components, plain_model, random_ids, weight_bytes
from memgen.bench.timing import Meter, Timing, measure_in_turn, paired_ratio
from memgen.generation.decode import Observer, generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenModel
from memgen.model.trigger import ConstantTrigger, Trigger
from memgen.types import Generation, WorkCount

# B rows, P prompt tokens, N new tokens

InsertionMode = Literal["never", "always", "trigger"]
"""Where latents are inserted. never: nowhere, our engine alone. always: at every boundary up to the cap. trigger: where a
learned token trigger invokes."""

INSERTION_MODES: tuple[InsertionMode, ...] = ("never", "always", "trigger")


@dataclass(frozen=True)
class DecodingWorkload:
    """Size of a decoding task."""

    batch: int = 8
    """Rows."""
    prompt: int = 128
    """Tokens of each prompt; all prompts differ."""
    new: int = 128
    """New tokens of each row; nothing ends earlier."""

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens_fed(self) -> int:
        """New tokens that are read back: all but each row's last."""
        return self.batch * (self.new - 1)

    @property
    def plain_positions(self) -> int:
        """Positions of plain decoding."""
        return self.batch * self.prompt + self.tokens_fed


@final
class Decoding:
    """A random model in two forms, Hugging Face's and ours, on the same weights.

    Args:
        settings: the model.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings
        self.plain = plain_model(settings)
        self.components = memgen_components(self.plain, settings)
        triggers: dict[InsertionMode, Trigger] = {
            "never": ConstantTrigger(0.0),
            "always": ConstantTrigger(1.0),
            "trigger": self.components.tokens,
        }
        self.models = {mode: self.components.model(trigger) for mode, trigger in triggers.items()}

    @torch.no_grad()
    def huggingface(
        self,
        workload: DecodingWorkload,
        *,
        new: int | None = None,
        static: bool = False,
        compiled: bool | None = None,
    ) -> torch.Tensor:
        """Hugging Face's greedy `generate`.

        Args:
            workload: the task.
            new: another number of new tokens; 1 reads the prompt only.
            static: a static cache instead of one that grows.
            compiled: whether a static cache's steps are compiled; None: as Hugging Face decides.

        Returns:
            Prompt and new tokens, (B, P+N).
        """
        ids = torch.tensor(
            random_ids(workload.batch, workload.prompt, self.settings), device=self.settings.device
        )
        config = GenerationConfig(
            max_new_tokens=new or workload.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if static else None,
            disable_compile=None if compiled is None else not compiled,
        )
        output = self.plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return cast(torch.Tensor, output)

    def ours(
        self,
        workload: DecodingWorkload,
        model: MemGenModel,
        observe: Observer | None = None,
        static_step: Literal["auto", "on", "off"] = "auto",
    ) -> Generation:
        """Our engine, greedy."""
        prompts = random_ids(workload.batch, workload.prompt, self.settings)
        settings = GenerationSettings(max_new_tokens=workload.new, static_step=static_step)
        return generate(model, prompts, settings, observe=observe)


def insertions(generation: Generation) -> int:
    """Insertions in all rows, those at prompt ends included."""
    return sum(len(row) for row in generation.plan.rows())


def prompt_reads(workload: DecodingWorkload, done: WorkCount, latents: int) -> float:
    """How often the prompts were read: positions that new tokens and latents do not explain, over the prompts' size.

    Args:
        workload: the task.
        done: the engine's count.
        latents: inserted in all rows.
    """
    return (done.reasoner_positions - workload.tokens_fed - latents) / (workload.batch * workload.prompt)


@dataclass(frozen=True)
class Floor:
    """Cost of the method's positions at plain decoding's prices, as ratios to plain decoding.

    Attributes:
        positions: all positions over plain decoding's: every position at plain decoding's mean price.
        two_price_wall: with two measured prices, one of a position that is read beside many others (prompt, latents,
            what the weaver and the trigger read) and one of a decoding step.
        two_price_cpu: the same in CPU time.
    """

    positions: float
    two_price_wall: float
    two_price_cpu: float


def decoding_floor(
    workload: DecodingWorkload, done: WorkCount, latents: int, plain: Timing, prefill: Timing
) -> Floor:
    """The floor of one case.

    Args:
        workload: the task.
        done: the engine's count.
        latents: inserted in all rows.
        plain: of Hugging Face's `generate`.
        prefill: of the same with one new token.
    """
    extra = done.weaver_positions + done.trigger_positions
    chunked = workload.batch * workload.prompt + latents + extra
    return Floor(
        positions=(done.reasoner_positions + extra) / workload.plain_positions,
        two_price_wall=_two_price(workload, chunked, median(plain.wall), median(prefill.wall)),
        two_price_cpu=_two_price(workload, chunked, median(plain.cpu), median(prefill.cpu)),
    )


def _two_price(workload: DecodingWorkload, chunked: int, plain: float, prefill: float) -> float:
    """(chunked positions at the prefill's price + the same steps) / plain."""
    steps = max(plain - prefill, 0.0)
    return (prefill * chunked / (workload.batch * workload.prompt) + steps) / plain


def step_bytes_floor(weights: int, cache: int, steps: int, bandwidth: float) -> float:
    """Seconds in which a device can read the weights, and on average half of the cache, once per step.

    Args:
        weights: bytes.
        cache: bytes when full.
        steps: passes over the weights.
        bandwidth: bytes per second of a large copy, reading and writing counted.
    """
    return steps * (weights + cache / 2) / bandwidth


@dataclass(frozen=True)
class Measured:
    """Timings and last outputs of all sides: "plain", "prefill", maybe "static", and each insertion mode."""

    timings: dict[str, Timing]
    generations: dict[InsertionMode, Generation]
    plain: torch.Tensor
    """Prompt and new tokens of Hugging Face's `generate`, (B, P+N)."""


def measure_decoding(
    decoding: Decoding,
    workload: DecodingWorkload,
    modes: Sequence[InsertionMode],
    repeats: int,
    meter: Meter,
    progress: Callable[[], None] = lambda: None,
    *,
    warm_up: bool = True,
) -> Measured:
    """Runs the baselines and each insertion mode in turn.

    Args:
        decoding: the model.
        workload: the task.
        modes: where latents are inserted, one side each.
        repeats: counted passes over all sides.
        meter: the clocks.
        progress: called after each run: `sides` per pass.
        warm_up: whether a pass that is not counted comes first.
    """
    outputs: dict[str, Any] = {}

    def keep(name: str, run: Callable[[], object]) -> Callable[[], None]:
        def work_of_side() -> None:
            outputs[name] = run()

        return work_of_side

    runs: dict[str, Callable[[], object]] = {
        "plain": keep("plain", lambda: decoding.huggingface(workload)),
        "prefill": keep("prefill", lambda: decoding.huggingface(workload, new=1)),
    }
    if has_static_cache(decoding.settings):
        runs["static"] = keep("static", lambda: decoding.huggingface(workload, static=True))
    for mode in modes:
        model = decoding.models[mode]
        runs[mode] = keep(mode, lambda model=model: decoding.ours(workload, model))  # type: ignore[misc]
    timings = measure_in_turn(runs, repeats, meter, progress, warm_up=warm_up)
    return Measured(timings, {mode: outputs[mode] for mode in modes}, outputs["plain"])


def has_static_cache(settings: ModelSettings) -> bool:
    """Whether a static cache is a baseline too: on a CPU it only adds masked work."""
    return torch.device(settings.device).type == "cuda"


def sides(settings: ModelSettings, modes: Sequence[InsertionMode]) -> int:
    """How many sides `measure_decoding` runs."""
    return len(modes) + 2 + has_static_cache(settings)


def decoding_case(
    decoding: Decoding,
    workload: DecodingWorkload,
    mode: InsertionMode,
    measured: Measured,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """The record of one insertion mode.

    Args:
        decoding: the model.
        workload: the task.
        mode: where latents were inserted.
        measured: of `measure_decoding`.
        bandwidth: bytes per second of a large copy, for the floor of a device that is bound by it.
    """
    settings, timings = decoding.settings, measured.timings
    generation = measured.generations[mode]
    ours, plain, prefill = timings[mode], timings["plain"], timings["prefill"]
    done = generation.work
    inserted = insertions(generation)
    latents = inserted * settings.latents
    floor = decoding_floor(workload, done, latents, plain, prefill)
    weights = weight_bytes(decoding.plain)
    cpu_ratio = paired_ratio(ours.cpu, plain.cpu)
    wall_ratio = paired_ratio(ours.wall, plain.wall)
    tokens = workload.batch * workload.new
    case: dict[str, Any] = {
        "model": settings.model,
        "batch": workload.batch,
        "memory": mode,
        "wall_ratio": round(wall_ratio, 4),
        "cpu_ratio": round(cpu_ratio, 4),
        "wall_ratio_of_minima": round(min(ours.wall) / min(plain.wall), 4),
        "cpu_ratio_of_minima": round(min(ours.cpu) / min(plain.cpu), 4),
        "floor_position_ratio": round(floor.positions, 4),
        "floor_wall_ratio": round(floor.two_price_wall, 4),
        "floor_cpu_ratio": round(floor.two_price_cpu, 4),
        "gap_to_floor": round(cpu_ratio / floor.two_price_cpu, 4),
        "prefills": round(prompt_reads(workload, done, latents), 6),
        "reasoner_forwards": done.reasoner_forwards,
        "reasoner_positions": done.reasoner_positions,
        "weaver_forwards": done.weaver_forwards,
        "weaver_positions": done.weaver_positions,
        "trigger_forwards": done.trigger_forwards,
        "trigger_positions": done.trigger_positions,
        "insertions": inserted,
        "invocation_rate": invocation_rate(generation),
        "delimiter_rate": round(delimiter_rate(generation, settings), 4),
        "same_text_as_plain": same_text(generation, measured.plain, workload.prompt),
        "weight_bytes": weights,
        "cache_bytes_needed": cache_bytes(settings, done, latents),
        "ours": ours.as_dict() | _rate(tokens, ours),
        "plain": plain.as_dict()
        | _rate(tokens, plain)
        | {"forwards": workload.new, "positions": workload.plain_positions, "cache": "growing"},
        "plain_prefill": prefill.as_dict(),
        **describe(settings, workload, len(ours.samples)),
    }
    if "static" in timings:
        static = timings["static"]
        case["plain_static_cache"] = static.as_dict() | _rate(tokens, static)
        case["wall_ratio_to_static_cache"] = round(paired_ratio(ours.wall, static.wall), 4)
    if bandwidth is not None:
        seconds = step_bytes_floor(weights, case["cache_bytes_needed"], workload.new, bandwidth)
        case["copy_bandwidth_bytes_per_second"] = bandwidth
        case["bandwidth_floor_seconds"] = round(seconds, 6)
        case["wall_ratio_to_bandwidth_floor"] = round(median(ours.wall) / seconds, 4)
    return case


def describe(settings: ModelSettings, workload: DecodingWorkload, repeats: int) -> dict[str, Any]:
    """Settings of a case."""
    return {
        "prompt": workload.prompt,
        "new": workload.new,
        "latents": settings.latents,
        "cap": settings.cap,
        "dtype": settings.dtype,
        "device": settings.device,
        "seed": settings.seed,
        "repeats": repeats,
    }


def _rate(tokens: int, timing: Timing) -> dict[str, Any]:
    return {"tokens_per_second": round(tokens / median(timing.wall), 2)}


def invocation_rate(generation: Generation) -> float | None:
    """Share of the boundaries at which the trigger was asked where it invoked; None if it was never asked."""
    asked = sum(turn.offered for turn in generation.turns)
    return round(sum(turn.invocations for turn in generation.turns) / asked, 4) if asked else None


def delimiter_rate(generation: Generation, settings: ModelSettings) -> float:
    """Share of the new tokens that are delimiters."""
    return float((torch.tensor(generation.answers()) % settings.spacing == 0).float().mean())


def same_text(generation: Generation, plain: torch.Tensor, prompt: int) -> float:
    """Share of the new tokens that equal plain decoding's: 1 without memory, up to rounding; small with it."""
    return round(float((torch.tensor(generation.answers()) == plain[:, prompt:].cpu()).float().mean()), 4)


def cache_bytes(settings: ModelSettings, done: WorkCount, latents: int) -> int:
    """Bytes of keys and values that reasoner, weaver and trigger keep. The weaver's queries are not kept.

    Args:
        settings: the model.
        done: the engine's count.
        latents: inserted in all rows; each was one query of the weaver.
    """
    kept = done.reasoner_positions + done.trigger_positions + max(done.weaver_positions - latents, 0)
    return kept * settings.shape.cache_bytes(settings.torch_dtype)
