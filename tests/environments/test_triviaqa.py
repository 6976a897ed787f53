from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from memgen.environments.search.retrieval import Passage, Searcher
from memgen.environments.search.triviaqa import TriviaQA


class Encyclopedia(Searcher):
    topk = 1

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        return [[Passage("1", "Peanuts", f"About {query}")] for query in queries]


def question(number: int) -> dict:
    """A record in the hub's form."""
    return {
        "question": f"Who was president number {number}?",
        "question_id": f"tc_{number}",
        "question_source": "http://www.triviacountry.com/",
        "entity_pages": {"title": []},
        "answer": {
            "aliases": [f"Mr. President {number}", f"The {number}th President"],
            "normalized_aliases": [f"mr president {number}", f"{number}th president"],
            "matched_wiki_entity_name": "",
            "value": f"President {number}",
            "type": "WikipediaEntity",
        },
    }


TRAIN = [question(i) for i in range(300)]
TEST = [question(i) for i in range(1000, 1005)]
TRAJECTORY = {
    "id": "triviaqa_0",
    "conversations": [
        {"from": "human", "value": "Who was President when the first Peanuts cartoon was published?"},
        {
            "from": "gpt",
            "value": "Thought: I need the year.\nIt was long ago.\nAction: search[first Peanuts [comic] cartoon]",
        },
        {"from": "human", "value": "Observation: Peanuts began in 1950.\nIt ended in 2000."},
        {"from": "gpt", "value": "Thought: Truman was president.\nFinal Answer: Harry Truman"},
    ],
}


def lines(records: Sequence[object]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(folder: Path) -> Path:
    (folder / "train.jsonl").write_text(lines(TRAIN))
    (folder / "validation.jsonl").write_text(lines(TEST))
    return folder


def test_every_gold_answer_scores_one_and_every_corrupted_one_zero(tmp_path):
    environment = TriviaQA(str(write(tmp_path)))
    for split, count in (("train", None), ("val", None), ("test", 5)):
        examples = environment.examples(split)
        assert count is None or len(examples) == count
        for example in examples:
            assert environment.reward(example, example.target).total == 1.0
            for alias in example.meta["aliases"]:
                assert environment.reward(example, f"<answer> {alias} </answer>").total == 1.0
                assert environment.reward(example, f"<answer> {alias}0 </answer>").total == 0.0
            assert environment.reward(example, example.answer).total == 0.0


def test_the_answer_is_the_value_and_all_its_names_count(tmp_path):
    example = TriviaQA(str(write(tmp_path))).examples("test")[0]
    assert example.answer == "President 1000"
    assert example.meta["aliases"] == [
        "President 1000",
        "Mr. President 1000",
        "The 1000th President",
        "mr president 1000",
        "1000th president",
    ]
    assert example.meta["released_aliases"] == ["mr president 1000", "1000th president"]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "flat"])
def test_the_forms_of_data_files_say_the_same(tmp_path, form):
    expected = TriviaQA(str(write(tmp_path))).examples("test")
    (tmp_path / "validation.jsonl").unlink()
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        for part in (0, 1):
            rows = TEST[:3] if part == 0 else TEST[3:]
            file = tmp_path / f"validation-0000{part}-of-00002.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif form == "json":
        (tmp_path / "validation.json").write_text(json.dumps(TEST))
    elif form == "flat":
        flat = [
            {"question": r["question"], **{f"answer.{key}": value for key, value in r["answer"].items()}}
            for r in TEST
        ]
        (tmp_path / "dev.jsonl").write_text(lines(flat))
    else:
        (tmp_path / "test.jsonl").write_text(lines(TEST))
    assert TriviaQA(str(tmp_path)).examples("test") == expected


def test_files_may_have_other_names(tmp_path):
    environment = TriviaQA(str(write(tmp_path)))
    (tmp_path / "train.jsonl").rename(tmp_path / "a.jsonl")
    (tmp_path / "validation.jsonl").rename(tmp_path / "b.jsonl")
    renamed = TriviaQA(str(tmp_path), train_file="a.jsonl", test_file=str(tmp_path / "b.jsonl"))
    (tmp_path / "home").mkdir()
    other = TriviaQA(str(write(tmp_path / "home")))
    for split in ("train", "val", "test"):
        assert renamed.examples(split) == other.examples(split)
    with pytest.raises(FileNotFoundError, match="there is no"):
        environment.examples("test")


def test_a_single_file_is_the_test_split(tmp_path):
    file = tmp_path / "some_questions.jsonl"
    file.write_text(lines(TEST))
    environment = TriviaQA(str(file))
    assert len(environment.examples("test")) == 5
    with pytest.raises(FileNotFoundError, match=r"some_questions\.jsonl is a file.*set train_file"):
        environment.examples("train")


def test_a_question_that_is_repeated_in_another_case_goes_to_one_side(tmp_path):
    again = [{**record, "question": record["question"].upper() + "!"} for record in TRAIN]
    (tmp_path / "train.jsonl").write_text(lines([*TRAIN, *again]))
    environment = TriviaQA(str(tmp_path), validation_fraction=0.3)
    train, val = (
        {e.question.lower().removesuffix("!") for e in environment.examples(s)} for s in ("train", "val")
    )
    assert not train & val
    assert len(train | val) == 300


def test_a_trajectory_is_rewritten_to_the_tags_of_the_prompt(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines([TRAJECTORY]))
    environment = TriviaQA("nowhere/at_all", trajectories=str(tmp_path), validation_fraction=0.0)
    (example,) = environment.examples("train")
    assert example.question == TRAJECTORY["conversations"][0]["value"]
    assert example.answer == "Harry Truman"
    assert environment.conversation(example) == [
        *environment.messages(example),
        {
            "role": "assistant",
            "content": "<think> I need the year.\nIt was long ago. </think>\n"
            "<search> first Peanuts [comic] cartoon </search>",
        },
        {"role": "user", "content": "<information>Peanuts began in 1950.\nIt ended in 2000.</information>"},
        {
            "role": "assistant",
            "content": "<think> Truman was president. </think>\n<answer> Harry Truman </answer>",
        },
    ]
    assert example.target == environment.conversation(example)[-1]["content"]
    assert environment.reward(example, example.target).total == 1.0


def test_what_a_trajectory_says_is_valid_in_an_episode(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines([TRAJECTORY]))
    environment = TriviaQA(
        "nowhere/at_all", trajectories=str(tmp_path), validation_fraction=0.0, search=Encyclopedia()
    )
    (example,) = environment.examples("train")
    episode = environment.episode()
    episode.reset(example)
    acts = [m["content"] for m in environment.conversation(example) if m["role"] == "assistant"]
    steps = [episode.step(act) for act in acts]
    assert [step.done for step in steps] == [False, True]
    assert episode.reward().total == 1.0
    assert episode.reward().parts["invalid_actions"] == 0.0


def test_an_instruction_before_the_question_is_left_out(tmp_path):
    turns = TRAJECTORY["conversations"]
    told = {"from": "human", "value": "Solve a task with Thought and Action: search[query]."}
    asked = {"from": "human", "value": f"Now it is your turn.\nQuestion: {turns[0]['value']}"}
    record = {"conversations": [told, {"from": "gpt", "value": "OK"}, asked, *turns[1:]]}
    (tmp_path / "train.json").write_text(json.dumps([TRAJECTORY, record]))
    plain, instructed = TriviaQA(
        "x/y", trajectories=str(tmp_path / "train.json"), validation_fraction=0.0
    ).examples("train")
    assert (instructed.question, instructed.meta) == (plain.question, plain.meta)


def test_trajectories_that_do_not_end_in_an_answer_are_left_out_and_counted(tmp_path, caplog):
    turns = TRAJECTORY["conversations"]
    unfinished = {"conversations": turns[:2]}
    looking_up = {
        "conversations": [
            turns[0],
            turns[1],
            turns[2],
            {"from": "gpt", "value": "Action: lookup[x]"},
            *turns[2:],
        ]
    }
    twice = {"conversations": [*turns, turns[0], turns[-1]]}
    mute = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "No idea."}]}
    file = tmp_path / "train.jsonl"
    file.write_text(lines([TRAJECTORY, unfinished, looking_up, twice, mute]))
    environment = TriviaQA("x/y", trajectories=str(file), validation_fraction=0.0)
    assert [e.id for e in environment.examples("train")] == ["train-1"]
    assert "trajectories: 4 of 5 train items are left out" in caplog.text
    assert f"{file}, line 2 does not end in its one answer" in caplog.text
    file.write_text(lines([mute]))
    with pytest.raises(ValueError, match=r"1 of 1 train items .* has no action after a question"):
        TriviaQA("x/y", trajectories=str(file)).examples("train")
    file.write_text(lines([{"conversations": "text"}]))
    with pytest.raises(ValueError, match='line 1: "conversations" holds no texts'):
        TriviaQA("x/y", trajectories=str(file)).examples("train")


def test_a_long_observation_of_a_trajectory_is_cut_as_in_an_episode(tmp_path):
    turns = TRAJECTORY["conversations"]
    long = {"from": "human", "value": "Observation: " + "word " * 2000}
    (tmp_path / "train.jsonl").write_text(lines([{"conversations": [*turns[:2], long, turns[3]]}]))
    environment = TriviaQA(
        "x/y", trajectories=str(tmp_path), validation_fraction=0.0, max_observation_chars=300
    )
    observed = environment.conversation(environment.examples("train")[0])[3]["content"]
    assert len(observed) <= 300
    assert observed.endswith("word ...</information>")


def test_questions_without_a_trajectory_are_searched_and_answered(tmp_path):
    environment = TriviaQA(str(write(tmp_path)), search=Encyclopedia())
    example = environment.examples("train")[0]
    roles = [message["role"] for message in environment.conversation(example)]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    with pytest.raises(ValueError, match="triviaqa has nothing to search: set data"):
        TriviaQA(str(tmp_path)).conversation(example)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": {"aliases": ["a"]}}, '"question" is missing'),
        ({"question": "Who?"}, '"answer" has no aliases'),
        ({"question": "Who?", "answer": "a"}, '"answer" has no aliases'),
        (
            {"question": "Who?", "answer": {"aliases": [], "normalized_aliases": [], "value": "<unk>"}},
            "has no aliases",
        ),
        ([1], "expected an object"),
        ("{", "expected an object"),
    ],
)
def test_a_broken_record_is_an_error_that_names_file_and_line(tmp_path, record, message):
    (tmp_path / "validation.jsonl").write_text(lines([TEST[0], record]))
    with pytest.raises(ValueError, match=message) as caught:
        TriviaQA(str(tmp_path)).examples("test")
    assert str(caught.value).startswith(f"{tmp_path / 'validation.jsonl'}, line 2: ")


def test_absent_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\.\./nowhere"):
        TriviaQA("../nowhere").examples("test")
    with pytest.raises(FileNotFoundError, match="set train_file"):
        TriviaQA(str(tmp_path)).examples("train")
    with pytest.raises(ValueError, match="validation_fraction"):
        TriviaQA(validation_fraction=1.5)


@pytest.mark.parametrize("name", ["mandarjoshi/trivia_qa", "trivia_qa"])
def test_the_hub_is_read_through_datasets_and_its_validation_split_is_the_test_split(monkeypatch, name):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0].endswith("AgentBank"):
            return [TRAJECTORY]
        return TRAIN if kwargs["split"] == "train" else TEST

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    environment = TriviaQA(name, subset="rc.nocontext", validation_fraction=0.0)
    assert len(environment.examples("test")) == 5
    assert len(environment.examples("train")) == 300
    agents = TriviaQA(name, trajectories="Solaris99/AgentBank", validation_fraction=0.0)
    assert [e.answer for e in agents.examples("train")] == ["Harry Truman"]
    assert calls == [
        (("mandarjoshi/trivia_qa", "rc.nocontext"), {"split": "validation"}),
        (("mandarjoshi/trivia_qa", "rc.nocontext"), {"split": "train"}),
        (("Solaris99/AgentBank", "triviaqa"), {"split": "train"}),
    ]
