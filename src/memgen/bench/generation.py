"""`memgen bench generation`: decoding with and without memory against Hugging Face's `generate` on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, cast, final

import torch
from transformers import GenerationConfig

from memgen.bench.counts import Counts, generation_counts, prompt_reads
from memgen.bench.shapes import ModelSettings, memory_parts, plain_model, random_ids, weight_bytes
from memgen.bench.timing import Meter, Timing, interleave, paired_ratio
from memgen.generation.decode import Observer, generate
from memgen.generation.sampling import GenerationSettings
from memgen.model.memgen import MemGenModel
from memgen.model.trigger import ConstantTrigger, Trigger
from memgen.types import Generation, WorkCount

# B rows, P prompt tokens, N new tokens

Memory = Literal["never", "always", "trigger"]
"""never: our engine without memory. always: at every boundary up to the cap. trigger: a learned token trigger decides."""

MEMORIES: tuple[Memory, ...] = ("never", "always", "trigger")


@dataclass(frozen=True)
class Work:
    """One decoding task."""

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
        self.parts = memory_parts(self.plain, settings)
        triggers: dict[Memory, Trigger] = {
            "never": ConstantTrigger(0.0),
            "always": ConstantTrigger(1.0),
            "trigger": self.parts.tokens,
        }
        self.models = {memory: self.parts.model(trigger) for memory, trigger in triggers.items()}

    @torch.no_grad()
    def huggingface(self, work: Work, *, new: int | None = None, static: bool = False) -> torch.Tensor:
        """Hugging Face's greedy `generate`.

        Args:
            work: the task.
            new: another number of new tokens; 1 reads the prompt only.
            static: a static cache instead of one that grows.

        Returns:
            Prompt and new tokens, (B, P+N).
        """
        ids = torch.tensor(random_ids(work.batch, work.prompt, self.settings), device=self.settings.device)
        config = GenerationConfig(
            max_new_tokens=new or work.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if static else None,
        )
        output = self.plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return cast(torch.Tensor, output)

    def ours(self, work: Work, model: MemGenModel, observe: Observer | None = None) -> Generation:
        """Our engine, greedy."""
        prompts = random_ids(work.batch, work.prompt, self.settings)
        return generate(model, prompts, GenerationSettings(max_new_tokens=work.new), observe=observe)

    def counts(self, generation: Generation, model: MemGenModel) -> Counts:
        """The work that a generation should have taken."""
        reads = isinstance(model.trigger, type(self.parts.tokens))
        return generation_counts(generation, self.parts.weaver.config.latents, trigger_reads=reads)


@dataclass(frozen=True)
class Floor:
    """What the method's positions would cost at plain decoding's prices, as ratios to plain decoding.

    Attributes:
        positions: all positions over plain decoding's: every position at plain decoding's mean price.
        two_price_wall: with two measured prices, one of a position that is read beside many others (prompt, latents,
            what the weaver and the trigger read) and one of a decoding step.
        two_price_cpu: the same in CPU time.
    """

    positions: float
    two_price_wall: float
    two_price_cpu: float


def decoding_floor(work: Work, counts: Counts, plain: Timing, prefill: Timing) -> Floor:
    """The floor of one case.

    Args:
        work: the task.
        counts: of the side with memory.
        plain: of Hugging Face's `generate`.
        prefill: of the same with one new token.
    """
    extra = counts.weaver_positions + counts.trigger_positions
    chunked = counts.prompt_positions + counts.latents + extra
    return Floor(
        positions=(counts.reasoner_positions + extra) / work.plain_positions,
        two_price_wall=_two_price(work, chunked, median(plain.wall), median(prefill.wall)),
        two_price_cpu=_two_price(work, chunked, median(plain.cpu), median(prefill.cpu)),
    )


def _two_price(work: Work, chunked: int, plain: float, prefill: float) -> float:
    """(chunked positions at the prefill's price + the same steps) / plain."""
    steps = max(plain - prefill, 0.0)
    return (prefill * chunked / (work.batch * work.prompt) + steps) / plain


def step_bytes_floor(weights: int, cache: int, steps: int, bandwidth: float) -> float:
    """Seconds in which a device can read the weights, and on average half of the cache, once per step.

    Args:
        weights: bytes.
        cache: bytes when full.
        steps: passes over the weights.
        bandwidth: bytes per second of a large copy, reading and writing counted.
    """
    return steps * (weights + cache / 2) / bandwidth


def measure_decoding(
    settings: ModelSettings,
    work: Work,
    memories: Sequence[Memory],
    repeats: int,
    meter: Meter,
    progress: Callable[[], None] = lambda: None,
    *,
    decoding: Decoding | None = None,
    bandwidth: float | None = None,
    warm_up: bool = True,
) -> list[dict[str, Any]]:
    """One case per kind of memory; all of them and the baseline in turn.

    Args:
        settings: the model.
        work: the task.
        memories: which kinds.
        repeats: counted passes over all sides.
        meter: the clocks.
        progress: called after each run: `sides` per pass.
        decoding: the two forms of the model, if they exist already.
        bandwidth: bytes per second of a large copy, for the floor of a device that is bound by it.
        warm_up: whether a pass that is not counted comes first.
    """
    decoding = decoding or Decoding(settings)
    outputs: dict[str, Any] = {}

    def keep(name: str, run: Callable[[], object]) -> Callable[[], None]:
        def work_of_side() -> None:
            outputs[name] = run()

        return work_of_side

    runs: dict[str, Callable[[], object]] = {
        "plain": keep("plain", lambda: decoding.huggingface(work)),
        "prefill": keep("prefill", lambda: decoding.huggingface(work, new=1)),
    }
    if has_static_cache(settings):
        runs["static"] = keep("static", lambda: decoding.huggingface(work, static=True))
    for memory in memories:
        model = decoding.models[memory]
        runs[memory] = keep(memory, lambda model=model: decoding.ours(work, model))  # type: ignore[misc]
    timings = interleave(runs, repeats, meter, progress, warm_up=warm_up)
    weights = weight_bytes(decoding.plain)
    return [
        _case(decoding, work, memory, timings, outputs, weights=weights, bandwidth=bandwidth)
        for memory in memories
    ]


def has_static_cache(settings: ModelSettings) -> bool:
    """Whether a static cache is a baseline too: on a CPU it only adds masked work."""
    return torch.device(settings.device).type == "cuda"


def sides(settings: ModelSettings, memories: Sequence[Memory]) -> int:
    """How many sides `measure_decoding` runs."""
    return len(memories) + 2 + has_static_cache(settings)


def _case(
    decoding: Decoding,
    work: Work,
    memory: Memory,
    timings: dict[str, Timing],
    outputs: dict[str, Any],
    *,
    weights: int,
    bandwidth: float | None,
) -> dict[str, Any]:
    settings = decoding.settings
    model, generation = decoding.models[memory], cast(Generation, outputs[memory])
    ours, plain, prefill = timings[memory], timings["plain"], timings["prefill"]
    counts = decoding.counts(generation, model)
    floor = decoding_floor(work, counts, plain, prefill)
    done = generation.work
    cpu_ratio = paired_ratio(ours.cpu, plain.cpu)
    wall_ratio = paired_ratio(ours.wall, plain.wall)
    tokens = work.batch * work.new
    case: dict[str, Any] = {
        "model": settings.model,
        "batch": work.batch,
        "memory": memory,
        "wall_ratio": round(wall_ratio, 4),
        "cpu_ratio": round(cpu_ratio, 4),
        "wall_ratio_of_minima": round(min(ours.wall) / min(plain.wall), 4),
        "cpu_ratio_of_minima": round(min(ours.cpu) / min(plain.cpu), 4),
        "floor_position_ratio": round(floor.positions, 4),
        "floor_wall_ratio": round(floor.two_price_wall, 4),
        "floor_cpu_ratio": round(floor.two_price_cpu, 4),
        "gap_to_floor": round(cpu_ratio / floor.two_price_cpu, 4),
        "prefills": round(prompt_reads(done.reasoner_positions, counts, work.tokens_fed), 6),
        "reasoner_forwards": done.reasoner_forwards,
        "reasoner_positions": done.reasoner_positions,
        "weaver_forwards": done.weaver_forwards,
        "weaver_positions": done.weaver_positions,
        "trigger_forwards": done.trigger_forwards,
        "trigger_positions": done.trigger_positions,
        "counts_match_formula": matches(done, counts),
        "query_key_pairs": counts.reasoner_pairs + counts.weaver_pairs + counts.trigger_pairs,
        "insertions": counts.insertions,
        "invocation_rate": invocation_rate(generation),
        "delimiter_rate": round(delimiter_rate(generation, settings), 4),
        "same_text_as_plain": same_text(generation, outputs["plain"], work.prompt),
        "weight_bytes": weights,
        "cache_bytes_needed": cache_bytes(settings, counts),
        "ours": ours.as_dict() | _rate(tokens, ours),
        "plain": plain.as_dict()
        | _rate(tokens, plain)
        | {"forwards": work.new, "positions": work.plain_positions, "cache": "growing"},
        "plain_prefill": prefill.as_dict(),
        **describe(settings, work, len(ours.samples)),
    }
    if "static" in timings:
        static = timings["static"]
        case["plain_static_cache"] = static.as_dict() | _rate(tokens, static)
        case["wall_ratio_to_static_cache"] = round(paired_ratio(ours.wall, static.wall), 4)
    if bandwidth is not None:
        seconds = step_bytes_floor(weights, case["cache_bytes_needed"], work.new, bandwidth)
        case["copy_bandwidth_bytes_per_second"] = bandwidth
        case["bandwidth_floor_seconds"] = round(seconds, 6)
        case["wall_ratio_to_bandwidth_floor"] = round(median(ours.wall) / seconds, 4)
    return case


def describe(settings: ModelSettings, work: Work, repeats: int) -> dict[str, Any]:
    """What was asked for."""
    return {
        "prompt": work.prompt,
        "new": work.new,
        "latents": settings.latents,
        "cap": settings.cap,
        "dtype": settings.dtype,
        "device": settings.device,
        "seed": settings.seed,
        "repeats": repeats,
    }


def _rate(tokens: int, timing: Timing) -> dict[str, Any]:
    return {"tokens_per_second": round(tokens / median(timing.wall), 2)}


def matches(done: WorkCount, counts: Counts) -> bool:
    """Whether the engine's counts are what the insertion plan asks for, and no more."""
    return (done.reasoner_positions, done.weaver_positions, done.trigger_positions) == (
        counts.reasoner_positions,
        counts.weaver_positions,
        counts.trigger_positions,
    )


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


def cache_bytes(settings: ModelSettings, counts: Counts) -> int:
    """Keys and values of every position that reasoner, weaver and trigger keep. The weaver's queries are forgotten."""
    kept = counts.reasoner_positions + counts.trigger_positions
    # Of what the weaver reads, the queries of every insertion are not kept, and each is one latent's.
    kept += max(counts.weaver_positions - counts.latents, 0)
    return kept * settings.shape.cache_bytes(settings.torch_dtype)
