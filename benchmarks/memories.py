"""How long text memories take to read and to write, by the number of their items.

    python -m benchmarks.memories [--items 1000 10000] [--vectors] [--out FILE]

Items are made of random words with Zipf's frequencies, so that a query of 20 words meets nearly all of them, which is the
worst case of BM25. Prints JSON: milliseconds of a read of the 4 best items and of a write, as the clock and as the processor
count them (median and 95th percentile of 200 and 50), and the file's bytes. The target is a BM25 read of 10,000 items in at
most 20 ms of the processor, so that a busy machine decides nothing; the exit status is 1 if it is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from memgen.environments.base import Message
from memgen.files import write_whole
from memgen.memories.embedders import Embedder, MiniLM
from memgen.memories.exp_rag import ExpRAG
from memgen.memories.experience import Experience, record

READS = 200
WRITES = 50
Argument = TypeVar("Argument")
TARGET_MS = 20.0
"""Of a BM25 read of 10,000 items."""


class Words:
    """Texts of random words."""

    def __init__(self, seed: int, vocabulary: int = 20_000) -> None:
        self._random = random.Random(seed)
        self._words = [f"w{number}" for number in range(vocabulary)]
        self._sums = list(itertools.accumulate(1 / (number + 1) for number in range(vocabulary)))

    def text(self, count: int) -> str:
        """So many words."""
        return " ".join(self._random.choices(self._words, cum_weights=self._sums, k=count))

    def experience(self, number: int) -> Experience:
        """A task of 20 words, and an answer of 60."""
        task = self.text(20)
        messages: list[Message] = [
            {"role": "user", "content": task},
            {"role": "assistant", "content": self.text(60)},
        ]
        return Experience(str(number), task, "", messages, 1.0, None)


def measure(items: int, embedder: Embedder | None, folder: Path) -> dict[str, Any]:
    """Times one memory."""
    words = Words(0)
    path = folder / f"{items}.sqlite"
    with ExpRAG(path, embedder=embedder) as memory:
        with memory.store.transaction(
            {"benchmark": items}
        ):  # one transaction: filling it is not what is measured
            for number in range(items):
                experience = words.experience(number)
                memory.store.add("task", record(experience), key=experience.task)
        queries = [words.text(20) for _ in range(READS)]
        memory.read(queries[0])  # warms up
        reads = timed(memory.read, queries)
        writes = timed(memory.write, [words.experience(items) for _ in range(WRITES)])
    return {
        "items": items,
        "embedder": embedder.id if embedder else "bm25",
        "read_ms": reads,
        "write_ms": writes,
        "bytes": path.stat().st_size,
    }


def timed(call: Callable[[Argument], object], arguments: Sequence[Argument]) -> dict[str, float]:
    """Milliseconds of a call, as the clock (wall) and the processor (cpu) count them."""
    wall, cpu = [], []
    for argument in arguments:
        clock, processor = time.perf_counter(), time.process_time()
        call(argument)
        wall.append(1000 * (time.perf_counter() - clock))
        cpu.append(1000 * (time.process_time() - processor))
    return {
        f"{name}_p{q}": round(float(np.percentile(values, q)), 2)
        for name, values in (("wall", wall), ("cpu", cpu))
        for q in (50, 95)
    }


def main() -> int:
    """Measures, prints, and compares with the target.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--items", type=int, nargs="+", default=[1000, 10_000], metavar="N", help="sizes (1000 10000)"
    )
    parser.add_argument("--vectors", action="store_true", help="MiniLM in place of BM25 (extra minilm)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the results")
    options = parser.parse_args()
    embedder = MiniLM() if options.vectors else None
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(items, embedder, Path(folder)) for items in options.items]
    text = json.dumps(results, indent=1)
    print(text)
    if options.out is not None:
        write_whole(options.out, text + "\n")
    slow = (
        any(r["read_ms"]["cpu_p50"] > TARGET_MS for r in results if r["items"] <= 10_000) and embedder is None
    )
    if slow:
        print(f"a read takes more than {TARGET_MS:g} ms", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
