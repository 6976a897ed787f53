"""The verdict in words, by rules that are written down here, so that every sentence follows from numbers.

Faculties are found if all of this holds:

1. The latents form clusters: the largest excess of the silhouette over samples without clusters has p <= 0.05, and
   K-means finds the same clusters for every seed (mean adjusted Rand index >= 0.8).
2. A cluster has a function of its own: some outcome (reward, reward on a task, a type of failure) gets worse by its
   removal than by a random removal at the same rate, and worse than by the removal of every other cluster (each with
   Holm-adjusted p <= 0.05).
3. At least two clusters have one, by the same rule of removal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memgen.analysis.clusters import LEVEL, ClusterStudy
from memgen.analysis.effects import REWARD, Effect
from memgen.analysis.interventions import REMOVE_ALL, SWAPPED_OTHER, SWAPPED_SAME

INDISCRIMINATE = 0.95
"""Filter rate from which a removal removes practically everything."""
SAME_PARTITION = 0.8
"""Adjusted Rand index from which clusters count as those of the task, the boundary or the kind of insertion."""


@dataclass(frozen=True)
class RemovalResult:
    """The removal of one cluster, as it was played.

    Attributes:
        cluster: from 0.
        clusters: N.
        rule: nearest or top_k.
        condition: its name.
        rate: share of the blocks that it removed.
        control: name of the random removal at that rate.
        control_rate: share that this one removed.
    """

    cluster: int
    clusters: int
    rule: str
    condition: str
    rate: float
    control: str
    control_rate: float


@dataclass(frozen=True)
class ClusterEffects:
    """Removals of all clusters of one N, and what they do.

    Attributes:
        clusters: N.
        results: the removals.
        beyond_random: each removal against its random removal.
        between: each removal against those of the other clusters by the same rule.
        agreement: adjusted Rand index of the clusters with task, boundary and kind of insertion.
    """

    clusters: int
    results: tuple[RemovalResult, ...]
    beyond_random: tuple[Effect, ...]
    between: tuple[Effect, ...]
    agreement: Mapping[str, float]

    def functions(self, rule: str) -> dict[int, list[str]]:
        """The outcomes that are a cluster's own, by cluster, for those that have one."""
        by_rule = [result for result in self.results if result.rule == rule]
        found: dict[int, list[str]] = {}
        for result in by_rule:
            others = {other.condition for other in by_rule} - {result.condition}
            for effect in self.beyond_random:
                if effect.condition != result.condition or not effect.harms(LEVEL):
                    continue
                worse = {
                    e.against
                    for e in self.between
                    if e.condition == result.condition and e.outcome == effect.outcome and e.harms(LEVEL)
                }
                if others and others <= worse:
                    found.setdefault(result.cluster, []).append(effect.outcome.name)
        return found


@dataclass(frozen=True)
class Verdict:
    """What the numbers say.

    Attributes:
        headline: one sentence about faculties.
        sentences: the rest, in order.
        clusters_found: whether rule 1 holds.
        faculties: for each cluster with a function of its own, its outcomes; empty unless all rules hold. Clusters are
            numbered from 1, by size in the half that they were fitted on.
        clusters: N of the faculties; None if there are none.
    """

    headline: str
    sentences: tuple[str, ...]
    clusters_found: bool
    faculties: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    clusters: int | None = None


def verdict(study: ClusterStudy, overall: Sequence[Effect], removals: Sequence[ClusterEffects]) -> Verdict:
    """Applies the rules.

    Args:
        study: are there clusters?
        overall: every condition against the checkpoint as it is.
        removals: of each N that was played.
    """
    sentences = [_memory(overall), *_content(overall), _clusters(study)]
    sentences += [sentence for effects in removals for sentence in _removals(effects)]
    owned: tuple[int, dict[int, list[str]]] | None = None
    for effects in removals:
        for rule in dict.fromkeys(result.rule for result in effects.results):
            functions = effects.functions(rule)
            if owned is None or len(functions) > len(owned[1]):
                owned = (effects.clusters, functions)
    clusters, functions = owned or (0, {})
    if not study.found:
        why = "all blocks are practically one vector" if study.alike else "the latents form no clusters"
        return Verdict(f"No faculties: {why}.", tuple(sentences), clusters_found=False)
    if not functions:
        headline = (
            "No faculties: the latents form clusters, but no cluster's removal does something of its own that a random "
            "removal at the same rate does not."
        )
        return Verdict(headline, tuple(sentences), clusters_found=True)
    listed = "; ".join(f"cluster {j + 1}: {', '.join(names)}" for j, names in sorted(functions.items()))
    if len(functions) < 2:
        headline = (
            f"No faculties: one of {clusters} clusters has a function of its own ({listed}), not several."
        )
        return Verdict(headline, tuple(sentences), clusters_found=True)
    return Verdict(
        f"Faculties: {len(functions)} of {clusters} clusters have functions of their own ({listed}).",
        tuple(sentences),
        clusters_found=True,
        faculties={j + 1: tuple(names) for j, names in functions.items()},
        clusters=clusters,
    )


def _of(overall: Sequence[Effect], condition: str) -> Effect | None:
    return next((e for e in overall if e.condition == condition and e.outcome.name == REWARD), None)


def _shown(effect: Effect) -> str:
    return f"{effect.difference}, p = {effect.adjusted:.2g} after Holm's correction"


def _memory(overall: Sequence[Effect]) -> str:
    effect = _of(overall, REMOVE_ALL)
    assert effect is not None, "removing everything is always among the conditions"
    if effect.adjusted > LEVEL:
        return f"Without any memory the reward does not change measurably ({_shown(effect)})."
    word = "falls" if effect.difference.mean < 0 else "rises"
    return f"Without any memory the reward {word} ({_shown(effect)})."


def _content(overall: Sequence[Effect]) -> list[str]:
    sentences = []
    for condition, what in (
        ("noise of equal norm", "Noise of equal norm in its place"),
        (SWAPPED_OTHER, "Memory of an item of another task"),
        (SWAPPED_SAME, "Memory of another item of the same task"),
    ):
        effect = _of(overall, condition)
        if effect is not None:
            verb = "does harm" if effect.harms(LEVEL) else "does no measurable harm"
            sentences.append(f"{what} {verb} ({_shown(effect)}).")
    return sentences


def _clusters(study: ClusterStudy) -> str:
    if study.alike:
        return f"The blocks spread by {study.spread:.2g} of their size: practically one vector, so nothing can be clustered."
    if study.best is None or study.p_value is None:
        return f"{study.blocks} blocks are too few, or too alike, to cluster."
    best = next(count for count in study.counts if count.clusters == study.best)
    numbers = (
        f"N = {study.best} has the largest excess: silhouette {best.silhouette:.2f} against {best.null_silhouette:.2f} "
        f"without clusters, p = {study.p_value:.2g}; stability over seeds {best.stability:.2f}"
    )
    return f"The latents {'form' if study.found else 'do not form'} clusters ({numbers})."


def _removals(effects: ClusterEffects) -> list[str]:
    sentences = []
    for rule, shown in (("nearest", "the nearest centroid"), ("top_k", "the paper's top-k rule")):
        results = [result for result in effects.results if result.rule == rule]
        rates = [result.rate for result in results]
        functions = effects.functions(rule)
        text = (
            f"N = {effects.clusters}, removal by {shown}: filter rates {min(rates):.0%} to {max(rates):.0%}"
        )
        if min(rates) >= INDISCRIMINATE:
            text += ", so whatever the cluster, practically everything is removed"
        named = "; ".join(f"cluster {j + 1} ({', '.join(names)})" for j, names in sorted(functions.items()))
        sentences.append(f"{text}; functions of their own: {named or 'none'}.")
    for name, value in effects.agreement.items():
        if value >= SAME_PARTITION:
            sentences.append(
                f"N = {effects.clusters}: the clusters are those of the {name} (adjusted Rand index {value:.2f}), so "
                f"removing one removes the memory of one {name}; nothing more follows about their content."
            )
    return sentences
