"""ReasoningBank: lessons of success and of failure, kept by the task that taught them (google-research/reasoning-bank).

    WRITE  was it a success? (1 call with `judge: scribe`); the scribe draws at most 3 lessons, other ones from a success than
           from a failure (1 call); append
    READ   the nearest earlier task; its lessons, in the system message

A lesson has a title, a description and a content. Differs from the released code: (1) a task is searched for only when its
outcome is known, where theirs is stored before, and then found without lessons; (2) a failure is stored in every mode; (3) success
is what the environment says, unless `judge` is scribe. Without a scribe the lesson is the task, the last action and the outcome.
The scribe's temperature is its own setting; the paper's is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, steps, transcript
from memgen.memories.judge import judged
from memgen.memories.scribe import Nonsense, json_in, text_of

RELATION = "taught"


@dataclass(frozen=True)
class ReasoningBankSettings:
    """Constants of ReasoningBank."""

    k: int = 1
    """Earlier tasks whose lessons are read."""
    lessons: int = 3
    """Lessons of an episode, at most."""
    judge: Literal["environment", "scribe"] = "environment"
    """Who says whether an episode was a success."""

    def __post_init__(self) -> None:
        for name in ("k", "lessons"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.judge not in ("environment", "scribe"):
            raise ValueError(f"judge must be environment or scribe, got {self.judge!r}")


@dataclass(frozen=True)
class Lesson:
    """A strategy that may help with other tasks."""

    title: str
    """Its name."""
    description: str
    """It in a sentence."""
    content: str
    """What to do, and why."""

    @property
    def text(self) -> str:
        """As it is shown."""
        return f"{self.title}: {self.description}\n{self.content}"


@final
class ReasoningBank(TextMemory[ReasoningBankSettings]):
    """Lessons of both outcomes."""

    method = "reasoning_bank"
    place = "system"
    constants = ReasoningBankSettings

    @override
    def learn(self, experience: Experience) -> None:
        success = judged(self, experience) if self.settings.judge == "scribe" else experience.succeeded
        prompt = (_OF_SUCCESS if success else _OF_FAILURE).format(most=self.settings.lessons)
        lessons = self.ask("lessons", f"{prompt}\n{_FORM}\n\n{transcript(experience)}", 800, _lessons)
        task = self.store.add("task", experience.task, key=experience.task, data={"success": success})
        for lesson in (lessons or [_what_happened(experience, success=success)])[: self.settings.lessons]:
            self.store.link(task, self.store.add("lesson", lesson.text), RELATION)

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        tasks = self.search(query, state.k or self.settings.k, "task")
        return [self.passage(item) for hit in tasks for item in self.store.linked(hit.item.number, RELATION)]


_OF_SUCCESS = (
    "This task was solved. Which strategies made it succeed, and help with other tasks as well? Name at most {most}, without "
    "names and values of this task."
)
_OF_FAILURE = (
    "This task was not solved. What went wrong, and which strategies would prevent it in other tasks as well? Name at most {most}, "
    "without names and values of this task."
)
_FORM = 'Answer with a JSON list: [{"title": "...", "description": "in a sentence", "content": "what to do, and why"}]'


def _lessons(answer: str) -> list[Lesson]:
    found = json_in(answer)
    if not isinstance(found, list) or not found:
        raise Nonsense(f"expected a JSON list of lessons, got {found!r:.80}")
    return [
        Lesson(*(text_of(fields, name) for name in ("title", "description", "content"))) for fields in found
    ]


def _what_happened(experience: Experience, *, success: bool) -> Lesson:
    """The fallback's lesson."""
    taken = steps(experience)
    outcome = "solved" if success else "not solved"
    return Lesson(
        "An earlier task",
        experience.task.strip(),
        f"Last action: {taken[-1].action if taken else 'none'}. {outcome}.",
    )
