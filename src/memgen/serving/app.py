"""The HTTP server: OpenAI's chat and text completions over an `Engine`.

Differs from OpenAI's: (1) each choice has a field `memgen` with the places where latents were woven in and the work; (2)
`logprobs` are those at the answer's temperature, and of a prompt (`echo`) those that the reasoner gives without latents; (3) what would change an answer and is not served is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, final

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memgen.api.agent import Agent, Answer
from memgen.api.text import AnswerText
from memgen.generation.continuous import positions_needed
from memgen.generation.sampling import GenerationSettings
from memgen.seeds import episode_seeds
from memgen.serving.engine import BusyError, Ended, Engine, Failed, Job, Progress
from memgen.serving.metrics import Metrics
from memgen.serving.protocol import (
    MOST_ANSWERS,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    RequestError,
    parsed,
)

DEFAULT_NEW_TOKENS = 256
"""Limit of an answer's length where a request does not say; less if the context leaves less."""
LONGEST_BODY = 8 << 20
"""Bytes of a request."""
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/load", "/metrics", "/healthz")


@dataclass(frozen=True)
class ServerSettings:
    """How the server behaves."""

    timeout_s: float = 300.0
    """Seconds after which a request is given up."""
    api_key: str | None = None
    """What `Authorization: Bearer ...` must say below /v1; None: nothing is asked for."""
    load: Callable[[str], Agent] | None = None
    """Loads another checkpoint for `POST /v1/load`; None: there is no such path."""


@dataclass(frozen=True)
class _Asked:
    """A chat or text completion, once its prompts are token ids.

    Attributes:
        agent: who answers.
        chat: which of the two.
        prompts: token ids of each.
        texts: what each prompt says, for `echo`.
        request: what was asked.
        name: of the model.
    """

    agent: Agent
    chat: bool
    prompts: list[list[int]]
    texts: list[str]
    request: ChatRequest | CompletionRequest
    name: str

    @property
    def echo(self) -> bool:
        return isinstance(self.request, CompletionRequest) and self.request.echo

    @property
    def logprobs(self) -> bool:
        return self.request.logprobs is not None and self.request.logprobs is not False

    @property
    def kind(self) -> str:
        return "chat.completion" if self.chat else "text_completion"


def build_app(agent: Agent, name: str, engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application.

    Args:
        agent: who answers.
        name: of the model in requests and responses.
        engine: decodes; closed when the application stops.
        settings: of the server.
    """
    server = _Server(agent, name, engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="memgen", openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(RequestError, _refusal)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(_Guard, server=server)
    app.get("/healthz")(server.health)
    app.get("/metrics")(server.metrics_text)
    app.get("/v1/models")(server.models)
    app.post("/v1/chat/completions")(server.chat)
    app.post("/v1/completions")(server.complete)
    if settings.load is not None:
        app.post("/v1/load")(server.load)
    return app


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError), "it is registered for these"
    return JSONResponse(error.body(), error.status, dict(error.headers or {}))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "it is registered for these"
    return await _refusal(
        request, RequestError(error.status_code, f"{request.url.path}: {error.detail}", "not_found")
    )


@final
class _Guard:
    """Asks for the key, and counts requests."""

    def __init__(self, app: ASGIApp, server: _Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, path, status = time.perf_counter(), scope["path"], 499  # A client that left got none.

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path.startswith("/v1") and not self.server.has_key(Headers(scope=scope)):
                error = RequestError(
                    401, "give the server's key as Authorization: Bearer KEY", "invalid_api_key"
                )
                await JSONResponse(error.body(), error.status)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            known = path if path in PATHS else "other"
            self.server.metrics.observe(known, status, time.perf_counter() - begin)


@final
class _Server:
    def __init__(self, agent: Agent, name: str, engine: Engine, settings: ServerSettings) -> None:
        self.agent, self.name, self.engine, self.settings = agent, name, engine, settings
        self.metrics = Metrics()
        self.began = int(time.time())
        self._encoding = asyncio.Lock()

    def has_key(self, headers: Headers) -> bool:
        """Whether a request gives the server's key, if it asks for one."""
        key = self.settings.api_key
        given = headers.get("Authorization", "").removeprefix("Bearer ")
        return key is None or hmac.compare_digest(given.encode(), key.encode())

    async def health(self) -> JSONResponse:
        """Whether the server works."""
        well = self.engine.alive
        return JSONResponse(
            {"status": "ok" if well else "stopping", "model": self.name}, 200 if well else 503
        )

    async def metrics_text(self) -> PlainTextResponse:
        """Prometheus' metrics."""
        return PlainTextResponse(self.metrics.text(self.engine), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The one model."""
        model = {"id": self.name, "object": "model", "created": self.began, "owned_by": "memgen"}
        return {"object": "list", "data": [model]}

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = parsed(ChatRequest, await _body(request))
        agent = self._agent_of(asked.model)
        messages = [{"role": message.role, "content": message.content} for message in asked.messages]
        prompt = await self._encoded(lambda: agent.prompt(messages))  # type: ignore[arg-type]
        return await self._answer(request, _Asked(agent, True, [prompt], [""], asked, self.name))

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked = parsed(CompletionRequest, await _body(request))
        agent = self._agent_of(asked.model)
        if not asked.prompts or len(asked.prompts) * asked.n > MOST_ANSWERS:
            raise RequestError(
                400, f"prompt: between 1 and {MOST_ANSWERS} answers can be asked for at a time"
            )
        if asked.stream and asked.echo and asked.logprobs is not None:
            raise RequestError(400, "logprobs: those of a prompt (echo) are not streamed; ask without stream")
        vocabulary = agent.model.reasoner.backbone.embedding.shape[0]

        def encode() -> list[list[int]]:
            return [agent.prompt(p, raw=True) if isinstance(p, str) else list(p) for p in asked.prompts]

        prompts = await self._encoded(encode)
        if any(not prompt or not all(0 <= token < vocabulary for token in prompt) for prompt in prompts):
            raise RequestError(
                400, f"prompt: a prompt has at least one token, and ids are below {vocabulary}"
            )
        texts = [p if isinstance(p, str) else str(agent.tokenizer.decode(p)) for p in asked.prompts]
        return await self._answer(request, _Asked(agent, False, prompts, texts, asked, self.name))

    async def load(self, request: Request) -> dict[str, Any]:
        """`POST /v1/load`: another checkpoint from here on. Requests that were accepted before are answered by the old one."""
        asked = parsed(LoadRequest, await _body(request))
        load = self.settings.load
        assert load is not None, "there is no such path otherwise"
        try:
            agent = await asyncio.wrap_future(self.engine.between_steps(lambda: load(asked.checkpoint)))
        except (ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise RequestError(
                400, f"{asked.checkpoint} could not be loaded: {reason}", "not_loaded"
            ) from error
        self.agent, self.name = agent, asked.name or asked.checkpoint
        return {"model": self.name}

    # From a request to jobs

    def _agent_of(self, model: str) -> Agent:
        if model != self.name:
            raise RequestError(
                404, f"there is no model {model!r:.200}; this server has {self.name!r}", "model_not_found"
            )
        return self.agent

    async def _encoded(self, encode: Callable[[], Any]) -> Any:
        """What a tokenizer gives, outside of the loop: a long text takes a while."""
        async with self._encoding:
            try:
                return await asyncio.to_thread(encode)
            except ValueError as error:
                raise RequestError(400, str(error)) from error

    def _settings(self, asked: _Asked, prompt: Sequence[int]) -> GenerationSettings | None:
        """How one answer is written; None: nothing is to be written."""
        request, model = asked.request, asked.agent.model
        new = request.max_tokens
        if isinstance(request, ChatRequest):
            new = request.max_completion_tokens or new
        if new == 0:
            if asked.echo:
                return None
            raise RequestError(400, "max_tokens: must be at least 1")
        context = model.reasoner.backbone.context_length
        if context is not None:
            room = context - positions_needed(model, len(prompt), 0)
            if new is None:
                inside = (
                    positions_needed(model, 0, DEFAULT_NEW_TOKENS)
                    - positions_needed(model, 0, 0)
                    - DEFAULT_NEW_TOKENS
                )
                new = max(1, min(DEFAULT_NEW_TOKENS, room - inside))
            if positions_needed(model, len(prompt), new) > context:
                raise RequestError(
                    400,
                    f"a prompt of {len(prompt)} tokens and an answer of {new} need "
                    f"{positions_needed(model, len(prompt), new)} positions with their latents, but the context is {context}",
                    "context_length_exceeded",
                )
        return GenerationSettings(
            max_new_tokens=new or DEFAULT_NEW_TOKENS,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
        )

    def _jobs(self, asked: _Asked, tell: Callable[[int, Progress | Ended | Failed], None]) -> list[Job]:
        request = asked.request
        seed = secrets.randbits(31) if request.seed is None else request.seed
        seeds = episode_seeds(seed, range(len(asked.prompts)), request.n)
        own = [self._settings(asked, prompt) for prompt in asked.prompts]
        jobs = []
        for index, row_seed in enumerate(seeds):
            prompt = index // request.n
            jobs.append(
                Job(
                    agent=asked.agent,
                    prompt=asked.prompts[prompt],
                    settings=own[prompt],
                    row_seed=row_seed % 2**63,
                    tell=partial(tell, index),
                    stop=_stop(asked.agent, request.stop),
                    scored=asked.echo and asked.logprobs,
                    alternatives=request.alternatives,
                    streamed=request.stream,
                )
            )
        return jobs

    # From jobs to a response

    async def _answer(self, request: Request, asked: _Asked) -> Response:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Progress | Ended | Failed]]()

        def tell(index: int, event: Progress | Ended | Failed) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        jobs = self._jobs(asked, tell)
        try:
            self.engine.submit(jobs)
        except BusyError as error:
            raise RequestError(429, str(error), "busy", {"Retry-After": "1"}) from error
        except RuntimeError as error:
            raise RequestError(503, str(error), "stopping") from error
        incoming = self._incoming(jobs, events)
        response = _Writer(asked)
        if asked.request.stream:
            return StreamingResponse(_lines(response, incoming), media_type="text/event-stream")
        gone = asyncio.create_task(_gone(request))
        collecting = asyncio.create_task(_collected(response, incoming))
        try:
            await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # No one reads it.
            return JSONResponse(collecting.result())
        finally:
            gone.cancel()
            collecting.cancel()
            self.engine.cancel(jobs)

    async def _incoming(
        self, jobs: list[Job], events: asyncio.Queue[tuple[int, Progress | Ended | Failed]]
    ) -> AsyncIterator[tuple[int, Progress | Ended]]:
        """What the jobs are told, until all have ended. Leaving it ends them."""
        left, loop = len(jobs), asyncio.get_running_loop()
        deadline = loop.time() + self.settings.timeout_s
        try:
            while left:
                index, event = await asyncio.wait_for(events.get(), deadline - loop.time())
                if isinstance(event, Failed):
                    raise RequestError(400 if event.refused else 500, event.reason)
                left -= isinstance(event, Ended)
                yield index, event
        except TimeoutError as error:
            raise RequestError(
                504, f"there was no answer within {self.settings.timeout_s:g} s", "timeout"
            ) from error
        finally:
            self.engine.cancel(jobs)


@dataclass(frozen=True)
class _Shown:
    """Tokens whose log-probabilities a response shows, with the most probable ones of their places (none: not asked for)."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    tops: Sequence[Sequence[tuple[int, float]]] = ()

    @property
    def each_tops(self) -> Sequence[Sequence[tuple[int, float]]]:
        return self.tops or [()] * len(self.tokens)


@final
class _Writer:
    """Turns what was written into OpenAI's JSON."""

    def __init__(self, asked: _Asked) -> None:
        self.asked = asked
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        answers = len(asked.prompts) * asked.request.n
        self._texts = [AnswerText(asked.agent.tokenizer, asked.request.stop) for _ in range(answers)]
        self._told = [0] * answers
        self.written = 0

    def usage(self) -> dict[str, int]:
        """Counts of tokens."""
        read = sum(map(len, self.asked.prompts))
        return {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": read + self.written}

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """What is around choices."""
        kind = f"{self.asked.kind}.chunk" if chunk and self.asked.chat else self.asked.kind
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.name,
            "choices": choices,
        }

    def choice(self, index: int, event: Ended) -> dict[str, Any]:
        """A whole answer."""
        asked, prompt = self.asked, index // self.asked.request.n
        answer = None if event.turn is None else asked.agent.answer(event.turn, asked.request.stop)
        self.written += 0 if answer is None else len(answer.tokens)
        text = "" if answer is None else answer.text
        shown = _Shown((), ()) if answer is None else _Shown(answer.tokens, answer.logprobs, event.tops)
        found: dict[str, Any] = {
            "index": index,
            "finish_reason": _reason(answer),
            "memgen": _extension(answer),
        }
        if asked.chat:
            return found | {
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._chat_logprobs(shown),
            }
        before = asked.texts[prompt] if asked.echo else ""
        return found | {
            "text": before + text,
            "logprobs": self._text_logprobs(index, event, shown),
        }

    def pieces(self, index: int, event: Progress | Ended) -> list[dict[str, Any]]:
        """Chunks of a stream: new text of an answer, and its end."""
        asked, text = self.asked, self._texts[index]
        chunks = []
        if self._told[index] == 0:
            self._told[index] = 1
            if asked.chat:
                chunks.append(self._piece(index, {"delta": {"role": "assistant", "content": ""}}))
            elif asked.echo:
                chunks.append(self._piece(index, {"text": asked.texts[index // asked.request.n]}))
        new = event if isinstance(event, Progress) else None
        for number, token in enumerate(new.tokens if new else ()):
            assert new is not None, "there are tokens"
            place = new.first + number
            woven = None
            if place in new.insertions:
                woven = {
                    "token": place,
                    "character": len(text.given),
                    "latents": asked.agent.latents_before(place),
                }
            content = text.add(token)
            shown = _Shown([token], [new.logprobs[number]], new.tops[number : number + 1])
            chunks += self._token_chunk(index, content, shown, woven)
        if isinstance(event, Ended):
            answer = None if event.turn is None else asked.agent.answer(event.turn, asked.request.stop)
            self.written += 0 if answer is None else len(answer.tokens)
            rest = text.end()
            end = {"finish_reason": _reason(answer), "memgen": _extension(answer)}
            chunks.append(
                self._piece(
                    index,
                    {
                        **({"delta": {"content": rest} if rest else {}} if asked.chat else {"text": rest}),
                        **end,
                    },
                )
            )
        return chunks

    def _token_chunk(
        self, index: int, content: str, shown: _Shown, woven: dict[str, int] | None
    ) -> list[dict[str, Any]]:
        if not content and woven is None and not self.asked.logprobs:
            return []
        piece: dict[str, Any] = {"delta": {"content": content}} if self.asked.chat else {"text": content}
        if self.asked.logprobs and self.asked.chat:
            piece["logprobs"] = self._chat_logprobs(shown)
        elif self.asked.logprobs:
            piece["logprobs"] = {
                "tokens": [self._spelled(shown.tokens[0])],
                "token_logprobs": [*shown.logprobs],
                "top_logprobs": self._tops(shown),
                "text_offset": [0],
            }
        if woven is not None:
            piece["memgen"] = {"insertions": [woven]}
        return [self._piece(index, piece)]

    def _piece(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        empty: dict[str, Any] = {"delta": {}} if self.asked.chat else {"text": ""}
        return self.frame(
            [{"index": index, "finish_reason": None, "logprobs": None} | empty | content], chunk=True
        )

    def _spelled(self, token: int) -> str:
        return str(self.asked.agent.tokenizer.decode([token]))

    def _chat_logprobs(self, shown: _Shown) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._spelled(token), "logprob": logprob, "bytes": None}

        content = [
            entry(token, logprob) | {"top_logprobs": [entry(*top) for top in tops]}
            for token, logprob, tops in zip(shown.tokens, shown.logprobs, shown.each_tops, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _tops(self, shown: _Shown) -> list[dict[str, float]]:
        """Of each token: it and the most probable ones of its place. Of two that are spelled alike, the more probable."""
        return [
            {
                self._spelled(top): value
                for top, value in sorted([(token, logprob), *tops], key=lambda pair: pair[1])
            }
            for token, logprob, tops in zip(shown.tokens, shown.logprobs, shown.each_tops, strict=True)
        ]

    def _text_logprobs(self, index: int, event: Ended, shown: _Shown) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        all_tokens, values = list(shown.tokens), list(shown.logprobs)
        tops: list[dict[str, float] | None] = [*self._tops(shown)]
        if self.asked.echo:
            scores, prompt = event.scores, self.asked.prompts[index // self.asked.request.n]
            assert scores is not None, "they were asked for"
            all_tokens = [*prompt, *all_tokens]
            values = [None, *scores.logprobs, *values]  # type: ignore[list-item]
            tops = [None, *self._tops(_Shown(prompt[1:], scores.logprobs, scores.tops)), *tops]
        spelled, offsets, place = [], [], 0
        for token in all_tokens:
            spelled.append(self._spelled(token))
            offsets.append(place)
            place += len(spelled[-1])
        return {"tokens": spelled, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _stop(agent: Agent, texts: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Ends an answer of a running batch at a stop text."""
    if not texts:
        return None
    text = AnswerText(agent.tokenizer, texts)

    def stop(tokens: Sequence[int]) -> bool:
        text.add(tokens[-1])
        return text.stopped

    return stop


def _reason(answer: Answer | None) -> str:
    return "stop" if answer is not None and answer.finished else "length"


def _extension(answer: Answer | None) -> dict[str, Any]:
    if answer is None:
        return {"insertions": []}
    return {
        "insertions": [asdict(insertion) for insertion in answer.insertions],
        "work": asdict(answer.work),
        "tokens": list(answer.tokens),
    }


async def _collected(
    writer: _Writer, incoming: AsyncIterator[tuple[int, Progress | Ended]]
) -> dict[str, Any]:
    ended = {index: event async for index, event in incoming if isinstance(event, Ended)}
    choices = [writer.choice(index, ended[index]) for index in sorted(ended)]
    return writer.frame(choices, chunk=False) | {"usage": writer.usage()}


async def _lines(
    writer: _Writer, incoming: AsyncIterator[tuple[int, Progress | Ended]]
) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
        async for index, event in incoming:
            for piece in writer.pieces(index, event):
                yield f"data: {json.dumps(piece)}\n\n"
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    finally:
        await incoming.aclose()  # type: ignore[attr-defined]
    if writer.asked.request.with_usage:
        yield f"data: {json.dumps(writer.frame([], chunk=True) | {'usage': writer.usage()})}\n\n"
    yield "data: [DONE]\n\n"


async def _body(request: Request) -> bytes:
    """A request's body.

    Raises:
        RequestError: if it is longer than `LONGEST_BODY`.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise RequestError(413, f"the request is longer than {LONGEST_BODY} bytes", "too_long")
    return bytes(body)


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
