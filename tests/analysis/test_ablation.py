"""The ablation matrix of weavers whose function is known."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from scipy.stats import binomtest

from analysis.planted import Marks, config, data, planted_weave, repeating_base, settings
from memgen.analysis import ablation as module
from memgen.analysis import ablation_report
from memgen.analysis.ablation import Ablation, AblationSettings, Condition, donor, swapped_block
from memgen.analysis.matrix import matrix
from memgen.analysis.subject import Subject
from memgen.chat import load_tokenizer
from memgen.model.latent_source import WeaverConfig
from memgen.model.memgen import MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import Weaver
from memgen.results import statistics
from memgen.results.score_files import read_records
from memgen.run_context import RunContext
from memgen.training.checkpoint import save_checkpoint
from sft_runs import make_trainer
from tiny import LORA

ITEMS = 12
ALL = "vanilla,never,always,prompt_only,delimiters,random:0.5,trained,entropy:1,pause,swapped,bon:3,cot"


class Alternating(Marks):
    """Neighbours ask for different letters, and are of one task: the latents of the next item are wrong ones."""

    def examples(self, split):
        return [dataclasses.replace(example, meta={}) for example in super().examples(split)]

    def final_answer(self, example, answer):
        return answer[:1] or None


def conditions(text: str) -> tuple[Condition, ...]:
    return tuple(Condition.parse(name) for name in text.split(","))


class Place:
    """A base, checkpoints, and ablations of them."""

    def __init__(self, folder):
        self.folder = folder
        self.base = repeating_base(folder / "base")
        self.config = config(self.base, cap=1)

    def checkpoint(self, name="checkpoint", bias=None, **weaver):
        """A checkpoint; with a bias, its trigger is a trained one that always or never invokes."""
        kind = TriggerConfig(kind="always")
        if bias is not None:
            kind = TriggerConfig(kind="tokens", lora=LORA, initial_invoke_bias=bias)
        changed = dataclasses.replace(self.config, trigger=kind, **weaver)
        torch.manual_seed(0)
        model = MemGenModel.build(
            changed, load_tokenizer(str(self.base)), lambda asset: asset, load_tokenizer=load_tokenizer
        )
        save_checkpoint(model, changed, self.folder / name, with_trigger=bias is not None)
        return str(self.folder / name)

    def ablation(self, text, *, out="out", start=None, items=ITEMS, chosen=None, **changes) -> Ablation:
        given = AblationSettings(conditions=None if text is None else conditions(text), bon_temperature=1.0)
        subject = Subject(
            memgen=self.config,
            data=data(self.base, Alternating(items=items)),
            init_from=start or self.checkpoint(),
            root=self.folder,
            out=self.folder / out,
            **{**settings(), **changes},
        )
        return Ablation(subject, chosen or given)

    def play(self, *arguments, **changes) -> Ablation:
        ablation = self.ablation(*arguments, **changes)
        try:
            make_trainer(self.folder).predict(ablation, return_predictions=False)
        finally:
            ablation.close()
        return ablation


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)  # Intervals are tested elsewhere.
    monkeypatch.setattr(Weaver, "weave", _planted())


def _planted():
    return planted_weave({"#": "X", "@": "Y"}, noise=0.0)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All conditions of a checkpoint whose trained trigger never invokes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 200)
        patch.setattr(Weaver, "weave", _planted())
        place = Place(tmp_path_factory.mktemp("everything"))
        ablation = place.play(ALL, start=place.checkpoint("trained", bias=-9.0))
        return ablation, matrix(ablation)


def texts(ablation, name):
    """What was answered under a condition."""
    path = ablation.folder / "conditions" / name / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_condition_does_what_its_name_says(everything):
    _, found = everything
    reward = {line.name: line.reward.mean for line in found.lines}
    insertions = {line.name: line.costs["insertions"] for line in found.lines}
    assert list(reward) == [*ALL.split(",")[:-2], "bon:3 oracle", "bon:3 vote", "cot"]
    assert reward["always"] == reward["prompt_only"] == 1.0
    # The planted weaver's latents are wrong ones for the neighbour, and pause tokens say nothing.
    silent = ("vanilla", "never", "delimiters", "trained", "pause", "swapped", "cot")
    assert {reward[name] for name in silent} == {0.0}
    assert insertions["vanilla"] == insertions["never"] == insertions["trained"] == insertions["cot"] == 0.0
    assert insertions["prompt_only"] == 1.0
    # Behind the letter X, a delimiter, once.
    assert insertions["always"] == insertions["pause"] + 0.5 == 1.5
    assert 0 < insertions["random:0.5"] < insertions["always"]
    assert {line.items for line in found.lines} == {ITEMS}


def test_the_reasoner_alone_and_a_trigger_that_never_invokes_give_the_same_answers(everything):
    ablation, _ = everything
    tokens = {
        name: [a["token_ids"] for a in texts(ablation, name)] for name in ("vanilla", "never", "trained")
    }
    assert tokens["vanilla"] == tokens["never"] == tokens["trained"]
    assert ablation._actors["vanilla"].model.weaver.config.prompt_latents == 0
    assert ablation.memgen.weaver.config.prompt_latents == 2
    rows = read_records(ablation.folder / "conditions" / "vanilla").rows
    assert all(row["reasoner_positions"] == row["prompt_tokens"] + row["tokens"] - 1 for row in rows)
    assert all(row["weaver_positions"] == row["trigger_positions"] == 0 for row in rows)


def test_tests_are_paired_and_corrected_over_all_of_them(everything):
    _, found = everything
    effects = [*found.against_first, *found.of_memory]
    assert found.first == "vanilla"
    assert found.memory == "trained"
    assert len(found.against_first) == len(found.lines) - 1
    assert [e.against for e in found.of_memory] == [x.name for x in found.lines if x.name != "trained"]
    # `trained` against `vanilla` is in both.
    assert found.tests == len(effects) - 1
    certain = binomtest(ITEMS, ITEMS, 0.5).pvalue
    always = next(effect for effect in effects if effect.condition == "always")
    assert always.p_value == certain
    assert always.test == "McNemar, exact"
    # The four smallest p-values are equal; Holm multiplies all of them by the number of tests.
    assert always.adjusted == pytest.approx(certain * found.tests)


def test_best_of_n_counts_no_more_positions_than_memory_took(everything):
    ablation, found = everything
    lines = {line.name: line for line in found.lines}
    oracle, vote = lines["bon:3 oracle"], lines["bon:3 vote"]
    assert oracle.reward.mean >= vote.reward.mean
    assert oracle.costs == vote.costs
    assert 1.0 <= oracle.samples <= 3.0
    assert len(texts(ablation, "bon_3")) == 3 * ITEMS
    assert any("as many count as have together at most the positions of trained" in n for n in found.notes)
    assert any("temperature 1 (--bon-temperature), all others at 0" in note for note in found.notes)


def test_cot_adds_its_text_to_the_prompt_and_nothing_else(everything):
    ablation, _ = everything
    plain, told = (texts(ablation, name)[0]["prompt"] for name in ("vanilla", "cot"))
    assert told == [{**plain[0], "content": plain[0]["content"] + "\nLet's think step by step."}]


def test_the_page_needs_nothing_from_outside_and_says_what_the_lines_say(everything):
    _, found = everything
    page = ablation_report.report_html(found)
    assert ablation_report.report_html(found) == page
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)([^"')\s>]+)""", page)
    assert not [link for link in outside if not link.startswith("#")]
    lines = ablation_report.text_lines(found)
    assert lines[1].split()[:2] == ["condition", "reward"]
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(found.lines)]] == [x.name for x in found.lines]
    assert all(note in "\n".join(lines) for note in found.notes)


def test_an_ablation_that_stopped_half_way_goes_on_and_plays_nothing_twice(place, monkeypatch):
    start = place.checkpoint("trained", bias=9.0)
    whole = place.play("always,random:0.5,trained", start=start, out="whole")
    played = []

    def failing(actor, examples, seeds, **changes):
        if len(played) == 2:
            raise RuntimeError("the machine went down")
        played.append(len(examples))
        return real(actor, examples, seeds, **changes)

    real = module.rollout
    monkeypatch.setattr(module, "rollout", failing)
    with pytest.raises(RuntimeError, match="the machine went down"):
        place.play("always,random:0.5,trained", start=start)
    monkeypatch.setattr(module, "rollout", lambda *a, **k: played.append(len(a[1])) or real(*a, **k))
    done = place.play("always,random:0.5,trained", start=start)
    assert sum(played) == 3 * ITEMS
    for name in ("always", "random_0.5", "trained"):
        rows = [
            [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in read_records(f).rows]
            for f in (whole.folder / "conditions" / name, done.folder / "conditions" / name)
        ]
        assert rows[0] == rows[1]


def test_a_matrix_of_an_unfinished_condition_is_refused(place):
    ablation = place.play("vanilla,never", items=3)
    ablation.data.items["test"] = [*ablation.items, ablation.items[0]]
    with pytest.raises(ValueError, match=r"has 3 of 4 items; run the command again"):
        matrix(ablation)


def test_other_settings_are_refused_by_name_and_more_conditions_are_added(place):
    start = place.checkpoint()
    place.play("vanilla,cot", start=start, items=3)
    place.play("cot,vanilla,never", start=start, items=3)
    other = AblationSettings(conditions=conditions("cot"), cot_text="Think.")
    with pytest.raises(
        ValueError, match=r'condition.instruction was "Let\'s think step by step." and is "Think."'
    ):
        place.play(None, start=start, items=3, chosen=other)
    with pytest.raises(ValueError, match=r"data.items was 3 and is 4"):
        place.play("vanilla", start=start, items=4)


def test_without_conditions_the_trained_trigger_is_played_where_there_is_one(place):
    def chosen(start):
        return [condition.name for condition in place.play(None, start=start, items=2).conditions]

    default = ["vanilla", "never", "always", "prompt_only", "delimiters", "random:0.5", "swapped"]
    assert chosen(place.checkpoint()) == default
    place.folder = place.folder / "again"
    place.folder.mkdir()
    assert chosen(place.checkpoint("trained", bias=9.0)) == [*default, "trained"]


def test_learned_pause_tokens_come_from_a_checkpoint_of_their_own(place):
    pauses = WeaverConfig(kind="pause", prompt_latents=2, inference_latents=2)
    start = place.checkpoint()
    learned = place.checkpoint("pauses", weaver=pauses)
    ablation = place.play(f"pause,pause:{learned}", start=start, items=2)
    names = [condition.folder_name for condition in ablation.conditions]
    assert texts(ablation, names[0]) == texts(ablation, names[1])  # Both are as they were made.
    with pytest.raises(
        ValueError, match=r"is no checkpoint of pause tokens: its model\.memgen\.weaver\.kind is weaver"
    ):
        place.play(f"pause:{start}", start=start, items=2, out="other")
    more = place.checkpoint("more", weaver=dataclasses.replace(pauses, prompt_latents=3))
    with pytest.raises(ValueError, match="inserts 3 latents at the end of a prompt and 2 at a delimiter"):
        place.play(f"pause:{more}", start=start, items=2, out="other")


def test_a_tokenizer_that_is_an_asset_is_found_before_set_up(place):
    ablation = place.ablation("vanilla", items=2)
    ablation.data.tokenizer = "lab:base"
    context = RunContext(resolve_asset=lambda name: str(place.base) if name == "lab:base" else name)
    make_trainer(place.folder, callbacks=[context]).predict(ablation, return_predictions=False)
    assert len(texts(ablation, "vanilla")) == 2


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("trained", {}, "holds no trained trigger, so there is nothing to play under the condition trained"),
        ("vanilla", {"items": 1}, "the test split has 1 items, but a comparison needs at least 2"),
    ],
    ids=["no trigger", "one item"],
)
def test_what_cannot_be_played_is_refused(place, text, changes, message):
    with pytest.raises(ValueError, match=message):
        place.play(text, **changes)


def test_best_of_n_without_a_temperature_is_refused(place):
    greedy = AblationSettings(conditions=conditions("bon:2"))
    with pytest.raises(ValueError, match=r"bon:2 samples several answers .* set --bon-temperature above 0"):
        place.play(None, chosen=greedy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alwys", "unknown condition 'alwys'; there are vanilla, never, always"),
        ("random", "condition 'random': write random:P"),
        ("always:1", "condition 'always:1': write always"),
        ("random:2", "random:P needs a probability from 0 to 1, got 2"),
        ("random:nan", "random:P needs a probability from 0 to 1, got nan"),
        ("random:half", "condition 'random:half': 'half' is no number"),
        ("entropy:-1", "entropy:T needs a threshold of 0 nats or more, got -1"),
        ("bon:1", "bon:N needs a whole number of answers, at least 2, got 1"),
        ("bon:2.5", "bon:N needs a whole number of answers, at least 2, got 2.5"),
        ("", "unknown condition ''"),
    ],
)
def test_a_condition_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Condition.parse(text)


@pytest.mark.parametrize("text", [*ALL.split(","), "pause:DIR"])
def test_a_condition_is_written_as_it_is_read(text):
    assert Condition.parse(text).name == text


def test_a_condition_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"condition random:0.5 is given twice"):
        AblationSettings(conditions=conditions("random:0.5,random:0.50"))


def test_the_donor_is_the_next_item_of_the_task():
    place = data("base", Marks(items=5))
    items = [type("Item", (), {"example": example}) for example in place.environment.examples("test")]
    assert [donor(items, index) for index in range(5)] == [2, 3, 4, 1, 0]
    assert donor(items[:2], 0) == 1


def test_a_swapped_block_is_never_the_own_one():
    own, two, three = torch.zeros(2, 4), torch.ones(2, 4), torch.full((3, 4), 2.0)
    assert torch.equal(swapped_block([three, two], 0, own), two)
    assert torch.equal(swapped_block([two, 2 * two], 5, own), 2 * two)
    assert torch.equal(swapped_block([three], 0, own), three[:2])
    assert swapped_block([], 0, own).shape == (0, 4)
