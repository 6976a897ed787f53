"""Parts of a self-contained page: nothing in it refers to anything outside."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from memgen.analysis.effects import Effect

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;text-align:left;border-bottom:1px solid #ddd}"
    "svg{max-width:100%;height:auto}pre{white-space:pre-wrap;margin:0}"
    ".verdict{background:#f3f6fa;padding:.7em 1em;border-left:4px solid #4477aa}"
)
"""Of every page."""


def forest(effects: Sequence[Effect]) -> str:
    """Differences of the reward with their intervals."""
    figure = Figure(figsize=(8, 1 + 0.28 * len(effects)), layout="constrained")
    axis = figure.subplots()
    for row, effect in enumerate(reversed(effects)):
        difference = effect.difference
        low, high = (difference.mean if x is None else x for x in (difference.low, difference.high))
        axis.plot([low, high], [row, row], color="#4477aa")
        axis.plot([difference.mean], [row], "o", color="#4477aa", markersize=4)
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.set_yticks(range(len(effects)), [effect.condition for effect in reversed(effects)], fontsize=7)
    axis.set_xlabel("change of the mean reward, 95 % interval")
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as an element of a page, the same for the same data."""
    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "memgen", "svg.fonttype": "path"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    # Without the XML header, whose DOCTYPE names a file elsewhere, and the metadata, which name a vocabulary.
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; cells are shown as texts."""

    def line(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"
