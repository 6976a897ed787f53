"""The whole analysis: collect, measure, cluster on one half of the items, intervene on the other, conclude.

A cluster's function is never measured on the items whose blocks defined the cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from sklearn.metrics import adjusted_rand_score

from memgen.analysis import clusters, geometry
from memgen.analysis.clusters import PAPER_COUNT, ClusterStudy, Ints
from memgen.analysis.collection import Collection, Floats
from memgen.analysis.effects import Effect, effects, filter_rate, outcomes
from memgen.analysis.geometry import Geometry
from memgen.analysis.interventions import (
    TRAINED,
    Directions,
    Removal,
    matched_removal,
    removals,
    whole_block_conditions,
)
from memgen.analysis.labels import (
    Failure,
    Labelling,
    Labels,
    collect_failures,
    combine,
    relabelled,
)
from memgen.analysis.playing import Answers, Player
from memgen.analysis.probes import Probe, probes
from memgen.analysis.verdict import ClusterEffects, RemovalResult, Verdict, verdict
from memgen.results.statistics import Interval, mean_interval
from memgen.tracking.metrics import SUCCESS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnalysisSettings:
    """What is analysed, beyond the checkpoint and the items."""

    clusters: int | None = None
    """N of the interventions. None: the best N if there are clusters, and the paper's 4."""
    top_k: int = 10
    """k of the paper's rule of removal."""
    seed: int = 0
    """Of the split of the items, K-means, noise, shuffling and random removals."""
    null_draws: int = 99
    """Samples without clusters that the clusters are compared with."""

    def __post_init__(self) -> None:
        for name, least in (("clusters", 2), ("top_k", 1), ("null_draws", 19)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Cluster:
    """One cluster, over all items.

    Attributes:
        cluster: from 0.
        clusters: N.
        blocks: number of its blocks.
        tasks: number of them by task.
        boundaries: by boundary.
        nearest_tokens: the vocabulary tokens nearest to its centroid, with their cosines.
        examples: boundary and following text of some of its blocks.
    """

    cluster: int
    clusters: int
    blocks: int
    tasks: Mapping[str, int]
    boundaries: Mapping[str, int]
    nearest_tokens: tuple[tuple[str, float], ...]
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Analysis:
    """Everything that was found.

    Attributes:
        settings: of the analysis.
        environment: its name.
        items: number of items with a valid answer.
        blocks: number of woven blocks.
        latents: number of latents of a block, by kind of insertion.
        fitting: number of items on which clusters were fitted.
        scoring: number of items on which interventions were scored.
        reward: of the checkpoint as it is, on the scoring items.
        conditions: of each condition: mean reward, filter rate and share of each type of failure.
        geometry: of the latents.
        probes: what can be read off them.
        study: are there clusters?
        clusters: of each N that was used.
        assigned: the cluster of every block of the collection, from 0, by N.
        overall: every condition against the checkpoint as it is.
        removals: for each N.
        labelling: what people said about failures; None: the types of failure are those of rules.
        notes: what was left out, and why.
        verdict: what follows.
    """

    settings: AnalysisSettings
    environment: str
    items: int
    blocks: int
    latents: Mapping[str, int]
    fitting: int
    scoring: int
    reward: Interval
    conditions: Mapping[str, Mapping[str, float]]
    geometry: Geometry
    probes: tuple[Probe, ...]
    study: ClusterStudy
    clusters: tuple[Cluster, ...]
    assigned: Mapping[int, list[int]]
    overall: tuple[Effect, ...]
    removals: tuple[ClusterEffects, ...]
    labelling: Labelling | None
    notes: tuple[str, ...]
    verdict: Verdict


@dataclass(frozen=True)
class Found:
    """What an analysis leaves behind.

    Attributes:
        analysis: its result.
        collection: the blocks.
        failures: failed trajectories of the checkpoint as it is and of all removals of clusters, for people to label.
    """

    analysis: Analysis
    collection: Collection
    failures: list[Failure]


def analyze(
    player: Player, trainer: Trainer, settings: AnalysisSettings, labels: Sequence[Labels] = ()
) -> Found:
    """Analyses the checkpoint of a player. What was played before is not played again.

    Args:
        player: plays the items.
        trainer: of one process.
        settings: of the analysis.
        labels: people's types of failure, of one annotator or two; none: those of rules.

    Raises:
        ValueError: if there are too few items, or too few answers with woven latents, or the labels are of other failures.
    """
    collection = player.collect(trainer)
    vocabulary = player.memgen.reasoner.backbone.embedding.detach()
    means = collection.means()
    fitting, scoring = halves(collection, settings.seed)
    fitted = np.asarray([block["index"] in fitting for block in collection.blocks])
    study = clusters.study(means[fitted], settings.seed, settings.null_draws)
    logger.info("%d blocks of %d items collected", len(means), len(collection.answers))
    centroids, notes = _centroids(means[fitted], study, settings)
    directions = Directions(vocabulary)
    planned = [removal for found in centroids for removal in removals(found, directions, settings.top_k)]
    answers, results = _play(player, trainer, collection, planned, sorted(scoring), settings.seed)
    shown = [TRAINED.name, *dict.fromkeys(name for r in results for name in (r.condition, r.control))]
    failures = collect_failures(
        answers, shown, lambda index: player.items[index].example.target, settings.seed
    )
    labelling = combine(failures, labels) if labels else None
    summaries = {name: _summary(found) for name, found in answers.items()}
    if labelling is not None:
        answers = relabelled(answers, labelling.types, shown)
        summaries |= {name: _summary(answers[name]) for name in shown}
    measured = outcomes(list(answers.values()))
    others = [name for name in answers if name != TRAINED.name]
    overall = effects([(name, TRAINED.name) for name in others], answers, measured)
    assigned = {len(found): clusters.assign(means, found) for found in centroids}
    tested = []
    for found in centroids:
        own = [result for result in results if result.clusters == len(found)]
        pairs = [
            (a.condition, b.condition)
            for rule in dict.fromkeys(r.rule for r in own)
            for a, b in permutations([r for r in own if r.rule == rule], 2)
        ]
        tested.append(
            ClusterEffects(
                clusters=len(found),
                results=tuple(own),
                beyond_random=tuple(effects([(r.condition, r.control) for r in own], answers, measured)),
                between=tuple(effects(pairs, answers, measured)),
                agreement=_agreement(collection, assigned[len(found)]),
            )
        )
    words = vocabulary.float().cpu().numpy()
    trained = [a["reward"] for a in answers[TRAINED.name].values()]
    analysis = Analysis(
        settings=settings,
        environment=player.data.environment.name,
        items=len(collection.answers),
        blocks=len(means),
        latents={block["kind"]: block["count"] for block in collection.blocks},
        fitting=len(fitting),
        scoring=len(scoring),
        reward=mean_interval(trained),
        conditions=summaries,
        geometry=geometry.describe(collection, words, SUCCESS, settings.seed),
        probes=tuple(probes(collection, settings.seed)),
        study=study,
        clusters=tuple(
            cluster
            for found in centroids
            for cluster in _described(player, collection, assigned[len(found)], found, words)
        ),
        assigned={count: labels.tolist() for count, labels in assigned.items()},
        overall=tuple(overall),
        removals=tuple(tested),
        labelling=labelling,
        notes=tuple(notes),
        verdict=verdict(study, overall, tested),
    )
    return Found(analysis, collection, failures)


def halves(collection: Collection, seed: int) -> tuple[set[int], set[int]]:
    """The items with blocks, and half of those without, in two halves of equal shares of each task.

    Returns:
        Indices of the items to fit clusters on, and of those to score interventions on.
    """
    random = np.random.default_rng(seed)
    woven = {block["index"] for block in collection.blocks}
    fitting: set[int] = set()
    scoring: set[int] = set()
    groups = sorted({(answer["task"], answer["index"] in woven) for answer in collection.answers})
    for task, has_blocks in groups:
        own = [
            answer["index"]
            for answer in collection.answers
            if answer["task"] == task and (answer["index"] in woven) == has_blocks
        ]
        shuffled = random.permutation(own).tolist()
        # The larger half of an odd number goes where there are fewer.
        first, second = sorted((fitting, scoring), key=len)
        first.update(shuffled[::2])
        second.update(shuffled[1::2])
    return fitting, scoring


def _centroids(
    means: Floats, study: ClusterStudy, settings: AnalysisSettings
) -> tuple[list[Floats], list[str]]:
    """The clusterings to intervene with, and why others are left out."""
    if settings.clusters is not None:
        wanted = [settings.clusters]
    else:
        best = [study.best] if study.found and study.best is not None else []
        wanted = list(dict.fromkeys([*best, PAPER_COUNT]))
    found, notes = [], []
    for count in wanted:
        different = len(np.unique(means, axis=0))
        if different < count:
            notes.append(f"N = {count} is left out: there are {different} different blocks to fit it on")
        else:
            found.append(clusters.fit(means, count, settings.seed)[0])
    return found, notes


def _play(
    player: Player,
    trainer: Trainer,
    collection: Collection,
    planned: Sequence[Removal],
    scoring: Sequence[int],
    seed: int,
) -> tuple[dict[str, Answers], list[RemovalResult]]:
    """Plays all conditions on the scoring items; random removals come last, since they need the rates of the others."""
    answers: dict[str, Answers] = {
        TRAINED.name: {a["index"]: {**a, "removed": 0} for a in collection.answers if a["index"] in scoring}
    }
    first = [*whole_block_conditions(collection, seed), *(removal.condition for removal in planned)]
    answers |= player.play(trainer, first, scoring)
    rates = [filter_rate(answers[removal.condition.name]) for removal in planned]
    controls = [matched_removal(r, rate, seed) for r, rate in zip(planned, rates, strict=True)]
    answers |= player.play(trainer, controls, scoring) if controls else {}
    results = [
        RemovalResult(
            cluster=removal.cluster,
            clusters=removal.clusters,
            rule=removal.rule,
            condition=removal.condition.name,
            rate=rate,
            control=control.name,
            control_rate=filter_rate(answers[control.name]),
        )
        for removal, rate, control in zip(planned, rates, controls, strict=True)
    ]
    return answers, results


def _agreement(collection: Collection, labels: Ints) -> dict[str, float]:
    """Adjusted Rand index of clusters with what is known of the blocks, where that has several values."""
    found = {}
    for name, key in (("task", "task"), ("boundary", "boundary"), ("kind of insertion", "kind")):
        known = [block[key] for block in collection.blocks]
        if len(set(known)) > 1:
            found[name] = float(adjusted_rand_score(known, labels))
    return found


def _described(
    player: Player, collection: Collection, labels: Ints, centroids: Floats, vocabulary: Floats
) -> list[Cluster]:
    tokenizer = player.data.tokenizer_object
    ids, cosines = geometry.nearest_tokens(centroids, vocabulary)
    found = []
    for number in range(len(centroids)):
        own = [block for block, label in zip(collection.blocks, labels, strict=True) if label == number]
        near = zip(ids[number].tolist(), cosines[number].tolist(), strict=True)
        found.append(
            Cluster(
                cluster=number,
                clusters=len(centroids),
                blocks=len(own),
                tasks=_counts(own, "task"),
                boundaries=_counts(own, "boundary"),
                nearest_tokens=tuple((tokenizer.decode([token]), cosine) for token, cosine in near),
                examples=tuple(
                    (block["boundary"], block["followed"]) for block in own[:: max(1, len(own) // 3)][:3]
                ),
            )
        )
    return found


def _counts(blocks: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    values = [block[key] for block in blocks]
    return {value: values.count(value) for value in sorted(set(values))}


def _summary(answers: Answers) -> dict[str, float]:
    valid = [answer for answer in answers.values() if answer["fault"] is None]
    failures = sorted({answer["failure"] for answer in valid} - {None})
    share = 1 / max(1, len(valid))
    return {
        "items": float(len(valid)),
        "reward": sum(answer["reward"] for answer in valid) * share,
        "filter_rate": filter_rate(answers),
        **{f"failure: {kind}": sum(a["failure"] == kind for a in valid) * share for kind in failures},
    }
