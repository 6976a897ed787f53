"""An HTML page of episodes with their insertion points: `samples/<name>.html` of a run in MLflow, likewise in other trackers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from lightning.pytorch.loggers import Logger

from memgen.tracking.episodes import Sample
from memgen.tracking.run_logger import RunLogger
from memgen.tracking.trackers import log_page


def log_samples(loggers: Iterable[Logger], samples: Sequence[Sample], name: str) -> None:
    """Writes episodes as a page `samples/<name>.html` of the run, in every tracker that takes pages."""
    page = samples_html(samples)
    for found in loggers:
        if isinstance(found, RunLogger):
            found.log_text(page, f"samples/{name}.html")
        else:
            log_page(found, page, list(samples), name)


def samples_html(samples: Sequence[Sample]) -> str:
    """A page of episodes, with a mark where latents were inserted."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Sample generations</title><style>'
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:.7em;border-radius:4px}"
        "mark{background:#ffd75e;border-radius:3px;padding:0 .25em;font-size:.8em}"
        "h2{font-size:1em}</style>"
        "<p>A <mark>mark</mark> stands where latent memory was inserted.</p>"
    ]
    for index, sample in enumerate(samples):
        answer = "".join(
            f"<mark>{html.escape(segment.text)}</mark>" if segment.is_insertion else html.escape(segment.text)
            for segment in sample.segments
        )
        title = html.escape(sample.title or f"Sample {index + 1}")
        parts.append(
            f"<section><h2>{title}</h2><pre>{html.escape(sample.prompt)}</pre><pre>{answer}</pre></section>"
        )
    return "\n".join([*parts, "</html>\n"])
