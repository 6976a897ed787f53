"""Serving concurrent clients against serving the same requests one after another: `python -m benchmarks.serving`.

The server of `memgen serve` on a random model, in this process, over HTTP on loopback. Both sides answer the same
requests (token ids of /v1/completions, greedy, no answer ends early), once with a client for each row of the batch and once
with a single client. CPU time is the process's, clients and HTTP included. Every answer must be the same on both sides, up
to the rounding of larger batches, which the output counts.

`--soak 1000` instead asks for so many answers of mixed lengths, with faults in between (bad JSON, a prompt that does not
fit, an unknown model, clients that leave in the middle of a stream or of an answer), and says what is left of them: rows that are
still taken, memory, and whether the first request of all still has its first answer. The exit status is 1 if any is.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import psutil
import torch
import uvicorn
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memgen.api.agent import Agent
from memgen.bench.shapes import ModelSettings, memgen_components, plain_model, random_ids
from memgen.files import write_whole
from memgen.model.memgen import MemGenConfig
from memgen.model.trigger import ConstantTrigger
from memgen.serving.app import ServerSettings, build_app
from memgen.serving.engine import Engine, Job


@dataclass(frozen=True)
class Side:
    """What serving the requests took.

    Attributes:
        clients: that asked at the same time.
        tokens: that were written.
        cpu_s: CPU seconds of the process.
        wall_s: wall seconds.
        p50_s: median of a request's seconds.
        p95_s: 95th percentile.
    """

    clients: int
    tokens: int
    cpu_s: float
    wall_s: float
    p50_s: float
    p95_s: float

    @property
    def tokens_per_cpu_s(self) -> float:
        """Tokens per CPU second."""
        return self.tokens / self.cpu_s


def random_agent(settings: ModelSettings, *, weaves: bool) -> Agent:
    """An agent of a random model, with a word for every token id."""
    parts = memgen_components(plain_model(settings), settings)
    words = {f"w{token}": token for token in range(settings.shape.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    return Agent(parts.model(ConstantTrigger(float(weaves))), MemGenConfig(), tokenizer)


@contextmanager
def served(agent: Agent, rows: int) -> Iterator[int]:
    """A server of the agent. Gives its port."""
    app = build_app(agent, "random", Engine(rows, 1024), ServerSettings())
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield int(bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def ask(port: int, prompts: Sequence[Sequence[int]], new: int, clients: int) -> tuple[Side, list[list[int]]]:
    """Asks for an answer to each prompt, with so many clients at the same time."""

    def one(prompt: Sequence[int]) -> tuple[float, list[int]]:
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        content = {"model": "random", "prompt": list(prompt), "max_tokens": new, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(content))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return time.perf_counter() - begin, answer["choices"][0]["memgen"]["tokens"]

    cpu, wall = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, prompts))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    cuts = quantiles([seconds for seconds, _ in found], n=20, method="inclusive")
    answers = [tokens for _, tokens in found]
    return Side(clients, sum(map(len, answers)), cpu, wall, cuts[9], cuts[18]), answers


EXPECTED = {
    "whole": 200,
    "stream": 200,
    "bad JSON": 400,
    "huge prompt": 400,
    "unknown model": 404,
    "cancelled stream": 200,
    "gone": None,
}
"""Kinds of the soak's requests and the status that each gets; None: its client leaves before there is one."""
PARTS = 5
"""Memory is measured after each of so many equal parts of the soak."""


@dataclass(frozen=True)
class Left:
    """What is there when no request is.

    Attributes:
        rss_mib: memory of the process in MiB, clients included.
        tensors: that Python holds.
        jobs: of the engine that Python holds.
        running: rows that are taken.
        waiting: requests in line.
    """

    rss_mib: float
    tensors: int
    jobs: int
    running: int
    waiting: int


@dataclass(frozen=True)
class Soak:
    """What a soak found.

    Attributes:
        statuses: how many requests of each kind got which status, as "kind: status".
        wrong: likewise, of those that another status was expected for.
        left: before the soak, and after each of its parts.
        answers: that were written to their end.
        cancelled: that their clients did not wait for.
        failed: that the engine could not write.
        same: whether the first request still has its first answer.
        seconds: wall seconds.
    """

    statuses: dict[str, int]
    wrong: dict[str, int]
    left: list[Left]
    answers: int
    cancelled: int
    failed: int
    same: bool
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether all requests got their status, no row is taken, and the engine holds on to none of them."""
        held = any(part.running or part.waiting or part.jobs for part in self.left)
        return not self.wrong and not held and not self.failed and self.same


def _send(port: int, content: object) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    connection.request("POST", "/v1/completions", body)
    return connection


def _metric(port: int, name: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return int(next(line.split()[1] for line in lines if line.startswith(f"memgen_{name} ")))


def _one(port: int, kind: str, vocabulary: int, context: int, draw: random.Random) -> int | None:
    """Asks for one answer, and gives its status, if it was waited for."""
    length = context + 1 if kind == "huge prompt" else draw.randint(1, 96)
    content = {
        "model": "none" if kind == "unknown model" else "random",
        "prompt": [draw.randrange(vocabulary) for _ in range(length)],
        "max_tokens": 128 if kind in ("cancelled stream", "gone") else draw.randint(1, 32),
        "temperature": draw.choice((0, 1)),
        "stream": kind in ("stream", "cancelled stream"),
    }
    connection = _send(port, b'{"model": ' if kind == "bad JSON" else content)
    try:
        if kind == "gone":
            time.sleep(draw.random() / 20)
            return None
        response = connection.getresponse()
        # One that leaves has read the beginning.
        response.read(64 if kind == "cancelled stream" else None)
        return response.status
    finally:
        connection.close()


def _left(port: int) -> Left:
    """Waits until no request is left, for a minute, and counts."""
    end = time.monotonic() + 60
    while (busy := (_metric(port, "running"), _metric(port, "waiting"))) != (0, 0):
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    gc.collect()
    found = gc.get_objects()
    # By type: isinstance would ask proxies for what they stand for.
    return Left(
        psutil.Process().memory_info().rss / 2**20,
        sum(issubclass(type(thing), torch.Tensor) for thing in found),
        sum(type(thing) is Job for thing in found),
        *busy,
    )


def soak(port: int, vocabulary: int, context: int, requests: int, clients: int, seed: int = 0) -> Soak:
    """Asks for answers of mixed lengths, with faults in between.

    Args:
        port: of a server in this process.
        vocabulary: token ids that prompts may have.
        context: the model's; a prompt that is longer does not fit.
        requests: how many.
        clients: that ask at the same time.
        seed: of kinds, prompts and lengths.
    """
    draw = random.Random(seed)
    kinds = [list(EXPECTED)[number % len(EXPECTED)] for number in range(requests)]
    draw.shuffle(kinds)
    statuses: Counter[tuple[str, int | None]] = Counter()

    def first() -> object:
        asked = {"model": "random", "prompt": [1, 2, 3], "max_tokens": 96, "temperature": 0}
        connection = _send(port, asked)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer["choices"]

    begin, answer = time.perf_counter(), first()
    # The longest prompts of all: from here on, the caches have the length that they need.
    for number in range(clients):
        _one(port, "stream", vocabulary, context, random.Random(seed - 1 - number))
    left = [_left(port)]
    with ThreadPoolExecutor(clients) as pool:
        for part in range(PARTS):
            numbers = range(part * requests // PARTS, (part + 1) * requests // PARTS)
            found = pool.map(
                lambda number: _one(
                    port, kinds[number], vocabulary, context, random.Random(f"{seed} {number}")
                ),
                numbers,
            )
            statuses.update(zip((kinds[number] for number in numbers), found, strict=True))
            left.append(_left(port))
    wrong = {f"{kind}: {got}": count for (kind, got), count in statuses.items() if got != EXPECTED[kind]}
    return Soak(
        {f"{kind}: {got}": count for (kind, got), count in sorted(statuses.items(), key=str)},
        wrong,
        left,
        _metric(port, "answers_total"),
        _metric(port, "cancelled_total"),
        _metric(port, "failed_total"),
        first() == answer,
        time.perf_counter() - begin,
    )


def report(found: Soak) -> None:
    """Prints what a soak found."""
    print(", ".join(f"{what} x {count}" for what, count in found.statuses.items()))
    if found.wrong:
        print("WRONG:", ", ".join(f"{what} x {count}" for what, count in found.wrong.items()))
    for part, left in enumerate(found.left):
        print(
            f"{part} of {PARTS}: {left.rss_mib:6.1f} MiB, {left.tensors} tensors, {left.jobs} jobs, "
            f"{left.running} running, {left.waiting} waiting"
        )
    print(
        f"{found.answers} answers, {found.cancelled} cancelled, {found.failed} failed, {found.seconds:.0f} s; "
        f"the first request has {'its first' if found.same else 'ANOTHER'} answer"
    )


def main() -> None:
    """Measures and prints both sides, or the soak."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="a shape of memgen bench; default: %(default)s")
    parser.add_argument("--clients", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=2, help="of each client; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt; default: %(default)s")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer; default: %(default)s")
    parser.add_argument("--never", action="store_true", help="weave no latents")
    parser.add_argument("--soak", type=int, metavar="N", help="ask N mixed requests with faults instead")
    parser.add_argument("--seed", type=int, default=0, help="of the soak; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = ModelSettings(model=options.model)
    agent = random_agent(settings, weaves=not options.never)
    if options.soak is not None:
        with served(agent, options.clients) as port:
            context = agent.model.reasoner.backbone.context_length
            assert context is not None, "the shapes have one"
            found = soak(
                port, settings.shape.vocabulary, context, options.soak, options.clients, options.seed
            )
        report(found)
        if options.out is not None:
            write_whole(options.out, json.dumps(asdict(found), indent=2) + "\n")
        sys.exit(0 if found.clean else 1)
    prompts = random_ids(options.clients * options.requests, options.prompt, settings)
    with served(agent, options.clients) as port:
        ask(port, prompts[:2], 4, 1)
        single, expected = ask(port, prompts, options.new, 1)
        many, answers = ask(port, prompts, options.new, options.clients)
    same = sum(ours == theirs for ours, theirs in zip(answers, expected, strict=True))
    for side in (single, many):
        print(
            f"{side.clients:3d} clients: {side.tokens_per_cpu_s:8.1f} tokens/CPU-s, {side.wall_s:7.2f} s, "
            f"latency p50 {side.p50_s:.3f} s, p95 {side.p95_s:.3f} s"
        )
    ratio = many.tokens_per_cpu_s / single.tokens_per_cpu_s
    print(f"{ratio:.2f} x the tokens per CPU-second; {same} of {len(prompts)} answers are the same")
    if options.out is not None:
        record = {
            "single": asdict(single),
            "many": asdict(many),
            "ratio": ratio,
            "same": same,
            "answers": len(prompts),
        }
        write_whole(options.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
