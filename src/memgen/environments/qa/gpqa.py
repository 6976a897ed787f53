"""GPQA (arXiv 2311.12022): graduate-level questions with four options.

Trained on `gpqa_main`, tested on `gpqa_diamond`, as in the paper. Diamond is a part of main, and the released code
trains on it; here no item of Diamond is ever trained on or validated on, recognised by its record id and, since ids may
be missing or changed, by the text of its question. Options are shuffled by a seed and the item, so their order
depends neither on the file's order nor on what was read before. Prompt and target are the released code's. The source
has no validation split: a seeded tenth of the rest is set aside, as in the released configuration.
"""

from __future__ import annotations

import hashlib
import random
import re
from string import ascii_uppercase
from typing import final

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.qa.multiple_choice import PROMPT, asked, choice_reward, explained
from memgen.environments.records import HubSplit, Record, Source, checked_fraction, normalised, share

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_ID = "Record ID"


@final
class GPQA(Environment):
    """Question with lettered options in, explanation with the boxed letter out; reward 1 for the right letter."""

    name = "gpqa"

    def __init__(
        self,
        path: str = "Idavidrein/gpqa",
        train_set: str = "gpqa_main",
        test_set: str = "gpqa_diamond",
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
            path: folder with a file for each set, a single file (which is tested on, never trained on), or a dataset
                of the hub.
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
        if "{question}" not in prompt:
            raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
        self.path = path
        self.validation_fraction = checked_fraction("validation_fraction", validation_fraction)
        self.split_seed = split_seed
        self.option_seed = option_seed
        self.prompt = prompt
        # The hub calls all of its sets "train". Locally, a set's file is told by its name.
        self._train = _source(path, train_set, train_file, revision, "train")
        self._test = _source(path, test_set, test_file, revision, "test")
        self._diamond = _source(path, "gpqa_diamond", diamond_file, revision, "diamond")
        self._test_is_diamond = test_set == "gpqa_diamond" and test_file is None and diamond_file is None
        self._read: dict[str, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the file.

        Raises:
            FileNotFoundError: if the data is neither local nor to be had from the hub; for training, if the Diamond
                set is not there to be kept out.
            ValueError: if a record is broken; the message names file, line and column.
        """
        if split == "test":
            return self._items("test")
        kept_out = [*self._items("test"), *([] if self._test_is_diamond else self._items("diamond"))]
        ids = {example.meta["record_id"] for example in kept_out} - {None}
        questions = {normalised(example.meta["stem"]) for example in kept_out}
        return [
            example
            for example in self._items("train")
            if example.meta["record_id"] not in ids
            and normalised(example.meta["stem"]) not in questions
            and self._is_validation(example.meta["stem"]) == (split == "val")
        ]

    def messages(self, example: Example) -> list[Message]:
        """One user message: the instruction, the question and its options."""
        return [{"role": "user", "content": self.prompt.replace("{question}", example.question)}]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the boxed letter is the right one, else 0."""
        return choice_reward(example.answer, len(example.meta["options"]), answer)

    def _is_validation(self, question: str) -> bool:
        return share(question, self.split_seed, "val") < self.validation_fraction

    def _items(self, part: str) -> list[Example]:
        if part not in self._read:
            source = {"train": self._train, "test": self._test, "diamond": self._diamond}[part]
            self._read[part] = [self._example(part, record) for record in source.records("test")]
        return self._read[part]

    def _example(self, part: str, record: Record) -> Example:
        stem = record.text("Question")
        given = [record.text("Correct Answer"), *(record.text(column) for column in _WRONG)]
        order = list(range(len(given)))
        digest = hashlib.sha256(f"{self.option_seed}\x1f{normalised(stem)}".encode()).digest()
        random.Random(digest).shuffle(order)
        options = tuple(given[index] for index in order)
        correct = ascii_uppercase[order.index(0)]
        identifier = record.fields.get(_ID)
        return Example(
            id=f"{part}-{record.number}",
            question=asked(stem, options),
            target=explained(record.text("Explanation", empty=True), correct),
            answer=correct,
            meta={
                "stem": stem,
                "options": options,
                "record_id": identifier.strip() or None if isinstance(identifier, str) else None,
            },
        )


def _source(path: str, dataset: str, file: str | None, revision: str | None, setting: str) -> Source:
    """One set as a source of its own, whose single split is called "test" here."""
    return Source(
        task="GPQA",
        path=path,
        files={"test": file},
        hub={"test": [HubSplit("train", dataset)]},
        revision=revision,
        folders=("dataset", "data"),
        names={"test": re.escape(dataset)},
        lone_file=setting == "test",
        setting=f"{setting}_file",
    )
