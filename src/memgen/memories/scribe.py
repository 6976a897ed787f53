"""The language model that writes memory, its cost counted; and what happens when it is gone or answers nonsense.

A scribe that is not reached, or whose answer cannot be read, is the scribe's failure and never the agent's: the memory
goes on with the method's deterministic fallback for that call, and says so, or stops (`on_scribe_failure`).

`HttpScribe` asks any endpoint of OpenAI's chat completions protocol; the reasoner itself is `memgen.generation.scribe`.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, final

from typing_extensions import override

from memgen.http_post import HttpFailure, HttpServer, split_address

OnFailure = Literal["fallback", "stop"]
"""What a memory does without a usable answer of its scribe."""


class ScribeError(RuntimeError):
    """The scribe gave no answer, or one that cannot be used."""


class Nonsense(ValueError):
    """An answer is not of the form that was asked for."""


@dataclass(frozen=True)
class Usage:
    """What a scribe has cost."""

    calls: int = 0
    """Questions that it answered."""
    prompt_tokens: int = 0
    """Tokens that it read for them."""
    completion_tokens: int = 0
    """Tokens that it wrote."""
    failures: int = 0
    """Questions that it did not answer."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.failures + other.failures,
        )

    def __sub__(self, other: Usage) -> Usage:
        return self + Usage(-other.calls, -other.prompt_tokens, -other.completion_tokens, -other.failures)


@dataclass(frozen=True)
class Completion:
    """A scribe's answer."""

    text: str
    """The answer."""
    prompt_tokens: int
    """Tokens that it read."""
    completion_tokens: int
    """Tokens that it wrote."""


class Scribe(ABC):
    """A language model that is asked by text."""

    id: str
    """Names the model in records."""

    def __init__(self) -> None:
        self.usage = Usage()

    @final
    def ask(self, purpose: str, prompt: str, max_tokens: int) -> str:
        """An answer, counted.

        Args:
            purpose: what it is for, for messages.
            prompt: the question, one message of a user.
            max_tokens: limit of the answer.

        Raises:
            ScribeError: if there is none.
        """
        try:
            completion = self.complete(prompt, max_tokens)
        except ScribeError as error:
            self.usage += Usage(failures=1)
            raise ScribeError(f"scribe {self.id}, asked for {purpose}: {error}") from error
        self.usage += Usage(1, completion.prompt_tokens, completion.completion_tokens)
        return completion.text

    @abstractmethod
    def complete(self, prompt: str, max_tokens: int) -> Completion:
        """Answers a prompt.

        Raises:
            ScribeError: if it cannot.
        """


@final
class HttpScribe(Scribe):
    """An endpoint of OpenAI's chat completions protocol."""

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        temperature: float = 0.0,
        timeout_s: float = 60.0,
        retries: int = 2,
        backoff_s: float = 1.0,
    ) -> None:
        """Asks nothing yet.

        Args:
            url: of the API, http://127.0.0.1:8000/v1 for instance; requests go to `<url>/chat/completions`.
            model: the model's name there.
            key_variable: environment variable that holds the API key; None: no key is sent.
            temperature: of sampling.
            timeout_s: seconds that a request may take from the connection to the last byte.
            retries: further attempts after a failure that may be temporary.
            backoff_s: pause before the second attempt; each further pause is twice as long.

        Raises:
            ValueError: if a setting is not usable.
        """
        super().__init__()
        split_address(url, "http://HOST:PORT/v1")
        if temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
        if key_variable is not None and not os.environ.get(key_variable):
            raise ValueError(
                f"the environment variable {key_variable} holds no API key; set it, or leave key_variable out"
            )
        self.id = f"{model} at {url}"
        self.model = model
        self.key_variable = key_variable
        self.temperature = temperature
        address = f"{url.rstrip('/')}/chat/completions"
        self._server = HttpServer(address, "scribe", timeout_s, retries, backoff_s)

    @override
    def complete(self, prompt: str, max_tokens: int) -> Completion:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Authorization": f"Bearer {os.environ[self.key_variable]}"} if self.key_variable else {}
        try:
            return self._server.ask(
                json.dumps(body).encode(), lambda content: _read(content, prompt), headers
            )
        except HttpFailure as failure:
            raise ScribeError(str(failure)) from failure


def _read(content: bytes, prompt: str) -> Completion:
    try:
        answer = json.loads(content)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise HttpFailure(f"the answer is no chat completion: {content[:80]!r}") from error
    if not isinstance(text, str):
        raise HttpFailure(f"the answer has no text: {content[:80]!r}")
    used = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    # A server that does not count: words and signs.
    read = used.get("prompt_tokens")
    written = used.get("completion_tokens")
    return Completion(
        text,
        read if isinstance(read, int) else count_words(prompt),
        written if isinstance(written, int) else count_words(text),
    )


def count_words(text: str) -> int:
    """Words and signs of a text: a stand-in for tokens where no tokenizer counts."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def some_text(answer: str) -> str:
    """An answer that may be any text but an empty one.

    Raises:
        Nonsense: if it is empty.
    """
    if not answer.strip():
        raise Nonsense("the answer is empty")
    return answer.strip()


def json_in(text: str) -> Any:
    """The first JSON object or list in an answer, whatever stands around it.

    Raises:
        Nonsense: if there is none.
    """
    decoder = json.JSONDecoder()
    for begin in re.finditer(r"[\[{]", text):
        try:
            return decoder.raw_decode(text, begin.start())[0]
        except (ValueError, RecursionError):
            continue
    raise Nonsense(f"there is no JSON in {text!r:.80}")


def object_in(text: str) -> dict[str, Any]:
    """The first JSON object in an answer.

    Raises:
        Nonsense: if there is none.
    """
    found = json_in(text)
    if not isinstance(found, dict):
        raise Nonsense(f"expected a JSON object, got {found!r:.80}")
    return found


def text_of(fields: object, name: str) -> str:
    """A field of a JSON object that must be a text with something in it.

    Raises:
        Nonsense: if it is not.
    """
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise Nonsense(f"{name} is no text: {value!r:.80}")
    return value.strip()


def texts_of(fields: object, name: str) -> list[str]:
    """A field of a JSON object that must be a list of texts.

    Raises:
        Nonsense: if it is not.
    """
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Nonsense(f"{name} is no list of texts: {value!r:.80}")
    return [text.strip() for text in value if text.strip()]
