"""The scribe: counted, bounded in time, and replaced or not where it fails."""

from __future__ import annotations

import http.server
import json
import threading
import time
from contextlib import contextmanager

import pytest

from memgen.memories.scribe import (
    HttpScribe,
    Nonsense,
    ScribeError,
    Usage,
    json_in,
    object_in,
    text_of,
    texts_of,
)
from tiny import byte_tokenizer, tiny_memgen


@contextmanager
def serving(answer):
    """A real server; yields its address and the requests it has had."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers, body))
            status, content = answer(len(requests))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text, usage=None):
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def test_an_endpoint_is_asked_in_openais_form_and_its_tokens_are_counted(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    used = {"prompt_tokens": 7, "completion_tokens": 3}
    with serving(lambda n: (200, completion("fine", used if n == 1 else None))) as (url, requests):
        scribe = HttpScribe(url, "small", key_variable="SOME_KEY", temperature=1.0)
        assert scribe.ask("a rule", "What now?", 50) == "fine"
        assert scribe.usage == Usage(1, 7, 3)
        scribe.ask("a rule", "What now?", 50)
        assert scribe.usage == Usage(2, 7 + 3, 3 + 1), "a server that does not count: words and signs"
    path, headers, body = requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert body == {
        "model": "small",
        "messages": [{"role": "user", "content": "What now?"}],
        "max_tokens": 50,
        "temperature": 1.0,
    }
    assert "secret" not in scribe.id


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((500, b"busy"), r"HTTP status 500 .*busy \(2 attempts\)"),
        ((401, b"who are you"), r"HTTP status 401 .*who are you \(1 attempt\)"),
        ((200, b"<html>"), "no chat completion: b'<html>'"),
        ((200, {"choices": []}), "no chat completion"),
        ((200, completion(None)), "the answer has no text"),
    ],
)
def test_an_endpoint_that_does_not_answer_is_named(answer, told):
    with serving(lambda n: answer) as (url, _):
        scribe = HttpScribe(url, "small", retries=1, backoff_s=0.0)
        with pytest.raises(ScribeError, match=f"scribe small at .*, asked for a rule: .*{told}"):
            scribe.ask("a rule", "What now?", 50)
        assert scribe.usage == Usage(failures=1)


def test_an_endpoint_that_is_slow_or_gone_ends_in_time():
    with serving(lambda n: (time.sleep(0.6), (200, completion("late")))[1]) as (url, _):
        scribe = HttpScribe(url, "small", timeout_s=0.2, retries=0)
        with pytest.raises(ScribeError, match=r"no complete answer within 0\.2 s"):
            scribe.ask("a rule", "What now?", 50)
    scribe = HttpScribe(url, "small", retries=0)
    with pytest.raises(ScribeError, match="no complete answer"):
        scribe.ask("a rule", "What now?", 50)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="url must look like http://HOST:PORT/v1, got 'example'"):
        HttpScribe("example", "small")
    with pytest.raises(ValueError, match="NO_SUCH_KEY holds no API key"):
        HttpScribe("http://127.0.0.1:1/v1", "small", key_variable="NO_SUCH_KEY")


def test_json_is_found_among_other_words():
    assert json_in('Sure! {"a": [1]} and more {') == {"a": [1]}
    assert json_in("[broken [1, 2]") == [1, 2]
    for text in ("nothing", "{", "[1"):
        with pytest.raises(Nonsense, match="no JSON"):
            json_in(text)
    with pytest.raises(Nonsense, match="expected a JSON object"):
        object_in("[1]")
    with pytest.raises(Nonsense, match="title is no text: ' '"):
        text_of({"title": " "}, "title")
    with pytest.raises(Nonsense, match=r"tags is no list of texts: \[1\]"):
        texts_of({"tags": [1]}, "tags")


# The reasoner as scribe


def test_the_reasoner_writes_through_our_decoding_and_is_counted():
    from memgen.chat import prompt_ids
    from memgen.generation.decode import generate
    from memgen.generation.sampling import GenerationSettings
    from memgen.generation.scribe import ReasonerScribe

    model, tokenizer = tiny_memgen(trigger="never"), byte_tokenizer()
    scribe = ReasonerScribe(model, tokenizer)
    prompt = "What now? <|im_end|> \u00fc"
    answer = scribe.ask("a rule", prompt, 8)
    ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    tokens = generate(model, [ids], GenerationSettings(max_new_tokens=8)).turns[0].tokens
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)
    assert scribe.usage == Usage(1, len(ids), len(tokens))
    with pytest.raises(ScribeError, match="asked for a rule"):
        scribe.ask("a rule", "far too long " * 100, 8)
    sampled = {
        ReasonerScribe(model, tokenizer, temperature=2.0, seed=s).ask("a rule", "Hm", 8) for s in (1, 2, 1)
    }
    assert len(sampled) == 2
