"""The report: one HTML page without a reference to anything outside it, and the numbers as JSON."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from memgen.analysis.clusters import MOST_BLOCKS
from memgen.analysis.collection import Collection, Floats
from memgen.analysis.effects import REWARD, Effect
from memgen.analysis.geometry import Quantiles
from memgen.analysis.page import STYLE, forest, svg, table
from memgen.analysis.pipeline import Analysis
from memgen.files import write_whole

REPORT, NUMBERS = "report.html", "analysis.json"
_FEWEST_TO_DRAW = 8
_MOST_COLOURS = 10


def write(analysis: Analysis, collection: Collection, folder: Path) -> tuple[str, str]:
    """Writes `report.html` and `analysis.json`, each whole or not at all.

    Args:
        analysis: the result.
        collection: its blocks, for the figures.
        folder: where to.

    Returns:
        The page, and the numbers as JSON.
    """
    numbers = json.dumps(dataclasses.asdict(analysis), indent=2, ensure_ascii=False) + "\n"
    page = report_html(analysis, collection)
    write_whole(folder / NUMBERS, numbers)
    write_whole(folder / REPORT, page)
    return page, numbers


def report_html(analysis: Analysis, collection: Collection) -> str:
    """The page."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Memory analysis</title><style>{STYLE}</style>',
        f"<h1>Latent memory of {html.escape(analysis.environment)}</h1>",
        *_verdict(analysis),
        *_geometry(analysis),
        *_clusters(analysis, collection),
        *_interventions(analysis),
    ]
    return "\n".join([*parts, "</html>\n"])


def _verdict(analysis: Analysis) -> list[str]:
    verdict = analysis.verdict
    sizes = ", ".join(f"{count} latents ({kind})" for kind, count in sorted(analysis.latents.items()))
    return [
        f'<div class="verdict"><p><b>{html.escape(verdict.headline)}</b></p>'
        + "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdict.sentences)
        + "</div>",
        f"<p>{analysis.blocks} woven blocks of {analysis.items} items; a block has {sizes}. Clusters are fitted on {analysis.fitting} "
        f"items, interventions scored on the other {analysis.scoring}, where the checkpoint as it is earns "
        f"{html.escape(str(analysis.reward))}.</p>",
        *(f"<p>{html.escape(note)}.</p>" for note in analysis.notes),
    ]


def _geometry(analysis: Analysis) -> list[str]:
    found = analysis.geometry

    def quantiles(values: Quantiles) -> str:
        return f"{values.median:.3g} ({values.low:.3g} to {values.high:.3g})"

    vocabulary = found.vocabulary
    beats = "above" if vocabulary.beats_random else "not above"
    rows = [
        ("norm of a latent", quantiles(found.latent_norms)),
        ("norm of a token embedding", quantiles(found.token_norms)),
        ("cosine between latents of a block", _number(found.within_blocks)),
        ("cosine between the k-th latents of two blocks", _number(found.between_blocks)),
        ("effective rank of all latents", f"{found.effective_rank:.1f} of {found.dimension}"),
        (
            "effective rank of the blocks' means",
            f"{found.effective_rank_of_means:.1f} of {found.dimension}",
        ),
        ("largest cosine of a latent with a token", quantiles(vocabulary.latents)),
        (
            "that of a random vector",
            f"{quantiles(vocabulary.random)}; {vocabulary.beyond_random:.0%} of the latents lie above its 95 % "
            f"quantile, the median latent {beats} it",
        ),
    ]
    distances = [
        (name, f"{distance.euclidean:.4g}", f"{distance.cosine:.3f}")
        for name, distance in found.distances.items()
    ]
    probes = [
        (
            probe.target,
            f"{probe.accuracy:.3f}",
            f"{probe.chance:.3f}",
            f"{probe.majority:.3f}",
            f"{probe.p_value:.2g}",
            probe.classes,
            probe.blocks,
            probe.held_out,
        )
        for probe in analysis.probes
    ]
    return [
        "<h2>Geometry</h2><p>Medians, with 5 % and 95 % quantiles.</p>",
        table(("", "value"), rows),
        "<p>Distances between mean vectors, over all pairs. Euclidean distances also compare lengths.</p>",
        table(("", "Euclidean", "cosine"), distances),
        "<p>What can be read off a block by logistic regression, on blocks that it has not seen.</p>",
        table(("target", "accuracy", "chance", "majority", "p", "classes", "blocks", "tested on"), probes)
        if probes
        else "<p>There are no two classes of anything to tell apart.</p>",
    ]


def _clusters(analysis: Analysis, collection: Collection) -> list[str]:
    study = analysis.study
    parts = ["<h2>Clusters</h2>"]
    if study.counts:
        rows = [
            (
                c.clusters,
                f"{c.silhouette:.3f}",
                f"{c.null_silhouette:.3f}",
                f"{c.excess:.3f}",
                f"{c.stability:.3f}",
            )
            for c in study.counts
        ]
        parts.append(
            table(("N", "silhouette", "without clusters", "excess", "stability (adjusted Rand)"), rows)
        )
        parts.append(_silhouette_figure(analysis))
    described = [
        (
            f"{c.cluster + 1} of {c.clusters}",
            c.blocks,
            _listed(c.tasks.items()),
            _listed((repr(name), count) for name, count in c.boundaries.items()),
            _listed((repr(token), f"{cosine:.2f}") for token, cosine in c.nearest_tokens),
            "; ".join(f"{boundary!r}: {followed!r}" for boundary, followed in c.examples),
        )
        for c in analysis.clusters
    ]
    if described:
        header = (
            "cluster",
            "blocks",
            "tasks",
            "boundaries",
            "nearest tokens (cosine)",
            "boundary: what follows",
        )
        parts.append(table(header, described))
    return [*parts, *_maps(analysis, collection)]


def _maps(analysis: Analysis, collection: Collection) -> list[str]:
    """Two-dimensional maps of the blocks, to look at: nothing is concluded from them."""
    means = collection.means()
    if len(means) < _FEWEST_TO_DRAW or analysis.study.alike:
        return []
    random = np.random.default_rng(analysis.settings.seed)
    shown = np.arange(len(means))
    if len(means) > MOST_BLOCKS:
        shown = np.sort(random.choice(len(means), MOST_BLOCKS, replace=False))
    labels = {
        key: [str(collection.blocks[i][key]) for i in shown]
        for key in ("task", "boundary")
        if len({block[key] for block in collection.blocks}) > 1
    }
    clusters = {
        f"cluster, N = {count}": [str(found[i] + 1) for i in shown]
        for count, found in analysis.assigned.items()
    }
    labels = {**clusters, **labels}
    parts = []
    for name in ("t-SNE", "UMAP"):
        places = _flattened(name, means[shown], analysis.settings.seed)
        if places is not None:
            figure = Figure(figsize=(4.2 * max(1, len(labels)), 4), layout="constrained")
            axes = figure.subplots(1, max(1, len(labels)), squeeze=False)[0]
            for axis, (title, values) in zip(
                axes, (labels or {"blocks": ["block"] * len(shown)}).items(), strict=True
            ):
                _scatter(axis, places, values, f"{name}, by {title}")
            parts.append(svg(figure))
    return ["<p>Maps to look at; no sentence of the verdict rests on them.</p>", *parts]


def _flattened(name: str, means: Floats, seed: int) -> NDArray[np.float64] | None:
    """The blocks in two dimensions; None if UMAP is not installed."""
    if name == "UMAP":
        if importlib.util.find_spec("umap") is None:
            return None
        neighbours = min(15, len(means) - 1)
        mapper = import_module("umap").UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1)
    else:
        mapper = TSNE(perplexity=min(30.0, (len(means) - 1) / 3), init="pca", random_state=seed)
    return np.asarray(mapper.fit_transform(means), dtype=np.float64)


def _scatter(axis: Axes, places: NDArray[np.float64], values: Sequence[str], title: str) -> None:
    common = sorted(set(values), key=lambda value: (-values.count(value), value))[:_MOST_COLOURS]
    for value in common:
        own = np.asarray([v == value for v in values])
        axis.scatter(places[own, 0], places[own, 1], s=8, label=repr(value).strip("'").replace("$", r"\$"))
    axis.set_title(title.replace("$", r"\$"), fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(fontsize=7)


def _silhouette_figure(analysis: Analysis) -> str:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    counts = [count.clusters for count in analysis.study.counts]
    axis.plot(counts, [c.silhouette for c in analysis.study.counts], "o-", label="latents")
    axis.plot(counts, [c.null_silhouette for c in analysis.study.counts], "x--", label="without clusters")
    axis.set_xlabel("N")
    axis.set_ylabel("silhouette")
    axis.legend()
    return svg(figure)


def _interventions(analysis: Analysis) -> list[str]:
    overall = [effect for effect in analysis.overall if effect.outcome.name == REWARD]
    parts = [
        "<h2>Interventions</h2><p>The same items and seeds; differences are paired, p-values are those after Holm's "
        "correction within each table.</p>",
        forest(overall),
        table(
            ("condition", "reward", "filter rate", "failures"),
            [
                (
                    name,
                    f"{found['reward']:.3f}",
                    f"{found['filter_rate']:.0%}",
                    _listed(
                        (key.removeprefix("failure: "), f"{share:.0%}")
                        for key, share in found.items()
                        if key.startswith("failure: ")
                    ),
                )
                for name, found in analysis.conditions.items()
            ],
        ),
        "<h3>Against the checkpoint as it is</h3>",
        _effects(analysis.overall),
    ]
    for found in analysis.removals:
        parts += [
            f"<h3>N = {found.clusters}: removal of a cluster against a random removal at the same rate</h3>",
            table(
                ("removal", "filter rate", "rate of the random removal"),
                [(r.condition, f"{r.rate:.0%}", f"{r.control_rate:.0%}") for r in found.results],
            ),
            _effects(found.beyond_random),
            f"<h3>N = {found.clusters}: removal of one cluster against that of another</h3>",
            _effects(found.between),
        ]
    return parts


def _effects(effects: Sequence[Effect]) -> str:
    rows = [
        (
            effect.condition,
            effect.against,
            effect.outcome.name,
            effect.items,
            str(effect.difference),
            f"{effect.adjusted:.2g}",
            effect.test,
        )
        for effect in effects
    ]
    return table(("condition", "against", "outcome", "items", "difference", "p (Holm)", "test"), rows)


def _listed(pairs: Iterable[tuple[object, object]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs)


def _number(value: float | None) -> str:
    return "one only" if value is None else f"{value:.3f}"
