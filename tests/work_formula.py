"""Exact work by a formula of its own, from an insertion plan alone.

Reasoner: a prompt and its latents once, then each token but the last and K latents per later insertion. Weaver: each
token and latent up to a row's last insertion once, and K queries per insertion. Trigger: the text up to the last boundary
at which it was asked.
"""

from __future__ import annotations

from memgen.types import Decision


def stream_positions(lengths, plan, latents):
    """Reasoner and weaver positions of rows that are read up to, and without, their last token.

    Args:
        lengths: tokens of each row, prompt included.
        plan: (point, kind) pairs of each row.
        latents: K.
    """
    reasoner = weaver = 0
    for length, row in zip(lengths, plan, strict=True):
        reasoner += length - 1 + latents * len(row)
        if row:
            weaver += row[-1][0] + latents * (len(row) - 1) + latents * len(row)
    return reasoner, weaver


def trigger_positions(generation):
    """Positions of a trigger with a pass of its own over the text."""
    positions = 0
    prompts = generation.prompt.lengths.tolist()
    for prompt, decisions in zip(prompts, generation.decisions.tolist(), strict=True):
        asked = [step for step, decision in enumerate(decisions) if decision != Decision.NOT_ASKED]
        positions += prompt + asked[-1] if asked else 0
    return positions


def decoding_positions(generation, latents, *, trigger_reads):
    """Reasoner, weaver and trigger positions of a generation whose prompts are read once per answer."""
    lengths = (generation.prompt.lengths + generation.lengths).tolist()
    reasoner, weaver = stream_positions(lengths, generation.plan.rows(), latents)
    return reasoner, weaver, trigger_positions(generation) if trigger_reads else 0
