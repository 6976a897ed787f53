from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from memgen.environments.search.popqa import PopQA
from memgen.environments.search.retrieval import PassageIndex
from memgen.environments.search.search_qa import SYSTEM_PROMPT, exact_match

RECORDS = [
    {
        "id": i,
        "question": f"What is the capital of land {i}?",
        "possible_answers": json.dumps([f"City {i}", f"Town {i}"]),
        "paragraphs": [
            {"title": f"Land {i}", "text": f"The capital of land {i} is City {i}."},
            {"title": "Capital", "text": "A capital is a city."},
        ],
    }
    for i in range(4)
]
SHARED = Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared")) / "data" / "popqa"
needs_real_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real PopQA data is not in {SHARED} (set MEMGEN_SHARED)"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))


def write(folder: Path, records: object = RECORDS, name: str = "popqa.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(records))
    return file


def test_the_prompt_is_the_released_one_to_the_letter(tmp_path):
    environment = PopQA(str(write(tmp_path)))
    assert environment.messages(environment.examples("test")[1]) == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "What is the capital of land 1?"},
    ]
    assert SYSTEM_PROMPT.startswith(
        "Answer the given question. You must conduct reasoning inside <think> and"
    )
    assert SYSTEM_PROMPT.endswith("For example, <answer> Beijing </answer>.")
    silent = PopQA(str(tmp_path), system_prompt="")
    assert [message["role"] for message in silent.messages(silent.examples("test")[0])] == ["user"]


def test_a_file_and_its_folder_are_the_same_data(tmp_path):
    file = write(tmp_path)
    (tmp_path / "LICENSE.txt").write_text("MIT")
    (tmp_path / "notes.json").write_text("{}")
    assert PopQA(str(tmp_path)).examples("test") == PopQA(str(file)).examples("test")


def test_the_file_may_have_another_name(tmp_path):
    expected = PopQA(str(write(tmp_path))).examples("test")
    (tmp_path / "popqa.json").rename(tmp_path / "held_out.json")
    environment = PopQA(str(tmp_path), test_file="held_out.json")
    assert environment.examples("test") == expected
    assert len(environment.searcher().search(["land"])[0]) == 3
    environment.searcher().close()
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        PopQA(str(tmp_path), test_file="absent.json").examples("test")


def test_the_original_tsv_is_read(tmp_path):
    (tmp_path / "popQA.tsv").write_text(
        'id\tquestion\tpossible_answers\n7\tWho?\t"[""An """"A"""" man"", ""b""]"\n'.replace('""""', '\\""')
    )
    (example,) = PopQA(str(tmp_path)).examples("test")
    assert example.meta["aliases"] == ['An "A" man', "b"]


def test_the_items_own_paragraphs_are_searched(tmp_path):
    environment = PopQA(str(write(tmp_path)))
    episode = environment.episode()
    episode.reset(environment.examples("test")[2])
    step = episode.step("<think> hm </think>\n<search> capital of land 2 </search>")
    assert step.observation.startswith(
        '<information>Doc 1(Title: "Land 2") The capital of land 2 is City 2.\nDoc 2'
    )
    index = environment.searcher()
    assert isinstance(index, PassageIndex)
    assert len(index) == 5
    index.close()


def test_the_reference_conversation_searches_the_question_and_answers(tmp_path):
    environment = PopQA(str(write(tmp_path)))
    example = environment.examples("test")[3]
    conversation = environment.conversation(example)
    assert [message["role"] for message in conversation] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert "is City 3." in conversation[3]["content"]
    assert conversation[-1]["content"] == example.target
    # An agent that says what it learned gets what it read, and the reward.
    episode = environment.episode()
    episode.reset(example)
    assert episode.step(conversation[2]["content"]).observation == conversation[3]["content"]
    assert episode.step(conversation[4]["content"]).done
    assert episode.reward().total == 1.0
    environment.searcher().close()


def test_data_without_paragraphs_needs_a_search_backend(tmp_path):
    bare = [{key: record[key] for key in ("question", "possible_answers")} for record in RECORDS]
    environment = PopQA(str(write(tmp_path, bare)))
    assert environment.reward(environment.examples("test")[0], "<answer> town 0 </answer>").total == 1.0
    episode = environment.episode()
    episode.reset(environment.examples("test")[0])
    with pytest.raises(ValueError, match="holds no paragraphs, so there is nothing to search: set data"):
        episode.step("<search> a </search>")


def test_there_is_no_training_split(tmp_path):
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError, match=f"no {split} split"):
            PopQA(str(write(tmp_path))).examples(split)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"possible_answers": '["a"]'}, '"question" is missing'),
        ({"question": " ", "possible_answers": '["a"]'}, '"question" is empty'),
        ({"question": "Who?"}, '"possible_answers" is missing'),
        ({"question": "Who?", "possible_answers": "[]"}, '"possible_answers" holds no text'),
        ({"question": "Who?", "possible_answers": ["", 5]}, '"possible_answers" holds no text'),
        ("text", "expected an object"),
    ],
)
def test_a_broken_record_is_an_error_that_names_it(tmp_path, record, message):
    file = write(tmp_path, [RECORDS[0], record])
    with pytest.raises(ValueError, match=message) as caught:
        PopQA(str(file)).examples("test")
    assert str(caught.value).startswith(f"{file}, record 2: ")


def test_absent_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\.\./nowhere"):
        PopQA("../nowhere").examples("test")
    with pytest.raises(FileNotFoundError, match="set test_file"):
        PopQA(str(tmp_path)).examples("test")
    with pytest.raises(ValueError, match="has no records"):
        PopQA(str(write(tmp_path, []))).examples("test")


def test_a_hub_name_is_read_through_datasets(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return RECORDS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples = PopQA("akariasai/PopQA").examples("test")
    assert [e.answer for e in examples] == ["City 0", "City 1", "City 2", "City 3"]
    assert calls == [(("akariasai/PopQA",), {"split": "test"})]


@pytest.fixture(scope="module")
def real() -> PopQA:
    return PopQA(str(SHARED))


@needs_real_data
@pytest.mark.parametrize("metric", ["exact_match", "alias_match", "released_match", "released_grpo"])
def test_all_gold_answers_of_the_real_data_score_one(metric):
    environment = PopQA(str(SHARED), metric=metric)
    examples = environment.examples("test")
    assert len(examples) == 1000
    assert sum(environment.reward(e, e.target).total for e in examples) == 1000.0
    aliases = [(e, alias) for e in examples for alias in e.meta["aliases"]]
    assert len(aliases) == 4495
    assert sum(environment.reward(e, f"<answer>{alias}</answer>").total for e, alias in aliases) == 4495.0


@needs_real_data
def test_all_corrupted_answers_of_the_real_data_score_zero(real):
    examples = real.examples("test")
    pool = sorted({example.answer for example in examples})
    tried = 0
    for number, example in enumerate(examples):
        gold = example.answer
        start = number % len(pool)
        first, other = (
            next(a for a in answers if not exact_match(a, example.meta["aliases"]))
            for answers in (pool, pool[start:] + pool[:start])
        )
        for wrong in (
            other,
            f"not {gold}",
            f"{gold} or {first}",
            f"{gold}x",
            gold[::-1],
        ):
            if exact_match(wrong, example.meta["aliases"]):
                assert wrong == gold[::-1], "a palindrome, or one more name of the same"
                continue
            tried += 1
            reward = real.reward(example, f"<think> x </think>\n<answer> {wrong} </answer>")
            assert (reward.total, reward.parts["answered"]) == (0.0, 1.0)
        for unsaid in (
            gold,
            f"<answer> {gold}",
            f"<think> {gold} </think>",
            f"<search> {gold} </search>",
            "",
        ):
            assert real.reward(example, unsaid).total == 0.0
    assert tried >= 4990


@needs_real_data
def test_every_real_question_finds_its_passage(real):
    index = real.searcher()
    assert isinstance(index, PassageIndex)
    assert len(index) == 1475
    records = json.loads((SHARED / "popqa.json").read_text())
    examples = real.examples("test")
    episodes = [real.episode() for _ in examples]
    real.reset_all(episodes, examples)
    steps = real.step_all(episodes, [f"<search> {example.question} </search>" for example in examples])
    titles = [{p.title for p in found} for found in index.search([example.question for example in examples])]
    hits = sum(bool({r["subj"], r["s_wiki_title"]} & found) for r, found in zip(records, titles, strict=True))
    assert hits == 1000
    assert all(len(step.observation) <= 2048 and step.fault is None for step in steps)
    for episode, example in zip(episodes, examples, strict=True):
        assert episode.step(example.target).done
        assert episode.reward().total == 1.0
    index.close()
