"""The order of trainings and tests of a chain, with commands that only write what the real ones would leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memgen.continual.chain import Chain, Stage, keep_settings
from memgen.continual.settings import ContinualSettings, read_settings
from memgen.results.score_files import Answered, Records
from memgen.results.summary import summarise

TASKS = {"a": {}, "b": {}, "c": {}}
ITEMS = 4


class Interrupted(Exception):
    """In the place of a signal."""


def row(index, right, fault=None):
    return {
        "index": index, "id": str(index), "sample": 0, "reward": float(right), "parts": {}, "fault": fault, "tokens": 1,
        "reasoner_positions": 1, "weaver_positions": 0, "trigger_positions": 0, "seconds": 0.0, "truncated": False,
    }  # fmt: skip


class Agent:
    """Commands of an agent that has learnt exactly the task that it learnt last, and remembers where it began.

    Args:
        dies_at: number of the call that writes half of what it should and ends the process, or None.
    """

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.replays: list[dict] = []
        self.dies_at = dies_at

    def _called(self, what: str, path: Path) -> None:
        self.calls.append((what, path.name))
        if len(self.calls) == self.dies_at:
            raise Interrupted

    def fit(self, config, overrides, run):
        run.mkdir(parents=True, exist_ok=True)
        (run / "half").touch()
        self._called("fit", run)
        start = overrides.get("model.init_from")
        best = run / "best"
        best.mkdir()
        task = config.stem.rpartition("-")[2]
        came = [] if start is None else (start / "history").read_text().split()
        (best / "history").write_text(" ".join([*came, config.stem]))
        again = json.loads(overrides.get("data.replay", '{"environments": []}'))
        if again["environments"]:
            self.replays.append(again)
        # A trigger's training leaves the weaver as it is.
        trains = "trigger_rl" not in config.stem
        weaver = (
            "".join([task, *again["environments"]]) if trains else (start / "weaver.safetensors").read_text()
        )
        (best / "weaver.safetensors").write_text(weaver)

    def test(self, config, overrides, records):
        self._called("test", records)
        task = config.stem.rpartition("-")[2]
        if "model.init_from" in overrides:
            knows = (overrides["model.init_from"] / "weaver.safetensors").read_text()
        else:
            knows = ""
            assert overrides["model.memgen.trigger.kind"] == "never"
        folder = Records(records, {"data": {"items": ITEMS}}, {})
        rows = [
            row(i, task in knows, fault="lost" if task == "c" and i == 0 and knows == "" else None)
            for i in range(ITEMS)
        ]
        folder.add([Answered(i, [{"index": i}], [rows[i]]) for i in range(ITEMS)])
        folder.write_summary(summarise(rows))
        folder.close()


def chain(folder, agent, **given) -> Chain:
    settings = read_settings({"chain": ["a", "b", "c"], "tasks": TASKS, **given})
    stages = {
        (stage, task): Stage(folder / f"{stage}-{task}.yaml", {"data": {"environment": task}})
        for stage in ("weaver_sft", "trigger_rl", "lora_sft")
        for task in settings.tasks
    }
    return Chain(settings, stages, folder, agent)


def test_every_method_goes_on_from_the_task_before(tmp_path):
    agent = Agent()
    scores = chain(tmp_path, agent).run()
    assert list(scores) == ["memgen", "memgen_trigger", "lora", "lora_replay"]
    for method in ("memgen", "memgen_trigger", "lora"):
        # Nothing before, then the last task alone.
        assert scores[method].matrix().tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert scores["lora_replay"].matrix().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    # An item that the environment failed once is left out of every row.
    assert [len(found["c"]) for found in scores["memgen"].rewards] == [ITEMS - 1] * 4

    def history(path):
        return (tmp_path / path / "best" / "history").read_text().split()

    assert history("weaver_sft/3-c") == ["weaver_sft-a", "weaver_sft-b", "weaver_sft-c"]
    # The first trigger begins beside the first weaver, every other one from the trigger before, beside its own weaver.
    assert history("trigger_rl/3-c") == ["weaver_sft-a", "trigger_rl-a", "trigger_rl-b", "trigger_rl-c"]
    assert (tmp_path / "trigger_start/3-c/weaver.safetensors").read_text() == "c"
    for method in ("lora", "lora_replay"):
        assert history(f"{method}/3-c") == ["lora_sft-a", "lora_sft-b", "lora_sft-c"]
    assert [call for call in agent.calls if call[0] == "fit"] == [
        ("fit", name) for name in ("1-a", "2-b", "3-c") * 4
    ]
    assert agent.replays == [
        {"environments": ["a"], "items": 256, "share": 0.5},
        {"environments": ["a", "b"], "items": 256, "share": 0.5},
    ]


def test_killed_at_any_moment_it_goes_on_and_does_nothing_twice(tmp_path):
    given = {"chain": ["a", "b"], "tasks": {"a": {}, "b": {}}, "methods": ["memgen_trigger", "lora_replay"]}
    whole = Agent()
    expected = chain(tmp_path / "whole", whole, **given).run()
    assert len(whole.calls) == 16
    for number in range(1, len(whole.calls) + 1):
        folder = tmp_path / str(number)
        killed, again = Agent(dies_at=number), Agent()
        with pytest.raises(Interrupted):
            chain(folder, killed, **given).run()
        found = chain(folder, again, **given).run()
        assert {name: scores.rewards for name, scores in found.items()} == {
            name: scores.rewards for name, scores in expected.items()
        }
        assert killed.calls[:-1] + again.calls == whole.calls
    done = Agent()
    chain(tmp_path / "whole", done, **given).run()
    assert done.calls == []


def test_a_chain_of_one_task_is_tested_on_all_and_methods_without_a_trigger_train_none(tmp_path):
    agent = Agent()
    scores = chain(tmp_path, agent, chain=["b"], methods=["memgen"]).run()
    assert scores["memgen"].matrix().tolist() == [[0, 0, 0], [0, 1, 0]]
    assert [name for what, name in agent.calls if what == "fit"] == ["1-b"]


def test_a_folder_refuses_other_settings(tmp_path):
    keep_settings(tmp_path, {"chain": ("a", "b"), "seed": 0})
    keep_settings(tmp_path, {"chain": ("a", "b"), "seed": 0})
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"was begun with other settings: seed was 0 and is 1; .*choose --out DIR"
    ):
        keep_settings(tmp_path, {"chain": ("a", "b"), "seed": 1})
    assert (tmp_path / "settings.json").read_bytes() == before
    assert json.loads(before) == {"chain": ["a", "b"], "seed": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"a": {}}}, "at least two tasks, got a"),
        ({"tasks": {"a": {}, "b": None}}, "at least two tasks, got a"),
        ({"chain": ["a", "a"]}, "chain names 'a' twice"),
        ({"chain": ["d"]}, "chain names 'd', which is none of a, b, c"),
        ({"chain": []}, "chain names no task"),
        ({"chain": None}, "chain is not set"),
        ({"methods": ["memory"]}, "methods names 'memory', which is none of memgen, memgen_trigger, lora, lora_replay"),
        ({"methods": "foo"}, "methods names 'foo', which is none of memgen"),
        ({"methods": ["lora", "lora"]}, "methods names 'lora' twice"),
        ({"methods": []}, "methods names no method"),
        ({"replay": {"share": 1.0}}, r"replay\.share must be above 0 and below 1, got 1\.0"),
        ({"replay": {"items": 0}}, r"replay\.items must be at least 1, got 0"),
        ({"tasks": {"a": {"setting": {}}, "b": {}}}, r"tasks\.a\.setting is not a key of StageSettings"),
        ({"tasks": {"../a": {}, "b": {}}}, "a task's name is a folder's"),
        ({"model": {}}, "model is not a key of ContinualSettings"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_chain_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_settings({"chain": ["a"], "tasks": TASKS, **change})


def test_names_may_be_written_as_on_a_command_line():
    found = read_settings({"chain": "b", "methods": "memgen, lora", "tasks": TASKS})
    assert (found.chain, found.methods) == (("b",), ("memgen", "lora"))


def test_an_overlay_takes_a_task_away_with_null():
    found = read_settings({"chain": ["a"], "tasks": {**TASKS, "b": None}})
    assert isinstance(found, ContinualSettings)
    assert list(found.tasks) == ["a", "c"]
