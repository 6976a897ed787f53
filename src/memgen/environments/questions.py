"""Question/answer benchmarks: their items, how they are split, and the prompt. A new one needs about 40 lines.

An item without a split of its own goes to one by the hash of its text, so a split depends neither on the order of the
files nor on what was read before, and a repeated question is never on both sides.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from abc import ABC
from collections.abc import Callable, Collection, Sequence
from typing import final

from typing_extensions import override

from memgen.environments.base import Environment, Example, Message, Split
from memgen.environments.sources import Record, Source

log = logging.getLogger(__name__)


@final
class Questions:
    """The items of a question/answer benchmark, read on first use.

    Three cases decide where an item goes:

    - A split with data of its own is taken as it is.
    - Without validation data, `validation_fraction` of the training items are set aside for validation.
    - With `test_fraction`, the same holds for the test split: the benchmark is published as one set.
    """

    def __init__(
        self,
        source: Source,
        example: Callable[[Record, str], Example | str],
        validation_fraction: float = 0.0,
        test_fraction: float | None = None,
        split_seed: int = 0,
        split_key: Callable[[Example], str] | None = None,
        prompt: str = "{question}",
    ) -> None:
        """Reads nothing yet.

        Args:
            source: where the records are.
            example: makes an item of a record and an id; or says why this record is left out (the records that were
                left out are counted in a warning).
            validation_fraction: share of the items set aside for validation where it has no data of its own.
            test_fraction: likewise for testing; None: the test split always has data of its own.
            split_seed: which items those are.
            split_key: the text whose hash decides that; None: `seeded_key` of the question.
            prompt: the user message; `{question}` stands for the question.

        Raises:
            ValueError: if a fraction or the prompt is not usable.
        """
        for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if test_fraction is not None and validation_fraction + test_fraction > 1.0:
            raise ValueError(
                "validation_fraction and test_fraction must be at most 1 together, got "
                f"{validation_fraction} and {test_fraction}"
            )
        if "{question}" not in prompt:
            raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
        self.source = source
        self.prompt = prompt
        self._example = example
        self._validation_fraction = validation_fraction
        self._test_fraction = test_fraction
        purpose = "val" if test_fraction is None else "split"
        self._split_key = split_key or (lambda item: seeded_key(item.question, split_seed, purpose))
        self._items: dict[Split, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the files.

        Raises:
            FileNotFoundError: if the data is neither local nor on the hub.
            ValueError: if a record is broken; the message names file, line and column.
        """
        if split == "test" and self._test_fraction is None:
            return list(self.items("test"))
        if split != "train" and self.source.has(split):
            return list(self.items(split))
        test = 0.0 if self._test_fraction is None or self.source.has("test") else self._test_fraction
        val = 0.0 if self.source.has("val") else self._validation_fraction

        def side(item: Example) -> Split:
            place = hash_fraction(self._split_key(item))
            return "test" if place < test else "val" if place < test + val else "train"

        return [item for item in self.items("train") if side(item) == split]

    def items(self, split: Split) -> Sequence[Example]:
        """The items of a split's own data, before any are set aside.

        Raises:
            FileNotFoundError: if the split has no data of its own.
            ValueError: if a record is broken, or all are left out.
        """
        if split not in self._items:
            records = self.source.records(split)
            made = [self._example(record, f"{split}-{record.number}") for record in records]
            reasons = [item for item in made if isinstance(item, str)]
            if reasons:
                message = (
                    f"{self.source.task}: {len(reasons)} of {len(made)} {split} items are left out, the first because "
                    f"{reasons[0]}"
                )
                if len(reasons) == len(made):
                    raise ValueError(message)
                log.warning("%s", message)
            self._items[split] = [item for item in made if isinstance(item, Example)]
        return self._items[split]

    def messages(self, example: Example) -> list[Message]:
        """One user message: the prompt with the question."""
        return [{"role": "user", "content": self.prompt.replace("{question}", example.question)}]


class QuestionEnvironment(Environment, ABC):
    """An environment whose items and prompts are those of a `Questions` source. Its reward is the leaf's own."""

    def __init__(self, questions: Questions) -> None:
        """Reads nothing yet."""
        self.questions = questions

    @override
    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the files, see `Questions.examples`."""
        return self.questions.examples(split)

    @override
    def messages(self, example: Example) -> list[Message]:
        """One user message: the prompt with the question."""
        return self.questions.messages(example)


def without(
    examples: Sequence[Example], others: Sequence[Example], marks: Callable[[Example], Collection[str]]
) -> list[Example]:
    """The examples that share none of their marks (an id, the normalised question) with any of the others."""
    known = {mark for other in others for mark in marks(other)}
    return [example for example in examples if known.isdisjoint(marks(example))]


def normalised(question: str) -> str:
    """A question without differences of case, width and white space, to recognise it in another file."""
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split())


def seeded_key(text: str, seed: int, purpose: str) -> str:
    """The text that is hashed to split items: seed, purpose and the normalised text."""
    return f"{seed}\x1f{purpose}\x1f{normalised(text)}"


def hash_fraction(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
