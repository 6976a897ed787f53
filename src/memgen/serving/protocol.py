"""What requests ask, in OpenAI's form. Fields that would change an answer and are not served are refused, others ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

T = TypeVar("T", bound=BaseModel)

NOT_SERVED = (
    "tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty", "best_of", "suffix", "top_logprobs",
)  # fmt: skip
"""Fields that are refused unless they say nothing."""
MOST_ANSWERS = 512
"""Answers that one request may ask for, over its prompts."""


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one line.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "invalid_request",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def body(self) -> dict[str, Any]:
        """The response, in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    @field_validator("max_tokens", "temperature", "top_p", "top_k", "n", "stop", "stream", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        if value is None:
            return cls.model_fields[info.field_name].get_default(call_default_factory=True)
        if info.field_name == "stop" and isinstance(value, str):
            return [value]
        if (
            info.field_name in ("temperature", "top_p")
            and isinstance(value, int)
            and not isinstance(value, bool)
        ):
            return float(value)
        return value

    @field_validator("stop")
    @classmethod
    def _stop_texts(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise ValueError("a stop text is empty; leave it out")
        return value

    @model_validator(mode="after")
    def _is_served(self) -> _Request:
        given = self.model_extra or {}
        refused = [name for name in NOT_SERVED if given.get(name)]
        kind = given.get("response_format")
        if isinstance(kind, dict) and kind.get("type", "text") != "text":
            refused.append("response_format")
        if refused:
            raise ValueError(f"{refused[0]} is not served; leave it out")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether the last chunk of a stream is to have the counts of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatMessage(BaseModel):
    """A message; its content is a text, or parts that are texts."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if isinstance(value, list) and all(
            isinstance(part, dict) and part.get("type") == "text" for part in value
        ):
            return "".join(str(part.get("text", "")) for part in value)
        return value

    @field_validator("role", mode="before")
    @classmethod
    def _developer(cls, value: Any) -> Any:
        return "system" if value == "developer" else value


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def alternatives(self) -> int:
        """How many of each place's most probable tokens are asked for."""
        return self.top_logprobs or 0


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("echo", mode="before")
    @classmethod
    def _null_is_false(cls, value: Any) -> Any:
        return False if value is None else value

    @property
    def alternatives(self) -> int:
        """How many of each place's most probable tokens are asked for."""
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as a text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class LoadRequest(BaseModel):
    """`POST /v1/load`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    checkpoint: str
    name: str | None = None


def parsed(kind: type[T], body: bytes) -> T:
    """A request's body as a record.

    Raises:
        RequestError: if it is no JSON, or says what cannot be; the message names the field.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is no JSON: {error}", "invalid_json") from error
    if not isinstance(content, dict):
        raise RequestError(400, "the request is no JSON object", "invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(400, f"{place}: {message}" if place else message) from error
