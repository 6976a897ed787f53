"""The Python API: an agent that is loaded by name and answers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import memgen
from memgen.api.agent import MARK, Insertion
from memgen.api.text import AnswerText
from memgen.chat import CHATML, prompt_ids
from memgen.cli import main as front_end
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from tiny import byte_tokenizer

HEAVY = ("lightning", "mlflow", "deepspeed", "jsonargparse", "omegaconf")
QUESTIONS = ["One and two?", "A longer question, with commas.", "x"]


def test_importing_memgen_takes_less_than_a_second_of_cpu_and_imports_nothing_heavy():
    code = (
        "import time; begin = time.process_time()\n"
        "import memgen; memgen.load\n"
        "print(time.process_time() - begin)\n"
        f"import sys; print(*{{'torch', 'transformers', *{HEAVY!r}}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, heavy = done.stdout.split("\n")[:2]
    assert float(seconds) < 1
    assert heavy == ""


def test_an_agent_comes_without_lightning_mlflow_and_deepspeed(checkpoint):
    code = (
        f"import memgen, sys; agent = memgen.load({str(checkpoint)!r}); agent.generate('a', max_new_tokens=2)\n"
        f"print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_an_answer_is_what_generate_gives_for_the_rendered_prompt(agent):
    (answer,) = agent.generate(QUESTIONS[:1], max_new_tokens=20)
    prompt = prompt_ids(agent.tokenizer, [{"role": "user", "content": QUESTIONS[0]}], CHATML)
    (turn,) = generate(agent.model, [prompt], GenerationSettings(max_new_tokens=20)).turns
    assert list(answer.tokens) == turn.tokens
    assert list(answer.logprobs) == turn.logprobs
    assert [insertion.token for insertion in answer.insertions] == turn.insertion_points
    assert answer.work == turn.work
    assert answer.prompt_tokens == len(prompt)
    assert answer.text == str(answer) == agent.tokenizer.decode(turn.tokens, skip_special_tokens=True)


def test_a_question_its_message_and_a_list_of_questions_are_answered_alike(agent):
    listed = agent.generate(QUESTIONS, max_new_tokens=20)
    for question, answer in zip(QUESTIONS, listed, strict=True):
        assert agent.generate(question, max_new_tokens=20).tokens == answer.tokens
        messages = [{"role": "user", "content": question}]
        assert agent.generate(messages, max_new_tokens=20).tokens == answer.tokens
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert [a.tokens for a in agent.generate(conversations, max_new_tokens=20)] == [a.tokens for a in listed]
    assert agent.generate([]) == []


def test_sampled_answers_of_a_list_do_not_depend_on_the_batch_size(agent):
    settings = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    together = agent.generate(QUESTIONS, **settings)
    assert [a.tokens for a in agent.generate(QUESTIONS, batch_size=1, **settings)] == [
        a.tokens for a in together
    ]
    assert agent.generate(QUESTIONS[0], **settings).tokens == together[0].tokens
    assert agent.generate(QUESTIONS[0], **(settings | {"seed": 4})).tokens != together[0].tokens


def returning(generator, into):
    """Its items; what it returns goes into a list."""
    into.append((yield from generator))


def test_a_stream_is_the_answer_in_pieces_with_its_insertions_in_place(agent):
    for question in QUESTIONS:
        answer = agent.generate(question, max_new_tokens=24)
        ended = []
        pieces = list(returning(agent.stream(question, max_new_tokens=24), ended))
        assert ended == [answer]
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == answer.text
        assert tuple(piece for piece in pieces if isinstance(piece, Insertion)) == answer.insertions
        assert "".join(map(str, pieces)) == answer.marked()
    assert answer.insertions
    assert MARK in answer.marked()


def test_a_stream_that_is_left_ends(agent):
    stream = agent.stream(QUESTIONS[0], max_new_tokens=200)
    next(stream)
    stream.close()
    assert agent.generate(QUESTIONS[0], max_new_tokens=4).tokens


def test_an_answer_ends_before_a_stop_text(agent):
    whole = agent.generate(QUESTIONS[1], max_new_tokens=40)
    stop = whole.text[5:7]
    cut = agent.generate(QUESTIONS[1], max_new_tokens=40, stop=[stop, "never written"])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finished
    assert len(cut.tokens) < len(whole.tokens)
    assert "".join(p for p in agent.stream(QUESTIONS[1], stop=stop) if isinstance(p, str)) == cut.text


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ([{"role": "robot", "content": "a"}], {}, "a role"),
        ([{"role": "user"}], {}, "content is a text"),
        ("a", {"stop": [""]}, "stop text is empty"),
        ("a", {"temperature": -1.0}, "temperature must be"),
        ("a", {"batch_size": 0}, "batch_size must be"),
        ("a" * 600, {}, "the reasoner's context is 512"),
        ([{"role": "user", "content": "a"}], {"raw": True}, "with raw a question is a text"),
    ],
)
def test_what_cannot_be_answered_is_refused(agent, question, options, message):
    with pytest.raises(ValueError, match=message):
        agent.generate(question, **options)


def test_a_run_folder_stands_for_its_best_checkpoint(checkpoint, agent):
    assert memgen.load(checkpoint.parent).source == checkpoint
    with pytest.raises(ValueError, match=r"it has no memgen\.json"):
        memgen.load(checkpoint.parent.parent)


def test_a_saved_agent_is_the_same_to_the_byte_and_has_a_card(agent, checkpoint, tmp_path):
    agent.save_pretrained(tmp_path / "saved")
    for name in ("memgen.json", "weaver.safetensors", "trigger.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert memgen.load(tmp_path / "saved").generate("a", max_new_tokens=8) == agent.generate(
        "a", max_new_tokens=8
    )
    assert "frozen language model" in (tmp_path / "saved" / "README.md").read_text()
    agent.save_pretrained(tmp_path / "saved")  # replaces it


def test_the_command_prints_what_the_agent_answers(agent, checkpoint, capsys):
    answer = agent.generate(QUESTIONS[1], max_new_tokens=24)
    argv = ["generate", "--checkpoint", str(checkpoint), "--prompt", QUESTIONS[1], "--max-new-tokens", "24"]
    assert front_end.main([*argv, "--mark", "<m>"]) == 0
    out, err = capsys.readouterr()
    assert out == answer.marked("<m>") + "\n"
    work = f"{answer.work.reasoner:.0f} reasoner and {answer.work.weaver:.0f} weaver positions"
    assert f"[{len(answer.tokens)} tokens, {len(answer.insertions)} insertions, {work}" in err


@pytest.mark.parametrize("text", ["plain", "naïve 你好 😀!", "ends in half"])
@pytest.mark.parametrize("stop", [(), ("好 ", "in h"), ("zzz",)])
def test_text_is_given_out_whole_and_never_taken_back(text, stop):
    tokenizer = byte_tokenizer()
    given = AnswerText(tokenizer, stop)
    pieces = [given.add(token) for token in tokenizer.encode(text)] + [given.end()]
    places = [text.find(s) for s in stop if s in text]
    assert "".join(pieces) == given.given == text[: min(places, default=len(text))]
    assert "\ufffd" not in given.given


def test_half_a_character_is_given_out_at_the_end_only():
    tokenizer = byte_tokenizer()
    given = AnswerText(tokenizer)
    assert [given.add(token) for token in tokenizer.encode("a😀")[:3]] == ["a", "", ""]
    assert given.end() == "\ufffd"
