"""Agent-FLAN's rewriting of collected trajectories."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from memgen.cli import main as front_end
from memgen.environments.trajectories import Trajectories
from memgen.results.agent_flan import SKILLS, Decomposed, FlanSettings, decompose, rewrite

WHOLE = FlanSettings(1.0, 1.0, 1.0, 1.0, 1.0)
SEARCH = [
    {"role": "system", "content": "you may search"},
    {"role": "user", "content": "who wrote it?"},
    {"role": "assistant", "content": "<think> I look it up. </think>\n<search> its author </search>", "agent": True},
    {"role": "user", "content": "a book by Ann"},
    {"role": "assistant", "content": "<answer>Ann</answer>", "agent": True},
]  # fmt: skip
WORLD = [
    {"role": "user", "content": "find tea"},
    {"role": "assistant", "content": "THOUGHT: it is left\nACTION: go left", "agent": True},
]
PLAIN = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "agent": True}]


def file(path, *conversations):
    lines = [
        json.dumps({"id": f"t{i}", "environment": "e", "sample": 0, "reward": 1.0, "messages": messages})
        for i, messages in enumerate(conversations)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def said(line):
    return [(message["role"], message["content"]) for message in line["messages"]]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("<think>why</think> <search> x y </search>", Decomposed("why", "search", "x y")),
        ("<answer>Ann</answer>", Decomposed(None, "answer", "Ann")),
        ("THOUGHT: it is left\nACTION: go left", Decomposed("it is left", "go left", None)),
        ("Thought: a\nand b\nAction: Lookup\nAction Input: tea", Decomposed("a\nand b", "Lookup", "tea")),
        ("ACTION: go left", Decomposed(None, "go left", None)),
        ('{"thought": "why", "action": "find", "arguments": {"what": "tea", "n": 2}}', Decomposed("why", "find", "what: tea\nn: 2")),
        ('{"name": "find", "action_input": "tea"}', Decomposed(None, "find", "tea")),
        ("the answer is 2", None),
        ("2", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_turn_falls_into_its_skills_whatever_its_form(turn, expected):
    assert decompose(turn) == expected


def test_each_skill_is_asked_in_plain_words_behind_the_turns_before(tmp_path):
    lines = rewrite(Trajectories(file(tmp_path / "c.jsonl", SEARCH)), WHOLE)
    by_skill = {skill: [line for line in lines if line["skill"] == skill] for skill in SKILLS}
    thought = ("user", "who wrote it?\n\nIn plain words: what do you think?")
    assert said(by_skill["reasoning"][0]) == [
        ("system", "you may search"), thought, ("assistant", "I look it up."),
    ]  # fmt: skip
    assert said(by_skill["understanding"][1]) == [
        ("system", "you may search"), thought, ("assistant", "I look it up."),
        ("user", "In plain words: what do you do?"), ("assistant", "search"),
        ("user", "With what?"), ("assistant", "its author"),
        ("user", "a book by Ann\n\nIn plain words: what do you do?"), ("assistant", "answer"),
        ("user", "With what?"), ("assistant", "Ann"),
    ]  # fmt: skip
    assert [len(found) for found in by_skill.values()] == [1, 2, 2]
    # One answer of each is learnt, of the whole trajectory every turn.
    learnt = Counter(
        sum(bool(m.get("agent")) for m in line["messages"]) for line in lines if line["skill"] in SKILLS
    )
    assert set(learnt) == {1}
    (whole,) = [line for line in lines if line["skill"] == "format"]
    assert whole["messages"] == SEARCH
    refusals = [said(line) for line in lines if line["skill"] == "negatives"]
    assert refusals[0] == [
        ("user", "Use the tool search: its author"),
        ("assistant", "I have no tool search here, so I cannot use it."),
    ]


def test_ordinary_conversations_are_mixed_in_and_held_in_front_of_the_tools(tmp_path):
    general = Trajectories(file(tmp_path / "g.jsonl", PLAIN, [{"role": "system", "content": "s"}, *PLAIN]))
    lines = rewrite(Trajectories(file(tmp_path / "c.jsonl", SEARCH)), WHOLE, general)
    assert next(line["messages"] for line in lines if line["skill"] == "general") == PLAIN
    in_front = [line for line in lines if line["skill"] == "negatives" and said(line)[0][0] == "system"]
    assert [said(line) for line in in_front] == [
        [("system", "you may search"), ("user", "1+1?"), ("assistant", "2")]
    ]
    assert in_front[0]["messages"][2]["agent"] is True
    # Nothing is offered by a prompt without a system message.
    assert not [
        line
        for line in rewrite(Trajectories(file(tmp_path / "w.jsonl", WORLD)), WHOLE, general)
        if line["skill"] == "negatives"
    ]


def test_shares_are_kept_exactly_and_by_the_seed_alone(tmp_path):
    recorded = Trajectories(file(tmp_path / "c.jsonl", *[SEARCH] * 10))
    lines = rewrite(recorded, FlanSettings())
    assert Counter(line["skill"] for line in lines) == {
        "format": 10, "reasoning": 10, "retrieval": 10, "understanding": 14, "negatives": 2,
    }  # fmt: skip
    assert rewrite(recorded, FlanSettings()) == lines
    assert rewrite(recorded, FlanSettings(seed=1)) != lines
    with pytest.raises(ValueError, match=r"nothing of .* is kept; raise a share"):
        rewrite(recorded, FlanSettings(0.0, 0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize("name", ["format", "reasoning", "negatives"])
def test_a_share_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=rf"the share of {name} must be in \[0, 1\], got 1\.5"):
        FlanSettings(**{name: 1.5})


def test_the_command_writes_what_training_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file(tmp_path / "c.jsonl", SEARCH, WORLD, PLAIN)
    argv = ["agent-flan", "c.jsonl", "--out", "flan.jsonl", "--negatives", "1"]
    assert front_end.main(argv) == 0
    assert (
        "flan.jsonl: 10 conversations (3 format, 2 reasoning, 2 retrieval, 1 understanding, 2 negatives)"
        in (capsys.readouterr().out)
    )
    written = Trajectories("flan.jsonl")
    assert len(written.examples("train")) == 10
    assert {example.meta["reward"] for example in written.examples("train")} == {1.0}
    before = (tmp_path / "flan.jsonl").read_bytes()
    assert front_end.main(argv) == 2
    assert "flan.jsonl exists; give another name (--out)" in capsys.readouterr().err
    assert front_end.main(["agent-flan", "none.jsonl", "--out", "x.jsonl"]) == 2
    assert "there is no file none.jsonl" in capsys.readouterr().err
    assert (tmp_path / "flan.jsonl").read_bytes() == before
    assert not (tmp_path / "x.jsonl").exists()
