"""The thread that decodes: jobs wait in line, join the running batch, and are told what was written for them.

The model is used by this thread alone. A job carries the agent that its prompt was encoded for; where the next in line has
another one than the batch, the batch runs empty first, so that no answer mixes two checkpoints.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, final

from memgen.api.agent import Agent
from memgen.generation.continuous import ContinuousBatch, Newcomer
from memgen.generation.sampling import GenerationSettings
from memgen.generation.state import Stop
from memgen.serving.scoring import PromptScores, prompt_scores
from memgen.types import AgentTurn

logger = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """Too many requests wait."""


@dataclass(frozen=True)
class Progress:
    """New tokens of a job.

    Attributes:
        first: index of the first of them in the answer.
        tokens: token ids.
        logprobs: log-probability of each.
        insertions: indices in the answer of those before which latents were woven in.
        tops: for each token the most probable ones of its place; empty if they were not asked for.
    """

    first: int
    tokens: list[int]
    logprobs: list[float]
    insertions: list[int]
    tops: list[Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Ended:
    """The end of a job.

    Attributes:
        turn: what was written; None: nothing was asked for.
        scores: of the prompt, if they were asked for.
        tops: for each token the most probable ones of its place; empty if they were not asked for.
    """

    turn: AgentTurn | None
    scores: PromptScores | None = None
    tops: Sequence[Sequence[tuple[int, float]]] = ()


@dataclass(frozen=True)
class Failed:
    """A job that could not be answered.

    Attributes:
        reason: one line.
        refused: whether it was the request's fault.
    """

    reason: str
    refused: bool


@dataclass(eq=False)
class Job:
    """An answer to be written.

    Attributes:
        agent: whose; its prompt was encoded for it.
        prompt: token ids.
        settings: how; None: only the prompt's scores are wanted.
        row_seed: of what is sampled.
        tell: is called in the engine's thread with `Progress`, and at last with `Ended` or `Failed`. It must not wait.
        stop: ends the answer besides the end tokens.
        scored: whether the prompt's scores are wanted.
        alternatives: how many most probable tokens of each place are wanted.
        streamed: whether to tell of progress.
        cancelled: whether no one waits for it any more.
        told: tokens that were told of.
        scores: the prompt's.
    """

    agent: Agent
    prompt: Sequence[int]
    settings: GenerationSettings | None
    row_seed: int
    tell: Callable[[Progress | Ended | Failed], None]
    stop: Stop | None = None
    scored: bool = False
    alternatives: int = 0
    streamed: bool = False
    cancelled: bool = False
    told: int = 0
    scores: PromptScores | None = None


@dataclass
class Counts:
    """What the engine has done since it began.

    Attributes:
        answers: that were written to their end.
        prompt_tokens: tokens of their prompts.
        tokens: that were written.
        insertions: of latents.
        reasoner_positions: read by the reasoner.
        weaver_positions: read by the weaver.
        cancelled: jobs that no one waited for any more.
        failed: jobs that could not be answered.
        steps: of the batch.
    """

    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    insertions: int = 0
    reasoner_positions: float = 0.0
    weaver_positions: float = 0.0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0


@dataclass
class _Errand:
    """Something else that the thread does between two steps."""

    run: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)


@final
class Engine:
    """Decodes in a thread of its own until it is closed.

    Args:
        rows: answers that are written at the same time.
        waiting: requests that may wait besides.
    """

    def __init__(self, rows: int, waiting: int) -> None:
        self.rows, self._limit = rows, waiting
        self.counts = Counts()
        self._line: deque[list[Job]] = deque()
        self._errands: deque[_Errand] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._agent: Agent | None = None
        self._batch: ContinuousBatch | None = None
        self._jobs: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="memgen-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._line)

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive() and not self._closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts the jobs of a request in line.

        Raises:
            BusyError: if too many requests wait already.
            RuntimeError: if the engine was closed.
        """
        with self._wake:
            if self._closing:
                raise RuntimeError("the server is stopping")
            # Those for whom there is a free row do not really wait.
            if len(self._line) >= self._limit + max(0, self.rows - len(self._jobs)):
                raise BusyError(f"{len(self._line)} requests are waiting; try again later")
            self._line.append(list(jobs))
            self._wake.notify()

    def between_steps(self, run: Callable[[], Any]) -> Future[Any]:
        """Runs something in the engine's thread, while no pass is running, and gives its result."""
        errand = _Errand(run)
        with self._wake:
            if self._closing:
                raise RuntimeError("the server is stopping")
            self._errands.append(errand)
            self._wake.notify()
        return errand.done

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs that no one waits for any more."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread. Jobs that are not done fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # The thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._line or self._jobs or self._errands or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._do_errands()
                self._admit()
                self._advance()
            except Exception:
                logger.exception("the engine could not go on with its batch; its answers fail")
                self._drop("the server failed while it wrote this answer; see its log")
        left = [*self._jobs.values(), *(job for jobs in self._line for job in jobs)]
        self._jobs, self._line = {}, deque()
        for job in left:
            self._tell(job, Failed("the server is stopping", refused=False))
        for errand in self._errands:
            errand.done.cancel()

    def _do_errands(self) -> None:
        while self._errands:
            errand = self._errands.popleft()
            if not errand.done.set_running_or_notify_cancel():
                continue
            try:
                errand.done.set_result(errand.run())
            except Exception as error:  # noqa: BLE001 - it is the caller's
                errand.done.set_exception(error)

    def _drop(self, reason: str) -> None:
        jobs, self._jobs, self._batch, self._agent = list(self._jobs.values()), {}, None, None
        for job in jobs:
            self.counts.failed += 1
            self._tell(job, Failed(reason, refused=False))

    def _tell(self, job: Job, event: Progress | Ended | Failed) -> None:
        try:
            job.tell(event)
        except RuntimeError:  # The loop that listened is gone.
            job.cancelled = True

    def _admit(self) -> None:
        """Lets jobs join, in their order, as long as there are free rows."""
        joining: list[Job] = []
        while (job := self._next(len(joining))) is not None:
            if job.cancelled:
                self.counts.cancelled += 1
                continue
            try:
                if job.scored:
                    job.scores = prompt_scores(job.agent.model, job.prompt, max(1, job.alternatives))
            except Exception as error:  # noqa: BLE001 - it fails this job alone
                self._fail(job, error)
                continue
            if job.settings is None:
                self._tell(job, Ended(None, job.scores))
            else:
                joining.append(job)
        if not joining:
            return
        assert self._batch is not None, "jobs join a batch"
        try:
            self._join(joining)
        except Exception as error:  # noqa: BLE001 - it fails those that it is about
            pending = [job for job in joining if job not in self._jobs.values()]
            if len(pending) == 1:
                self._fail(pending[0], error)
                return
            for job in pending:
                try:
                    self._join([job])
                except Exception as own:  # noqa: BLE001 - likewise
                    self._fail(job, own)

    def _next(self, joining: int) -> Job | None:
        """The next job that can join."""
        with self._wake:
            while self._line and not self._line[0]:
                self._line.popleft()
            if not self._line:
                return None
            job = self._line[0][0]
            if job.agent is not self._agent or self._batch is None:
                if self._jobs or joining:
                    return None
                self._agent, self._batch = job.agent, ContinuousBatch(job.agent.model, self.rows)
            if self._batch.free - joining < 1:
                return None
            self._line[0].pop(0)
            if not self._line[0]:
                self._line.popleft()
            return job

    def _join(self, jobs: Sequence[Job]) -> None:
        assert self._batch is not None, "jobs join a batch"
        newcomers = [
            Newcomer(job.prompt, job.settings, job.row_seed, job.stop, job.alternatives)
            for job in jobs
            if job.settings is not None
        ]
        self._jobs |= dict(zip(self._batch.join(newcomers), jobs, strict=True))

    def _advance(self) -> None:
        """Tells of what was written, lets go of what is over, and writes the next tokens."""
        batch = self._batch
        if batch is None or not self._jobs:
            return
        for place, job in self._jobs.items():
            if job.cancelled:
                batch.cancel(place)
            elif job.streamed:
                self._report(job, batch, place)
        for place, turn in batch.leave():
            job = self._jobs.pop(place)
            if job.cancelled:
                self.counts.cancelled += 1
            else:
                self._count(turn)
                self._tell(job, Ended(turn, job.scores, batch.written(place).tops))
        if self._jobs:
            batch.step()
            self.counts.steps += 1

    def _report(self, job: Job, batch: ContinuousBatch, place: int) -> None:
        written, first = batch.written(place), job.told
        job.told = len(written.tokens)
        if job.told > first:
            inside = [index for index in written.insertions if first <= index < job.told]
            self._tell(
                job,
                Progress(
                    first,
                    list(written.tokens[first:]),
                    list(written.logprobs[first : job.told]),
                    inside,
                    list(written.tops[first : job.told]),
                ),
            )

    def _count(self, turn: AgentTurn) -> None:
        self.counts.answers += 1
        self.counts.prompt_tokens += len(turn.context)
        self.counts.tokens += len(turn.tokens)
        self.counts.insertions += len(turn.insertions)
        self.counts.reasoner_positions += turn.work.reasoner
        self.counts.weaver_positions += turn.work.weaver

    def _fail(self, job: Job, error: Exception) -> None:
        self.counts.failed += 1
        refused = isinstance(error, ValueError)
        if not refused:
            logger.error("a request failed", exc_info=error)
        self._tell(job, Failed(str(error).strip().partition("\n")[0], refused=refused))
