"""`memgen bench memory`: peak memory of decoding and of a training step, each side in a fresh process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import GenerationConfig

from memgen.bench.generation import Decoding, DecodingWorkload, cache_bytes, insertions
from memgen.bench.shapes import ModelSettings
from memgen.bench.training import TrainingWorkload, peak_in_own_process

DECODING_SIDES = ("plain", "never", "always")


def live_cache_bytes() -> int:
    """Bytes of all tensors of four axes that exist now.

    Between two steps of decoding these are the KV caches: weights have at most two axes, and activations are freed.
    """
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if type(found) is torch.Tensor and found.dim() == 4
    }
    return sum(storages.values())


def decoding_cache(decoding: Decoding, workload: DecodingWorkload, side: str) -> dict[str, int]:
    """Bytes of keys and values at the last step: needed for the kept positions, and allocated.

    Args:
        decoding: the model.
        workload: the task.
        side: plain, or an insertion mode.
    """
    settings = decoding.settings
    per_position = settings.shape.cache_bytes(settings.torch_dtype)
    if side == "plain":
        ids = torch.zeros(workload.batch, workload.prompt, dtype=torch.int64, device=settings.device)
        config = GenerationConfig(
            max_new_tokens=workload.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        with torch.no_grad():
            output = decoding.plain.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        held = live_cache_bytes()
        del output
        return {"cache_bytes_needed": workload.plain_positions * per_position, "cache_bytes_held": held}
    model = decoding.models[side]  # type: ignore[index]
    held = 0
    seen = 0

    def observe(row: int, token: int | None) -> None:
        nonlocal held, seen
        seen += token is not None
        if seen == workload.batch * workload.new:
            held = live_cache_bytes()

    generation = decoding.ours(workload, model, observe)
    needed = cache_bytes(settings, generation.work, insertions(generation) * settings.latents)
    return {"cache_bytes_needed": needed, "cache_bytes_held": held}


def measure_decoding_memory(
    settings: ModelSettings,
    workload: DecodingWorkload,
    progress: Callable[[], None] = lambda: None,
    sides: Sequence[str] = DECODING_SIDES,
) -> Iterator[dict[str, Any]]:
    """One case per side, each as soon as it is measured.

    Args:
        settings: the model.
        workload: the task.
        progress: called after each side.
        sides: plain and insertion modes; plain comes first.
    """
    baseline: int | None = None
    for side in sides:
        peak = peak_in_own_process(
            {"kind": "generation", "side": side, "settings": settings, "work": workload}
        )
        above = peak["peak_above_weights_bytes"]
        baseline = baseline or above
        progress()
        yield {
            "model": settings.model,
            "work": "decode",
            "side": side,
            **asdict(workload),
            "latents": settings.latents,
            "cap": settings.cap,
            **peak,
            "memory_ratio": round(above / baseline, 4) if above and baseline else None,
            **decoding_cache(Decoding(settings), workload, side),
            **_described(settings),
        }


def measure_training_memory(
    settings: ModelSettings, workload: TrainingWorkload, progress: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """One case per side of a supervised step, each as soon as it is measured.

    Args:
        settings: the model.
        workload: the batch.
        progress: called after each side.
    """
    baseline: int | None = None
    for side in ("plain", "ours"):
        peak = peak_in_own_process(
            {"kind": "training", "side": side, "stage": "sft", "settings": settings, "work": workload}
        )
        above = peak["peak_above_weights_bytes"]
        baseline = baseline or above
        progress()
        yield {
            "model": settings.model,
            "work": "sft step",
            "side": side,
            **asdict(workload),
            "latents": settings.latents,
            **peak,
            "memory_ratio": round(above / baseline, 4) if above and baseline else None,
            **_described(settings),
        }


def _described(settings: ModelSettings) -> dict[str, Any]:
    return {"dtype": settings.dtype, "device": settings.device, "seed": settings.seed}
