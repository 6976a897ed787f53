"""GPQA (arXiv 2311.12022): graduate-level questions with four options.

Trained on `gpqa_main`, tested on `gpqa_diamond`, as in the paper. Diamond is a part of main, and the released code
trains on it; here no item of Diamond is ever trained on or validated on, recognised by its record id and, since ids may
be missing or changed, by the text of its question. Options are shuffled by a seed and the item, so their order
depends neither on the file's order nor on what was read before. Prompt and target are the released code's. The source
has no validation split: a seeded tenth of the rest is set aside, as in the released configuration.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from string import ascii_uppercase
from typing import final

from typing_extensions import override

from memgen.environments.base import Example, Split
from memgen.environments.qa.multiple_choice import PROMPT, ChoiceEnvironment, choice_example
from memgen.environments.questions import Questions, normalised, seeded_key, without
from memgen.environments.sources import HubSplit, Record, Source

_DIAMOND = "gpqa_diamond"
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_ID = "Record ID"


@final
class GPQA(ChoiceEnvironment):
    """Question with lettered options in, explanation with the boxed letter out; reward 1 for the right letter."""

    name = "gpqa"

    def __init__(
        self,
        path: str = "Idavidrein/gpqa",
        train_set: str = "gpqa_main",
        test_set: str = _DIAMOND,
        train_file: str | None = None,
        test_file: str | None = None,
        diamond_file: str | None = None,
        revision: str | None = None,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        option_seed: int = 0,
        prompt: str = PROMPT,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: folder with a file for each set, a single file (which is tested on, never trained on), or a
                dataset of the hub.
            train_set: the set to train on: the hub's configuration, and what the local file's name begins with.
            test_set: the set to test on, likewise.
            train_file: the set to train on in the folder `path`, if it has another name.
            test_file: likewise.
            diamond_file: the Diamond set, which is kept out of training, where `test_set` or `test_file` is another.
            revision: of the hub's dataset.
            validation_fraction: share of the training items set aside for validation.
            split_seed: which ones.
            option_seed: the order of the options.
            prompt: the user message; `{question}` stands for the question with its options.

        Raises:
            ValueError: if a setting is not usable.
        """
        self.option_seed = option_seed
        source = Source(
            task="GPQA",
            path=path,
            files={"train": train_file, "test": test_file},
            # The hub calls all of its sets "train". Locally, a set's file is found by its name.
            hub={"train": [HubSplit("train", train_set)], "test": [HubSplit("train", test_set)]},
            revision=revision,
            splits=("train", "test"),
            folders=("dataset", "data"),
            names={"train": re.escape(train_set), "test": re.escape(test_set)},
            lone_file="test",
        )
        super().__init__(
            Questions(
                source,
                self._example,
                validation_fraction,
                split_key=lambda item: seeded_key(item.meta["stem"], split_seed, "val"),
                prompt=prompt,
            )
        )
        diamond = dataclasses.replace(
            source,
            files={"test": diamond_file},
            hub={"test": [HubSplit("train", _DIAMOND)]},
            names={"test": _DIAMOND},
            lone_file="refused",
            setting="diamond_file",
        )
        tests_diamond = test_set == _DIAMOND and test_file is None and diamond_file is None
        self._diamond = None if tests_diamond else Questions(diamond, self._example)

    @override
    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the file.

        Raises:
            FileNotFoundError: if the data is neither local nor on the hub; for training, if the Diamond set is not
                there to be kept out.
            ValueError: if a record is broken; the message names file, line and column.
        """
        if split == "test":
            return self.questions.examples("test")
        kept_out = [*self.questions.items("test"), *(self._diamond.items("test") if self._diamond else [])]
        return without(self.questions.examples(split), kept_out, _marks)

    def _example(self, record: Record, identifier: str) -> Example:
        stem = record.text("Question")
        given = [record.text("Correct Answer"), *(record.text(column) for column in _WRONG)]
        order = list(range(len(given)))
        digest = hashlib.sha256(f"{self.option_seed}\x1f{normalised(stem)}".encode()).digest()
        random.Random(digest).shuffle(order)
        record_id = record.fields.get(_ID)
        return choice_example(
            identifier,
            stem,
            options=[given[index] for index in order],
            correct=ascii_uppercase[order.index(0)],
            explanation=record.text("Explanation", empty=True),
            record_id=record_id.strip() or None if isinstance(record_id, str) else None,
        )


def _marks(example: Example) -> list[str]:
    """By which an item is recognised in another set: its question and, if it has one, its record id."""
    record_id = example.meta["record_id"]
    question = f"question {normalised(example.meta['stem'])}"
    return [question] if record_id is None else [question, f"id {record_id}"]
