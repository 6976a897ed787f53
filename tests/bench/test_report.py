"""docs/performance.md and the figures that it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memgen.bench import report
from memgen.bench.tables import generation_rows, markdown, notes, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results():
    folder = ROOT / report.RESULTS
    if not folder.is_dir():
        pytest.skip(f"{report.RESULTS} is not there (make bench-performance)")
    return folder


def test_the_document_shows_the_recorded_figures(results):
    text = (ROOT / report.DOCUMENT).read_text(encoding="utf-8")
    assert report.fill(text, results) == text
    assert "| small | 8 | always |" in text


def test_every_table_has_its_place_in_the_document():
    text = (ROOT / report.DOCUMENT).read_text(encoding="utf-8")
    places = [match["name"] for match in report.PLACE.finditer(text)]
    assert sorted(places) == sorted([*report.TABLES, "prices"])


def test_recorded_work_is_the_formulas_and_every_prompt_is_read_once(results):
    for path in results.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["complete"], path
        for case in content["cases"]:
            assert case.get("counts_match_formula", True), (path, case)
            assert case.get("prefills", 1) == 1, (path, case)


def test_the_curves_are_drawn(results, tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        report.plot(report.load(results, "sweeps"), path)
    assert first.read_text() == second.read_text(), "the same figures give the same file"
    assert "other rows that insert" in first.read_text()


def test_a_table_of_an_interrupted_run_is_refused(tmp_path):
    (tmp_path / "kernels.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="was interrupted"):
        report.fill("<!-- kernels -->\n<!-- end -->", tmp_path)


def test_absent_figures_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(ValueError, match="make bench-performance"):
        report.fill("<!-- kernels -->\n<!-- end -->", tmp_path)


def test_a_place_that_nothing_fills_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a place 'speed' that nothing fills; choose among: generation"):
        report.fill("<!-- speed -->\n<!-- end -->", tmp_path)


def test_provenance_names_command_machine_date_and_seed():
    machine = {
        "processor": "CPU Z",
        "logical_cores": 2,
        "threads": 1,
        "torch": "2.13",
        "transformers": "5.23",
    }
    case = {"seed": 3, "repeats": 7, "load_average": [0.5, 0, 0]}
    content = {
        "command": "memgen bench kernels --json out/x.json --repeats 7",
        "machine": machine | {"date": "2026-01-02T03:04:05+00:00"},
        "cases": [case, case | {"load_average": [1.5, 0, 0]}],
    }
    assert report.provenance(content) == (
        "`memgen bench kernels --repeats 7`: 2026-01-02, CPU Z (2 cores), 1 thread, load average 0.5 to 1.5, "
        "torch 2.13, transformers 5.23, seed 3, 7 counted repeats."
    )


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
    "counts_match_formula": True,
    "delimiter_rate": 0.06,
}


def test_one_set_of_rows_serves_the_terminal_and_the_document():
    rows = generation_rows([CASE])
    assert markdown(rows).splitlines()[2] == "| small | 8 | always | 1.23 | 1.30 | 1.10 | 1.12 | 100 | 123 |"
    assert table("title", rows).row_count == 1


def test_notes_name_wrong_counts_and_unusual_texts():
    assert notes([CASE]) == []
    assert "this is a bug" in notes([CASE | {"counts_match_formula": False}])[0]
    assert "delimiters are 20.0 % of its text" in notes([CASE | {"delimiter_rate": 0.2}])[0]
