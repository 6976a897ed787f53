"""A-MEM: notes that link to each other and change their neighbours (arXiv 2502.12110).

    WRITE  the scribe describes the episode: keywords, tags, context (1 call); the 5 nearest notes; the scribe says which of
           them it is linked to, and rewrites their context and tags (1 call)
    READ   the scribe makes keywords of the query (1 call); the 10 nearest notes, then what they are linked to

A note is searched by all its text: content, context, keywords and tags. Differs from the released code (WujiangXu/A-mem,
agiresearch/A-mem): (1) a rewritten note has a new vector at once, where theirs are stale until every 100th evolution; (2)
links go by the note's number, survive the file's being closed, and are read; (3) at most as many linked notes are read as
were found. Without a scribe keywords are the words of the highest tf-idf, a note is linked to its 5 nearest, and none is rewritten.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from typing_extensions import override

from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory
from memgen.memories.experience import Experience, transcript
from memgen.memories.scribe import Nonsense, object_in, text_of, texts_of
from memgen.memories.store import Item

RELATION = "related"


@dataclass(frozen=True)
class AMemSettings:
    """Constants of A-MEM."""

    k: int = 10
    """Notes that are found, and linked notes that are read besides."""
    neighbours: int = 5
    """Notes that a new one is compared with."""
    keywords: int = 5
    """Keywords of a note without a scribe."""

    def __post_init__(self) -> None:
        for name in ("k", "neighbours", "keywords"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Note:
    """What is known of an episode besides its text."""

    keywords: tuple[str, ...]
    """Words that tell it from others."""
    tags: tuple[str, ...]
    """Its classes."""
    context: str
    """What it is about, in a sentence."""

    def fields(self) -> dict[str, Any]:
        """For the file."""
        return {"keywords": list(self.keywords), "tags": list(self.tags), "context": self.context}


@dataclass(frozen=True)
class Evolution:
    """What a new note does to its neighbours."""

    links: tuple[int, ...]
    """Neighbours that it is linked to, by their place among them, from 1."""
    rewritten: Mapping[int, tuple[str, tuple[str, ...]]]
    """New context and tags of neighbours, by their place."""


@final
class AMem(TextMemory[AMemSettings]):
    """A network of notes."""

    method = "a_mem"
    place = "before_task"
    constants = AMemSettings

    @override
    def learn(self, experience: Experience) -> None:
        content = transcript(experience)
        note = self.ask("a note", f"{_DESCRIBE}\n\n{content}", 300, _note)
        described = note is not None
        if note is None:
            note = Note(tuple(self._telling_words(content)), (), "")
        near = [hit.item for hit in self.search(content, self.settings.neighbours, "note")]
        number = self.store.add(
            "note", _shown(content, note), key=_searched(content, note), data=_data(content, note)
        )
        if not near:
            return
        evolution = self.ask("links", _relate(content, note, near), 600, _evolution) if described else None
        if evolution is None:
            evolution = Evolution(tuple(range(1, len(near) + 1)), {})
        for place in evolution.links:
            if 1 <= place <= len(near):
                self.store.link(number, near[place - 1].number, RELATION)
        for place, (context, tags) in evolution.rewritten.items():
            if 1 <= place <= len(near):
                self._rewrite(near[place - 1], context, tags)

    @override
    def find(self, query: str, state: ReadState) -> list[Passage]:
        k = state.k or self.settings.k
        keywords = self.ask("keywords", f"{_KEYWORDS}\n\n{query}", 100, _query_words)
        found = [hit.item for hit in self.search(keywords or query, k, "note")]
        linked = [other for item in found for other in self.store.linked(item.number, RELATION)]
        numbers = {item.number for item in found}
        further = {item.number: item for item in linked if item.number not in numbers}
        return [self.passage(item) for item in (*found, *list(further.values())[:k])]

    def _rewrite(self, item: Item, context: str, tags: tuple[str, ...]) -> None:
        content = item.data["content"]
        note = Note(
            tuple(item.data["keywords"]), tags or tuple(item.data["tags"]), context or item.data["context"]
        )
        self.store.update(
            item, text=_shown(content, note), key=_searched(content, note), data=_data(content, note)
        )

    def _telling_words(self, content: str) -> list[str]:
        """The words of the highest tf-idf among the notes; among equals, the first."""
        words = Counter(re.findall(r"[^\W\d_]{3,}", content.lower()))
        notes = [set(re.findall(r"\w+", item.data["content"].lower())) for item in self.store.items("note")]
        weight = {
            word: count * math.log((len(notes) + 1) / (1 + sum(word in note for note in notes)) + 1)
            for word, count in words.items()
        }
        return sorted(weight, key=lambda word: -weight[word])[: self.settings.keywords]


_DESCRIBE = (
    "Describe this episode, so that it is found again when it is of use. Answer with one JSON object: "
    '{"keywords": [what tells it from others], "tags": [its classes], "context": "what it is about and what it taught, in a '
    'sentence"}\n\nEpisode:'
)
_RELATE = (
    "Here are a new note and earlier ones. Which earlier notes belong with it? Which of them are to be described differently, "
    "now that it is known? Answer with one JSON object: "
    '{"links": [numbers], "rewritten": [{"number": n, "context": "...", "tags": [...]}]}'
)
_KEYWORDS = (
    "Which keywords would a useful note on this task have? Answer with one JSON object: "
    '{"keywords": [...]}\n\nTask:'
)


def _relate(content: str, note: Note, near: Sequence[Item]) -> str:
    listed = "\n\n".join(f"{number}. {item.text}" for number, item in enumerate(near, start=1))
    return f"{_RELATE}\n\nNew note:\n{_shown(content, note)}\n\nEarlier notes:\n{listed}"


def _note(answer: str) -> Note:
    fields = object_in(answer)
    return Note(
        tuple(texts_of(fields, "keywords")), tuple(texts_of(fields, "tags")), text_of(fields, "context")
    )


def _query_words(answer: str) -> str:
    words = texts_of(object_in(answer), "keywords")
    if not words:
        raise Nonsense("there are no keywords")
    return ", ".join(words)


def _evolution(answer: str) -> Evolution:
    fields = object_in(answer)
    links, rewritten = fields.get("links"), fields.get("rewritten", [])
    if not isinstance(links, list) or not all(type(place) is int for place in links):
        raise Nonsense(f"links is no list of numbers: {links!r:.80}")
    if not isinstance(rewritten, list):
        raise Nonsense(f"rewritten is no list: {rewritten!r:.80}")
    changes = {}
    for entry in rewritten:
        place = entry.get("number") if isinstance(entry, dict) else None
        if type(place) is not int:
            raise Nonsense(f"a rewritten note has no number: {entry!r:.80}")
        changes[place] = text_of(entry, "context"), tuple(texts_of(entry, "tags"))
    return Evolution(tuple(links), changes)


def _data(content: str, note: Note) -> dict[str, Any]:
    return {"content": content, **note.fields()}


def _searched(content: str, note: Note) -> str:
    return "\n".join([content, note.context, " ".join(note.keywords), " ".join(note.tags)])


def _shown(content: str, note: Note) -> str:
    notes = [f"Context: {note.context}"] if note.context else []
    notes += [f"Keywords: {', '.join(note.keywords)}"] if note.keywords else []
    notes += [f"Tags: {', '.join(note.tags)}"] if note.tags else []
    return "\n".join([content, *notes])
