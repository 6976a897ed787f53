"""The OpenAI-compatible server: answers equal the agent's, and no request harms another."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from memgen.generation.continuous import ContinuousBatch
from memgen.types import InsertionPlan, TokenBatch
from serving_tiny import serving, tiny_agent, wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTIONS = [
    f"What is {a} and {b}, then?" * (1 + a % 3) for a, b in zip(range(12), range(7, 19), strict=True)
]


def refusal(client, path, content, headers=None):
    status, body, _ = client.ask("POST", path, content, headers)
    return status, json.loads(body)["error"]


def test_there_is_one_model_and_it_is_well(client):
    status, body, _ = client.ask("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(body)["data"]] == ["tiny"]
    assert client.ask("GET", "/healthz")[0] == 200


def test_greedy_answers_of_clients_that_join_and_leave_equal_the_agents(client, agent):
    draw = random.Random(0)
    limits = [draw.randint(1, 40) for _ in QUESTIONS]

    def ask(number):
        return client.chat(QUESTIONS[number], temperature=0, max_tokens=limits[number])

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(ask, range(len(QUESTIONS))))
    for question, limit, response in zip(QUESTIONS, limits, responses, strict=True):
        answer = agent.generate(question, max_new_tokens=limit)
        (choice,) = response["choices"]
        assert choice["memgen"]["tokens"] == list(answer.tokens)
        assert choice["message"]["content"] == answer.text
        assert choice["finish_reason"] == ("stop" if answer.finished else "length")
        woven = [
            (place["token"], place["character"], place["latents"]) for place in choice["memgen"]["insertions"]
        ]
        assert woven == [(place.token, place.character, place.latents) for place in answer.insertions]
        assert choice["memgen"]["work"]["reasoner"] == answer.work.reasoner
        used = response["usage"]
        assert (used["prompt_tokens"], used["completion_tokens"]) == (
            answer.prompt_tokens,
            len(answer.tokens),
        )


def test_a_seed_gives_the_agents_sampled_answer_and_several_answers_differ(client, agent):
    settings = {"temperature": 1.0, "top_p": 0.95, "seed": 3}
    (choice,) = client.chat(QUESTIONS[0], max_tokens=12, **settings)["choices"]
    assert choice["memgen"]["tokens"] == list(
        agent.generate(QUESTIONS[0], max_new_tokens=12, **settings).tokens
    )
    first, again = (client.chat(QUESTIONS[0], max_tokens=12, n=3, **settings)["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in first]
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice["message"]["content"] for choice in again]


def test_a_stream_has_the_answer_in_pieces_its_insertions_and_its_usage(client, agent):
    answer = agent.generate(QUESTIONS[1], max_new_tokens=24)
    asked = {"temperature": 0, "max_tokens": 24, "stream_options": {"include_usage": True}}
    *chunks, usage, done = client.events(CHAT, messages=[{"role": "user", "content": QUESTIONS[1]}], **asked)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(answer.tokens)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == answer.text
    woven = [place for choice in choices[:-1] for place in choice.get("memgen", {}).get("insertions", [])]
    assert woven == choices[-1]["memgen"]["insertions"]
    assert [place["token"] for place in woven] == [place.token for place in answer.insertions]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    (text,) = {
        "".join(
            chunk["choices"][0]["text"]
            for chunk in client.events(TEXT, prompt="ab", max_tokens=9, temperature=0)[:-1]
        )
    }
    assert text == agent.generate("ab", raw=True, max_new_tokens=9).text


def test_an_answer_ends_before_a_stop_text_whole_or_streamed(client, agent):
    whole = agent.generate(QUESTIONS[2], max_new_tokens=40).text
    stop = whole[5:7]
    asked = {"temperature": 0, "max_tokens": 40, "stop": stop}
    (choice,) = client.chat(QUESTIONS[2], **asked)["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    chunks = client.events(CHAT, messages=[{"role": "user", "content": QUESTIONS[2]}], **asked)[:-1]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == choice["message"]["content"]


def test_logprobs_are_those_of_the_written_tokens(client, agent):
    answer = agent.generate(QUESTIONS[3], max_new_tokens=10)
    (choice,) = client.chat(QUESTIONS[3], temperature=0, max_tokens=10, logprobs=True)["choices"]
    found = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert found == pytest.approx(answer.logprobs, abs=1e-5)


def test_top_logprobs_are_the_most_probable_tokens_of_each_place_at_the_answers_temperature(client):
    asked = {"max_tokens": 10, "logprobs": True, "top_logprobs": 20}
    for settings in ({"temperature": 0}, {"temperature": 0.7, "seed": 5, "top_k": 20}):
        (choice,) = client.chat(QUESTIONS[3], **asked, **settings)["choices"]
        content = choice["logprobs"]["content"]
        assert len(content) == len(choice["memgen"]["tokens"])
        for token in content:
            found = [(top["token"], top["logprob"]) for top in token["top_logprobs"]]
            assert len(found) == 20
            assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)
            # A token that is sampled from the 20 most probable ones is one of them.
            assert any(
                name == token["token"] and value == pytest.approx(token["logprob"], abs=1e-5)
                for name, value in found
            )
        chunks = client.events(
            CHAT, messages=[{"role": "user", "content": QUESTIONS[3]}], **asked, **settings
        )[:-1]
        shown = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [entry for piece in shown if piece for entry in piece["content"]] == content


def test_alternatives_of_an_answer_are_those_of_its_tokens_in_a_prompt():
    with serving(tiny_agent(trigger="never")) as plain:
        asked = {"temperature": 0, "max_tokens": 6, "logprobs": 3}
        (written,) = plain.post(TEXT, prompt=[5, 9, 40], **asked)["choices"]
        ids = [5, 9, 40, *written["memgen"]["tokens"]]
        (scored,) = plain.post(TEXT, prompt=ids, **(asked | {"echo": True, "max_tokens": 0}))["choices"]
        pieces = [
            chunk["choices"][0]["logprobs"] for chunk in plain.events(TEXT, prompt=[5, 9, 40], **asked)[:-1]
        ]
    tops = written["logprobs"]["top_logprobs"]
    assert [top for piece in pieces if piece for top in piece["top_logprobs"]] == tops
    for ours, theirs in zip(tops, scored["logprobs"]["top_logprobs"][3:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_harness_gets_the_scores_of_a_prompt_and_its_most_probable_tokens(client, agent):
    prompt = agent.tokenizer.encode("two and two is four")
    response = client.post(TEXT, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)
    (choice,) = response["choices"]
    batch = TokenBatch.from_rows([prompt], [[False] + [True] * (len(prompt) - 1)])
    with torch.no_grad():
        expected, _ = agent.model.label_logprobs(batch, InsertionPlan.empty(1))
    shown = choice["logprobs"]
    assert shown["token_logprobs"][0] is None
    assert shown["token_logprobs"][1 : len(prompt)] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(shown["tokens"]) == len(shown["top_logprobs"]) == len(shown["text_offset"]) == len(prompt) + 1
    assert all(
        max(top.values()) >= own
        for top, own in zip(shown["top_logprobs"][1:], shown["token_logprobs"][1:], strict=True)
    )
    assert choice["text"].startswith("two and two is four")
    (scored,) = client.post(TEXT, prompt=prompt, echo=True, logprobs=1, max_tokens=0)["choices"]
    assert scored["logprobs"]["token_logprobs"] == shown["token_logprobs"][:-1]
    assert scored["text"] == "two and two is four"


def test_several_prompts_are_answered_in_their_order(client, agent):
    prompts = ["ab", "c", "a longer one"]
    choices = client.post(TEXT, prompt=prompts, n=2, max_tokens=8, temperature=0)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    expected = [answer.text for answer in agent.generate(prompts, raw=True, max_new_tokens=8)]
    assert [choice["text"] for choice in choices] == [text for text in expected for _ in range(2)]


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        (CHAT, b"{", 400, "no JSON"),
        (CHAT, b"[]", 400, "no JSON object"),
        (CHAT, b"[" * 100_000, 400, "no JSON"),
        (CHAT, {"model": "tiny"}, 400, "messages"),
        (CHAT, {"model": "gpt", "messages": [{"role": "user", "content": "a"}]}, 404, "there is no model 'gpt'"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": ""}]}, 400, "prompt is empty"),
        (CHAT, {"model": "tiny", "messages": [{"role": "robot", "content": "a"}]}, 400, "a role"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a" * 600}]}, 400, "context is 512"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 900}, 400, "context is 512"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": -1}, 400, "temperature"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 0}, 400, "n: "),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools is not served"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stop": [""]}, 400, "stop text is empty"),
        (TEXT, {"model": "tiny", "prompt": []}, 400, "between 1 and 512 answers"),
        (TEXT, {"model": "tiny", "prompt": [[1], [9999]]}, 400, "ids are below 260"),
        (TEXT, {"model": "tiny", "prompt": "a", "logprobs": 6}, 400, "logprobs"),
        (TEXT, {"model": "tiny", "prompt": "a", "top_logprobs": 2}, 400, "top_logprobs is not served"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "needs logprobs: true"),
        (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 21}, 400, "top_logprobs"),
        (TEXT, {"model": "tiny", "prompt": "a", "logprobs": 1, "echo": True, "stream": True}, 400, "not streamed"),
        (TEXT, b"x" * (9 << 20), 413, "longer than"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/load", {"checkpoint": "a"}, 404, "Not Found"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_line(client, path, content, status, message):
    found, error = refusal(client, path, content)
    assert found == status
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_a_default_limit_is_what_the_context_leaves(client, agent):
    question = "a" * 400
    response = client.chat(question, temperature=0)
    prompt = len(agent.prompt(question))
    assert response["usage"]["prompt_tokens"] == prompt
    assert response["usage"]["completion_tokens"] <= 512 - prompt - 3 - 3 * 2


def test_a_key_is_asked_for_below_v1_alone(agent):
    with serving(agent, api_key="secret") as client:
        assert client.ask("GET", "/healthz")[0] == 200
        assert client.ask("GET", "/v1/models")[0] == 401
        assert client.ask("GET", "/v1/models", headers={"Authorization": "Bearer other"})[0] == 401
        assert client.ask("GET", "/v1/models", headers={"Authorization": "Bearer secret"})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(agent, slowly, stream):
    with serving(agent, rows=1) as client:
        messages = [{"role": "user", "content": "a"}]
        client.leave(CHAT, messages=messages, max_tokens=400, temperature=0, stream=stream)
        wait_until(lambda: client.engine.running == 0)
        assert client.engine.counts.cancelled == 1
        assert client.chat("a", max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_too_many_waiting_requests_are_refused_and_those_that_wait_are_answered(agent, gate):
    with serving(agent, rows=1, waiting=1) as client, ThreadPoolExecutor(4) as pool:
        content = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}
        accepted = [pool.submit(client.ask, "POST", TEXT, content)]
        wait_until(lambda: client.engine.running)
        accepted.append(pool.submit(client.ask, "POST", TEXT, content))
        wait_until(lambda: client.engine.waiting)
        status, body, headers = client.ask("POST", TEXT, content)
        assert status == 429
        assert headers["Retry-After"] == "1"
        assert "waiting" in json.loads(body)["error"]["message"]
        gate.set()
        assert [answer.result()[0] for answer in accepted] == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_time_is_over_is_told_so_and_frees_its_row(agent, gate, stream):
    with serving(agent, rows=1, timeout_s=0.2) as client:
        content = {"model": "tiny", "prompt": "a", "max_tokens": 400, "temperature": 0, "stream": stream}
        status, body, _ = client.ask("POST", TEXT, content)
        assert status == (200 if stream else 504)
        assert "there was no answer within 0.2 s" in body
        assert "[DONE]" not in body
        gate.set()
        wait_until(lambda: client.engine.running == client.engine.waiting == 0)
        assert client.engine.counts.answers == 0


def test_a_fault_of_the_model_fails_its_batch_and_the_server_goes_on(agent, monkeypatch):
    with serving(agent) as client:
        monkeypatch.setattr(ContinuousBatch, "step", lambda self: 1 / 0)
        found, error = refusal(client, TEXT, {"model": "tiny", "prompt": "a", "max_tokens": 5})
        assert found == 500
        assert "see its log" in error["message"]
        monkeypatch.undo()
        assert client.post(TEXT, prompt="a", max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_another_checkpoint_is_loaded_between_answers_and_mixes_none(agent, slowly):
    others = {"other": tiny_agent(seed=5)}

    def load(name):
        if name not in others:
            raise ValueError(f"there is no {name}")
        return others[name]

    with serving(agent, load=load) as client, ThreadPoolExecutor(4) as pool:
        content = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "temperature": 0}
        before = [pool.submit(client.ask, "POST", TEXT, content) for _ in range(3)]
        wait_until(lambda: client.engine.running)
        assert refusal(client, "/v1/load", {"checkpoint": "missing"})[0] == 400
        status, _, _ = client.ask("POST", "/v1/load", {"checkpoint": "other", "name": "tiny"})
        assert status == 200
        after = client.post(TEXT, prompt="abc", max_tokens=30, temperature=0)["choices"][0]["text"]
        old, new = (a.generate("abc", raw=True, max_new_tokens=30).text for a in (agent, others["other"]))
        assert old != new
        assert after == new
        assert {json.loads(found.result()[1])["choices"][0]["text"] for found in before} == {old}


def test_metrics_count_requests_tokens_and_insertions(agent):
    with serving(agent) as client:
        written = client.chat("a", max_tokens=7, temperature=0)
        refusal(client, CHAT, b"{")
        client.ask("GET", "/anything")
        _, body, headers = client.ask("GET", "/metrics")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))
        assert lines['memgen_requests_total{path="/v1/chat/completions",status="200"}'] == "1"
        assert lines['memgen_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
        assert lines['memgen_requests_total{path="other",status="404"}'] == "1"
        assert lines["memgen_request_seconds_count"] == "3"
        assert lines["memgen_tokens_total"] == str(written["usage"]["completion_tokens"])
        assert lines["memgen_insertions_total"] == str(len(written["choices"][0]["memgen"]["insertions"]))
        assert lines["memgen_running"] == "0"


# The official client


def test_the_official_client_chats_streams_and_completes(client, agent):
    openai = pytest.importorskip("openai")
    answer = agent.generate(QUESTIONS[4], max_new_tokens=16)
    messages = [{"role": "user", "content": QUESTIONS[4]}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0}
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0
    ) as official:
        assert [model.id for model in official.models.list()] == ["tiny"]
        whole = official.chat.completions.create(**asked, n=2, logprobs=True)
        assert [choice.message.content for choice in whole.choices] == [answer.text] * 2
        assert len(whole.choices[0].logprobs.content) == len(answer.tokens)
        assert whole.choices[0].memgen["tokens"] == list(answer.tokens)
        stream = official.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.text
        text = official.completions.create(
            model="tiny", prompt="ab", max_tokens=6, temperature=0, echo=True, logprobs=1
        )
        assert text.choices[0].text.startswith("ab")
        assert text.choices[0].logprobs.token_logprobs[0] is None
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            official.chat.completions.create(**(asked | {"model": "gpt"}))
        with pytest.raises(openai.BadRequestError, match="the context is 512"):
            official.chat.completions.create(**(asked | {"max_tokens": 9999}))
