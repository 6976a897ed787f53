"""What the oracle says of items whose best policies are known, and of planted weavers that are played."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from analysis.planted import Marks, checkpoint, config, data, repeating_base, settings
from analysis.test_policies import explored
from memgen.analysis import oracle_report, playing
from memgen.analysis.oracle import OracleSettings, explore, summarise
from memgen.analysis.playing import Player
from memgen.analysis.policies import Trace
from memgen.analysis.subject import Subject
from memgen.model.weaver import Weaver
from memgen.results import statistics
from memgen.results.statistics import share
from sft_runs import make_trainer
from tiny import byte_tokenizer


def found_for(solves, items=40, boundaries=3, budget=16, trigger=None):
    """The oracle on items of so many boundaries; `solves(index, decisions)` says whether an answer is right."""

    def run(index):
        def play(policy):
            decisions = tuple(policy.invokes(number) for number in range(boundaries))
            right = bool(solves(index, decisions))
            return Trace(decisions, right, float(right))

        return play

    explorers = {index: explored(run(index), budget) for index in range(items)}
    known = {index: {"id": f"item {index}", "task": "one"} for index in range(items)}
    traces = None
    if trigger is not None:
        decided = {index: tuple(trigger(index)) for index in range(items)}
        traces = {i: Trace(d, bool(solves(i, d)), float(solves(i, d))) for i, d in decided.items()}
    return summarise(explorers, known, traces, OracleSettings(budget), "planted")


def needs_memory(index, decisions):
    """Every second item needs memory at the second boundary; the others must have none."""
    return decisions[1] if index % 2 else not any(decisions)


def test_where_no_insertion_matters_there_is_nothing_to_gain():
    found = found_for(lambda index, decisions: index % 4 == 0)
    assert found.headline.startswith("A trigger has nothing to gain in accuracy")
    assert found.optimum.accuracy.mean == 0.25
    assert found.optimum.insertions == 0.0
    assert (found.rescued["never"].count, found.rescued["never"].total) == (0, 30)
    assert (found.broken["never"].count, found.broken["never"].total) == (0, 10)
    assert found.shared.name == "never"
    assert "none was better than 'never'" in found.sentences[0]


def test_what_depends_on_the_item_is_a_bound_and_no_rule():
    found = found_for(needs_memory, trigger=lambda index: [index % 2 == 1] * 3)
    assert found.never.accuracy.mean == found.always.accuracy.mean == 0.5
    assert found.optimum.accuracy.mean == 1.0
    assert found.optimum.insertions == 0.5
    assert found.headline.startswith("A trigger has at most 50.0 points (95 % interval ")
    assert found.rescued["never"] == share(20, 20)
    assert found.rescued["always"] == share(20, 20)
    assert found.broken["never"] == share(20, 20)
    assert found.shared_gain.difference.mean == 0.0
    assert found.tried_singly == found.tried_in_pairs == 40
    assert found.trigger.accuracy.mean == 1.0
    assert found.trigger_loss.difference.mean == 0.0
    assert "that is 100% of what there is to gain" in found.sentences[-1]
    assert {item.best for item in found.details} == {"never", "boundary 2 alone"}
    assert "has no trained trigger" in found_for(needs_memory).sentences[-1]


def test_a_rule_that_all_items_share_is_found_on_one_half_and_gains_on_the_other():
    found = found_for(lambda index, decisions: decisions == (False, True, False))
    assert found.shared.name == "boundary 2 alone"
    assert found.shared.accuracy.mean == 1.0
    assert found.shared.accuracy.count == 20
    assert found.shared_gain.difference.mean == 1.0
    assert found.shared_gain.p_value == pytest.approx(stats.binomtest(20, 20, 0.5).pvalue)
    assert found.sentences[0].startswith("A rule gains without training: 'boundary 2 alone'")
    assert "insertion breaks 0 of 0 successes" in found.sentences[1]


def test_a_rule_that_fits_one_half_by_chance_does_not_gain_on_the_other():
    found = found_for(lambda index, decisions: math.sin(index * 99 + hash(decisions) % 1000) > 0, items=30)
    best = found.policies[0]
    assert best.chosen_on == max(policy.chosen_on for policy in found.policies)
    assert found.shared.name == best.name
    assert found.shared.accuracy.mean == best.scored_on
    assert found.optimum.accuracy.mean > max(policy.accuracy for policy in found.policies)


def test_a_small_budget_says_how_much_of_the_policies_it_tried():
    found = found_for(needs_memory, boundaries=5, budget=5)
    assert (found.tried_singly, found.tried_in_pairs) == (0, 0)
    assert found.decoded == 5 * 40
    names = {policy.name for policy in found.policies}
    assert names == {"never", "always", "boundary 1 alone", "boundary 2 alone", "boundary 3 alone"}
    assert "left out on 0 of them" in found.sentences[3]


def test_nothing_to_decide_and_nothing_to_spend_are_refused():
    with pytest.raises(ValueError, match="no episode has a boundary, so a trigger has nothing to decide"):
        found_for(lambda index, decisions: True, boundaries=0)
    with pytest.raises(ValueError, match=r"--budget must be at least 3 .*, got 2"):
        OracleSettings(budget=2)


@pytest.mark.parametrize(("count", "total"), [(0, 9), (3, 9), (9, 9), (50, 120)])
def test_the_interval_of_a_share_is_wilsons(count, total):
    z = stats.norm.ppf(0.975)
    p, n = count / total, total
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = share(count, total)
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert share(0, 0).low is None


class Played:
    """Plays items of three boundaries, some of which the environment fails."""

    folder = "out"
    data = SimpleNamespace(environment=SimpleNamespace(name="played"))

    def __init__(self, failing, items=8):
        self.failing, self.items, self.asked = failing, items, []

    def play(self, trainer, conditions, items=None):
        (condition,) = conditions
        found = {}
        for index in range(self.items) if items is None else items:
            self.asked.append(index)
            decisions = [int(condition.decide(index, number)) for number in range(3)]
            fault = "the server is gone" if index in self.failing else None
            found[index] = {
                "id": str(index),
                "task": "one",
                "reward": float(decisions[1]),
                "decisions": decisions,
                "fault": fault,
            }
        return {condition.name: found}


def test_items_that_the_environment_fails_are_left_out_and_not_tried_again():
    player = Played({3})
    found = explore(player, None, OracleSettings(budget=5), has_trigger=False)
    assert (found.items, found.faulted) == (7, 1)
    assert 3 not in {item.index for item in found.details}
    assert player.asked.count(3) == 1
    assert player.asked.count(0) == 5
    assert "1 more are left out" in oracle_report.oracle_markdown(found)
    with pytest.raises(ValueError, match="the environment failed on 5 of 8 items, and 3 are too few"):
        explore(Played({0, 1, 2, 3, 4}), None, OracleSettings(budget=5), has_trigger=False)


# Played


def weave_x(self, states, counts, kinds, rows, cache, texts=None):
    letter = self.backbone.embedding[byte_tokenizer().encode("X")[0]].detach()
    return torch.cat([letter.expand(self.config.latents(kind), -1) for kind in kinds])


@pytest.fixture
def player(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    base = repeating_base(tmp_path / "base")
    # Memory writes X whatever was asked; without it, the reasoner repeats the end of the prompt.
    monkeypatch.setattr(Weaver, "weave", weave_x)
    chosen = config(base, cap=2)
    folder = checkpoint(base, tmp_path / "checkpoint", chosen)

    def build(items=12, out="out"):
        return Player(
            Subject(
                memgen=chosen,
                data=data(base, Marks(items=items, wanted={"#": "X", "@": "\n"})),
                init_from=str(folder),
                root=tmp_path,
                out=tmp_path / out,
                **settings(),
            )
        )

    return build


def test_a_planted_weaver_that_helps_one_task_and_harms_the_other(player, tmp_path, monkeypatch):
    found = explore(player(), make_trainer(tmp_path), OracleSettings(budget=6), has_trigger=False)
    assert found.items == 12
    assert found.never.accuracy.mean == found.always.accuracy.mean == 0.5
    assert found.optimum.accuracy.mean == 1.0
    assert found.rescued["never"] == share(6, 6)
    assert found.broken["never"] == share(6, 6)
    assert found.headline.startswith("A trigger has at most 50.0 points")
    tables, numbers = oracle_report.write(found, tmp_path)
    assert found.headline in tables
    assert "| never | 0.5000 |" in tables
    assert json.loads(numbers)["optimum"]["accuracy"]["mean"] == 1.0
    # Again, without playing; and with more budget, only what is new.
    played = []
    original = playing.rollout
    monkeypatch.setattr(playing, "rollout", lambda *a, **k: (played.append(1), original(*a, **k))[1])
    again = explore(player(), make_trainer(tmp_path), OracleSettings(budget=6), has_trigger=False)
    assert again == found
    assert played == []
    more = explore(player(), make_trainer(tmp_path), OracleSettings(budget=8), has_trigger=False)
    assert more.decoded >= found.decoded
    assert len(played) <= 2


def test_a_run_that_stopped_half_way_goes_on(player, tmp_path, monkeypatch):
    original, calls = playing.rollout, []

    def stopping(*arguments, **options):
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise RuntimeError("the power is out")
        return original(*arguments, **options)

    monkeypatch.setattr(playing, "rollout", stopping)
    with pytest.raises(RuntimeError, match="the power is out"):
        explore(player(), make_trainer(tmp_path), OracleSettings(budget=5), has_trigger=False)
    found = explore(player(), make_trainer(tmp_path), OracleSettings(budget=5), has_trigger=False)
    whole = explore(player(out="other"), make_trainer(tmp_path), OracleSettings(budget=5), has_trigger=False)
    assert found == whole


def test_a_single_item_is_refused(player, tmp_path):
    with pytest.raises(ValueError, match="the test split has 1 items, but an analysis needs at least 4"):
        explore(player(items=1), make_trainer(tmp_path), OracleSettings(), has_trigger=False)


def test_answers_of_another_version_are_not_taken_for_ours(player, tmp_path):
    explore(player(), make_trainer(tmp_path), OracleSettings(budget=3), has_trigger=False)
    folder = tmp_path / "out" / "conditions"
    first, second = (next(folder.glob(f"policy_{number}-*.jsonl")) for number in (1, 2))
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    size = first.stat().st_size
    text = "".join(json.dumps({**line, "decisions": [1] * len(line["decisions"])}) + "\n" for line in lines)
    first.write_text(text)
    if first.stat().st_size != size:
        pytest.skip("the records are of another length")
    with pytest.raises(ValueError, match="under another policy than 'never'"):
        explore(player(), make_trainer(tmp_path), OracleSettings(budget=3), has_trigger=False)
    assert second.exists()
