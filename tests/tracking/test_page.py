"""The HTML page of episodes."""

from __future__ import annotations

from memgen.tracking.episodes import Sample, TextSegment
from memgen.tracking.page import samples_html


def test_a_page_shows_text_as_text_and_marks_insertions():
    segments = [TextSegment("</pre><script>"), TextSegment("<8>", is_insertion=True)]
    page = samples_html([Sample("2 < 3?", segments, "a & b")])
    assert "<script>" not in page
    assert "<h2>a &amp; b</h2><pre>2 &lt; 3?</pre>" in page
    assert "<pre>&lt;/pre&gt;&lt;script&gt;<mark>&lt;8&gt;</mark></pre>" in page
