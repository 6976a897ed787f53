"""What an analysis says of weavers whose functions are known."""

from __future__ import annotations

import json
import re

import pytest

from analysis.planted import TASKS, Marks, checkpoint, config, data, planted_weave, repeating_base, settings
from memgen.analysis import report
from memgen.analysis.pipeline import AnalysisSettings, analyze
from memgen.analysis.playing import Player
from memgen.analysis.subject import Subject
from memgen.model.weaver import Weaver
from memgen.results import statistics
from sft_runs import make_trainer

QUICK = AnalysisSettings(null_draws=19)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Analyses a planted weaver."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)  # Intervals are tested elsewhere.
    base = repeating_base(tmp_path / "base")

    def analyse(weave, environment=None, latents=2, cap=0, out="out", chosen=QUICK, **changes):
        chosen_config = config(base, latents, cap)
        monkeypatch.setattr(Weaver, "weave", weave)
        player = Player(
            Subject(
                memgen=chosen_config,
                data=data(base, environment),
                init_from=str(checkpoint(base, tmp_path / f"checkpoint-{latents}", chosen_config)),
                root=tmp_path,
                out=tmp_path / out,
                **{**settings(), **changes},
            )
        )
        result = analyze(player, make_trainer(tmp_path), chosen)
        return (result.analysis, result.collection), tmp_path / out

    return analyse


def test_two_planted_functions_are_found_and_nothing_else(run):
    (found, collection), folder = run(planted_weave(TASKS), Marks(items=160))
    assert found.reward.mean == 1.0
    assert len(collection.blocks) == 160
    assert found.study.best == 2
    assert found.verdict.clusters_found
    assert found.verdict.headline.startswith("Faculties: 2 of 2 clusters have functions of their own")
    tasks = {c.cluster + 1: next(iter(c.tasks)) for c in found.clusters if c.clusters == 2}
    assert sorted(tasks.values()) == ["task #", "task @"]
    assert all(len(c.tasks) == 1 for c in found.clusters if c.clusters == 2)
    for cluster, outcomes in found.verdict.faculties.items():
        assert f"reward on {tasks[cluster]}" in outcomes
        other = next(name for number, name in tasks.items() if number != cluster)
        assert f"reward on {other}" not in outcomes
    (two,) = [removals for removals in found.removals if removals.clusters == 2]
    assert two.agreement["task"] == pytest.approx(1.0)
    assert any("the clusters are those of the task" in sentence for sentence in found.verdict.sentences)
    by_name = {e.condition: e for e in found.overall if e.outcome.name == "reward"}
    assert by_name["remove all"].difference.mean == -1.0
    assert by_name["swapped within the task"].difference.mean == 0.0
    assert by_name["swapped between tasks"].difference.mean == -1.0
    assert by_name["latent 2 alone"].difference.mean == by_name["latents shuffled"].difference.mean == 0.0
    probes = {probe.target: probe for probe in found.probes}
    assert probes["task"].accuracy == 1.0
    assert probes["task"].p_value < 0.05
    page, numbers = report.write(found, collection, folder)
    assert found.verdict.headline in page
    assert json.loads(numbers)["verdict"]["clusters"] == 2
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)([^"')\s>]+)""", page)
    assert not [link for link in outside if not link.startswith("#")]
    assert "@import" not in page
    assert "<script" not in page
    assert report.report_html(found, collection) == page


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["one vector", "one vector and noise"])
def test_a_weaver_whose_latents_are_alike_has_no_faculties(run, noise):
    same = dict.fromkeys(TASKS, "X")
    (found, collection), folder = run(planted_weave(same, noise), Marks(wanted=same))
    assert found.reward.mean == 1.0
    assert found.verdict.headline.startswith("No faculties")
    assert not found.verdict.clusters_found
    assert not found.verdict.faculties
    assert found.study.alike == (noise == 0.0)
    assert "four" not in found.verdict.headline
    if noise == 0.0:
        assert found.notes == ("N = 4 is left out: there are 1 different blocks to fit it on",)
    else:
        assert {removals.clusters for removals in found.removals} == {4}
    page, _ = report.write(found, collection, folder)
    assert found.verdict.headline in page


def test_clusters_without_a_function_are_told_from_faculties(run):
    same = dict.fromkeys(TASKS, "X")
    (found, _), _ = run(planted_weave(same, 0.03, offsets=3), Marks(wanted=same))
    assert found.reward.mean == 1.0
    assert found.study.best == 3
    assert found.verdict.clusters_found
    assert found.verdict.headline.startswith("No faculties: the latents form clusters, but")


def test_a_block_of_one_latent_is_neither_shuffled_nor_reduced(run):
    (found, _), _ = run(planted_weave(TASKS), Marks(items=12), latents=1)
    assert found.geometry.within_blocks is None
    assert not any(name.startswith("latent") for name in found.conditions)


def test_a_test_of_too_few_items_is_refused_before_anything_is_played(run):
    with pytest.raises(ValueError, match="the test split has 1 items, but an analysis needs at least 4"):
        run(planted_weave(TASKS), Marks(items=1))


def test_one_cluster_is_refused():
    with pytest.raises(ValueError, match="clusters must be at least 2, got 1"):
        AnalysisSettings(clusters=1)


def test_a_number_of_clusters_that_the_blocks_do_not_allow_is_noted_and_left_out(run):
    chosen = AnalysisSettings(clusters=7, null_draws=19)
    (found, _), _ = run(planted_weave(TASKS, 0.0), Marks(items=12), chosen=chosen)
    assert found.notes == ("N = 7 is left out: there are 2 different blocks to fit it on",)
    assert found.removals == ()
