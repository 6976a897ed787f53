"""A cell of a study on a tiny random model: what is read, written, recorded, and what happens when something fails."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from dataclasses import dataclass

import pytest
import torch

from analysis.planted import config, data
from analysis.planted import settings as playing_settings
from experiences import ScriptedScribe
from letters_env import LetterGame
from memgen.analysis.subject import Subject
from memgen.chat import CHATML, load_tokenizer
from memgen.environments.base import Environment, Example, Reward
from memgen.generation.sampling import GenerationSettings
from memgen.lab.saving import save_backbone
from memgen.memories.base import TextMemory
from memgen.memories.exp_recent import ExpRecent
from memgen.memories.raw_trajectories import RawTrajectories
from memgen.memories.scribe import ScribeError
from memgen.memories.store import MemoryStore
from memgen.model.memgen import MemGenModel
from memgen.results import statistics
from memgen.results.recorded_test import ItemRecorder
from memgen.results.score_files import read_records
from memgen.study import session as module
from memgen.study.session import Session
from memgen.study.settings import Cell, read_settings
from memgen.training.checkpoint import TextSettings, save_checkpoint
from memgen.types import InsertionKind
from sft_runs import make_trainer
from tiny import byte_tokenizer, tiny_causal_lm

ITEMS = 6


class Sums(Environment):
    """Half of what a random model writes is right."""

    name = "sums"

    def examples(self, split):
        count = ITEMS if split == "test" else 9
        return [Example(f"{split}-{i}", f"{split} sum {i}", f"it is {i}", str(i)) for i in range(count)]

    def messages(self, example):
        return [{"role": "user", "content": example.question}]

    def reward(self, example, answer):
        return Reward(float(sum(answer.encode()) % 2))


@dataclass
class Place:
    """A base, and cells played on it."""

    folder: object
    environment: Environment
    base: object = None

    def __post_init__(self):
        self.base = self.folder / "base"
        self.base.mkdir()
        save_backbone(tiny_causal_lm(max_position_embeddings=4096), byte_tokenizer(), self.base)

    def session(self, method, protocol="online", out="cell", seed=0, config_changes=None, **study):
        settings = read_settings(
            {"methods": {"method": method}, "tasks": {"task": {}}, "experiences": 3, "budget": 300, **study}
        )
        cell = Cell("method", "task", seed, None if "memory" not in method else protocol)
        subject = Subject(
            memgen=config_changes or config(self.base, cap=1),
            data=data(self.base, self.environment),
            init_from=method.get("checkpoint"),
            root=self.folder,
            out=self.folder / out,
            **{**playing_settings(), "generation": GenerationSettings(max_new_tokens=4)},
        )
        return Session(subject, settings, cell)

    def checkpoint(self, name, chosen):
        """A checkpoint whose tensors are not those of a new one."""
        model = MemGenModel.build(chosen, load_tokenizer(str(self.base)), lambda name: name)
        model.weaver.trained_kinds = set(InsertionKind)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.weaver.own_parameters().values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        text = TextSettings(CHATML, model.reasoner.end_ids)
        save_checkpoint(model, chosen, self.folder / name, with_trigger=False, text=text)
        return str(self.folder / name)

    def play(self, method, **changes):
        session = self.session(method, **changes)
        rows = session.play(make_trainer(self.folder))
        return session, sorted(rows, key=lambda row: row["index"])

    def answers(self, out="cell", phase="test"):
        """In the order in which they were given."""
        lines = (self.folder / out / phase / "answers.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, Sums())


def memory(method="exp_rag", **constants):
    return {"memory": {"method": method, "constants": constants}}


def shown(answer):
    return answer["prompt"][-1]["content"]


def contents(place, out="cell"):
    with sqlite3.connect(place.folder / out / "memory.sqlite") as file:
        return [
            file.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in ("items", "state", "log")
        ]


@pytest.mark.parametrize("environment", [Sums(), LetterGame()], ids=["questions", "episodes"])
def test_an_empty_memory_answers_as_the_reasoner_alone_bit_for_bit(tmp_path, environment):
    place = Place(tmp_path, environment)
    place.play({}, out="vanilla")
    place.play({**memory(), "control": "empty"}, out="empty")
    alone, empty = (
        {a["index"]: (a["token_ids"], a["prompt"], a["answer"]) for a in place.answers(out)}
        for out in ("vanilla", "empty")
    )
    assert alone == empty
    keys = ("reward", "reasoner_positions", "weaver_positions", "trigger_positions", "prompt_tokens")
    rows = [
        [[row[key] for key in keys] for row in read_records(place.folder / out / "test").rows]
        for out in ("vanilla", "empty")
    ]
    assert rows[0] == rows[1]


def test_online_an_item_is_read_by_the_next_ones_and_never_by_itself(place):
    _, rows = place.play(memory("exp_recent", window=2), seed=3)
    answers = place.answers()
    order = [answer["index"] for answer in answers]
    assert sorted(order) == list(range(ITEMS))
    assert order != sorted(order)
    for number, answer in enumerate(answers):
        read = [i for i in range(ITEMS) if f"Task: test sum {i}\n" in shown(answer)]
        assert sorted(read) == sorted(order[max(0, number - 2) : number])
    # Newest first, in the form of the method, above the task.
    assert shown(answers[2]).startswith(f"Earlier tasks:\n\nTask: test sum {order[1]}\nOutput: ")
    assert shown(answers[2]).endswith(f"The task now:\n\ntest sum {order[2]}")
    assert [row["retrievals"] for row in rows] == [0] * ITEMS
    other, _ = place.play(memory("exp_recent", window=2), seed=4, out="other")
    assert [answer["index"] for answer in place.answers("other")] != order
    assert other.method_name() == "method"


def test_frozen_a_memory_learns_from_training_items_and_is_only_read_then(place):
    _, rows = place.play(memory(k=2), protocol="frozen")
    learnt = place.answers(phase="learn")
    assert len(learnt) == 3
    assert all("train sum" in shown(answer) for answer in learnt)
    for answer in place.answers():
        assert shown(answer).count("Task: train sum") == 2
        assert "Task: test sum" not in shown(answer)
    assert len({row["memory_entry"] for row in rows}) == 1
    assert [row["retrievals"] for row in rows] == [1] * ITEMS
    # From reference solutions nothing is played before the test.
    place.play(memory(k=2), protocol="frozen", out="answers", learn_from="answers")
    assert not (place.folder / "answers" / "learn").exists()
    assert all("Output: it is" in shown(answer) for answer in place.answers("answers"))
    assert all("success (reward 1)" in shown(answer) for answer in place.answers("answers"))


@pytest.mark.parametrize("protocol", ["online", "frozen"])
def test_killed_between_any_two_steps_a_cell_goes_on_to_the_same_end(place, protocol, monkeypatch):
    # Recalls change the memory, so what was read and not recorded has to be undone.
    method = memory("memory_bank", day=2)
    whole = place.play(method, protocol=protocol, out="whole")[1]
    expected = contents(place, "whole")

    class Killed(BaseException):
        pass

    def killing(step, calls=2):
        left = iter(range(calls - 1))

        def until_killed(*arguments, **named):
            if next(left, None) is None:
                raise Killed
            return step(*arguments, **named)

        return until_killed

    steps = [(TextMemory, "write"), (MemoryStore, "pending"), (module, "rollout"), (ItemRecorder, "record")]
    for owner, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing(getattr(owner, name)))
            with pytest.raises(Killed):
                place.play(method, protocol=protocol)
    rows = place.play(method, protocol=protocol)[1]

    def lasting(found):
        # A rebuilt file has other pages.
        return [{k: v for k, v in row.items() if not k.endswith(("seconds", "_bytes"))} for row in found]

    assert lasting(rows) == lasting(whole)
    assert contents(place) == expected


def test_what_is_whole_is_not_played_again(place, monkeypatch):
    first = place.play(memory(), protocol="frozen")[1]
    monkeypatch.setattr(module, "rollout", None)
    assert place.play(memory(), protocol="frozen")[1] == first


def test_controls_change_what_they_say_and_nothing_else(place):
    place.play(memory(k=2), out="plain")
    place.play({**memory(k=2), "control": "random"}, out="random")
    place.play({"control": "oracle"}, out="oracle")
    for plain, random in zip(place.answers("plain"), place.answers("random"), strict=True):
        assert plain["index"] == random["index"]
        assert abs(len(shown(plain)) - len(shown(random))) <= 24 or "Earlier" not in shown(random)
    last = place.answers("random")[-1]
    assert "Earlier tasks" in shown(last)
    assert shown(last) != shown(place.answers("plain")[-1])
    for answer in place.answers("oracle"):
        assert f"Output: it is {answer['index']}\n" in shown(answer)


def test_shuffled_outcomes_are_those_of_other_items(place, monkeypatch):
    written = []
    real = TextMemory.write
    monkeypatch.setattr(TextMemory, "write", lambda self, e: (written.append(e), real(self, e))[1])
    _, rows = place.play({**memory(), "control": "shuffled"})
    rewards = {row["id"]: row["reward"] for row in rows}
    assert set(rewards.values()) == {0.0, 1.0}
    for number, experience in enumerate(written):
        assert experience.reward in {rewards[earlier.id] for earlier in written[: number + 1]}
    assert [e.reward for e in written] != [rewards[e.id] for e in written]


def test_worked_examples_are_the_same_for_all_items_and_others_under_another_seed(place):
    place.play({"examples": 2})
    blocks = {shown(answer).partition("The task now:")[0] for answer in place.answers()}
    assert len(blocks) == 1
    assert blocks.pop().count("Task: train sum") == 2
    place.play({"examples": 2}, seed=1, out="other")
    assert shown(place.answers("other")[0]).partition("The task now:")[0] not in blocks
    with pytest.raises(ValueError, match="10 worked examples are wanted, but sums has 9 training items"):
        place.play({"examples": 10}, out="more")


def test_a_checkpoint_weaves_and_its_controls_weave_as_much(place):
    start = place.checkpoint("checkpoint", config(place.base, cap=1))
    methods = {
        "weaver": {"checkpoint": start},
        "swapped": {"checkpoint": start, "control": "swapped"},
        "pause": {"control": "pause"},
        "with_memory": {"checkpoint": start, **memory("exp_recent")},
        "alone": {},
    }
    found = {}
    for name, method in methods.items():
        session, found[name] = place.play(method, out=name)
        assert (session.trained_parameters() > 0) == (name != "alone")
    assert all((row["latents"] >= 2) == (name != "alone") for name, rows in found.items() for row in rows)
    assert all(row["weaver_positions"] == 0 for row in found["pause"])
    tokens = {name: {a["index"]: a["token_ids"] for a in place.answers(name)} for name in found}
    assert len({str(sorted(answers.items())) for answers in tokens.values()}) == len(tokens)
    # The first item has nothing to read yet: it is the weaver's own answer.
    first = place.answers("with_memory")[0]
    assert first["token_ids"] == tokens["weaver"][first["index"]]


def test_a_memory_that_the_weaver_reads_is_written_by_the_study(place):
    (place.folder / "cell").mkdir()
    file = place.folder / "cell" / "memory.sqlite"
    RawTrajectories(file).close()
    chosen = config(place.base, cap=1)
    arguments = {"memory": str(file), "passages": 1, "budget": 256}
    weaver = dataclasses.replace(
        chosen.weaver, kind="memgen.generation.composer.Composer", arguments=arguments
    )
    chosen = dataclasses.replace(chosen, weaver=weaver)
    method = {
        "checkpoint": place.checkpoint("composer", chosen),
        "memory": {"method": "raw_trajectories", "into": "weaver"},
    }
    _, rows = place.play(method, config_changes=chosen)
    assert all(shown(answer) == f"test sum {answer['index']}" for answer in place.answers())
    order = [answer["index"] for answer in place.answers()]
    rows.sort(key=lambda row: order.index(row["index"]))
    assert [row["memory_entry"] for row in rows] == list(range(1, ITEMS + 1))
    assert rows[-1]["weaver_positions"] > rows[0]["weaver_positions"]
    assert rows[-1]["retrievals"] > 0


def test_a_latent_source_that_learns_is_asked_item_by_item_in_the_order_of_the_seed(place, monkeypatch):
    start = place.checkpoint("checkpoint", config(place.base, cap=1))
    asked = []
    real = ItemRecorder.play
    monkeypatch.setattr(
        ItemRecorder, "play", lambda self, *a: (asked.append(list(a[1].indices)), real(self, *a))[1]
    )
    place.play({"checkpoint": start, "learns": True}, seed=3)
    place.play(memory("exp_recent"), seed=3, out="other")
    assert asked == [[answer["index"]] for answer in place.answers("other")]


def test_an_item_that_the_environment_failed_is_neither_scored_nor_written(tmp_path):
    place = Place(tmp_path, LetterGame(fails=(2,)))
    _, rows = place.play(memory("exp_recent", window=10))
    failed = [row for row in rows if row["fault"] is not None]
    assert [row["id"] for row in failed] == ["test-2"]
    assert max(row["memory_entry"] for row in rows) == len(rows) - 1


def test_a_full_disk_stops_the_cell_at_a_whole_item(place, monkeypatch):
    whole = place.play(memory(), out="whole")[1]
    real = TextMemory.write

    def full(self, experience):
        if self.store.tick == 2:
            raise OSError(28, "the disk is full")
        return real(self, experience)

    with monkeypatch.context() as patch:
        patch.setattr(TextMemory, "write", full)
        with pytest.raises(OSError, match="the disk is full"):
            place.play(memory())
    assert len(place.answers()) == 2
    assert [row["reward"] for row in place.play(memory())[1]] == [row["reward"] for row in whole]


@pytest.mark.parametrize("answer", [None, "no rule at all"], ids=["gone", "nonsense"])
def test_a_scribe_that_fails_stops_the_cell_or_is_replaced_as_configured(place, monkeypatch, answer):
    scribe = {"kind": "http", "url": "http://127.0.0.1:9/v1", "model": "m", "on_failure": "stop"}
    method = memory("a_mem")
    failing = ScriptedScribe(lambda prompt: answer)
    monkeypatch.setattr(Session, "_scribe", lambda self: failing)
    with pytest.raises(ScribeError, match="on_scribe_failure: fallback goes on without it"):
        place.play(method, scribe=scribe)
    assert not place.answers()
    session, rows = place.play(method, scribe={**scribe, "on_failure": "fallback"}, out="other")
    assert session.method_name() == "method/df"
    assert all(row["fallbacks"] for row in rows)
    # What is scored is the agent's answer, as with the fallback alone.
    alone = place.play(method, out="alone")[1]
    assert [row["reward"] for row in rows] == [row["reward"] for row in alone]


def test_a_scribe_is_counted_item_by_item(place, monkeypatch):
    good = ScriptedScribe(lambda prompt: '[{"title": "T", "description": "d", "content": "c"}]')
    monkeypatch.setattr(Session, "_scribe", lambda self: good)
    scribe = {"kind": "http", "url": "http://127.0.0.1:9/v1", "model": "m"}
    session, rows = place.play(memory("reasoning_bank"), scribe=scribe)
    assert session.method_name() == "method"
    assert [row["scribe_calls"] for row in rows] == [1] * ITEMS
    assert all(row["scribe_tokens"] > 20 for row in rows)


def test_a_memory_of_another_method_or_embedder_in_the_folder_is_refused(place):
    (place.folder / "cell").mkdir()
    ExpRecent(place.folder / "cell" / "memory.sqlite").close()
    with pytest.raises(
        ValueError, match="is a memory of exp_recent, not of exp_rag; choose another file or method"
    ):
        place.play(memory())


def test_a_memory_that_was_changed_since_is_refused(place):
    place.play(memory())
    (place.folder / "cell" / "memory.sqlite").unlink()
    with pytest.raises(
        ValueError, match=r"has 0 entries, but its items were recorded up to entry 6: it was changed since"
    ):
        place.play(memory())


def test_other_settings_are_refused_by_name(place):
    place.play(memory(k=1))
    with pytest.raises(ValueError, match=r"study.budget was 300 and is 200"):
        place.play(memory(k=1), budget=200)


def test_passages_that_do_not_fit_into_the_context_are_refused_at_once(place):
    with pytest.raises(ValueError, match=r"and 9032 of a memory with up to 0 latents leaves no room"):
        place.play(memory(), budget=9000)
    with pytest.raises(
        ValueError, match="has 9 training items, but a memory is to learn from 10: lower experiences"
    ):
        place.play(memory(), protocol="frozen", experiences=10)
