"""The protocol of text memories: write what a task taught, read before the next one.

    with ExpRAG(path) as memory:
        passages = memory.read(task, ReadState(task_id="17"))
        messages = with_memory(environment.messages(example), passages, memory.place)
        ...                                     # act, and get a reward
        memory.write(Experience(...))

A method says what it learns (`learn`) and what it finds (`find`); transactions, budgets and counts are here. Where its paper
asks a language model, it asks the scribe through `ask`; the answer None means the deterministic fallback, and what was
written with one has another name (`expel/df`).
"""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast, final

from memgen.environments.base import Message
from memgen.environments.search.retrieval import Passage
from memgen.memories.embedders import Embedder
from memgen.memories.experience import Experience
from memgen.memories.scribe import Nonsense, OnFailure, Scribe, ScribeError, Usage, count_words
from memgen.memories.store import Changes, Found, Identity, Item, MemoryStore

logger = logging.getLogger(__name__)

Place = Literal["system", "before_task", "examples"]
"""Where passages go in a prompt: into the system message, or before the task as lessons or as examples."""
Settings = TypeVar("Settings")
Answer = TypeVar("Answer")

_HEADINGS: dict[Place, str] = {
    "system": "What earlier tasks taught:",
    "before_task": "What earlier tasks taught:",
    "examples": "Earlier tasks:",
}
_THE_TASK = "The task now:"


@dataclass(frozen=True)
class ReadState:
    """What a memory is read for."""

    task_id: str = ""
    """Id of the task under way."""
    group: str = ""
    """Its group, as in `Experience`."""
    step: int = 0
    """Actions taken in it."""
    k: int | None = None
    """Items wanted at most; None: the method's own number."""
    budget: int | None = None
    """Tokens of all passages together, at most; None: no limit."""
    situation: str = ""
    """The task and what was last observed, for methods that refine what they have read."""

    def __post_init__(self) -> None:
        for name in ("k", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class WriteReport:
    """What a write did."""

    method: str
    """Name of what wrote, with `/df` if a deterministic fallback took part."""
    tick: int
    """The memory's clock behind it."""
    added: int
    """New items."""
    changed: int
    """Items that are different now."""
    removed: int
    """Items that are no more."""
    usage: Usage
    """What the scribe cost."""
    fallbacks: int
    """Questions that the deterministic fallback answered in the place of a scribe that failed."""

    @property
    def calls(self) -> int:
        """Questions that the scribe answered."""
        return self.usage.calls

    @property
    def tokens(self) -> int:
        """Tokens that the scribe read and wrote."""
        return self.usage.prompt_tokens + self.usage.completion_tokens


class TextMemory(ABC, Generic[Settings]):
    """A memory that keeps text, in one file.

    Attributes:
        settings: the method's constants.
        store: the file.
        scribe: the language model that writes; None: the deterministic fallback.
        seed: of random decisions.
        retrievals: searches so far.
        fallbacks: questions so far that the fallback answered in the place of a scribe that failed, those of reads included.
    """

    method: ClassVar[str]
    """Name in records and tables."""
    place: ClassVar[Place]
    """Where what is read goes."""
    constants: ClassVar[type[Any]]
    """Type of the settings, a frozen dataclass whose defaults are the paper's."""
    asks: ClassVar[bool] = True
    """Whether the method asks a scribe at all."""
    recalls: ClassVar[bool] = False
    """Whether reading changes items."""

    def __init__(
        self,
        path: Path | str,
        settings: Settings | None = None,
        *,
        embedder: Embedder | None = None,
        scribe: Scribe | None = None,
        on_scribe_failure: OnFailure = "fallback",
        seed: int = 0,
        count_tokens: Callable[[str], int] = count_words,
    ) -> None:
        """Opens the memory's file, or begins one.

        Args:
            path: of the file.
            settings: the method's constants; None: their defaults.
            embedder: makes vectors; None: BM25.
            scribe: the language model that writes; None: the deterministic fallback.
            on_scribe_failure: whether the fallback answers where the scribe is gone or answers nonsense, or the memory
                stops with `ScribeError`.
            seed: of random decisions.
            count_tokens: length of a text, for `ReadState.budget`; the reasoner's tokenizer in a study.

        Raises:
            ValueError: if the file is another memory's, or the method needs an embedder and has none.
            OSError: if the file cannot be used.
        """
        self.settings: Settings = self.constants() if settings is None else settings
        if self.needs_vectors() and embedder is None:
            raise ValueError(
                f"{self.method} compares cosines with constants, which BM25's scores do not allow; give an embedder "
                "(memgen.memories.embedders.MiniLM)"
            )
        if on_scribe_failure not in ("fallback", "stop"):
            raise ValueError(f"on_scribe_failure must be fallback or stop, got {on_scribe_failure!r}")
        self.scribe = scribe
        self.on_scribe_failure = on_scribe_failure
        self.seed = seed
        self.count_tokens = count_tokens
        self.retrievals = 0
        self.fallbacks = 0
        constants = dataclasses.asdict(cast(Any, self.settings))
        identity = Identity(self.method, constants, embedder.id if embedder else "bm25", seed)
        self.store = MemoryStore(Path(path), identity, embedder)

    @property
    def name(self) -> str:
        """The method's name, with `/df` where a method that asks has no scribe."""
        return f"{self.method}/df" if self.asks and self.scribe is None else self.method

    @final
    def write(self, experience: Experience) -> WriteReport:
        """Learns from a finished task, all of it or nothing.

        Raises:
            ScribeError: if the scribe failed and `on_scribe_failure` is stop; nothing is written then.
            OSError: if the file cannot be written; it is then as it was.
        """
        return self._written({"write": experience.id}, lambda: self.learn(experience))

    @final
    def finish(self) -> WriteReport:
        """Learns what waits for the end of the tasks: before a frozen evaluation, say. Most methods wait for nothing."""
        return self._written({"finish": True}, self.conclude)

    @final
    def read(self, query: str, state: ReadState | None = None) -> list[Passage]:
        """What fits a task, best first. What a recall does to the items is written, too.

        Args:
            query: the task.
            state: what it is read for.

        Raises:
            ScribeError: if the scribe failed and `on_scribe_failure` is stop.
        """
        passages = self.look(query, state)
        if passages and self.recalls:
            with self.store.transaction({"read": "" if state is None else state.task_id}):
                self.recall([item for p in passages if (item := self.store.item(int(p.id))) is not None])
        return passages

    @final
    def look(self, query: str, state: ReadState | None = None) -> list[Passage]:
        """As `read`, but nothing is written: the items do not notice that they were recalled."""
        state = state or ReadState()
        return self.fitting(self.find(query, state), state)

    def refine(self, passages: Sequence[Passage], state: ReadState) -> list[Passage]:
        """What of the passages is of use in the situation; all of them, but for ReMem."""
        return list(passages)

    # What a method says

    def needs_vectors(self) -> bool:
        """Whether it compares cosines with constants, which BM25's scores do not allow."""
        return False

    @abstractmethod
    def learn(self, experience: Experience) -> None:
        """What a write does to the items, inside its transaction and behind the clock's tick."""

    @abstractmethod
    def find(self, query: str, state: ReadState) -> list[Passage]:
        """What a read finds, best first; `passage` makes passages of items."""

    def conclude(self) -> None:
        """What is learnt at the end of the tasks."""

    def recall(self, items: Sequence[Item]) -> None:
        """What being read does to items."""

    # What methods share

    @final
    def ask(self, purpose: str, prompt: str, max_tokens: int, read: Callable[[str], Answer]) -> Answer | None:
        """Asks the scribe.

        Args:
            purpose: what for, in a word or two.
            prompt: the question.
            max_tokens: limit of the answer.
            read: what an answer says; raises `Nonsense` where it says nothing.

        Returns:
            What it says, or None: there is no scribe, or it failed, and the fallback is to be used.

        Raises:
            ScribeError: if the scribe failed and `on_scribe_failure` is stop.
        """
        if self.scribe is None:
            return None
        try:
            answer = self.scribe.ask(purpose, prompt, max_tokens)
            try:
                return read(answer)
            except Nonsense as error:
                raise ScribeError(
                    f"scribe {self.scribe.id} answered nonsense, asked for {purpose}: {error}"
                ) from error
        except ScribeError as error:
            if self.on_scribe_failure == "stop":
                raise ScribeError(f"{error} (on_scribe_failure: fallback goes on without it)") from error
            self.fallbacks += 1
            logger.warning("%s: %s; the deterministic fallback answers", self.method, error)
            return None

    @final
    def search(
        self, query: str, k: int, kind: str, group: str | None = None, leave_out: Collection[int] = ()
    ) -> list[Found]:
        """`MemoryStore.search`, counted."""
        self.retrievals += 1
        return self.store.search(query, k, kind, group, leave_out)

    @final
    def passage(self, item: Item, title: str = "") -> Passage:
        """An item as it is shown."""
        return Passage(id=str(item.number), title=title or item.kind, text=item.text)

    @final
    def fitting(self, passages: Iterable[Passage], state: ReadState) -> list[Passage]:
        """The passages that fit into the budget, whole, those in front first."""
        return list(passages) if state.budget is None else within(passages, state.budget, self.count_tokens)

    def _written(self, cause: dict[str, Any], learn: Callable[[], None]) -> WriteReport:
        before, failed = self.usage, self.fallbacks
        with self.store.transaction({"method": self.name, **cause}):
            if "write" in cause:
                self.store.advance()
            learn()
            changes: Changes = self.store.pending()
        fallbacks = self.fallbacks - failed
        return WriteReport(
            method=f"{self.method}/df" if fallbacks else self.name,
            tick=self.store.tick,
            added=changes.added,
            changed=changes.changed,
            removed=changes.removed,
            usage=self.usage - before,
            fallbacks=fallbacks,
        )

    @property
    def usage(self) -> Usage:
        """What the scribe has cost so far, everything that it was asked included."""
        return self.scribe.usage if self.scribe else Usage()

    def close(self) -> None:
        """Closes the file."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def within(passages: Iterable[Passage], budget: int, count_tokens: Callable[[str], int]) -> list[Passage]:
    """The passages that have together at most so many tokens, whole, those in front first."""
    kept, left = [], budget
    for passage in passages:
        length = count_tokens(passage.text)
        if length <= left:
            kept.append(passage)
            left -= length
    return kept


def with_memory(
    messages: Sequence[Message], passages: Sequence[Passage], place: Place, *, headings: bool = True
) -> list[Message]:
    """A prompt with what was read: in its system message, or before the task in its last message of a user.

    The passages are text within a message: whatever markers they spell, `memgen.chat` encodes them as ordinary text. Without
    passages the prompt is what it was.

    Args:
        messages: the prompt.
        passages: what was read, best first.
        place: where they go.
        headings: whether words of ours stand above the passages and above the task. A tokenizer of few words may not have
            them.
    """
    prompt = [Message(role=m["role"], content=m["content"]) for m in messages]
    if not passages:
        return prompt
    block = "\n\n".join([*([_HEADINGS[place]] if headings else []), *(passage.text for passage in passages)])
    if place == "system":
        if not prompt or prompt[0]["role"] != "system":
            return [Message(role="system", content=block), *prompt]
        prompt[0]["content"] += f"\n\n{block}"
        return prompt
    users = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        return [*prompt, Message(role="user", content=block)]
    last = prompt[users[-1]]
    between = f"\n\n{_THE_TASK}\n\n" if headings else "\n\n"
    last["content"] = f"{block}{between}{last['content']}"
    return prompt
