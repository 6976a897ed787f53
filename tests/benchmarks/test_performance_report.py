"""Filling the places of a document."""

from __future__ import annotations

import pytest

from benchmarks.performance_report import fill, fill_places, markdown
from memgen.bench.tables import generation_rows, notes

CASE = {
    "model": "small",
    "batch": 8,
    "memory": "always",
    "cpu_ratio": 1.234,
    "wall_ratio": 1.3,
    "floor_cpu_ratio": 1.1,
    "gap_to_floor": 1.12,
    "ours": {"tokens_per_second": 100.4},
    "plain": {"tokens_per_second": 123.0},
    "delimiter_rate": 0.06,
}


def test_only_the_text_between_a_places_marks_is_replaced(tmp_path):
    document = "before\n<!-- speed -->\nold\n<!-- end -->\nafter\n"
    filled = fill_places(document, tmp_path, {"speed": lambda: "| new |"})
    assert filled == "before\n<!-- speed -->\n| new |\n<!-- end -->\nafter\n"


def test_a_place_that_nothing_fills_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a place 'speed' that nothing fills; choose among: generation"):
        fill("<!-- speed -->\n<!-- end -->", tmp_path)


def test_a_table_of_an_interrupted_run_is_refused(tmp_path):
    (tmp_path / "kernels.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="was interrupted"):
        fill("<!-- kernels -->\n<!-- end -->", tmp_path)


def test_absent_figures_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(ValueError, match="make bench-performance"):
        fill("<!-- kernels -->\n<!-- end -->", tmp_path)


def test_a_document_shows_the_terminals_cells():
    rows = generation_rows([CASE])
    assert markdown(rows).splitlines()[2] == "| small | 8 | always | 1.23 | 1.30 | 1.10 | 1.12 | 100 | 123 |"


def test_a_note_names_texts_with_unusually_many_delimiters():
    assert notes([CASE]) == []
    assert "delimiters are 20.0 % of its text" in notes([CASE | {"delimiter_rate": 0.2}])[0]
