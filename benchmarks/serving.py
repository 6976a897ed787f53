"""Serving concurrent clients against serving the same requests one after another: `python -m benchmarks.serving`.

The server of `memgen serve` on a random model, in this process, over HTTP on loopback. Both sides answer the same
requests (token ids of /v1/completions, greedy, no answer ends early), once with a client for each row of the batch and once
with a single client. CPU time is the process's, clients and HTTP included. Every answer must be the same on both sides, up
to the rounding of larger batches, which the output counts.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

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
from memgen.serving.engine import Engine


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


def main() -> None:
    """Measures and prints both sides."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="a shape of memgen bench; default: %(default)s")
    parser.add_argument("--clients", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=2, help="of each client; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt; default: %(default)s")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer; default: %(default)s")
    parser.add_argument("--never", action="store_true", help="weave no latents")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = ModelSettings(model=options.model)
    agent = random_agent(settings, weaves=not options.never)
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
