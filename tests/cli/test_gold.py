"""`memgen test --gold`: the reference answers of a data set, without a model."""

from __future__ import annotations

import json

import pytest

from memgen.cli.gold import failing_references
from memgen.environments.base import Episode, Example, InteractiveEnvironment, Observation, Reward, Step
from memgen.environments.qa.gsm8k import GSM8K


def test_questions_whose_reference_is_wrong_are_found(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = GSM8K(str(tmp_path))
    examples = list(environment.examples("test"))
    assert failing_references(environment, examples) == []
    wrong = Example(examples[1].id, examples[1].question, "\\boxed{7}", examples[1].answer)
    assert failing_references(environment, [examples[0], wrong, examples[2]]) == [wrong]


class Doors(InteractiveEnvironment):
    name = "doors"
    max_turns = 3

    def examples(self, split):
        return [Example("left", "", "", "left"), Example("right", "", "", "right")]

    def messages(self, example):
        return [{"role": "system", "content": "Choose a door."}]

    def conversation(self, example):
        turn = {"role": "assistant", "content": "left"}
        return [*self.messages(example), {"role": "user", "content": "Two doors."}, turn]

    def episode(self):
        return Choice()


class Choice(Episode):
    def reset(self, example):
        self.example, self.total = example, 0.0
        return Observation("Two doors.")

    def step(self, action):
        self.total = float(action == self.example.answer)
        return Step("", done=True)

    def reward(self):
        return Reward(self.total)


def test_reference_conversations_are_played():
    environment = Doors()
    assert [item.id for item in failing_references(environment, environment.examples("test"))] == ["right"]


@pytest.mark.parametrize("reward", [float("nan"), 0.5])
def test_a_reference_that_does_not_earn_all_of_the_reward_is_not_right(reward, monkeypatch):
    monkeypatch.setattr(Choice, "reward", lambda self: Reward(reward))
    environment = Doors()
    assert len(failing_references(environment, environment.examples("test"))) == 2
