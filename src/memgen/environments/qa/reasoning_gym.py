"""Reasoning Gym (arXiv 2505.24760): questions from more than a hundred generators. Needs the extra `reasoning-gym`.

Differs from the library: (1) splits share no question: the library draws item i from `seed + i`, so the items of two seeds are
mostly the same ones, shifted; here a question's split is decided by its hash, whatever was drawn before, and another `seed`
begins 10,000,000 draws further on; (2) an item whose own reference answer does not score 1, and a repeated question, are
left out; (3) a library's score below 1 is no reward, since many scorers give partial credit for any answer; (4) everything
of the library runs in worker processes, in bubblewrap where it works, see `memgen.environments.qa.reasoning_gym_worker`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import platformdirs
from typing_extensions import override

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.code.execution import Isolation, run_environment
from memgen.environments.code.sandbox import INSTALL, UNUSABLE, Sandbox
from memgen.environments.processes import Launch, WorkerLostError, WorkerPool
from memgen.environments.qa import reasoning_gym_worker
from memgen.environments.qa.reasoning_gym_worker import BLOCK
from memgen.environments.questions import hash_fraction, normalised, seeded_key
from memgen.files import write_whole

log = logging.getLogger(__name__)

AnswerStyle = Literal["plain", "tags"]

PLAIN_PROMPT = "{question}\nReply with the final answer only."
"""User message of the style "plain"."""
TAGS_SYSTEM = (
    "Given a problem, your task is to answer the question by thinking step-by-step in a clear and specific manner.\n"
    "Once you have thought about the reasoning process, provide the answer in the following format:\n"
    "<answer>answer here</answer>\n"
    "Do not explain your reasoning inside the answer tags, provide only the final answer. When an example is provided, "
    "you should strictly follow the format of the output/answer in that example.\n"
)
"""System message of the style "tags": the library's own (`SYSTEM_PROMPTS["default"]`)."""

REFUSED = {
    "composite": "it is a mixture of tasks; name several in tasks",
    "game_of_life_halting": "its scorer gives full marks to any answer that is not empty",
    "puzzle24": "its scorer gives full marks to any four allowed numbers that make 24, whichever were asked for",
}
"""Tasks that are refused, and why."""
READ_AS_CODE = frozenset(
    {
        "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
        "simple_integration", "spiral_matrix", "string_insertion",
    }
)  # fmt: skip
"""Tasks whose scorers run text of an answer as code. The worker replaces what runs it; they want a sandbox all the same."""

_INSTALL = "Reasoning Gym is not installed; install it by: pip install 'memgen[reasoning-gym]'"
_SPLIT_SHARES: tuple[tuple[Split, float], ...] = (("test", 0.2), ("val", 0.1), ("train", 0.7))
"""Shares of all questions, about those of the default sizes."""
_SEEDS = 400
"""The library seeds generators of 32 bits."""
_SEED_DISTANCE = 10_000_000
_GIVE_UP = 2_000
"""Draws in a row without a new question of the split."""
_WORTH_KEEPING_S = 1.0
"""A block that takes longer is kept on disk."""
_DRAW_LIMIT_S = 900.0
"""For `BLOCK` items; those of the slowest task take 14 s, by default."""
_WALL_FACTOR = 4.0
"""Wall time of an answer's scoring, by its CPU time: a loaded machine makes no answer wrong."""
_SANDBOX_PROCESSES = 16
_FOLDER_MB = 16
_OVERHEAD_S = 30.0
"""Beyond the time of scoring, before a worker is taken for dead."""
_REPORT_S = 10.0


@dataclass(frozen=True)
class GymTask:
    """One of Reasoning Gym's tasks."""

    task: str
    """Its name, `chain_sum` for instance."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters by name; the others have the library's defaults."""
    share: int = 1
    """Its items in a row, whenever its turn comes."""

    def __post_init__(self) -> None:
        if self.share < 1:
            raise ValueError(f"share of {self.task} must be at least 1, got {self.share}")


@dataclass(frozen=True)
class _Drawn:
    question: str
    answer: str | None
    entry: str
    """The library's own record of the item, which only workers read."""


@final
class ReasoningGym(Environment):
    """Question in, final answer out; the reward is 1 if the library's own scorer gives full marks, else 0."""

    name = "reasoning_gym"

    def __init__(
        self,
        tasks: Sequence[GymTask | str] = ("chain_sum",),
        seed: int = 0,
        train_size: int = 2048,
        val_size: int = 240,
        test_size: int = 600,
        answer_style: AnswerStyle = "plain",
        prompt: str | None = None,
        system: str | None = None,
        min_score: float = 1.0,
        isolation: Isolation = "bubblewrap",
        timeout_s: float = 5.0,
        memory_mb: int = 1024,
        reward_workers: int = 2,
    ) -> None:
        """Starts a worker, which checks the tasks and their parameters; draws nothing yet.

        Args:
            tasks: tasks of the library, by name or with parameters. Several take turns in every split, each with as many
                items in a row as its share says; a task named n times gets n shares.
            seed: other seeds give other items, of the same splits: no seed's training items are another one's test items.
            train_size: examples to train on.
            val_size: examples to choose settings on.
            test_size: examples to report.
            answer_style: "plain", the completion is the answer; or "tags", the answer is what the last complete
                `<answer>...</answer>` holds, as in the library.
            prompt: the user message, `{question}` stands for the question; null: the style's own.
            system: the system message; empty: none; null: the style's own.
            min_score: the library's score from which on an answer is right. Many scorers give partial credit, even to
                answers that mean nothing.
            isolation: "bubblewrap", or "limits" where it cannot be installed: limits only, no sandbox. Tasks that do not
                read an answer as code do without bubblewrap where it is not to be had.
            timeout_s: CPU seconds that scoring an answer may take, and four times that in all; beyond, it scores 0.
            memory_mb: memory that it may take beyond the library's own.
            reward_workers: worker processes.

        Raises:
            ImportError: if the library is not installed.
            RuntimeError: if a task needs bubblewrap and it cannot be used, or a worker cannot be started.
            ValueError: if a task, a parameter or a setting is not usable.
        """
        given = [GymTask(task) if isinstance(task, str) else task for task in tasks]
        _require(given, answer_style, prompt, seed, min_score, timeout_s, memory_mb)
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{split}_size must be at least 1, got {size}")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError(_INSTALL)
        self.tasks = tuple(given)
        self.seed = seed
        self.answer_style: AnswerStyle = answer_style
        self.prompt = (
            (PLAIN_PROMPT if answer_style == "plain" else "{question}") if prompt is None else prompt
        )
        self.system = ("" if answer_style == "plain" else TAGS_SYSTEM) if system is None else system
        self.min_score = min_score
        self._limits = (timeout_s, _WALL_FACTOR * timeout_s, memory_mb)
        self._pool, self._version = _checked_pool(self.tasks, isolation, reward_workers)
        self._blocks: dict[tuple[int, int], list[_Drawn]] = {}
        self._left_out: Counter[str] = Counter()

    @override
    def examples(self, split: Split) -> list[Example]:
        """The items of a split. A longer split begins with the shorter one.

        Raises:
            ValueError: if a task has fewer different questions in the split than it is asked for.
        """
        size = self.sizes[split]
        turns = [place for place, task in enumerate(self.tasks) for _ in range(task.share)]
        wanted = Counter(turns[index % len(turns)] for index in range(size))
        supply = {place: self._questions(place, split, wanted[place]) for place in wanted}
        seen: set[str] = set()  # Two entries may be the same task.
        examples: list[Example] = []
        for index in range(size):
            place = turns[index % len(turns)]
            drawn = next((item for item in supply[place] if normalised(item.question) not in seen), None)
            if drawn is None:
                raise ValueError(self._too_few(place, split, examples, wanted[place]))
            seen.add(normalised(drawn.question))
            examples.append(self._example(f"{split}-{index}", place, drawn))
        for reason, count in self._left_out.items():
            log.warning("Reasoning Gym: %d items are left out: %s", count, reason)
        self._left_out.clear()
        return examples

    @override
    def messages(self, example: Example) -> list[Message]:
        """The system message, if there is one, and the question in its prompt."""
        user: Message = {"role": "user", "content": self.prompt.replace("{question}", example.question)}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    @override
    def conversation(self, example: Example) -> list[Message]:
        """The prompt followed by the reference answer.

        Raises:
            ValueError: if the task has no reference answers.
        """
        if not example.target:
            raise ValueError(
                f"{example.meta['task']} has no reference answers, which weaver SFT and memgen test --gold need; "
                "leave it out, or train it by weaver GRPO"
            )
        return super().conversation(example)

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the library's score is at least `min_score`, else 0.

        Parts: `exact` (the total), `score` (the library's), `has_answer`, `timed_out` and `scorer_failed` (the scorer
        raised an error, or died); in a mixture of tasks also `TASK/exact`.
        """
        return self.rewards([example], [answer])[0]

    @override
    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Scores in `reward_workers` processes at once."""
        finals = [self._final(answer) for answer in answers]
        pairs = list(zip(examples, finals, strict=True))
        results = iter(self._pool.map(self._score, [pair for pair in pairs if pair[1]]))
        return [self._reward(example, next(results) if final else None) for example, final in pairs]

    @override
    def final_answer(self, example: Example, answer: str) -> str | None:
        """What the library's scorer is given."""
        return self._final(answer) or None

    def close(self) -> None:
        """Ends the workers. They start again when they are needed."""
        self._pool.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the workers now running."""
        return self._pool.pids

    def _final(self, answer: str) -> str:
        """The answer that a completion gives; empty: none."""
        if self.answer_style == "plain":
            return answer.strip()
        head, closed, _ = answer.rpartition("</answer>")
        _, opened, inside = head.rpartition("<answer>")
        return inside.strip() if closed and opened else ""

    def _score(self, pair: tuple[Example, str]) -> dict[str, Any]:
        example, answer = pair
        task = self.tasks[example.meta["place"]]
        request = ["score", task.task, dict(task.parameters), example.meta["entry"], answer, *self._limits]
        try:
            return dict(self._ask(request, self._limits[1] + _OVERHEAD_S))
        except WorkerLostError as lost:
            return {"stopped": "time"} if lost.timed_out else {"error": "died"}

    def _ask(self, request: list[Any], timeout_s: float) -> Any:
        """A worker's answer; asks again if it died, for a scheduler's signal may have ended the sandbox.

        Raises:
            WorkerLostError: if it took too long, or died twice.
        """
        try:
            return self._pool.ask(request, timeout_s)
        except WorkerLostError as lost:
            if lost.timed_out:
                raise
        return self._pool.ask(request, timeout_s)

    def _reward(self, example: Example, result: Mapping[str, Any] | None) -> Reward:
        scored = result or {}
        score = float(scored.get("score", 0.0))
        exact = float(score >= self.min_score)
        parts = {
            "exact": exact,
            "score": score,
            "has_answer": float(result is not None),
            "timed_out": float("stopped" in scored),
            "scorer_failed": float("error" in scored),
        }
        if len({task.task for task in self.tasks}) > 1:
            parts[f"{example.meta['task']}/exact"] = exact
        return Reward(exact, parts)

    def _example(self, identifier: str, place: int, drawn: _Drawn) -> Example:
        answer = drawn.answer or ""
        return Example(
            id=identifier,
            question=drawn.question,
            target=f"<answer>{answer}</answer>" if answer and self.answer_style == "tags" else answer,
            answer=answer,
            meta={"task": self.tasks[place].task, "place": place, "entry": drawn.entry},
        )

    def _questions(self, place: int, split: Split, wanted: int) -> Iterator[_Drawn]:
        """The different questions of a task in a split, until hardly a new one comes."""
        seen: set[str] = set()
        since, reported = 0, time.monotonic()
        first = 0
        while since < _GIVE_UP:
            if time.monotonic() - reported > _REPORT_S:
                reported = time.monotonic()
                log.info("%s: %d of %d %s items are drawn", self.tasks[place].task, len(seen), wanted, split)
            for drawn in self._drawn(place, first, split, wanted - len(seen)):
                since += 1
                key = normalised(drawn.question)
                if key not in seen and _split_of(drawn.question) == split:
                    seen.add(key)
                    since = 0
                    yield drawn
            first += 1

    def _too_few(self, place: int, split: Split, examples: Sequence[Example], wanted: int) -> str:
        task = self.tasks[place]
        found = sum(example.meta["place"] == place for example in examples)
        draws = BLOCK * sum(key[0] == place for key in self._blocks)
        return (
            f"{task.task} has {found} different {split} questions in {draws:,} draws, and {split}_size "
            f"{self.sizes[split]} asks for {wanted}; set {split}_size lower, or parameters with more questions"
        )

    def _drawn(self, place: int, block: int, split: Split, missing: int) -> list[_Drawn]:
        """A block of a task. The blocks that will follow are drawn beside it, as many at once as there are workers."""
        if (place, block) not in self._blocks:
            share = dict(_SPLIT_SHARES)[split]
            ahead = math.ceil(max(missing, 1) / (BLOCK * share))
            blocks = range(block, block + min(ahead, self._pool.workers))
            new = [(place, number) for number in blocks if (place, number) not in self._blocks]
            self._blocks.update(zip(new, self._pool.map(self._draw, new), strict=True))
        return self._blocks[place, block]

    def _draw(self, key: tuple[int, int]) -> list[_Drawn]:
        place, block = key
        task = self.tasks[place]
        seed = self.seed * _SEED_DISTANCE + block * BLOCK
        request = ["draw", task.task, dict(task.parameters), seed]
        kept = self._kept(request)
        if kept.exists():
            items = json.loads(kept.read_text())
        else:
            start = time.monotonic()
            try:
                items = self._ask(request, _DRAW_LIMIT_S)
            except WorkerLostError as lost:
                raise ValueError(
                    f"{task.task}: {BLOCK} items could not be drawn with these parameters ({lost}): {dict(task.parameters)}"
                ) from lost
            if time.monotonic() - start > _WORTH_KEEPING_S:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_whole(kept, json.dumps(items))
        drawn = []
        for item in items:
            if isinstance(item, str):
                self._left_out[f"{task.task}'s generator failed ({item})"] += 1
            elif item[1] is not None and not item[2] >= 1.0:
                self._left_out[f"{task.task}'s own reference answer does not score 1"] += 1
            else:
                drawn.append(_Drawn(question=item[0], answer=item[1], entry=item[3]))
        return drawn

    def _kept(self, request: list[Any]) -> Path:
        """Where a block that took long is kept."""
        home = os.environ.get("MEMGEN_HOME")
        folder = (Path(home) if home else Path(platformdirs.user_cache_dir("memgen"))) / "reasoning_gym"
        about = [self._version, sys.version_info[:2], BLOCK, request]
        return folder / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _require(
    tasks: Sequence[GymTask],
    answer_style: str,
    prompt: str | None,
    seed: int,
    min_score: float,
    timeout_s: float,
    memory_mb: int,
) -> None:
    if not tasks:
        raise ValueError("tasks must name at least one task of Reasoning Gym, chain_sum for instance")
    for task in tasks:
        if task.task in REFUSED:
            raise ValueError(f"{task.task} is refused: {REFUSED[task.task]}")
    if answer_style not in ("plain", "tags"):
        raise ValueError(f"answer_style must be plain or tags, got {answer_style!r}")
    if prompt is not None and "{question}" not in prompt:
        raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
    if not 0 <= seed <= _SEEDS:
        raise ValueError(f"seed must be from 0 to {_SEEDS}, got {seed}")
    if not 0.0 < min_score <= 1.0:
        raise ValueError(f"min_score must be above 0 and at most 1, got {min_score}")
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}")


def _split_of(question: str) -> Split:
    """The split of a question, for every task, seed and size."""
    place = hash_fraction(seeded_key(question, 0, "reasoning_gym"))
    for split, share in _SPLIT_SHARES:
        place -= share
        if place < 0:
            return split
    return "train"


def _checked_pool(tasks: Sequence[GymTask], isolation: Isolation, workers: int) -> tuple[WorkerPool, str]:
    """Workers that accept the tasks, and the library's version."""
    if isolation not in ("bubblewrap", "limits"):
        raise ValueError(f"isolation must be bubblewrap or limits, got {isolation!r}")
    code = sorted({task.task for task in tasks} & READ_AS_CODE)
    if isolation == "bubblewrap" and shutil.which("bwrap") is None and code:
        raise RuntimeError(
            f"{', '.join(code)}: bubblewrap (bwrap) is not installed, and answers are not read as code without it; {INSTALL}"
        )
    launches: list[Callable[[int], AbstractContextManager[Launch]]] = []
    if isolation == "bubblewrap" and shutil.which("bwrap") is not None:
        launches.append(partial(_in_sandbox, _sandbox()))
    if isolation == "limits" or not code:
        launches.append(_limited)
    for launch in launches:
        trouble = "the workers of Reasoning Gym could not be started" + (
            f" in bubblewrap ({UNUSABLE})." if launch is not _limited else "."
        )
        pool = WorkerPool(launch, workers, trouble)
        try:
            return pool, _version(pool, tasks)
        except RuntimeError:
            if launch is launches[-1]:
                raise
    raise AssertionError("the last of the launches returns or raises")


def _version(pool: WorkerPool, tasks: Sequence[GymTask]) -> str:
    """The library's version, after a check of the tasks.

    Raises:
        ValueError: if the library refuses one.
        RuntimeError: if a worker cannot be started.
    """
    version = ""
    for task in tasks:
        try:
            answer = pool.ask(["check", task.task, dict(task.parameters)], _DRAW_LIMIT_S)
        except WorkerLostError as lost:
            raise ValueError(f"{task.task} with parameters {dict(task.parameters)}: {lost}") from lost
        if "refused" in answer:
            raise ValueError(answer["refused"])
        version = answer["version"]
    return version


def _sandbox() -> Sandbox:
    return Sandbox(
        Path(reasoning_gym_worker.__file__), _FOLDER_MB, _SANDBOX_PROCESSES, packages=["reasoning_gym"]
    )


@contextlib.contextmanager
def _in_sandbox(sandbox: Sandbox, number: int) -> Iterator[Launch]:
    with sandbox.launch(number) as launch:
        command = [*launch.command, str(launch.uid or 0), str(_SANDBOX_PROCESSES)]
        yield Launch(command, launch.environment, launch.folder, inherited=launch.inherited)


@contextlib.contextmanager
def _limited(number: int) -> Iterator[Launch]:
    folder = tempfile.mkdtemp(prefix="memgen-limits-")
    # The library may be importable only through this process's sys.path.
    packages = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        yield Launch(
            command=[sys.executable, "-s", "-P", "-B", reasoning_gym_worker.__file__, "0", "0"],
            environment=run_environment(home=folder, temporary=folder, path=os.defpath, packages=packages),
            folder=folder,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
