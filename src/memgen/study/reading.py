"""What stands in a prompt before the agent answers: passages of a memory, worked examples, an oracle, or nothing."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from memgen.chat import text_ids
from memgen.environments.base import Environment, Example, Message
from memgen.environments.search.retrieval import Passage
from memgen.memories.base import ReadState, TextMemory, within
from memgen.memories.experience import Experience, record
from memgen.seeds import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Words:
    """Texts as a reasoner's tokenizer can have them, and their length."""

    tokenizer: PreTrainedTokenizerBase
    """The reasoner's."""
    known_only: bool
    """Whether words that it does not have are left out."""

    def plain(self, text: str) -> str:
        """The text, without unknown words if these are left out; a line without any word goes with them."""
        if not self.known_only:
            return text
        known = _known(self.tokenizer)
        lines = [
            [
                part
                for word in line.split()
                for part in ([word] if known(word) else re.findall(r"\w+", word))
                if known(part)
            ]
            for line in text.split("\n")
        ]
        return "\n".join(" ".join(line) for line in lines if line)

    def count(self, text: str) -> int:
        """Tokens of the text as it is shown."""
        shown = self.plain(text)
        return len(text_ids(self.tokenizer, shown)) if shown else 0

    def shown(self, passages: Sequence[Passage]) -> list[Passage]:
        """Passages as they are shown; those of which nothing is left are none."""
        plain = [dataclasses.replace(passage, text=self.plain(passage.text)) for passage in passages]
        return [passage for passage in plain if passage.text.strip()]


@cache
def _known(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bool]:
    @cache
    def known(word: str) -> bool:
        try:
            text_ids(tokenizer, word)
        except ValueError:
            return False
        return True

    return known


def task_text(example: Example) -> str:
    """The task as memories know it."""
    return example.question.strip() or example.id


def said_in(environment: Environment, example: Example) -> list[Message]:
    """An item's reference solution as messages, from the first of the assistant."""
    messages = environment.conversation(example)[len(environment.messages(example)) :]
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[first:]


def solved(environment: Environment, example: Example) -> Passage:
    """An item's own solution, in the form in which memories of earlier tasks keep one (`record`)."""
    text = task_text(example)
    experience = Experience(example.id, text, "", said_in(environment, example), 1.0, True)
    return Passage(example.id, "worked example", record(experience))


def worked_examples(
    environment: Environment, count: int, seed: int, budget: int, words: Words
) -> list[Passage]:
    """Some training items with their solutions, as many as fit.

    Raises:
        ValueError: if there are fewer training items.
    """
    examples = environment.examples("train")
    if len(examples) < count:
        raise ValueError(
            f"{count} worked examples are wanted, but {environment.name} has {len(examples)} training items"
        )
    chosen = random.Random(seed_of("worked examples", seed)).sample(range(len(examples)), count)
    return within([solved(environment, examples[index]) for index in chosen], budget, words.count)


def read(memory: TextMemory[Any], example: Example, group: str, k: int | None, budget: int) -> list[Passage]:
    """What a memory finds for an item. It is refined once, before the first action."""
    text = task_text(example)
    state = ReadState(task_id=example.id, group=group, k=k, budget=budget, situation=text)
    return memory.refine(memory.read(text, state), state)


def at_random(memory: TextMemory[Any], passages: Sequence[Passage], seed: int, words: Words) -> list[Passage]:
    """For each passage others of the same kind at random, cut to the length that it has.

    Where the memory has no other item of the kind, its own words in another order.
    """
    rng = random.Random(seed)
    found = []
    for passage in passages:
        item = memory.store.item(int(passage.id))
        others = [] if item is None else [o for o in memory.store.items(item.kind) if o.number != item.number]
        rng.shuffle(others)
        length = words.count(passage.text)
        pieces = [piece for other in others for piece in _pieces(words.plain(other.text))]
        if not pieces:
            pieces = _pieces(words.plain(passage.text))
            rng.shuffle(pieces)
        found.append(dataclasses.replace(passage, text=_cut(pieces, length, words)))
    return found


def _pieces(text: str) -> list[str]:
    """Words with the white space behind them."""
    return re.findall(r"\S+\s*", text + "\n")


def _cut(pieces: Sequence[str], length: int, words: Words) -> str:
    """As many pieces as have together at most so many tokens, at least one, from the front again and again."""

    def first(count: int) -> str:
        return "".join(pieces[index % len(pieces)] for index in range(count)).rstrip()

    # A piece has a token at least, so the text of more than `length` pieces is too long.
    low, high = 1, max(1, length)
    while low < high:
        middle = (low + high + 1) // 2
        if words.count(first(middle)) <= length:
            low = middle
        else:
            high = middle - 1
    return first(low)
