"""How cost grows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import sweeps
from benchmarks.sweeps import (
    PRICED,
    SWEEPS,
    Point,
    attention_pairs,
    find_sweep,
    measure_point,
    points,
    summarise,
    warm_up,
)
from memgen.bench.generation import Decoding, DecodingWorkload
from memgen.bench.shapes import ModelSettings

SETTINGS = ModelSettings(model="tiny", latents=2, cap=3, spacing=4)


def test_an_unknown_sweep_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown sweep 'rows'; choose among: batch, new, insertions"):
        find_sweep("rows")


def test_the_insertion_sweep_sets_the_cap_without_the_prompt_end():
    made = {point.x: point for point in points(SWEEPS["insertions"], SETTINGS)}
    assert made[0].mode == "never"
    assert (made[1].mode, made[1].settings.cap) == ("always", 0)
    assert made[32].settings.cap == 31


@pytest.mark.parametrize("inserting", [0, 1, 3])
def test_a_row_that_never_inserts_is_fed_the_same_whatever_the_others_do(inserting, meter):
    point = Point(
        "others", inserting, SETTINGS, DecodingWorkload(batch=4, prompt=6, new=24), "always", inserting
    )
    case = measure_point(point, 1, meter)
    assert case["positions_of_a_row_that_never_inserts"] == 6 + 23
    assert case["rows_inserting"] == inserting
    assert (case["insertions"] > inserting) == (inserting > 0)
    assert 0 < case["quiet_steps"] <= 23
    if not inserting:
        assert case["quiet_steps"] == 23
        assert case["same_text_as_plain"] == 1.0


def test_attention_pairs_of_one_row_by_hand():
    # 4 prompt tokens and 6 new ones; K = 2 before token 4 and before token 7.
    decoding = Decoding(SETTINGS)
    made = decoding.ours(DecodingWorkload(batch=1, prompt=4, new=6), decoding.models["never"])
    made = replace(made, turns=[replace(made.turns[0], insertions=[(4, 0), (7, 1)])])
    reasoner = 13 * 14 // 2
    weaver = 9 * 10 // 2 + (2 * 4 + 3) + (2 * 9 + 3)
    assert attention_pairs(made, 2) == reasoner + weaver


def test_the_command_ends_in_a_sentence_about_other_rows(tmp_path, capsys, monkeypatch, meter):
    path = tmp_path / "sweeps.json"
    monkeypatch.setattr(sweeps, "ProcessMeter", lambda device: meter)
    monkeypatch.setattr(sweeps, "SWEEP_WORK", DecodingWorkload(batch=8, prompt=4, new=32))
    monkeypatch.setitem(SWEEPS, "others", replace(SWEEPS["others"], values=(0, 3, 7)))
    threads = torch.get_num_threads()
    arguments = ["others", "--model", "tiny", "--repeats", "1", "--latents", "2", "--threads", str(threads)]
    assert sweeps.main([*arguments, "--json", str(path)]) == 0
    assert "another row's insertion costs" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [case["x"] for case in content["cases"]] == [0, 3, 7]
    assert content["scaling"]["tiny"]["others"]["most_insertions"] == content["cases"][-1]["insertions"]


def case_of(sweep, x, insertions, seconds, quiet=None):
    counts = dict(zip(PRICED, (10, 20 + x, insertions, 5 * insertions, 100 + x * x), strict=True))
    return counts | {
        "model": "tiny",
        "sweep": sweep,
        "x": x,
        "insertions": insertions,
        "ours": {"cpu_seconds_median": seconds},
        "quiet_step_cpu_seconds_median": quiet,
    }


def test_the_summary_recovers_a_constant_cost_per_insertion_and_a_flat_step():
    cases = [case_of("others", x, 6 * x, 2.0 + 0.012 * x, 0.005) for x in range(8)]
    found = summarise(cases)["tiny"]
    assert found["others"]["cpu_seconds_per_insertion"] == pytest.approx(0.002)
    assert found["others"]["quiet_step_growth_at_most_insertions"] == pytest.approx(0.0)
    assert found["fit"]["r_squared"] == pytest.approx(1.0, abs=1e-3)


def test_the_summary_shows_a_step_that_grows_with_other_rows_insertions():
    cases = [case_of("others", x, 6 * x, 2.0, 0.005 * (1 + 0.1 * x)) for x in range(8)]
    assert summarise(cases)["tiny"]["others"]["quiet_step_growth_at_most_insertions"] == pytest.approx(0.7)


def test_few_points_of_one_sweep_are_not_fitted():
    assert summarise([case_of("batch", 1, 6, 2.0)]) == {"tiny": {}}


def test_the_warm_up_runs_both_sides(meter):
    warm_up(SETTINGS, meter)
    assert meter.runs == 4
