"""AQuA-RAT (arXiv 1705.04146): algebraic word problems with five options and a rationale.

The paper uses it in continual learning and publishes neither prompt nor sizes; it is asked as the released code asks
GPQA. Official splits: train, dev (here: val), test; a source without a dev file has a seeded share of its training
problems set aside. A single file that is not named after training serves for evaluation, as val and as test.
"""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import final

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.qa.multiple_choice import PROMPT, asked, choice_reward, explained
from memgen.environments.records import HubSplit, Part, Record, Source, checked_fraction, share

_OPTION = re.compile(r"\(?([A-Z])\s*[).:]\s*(.*)", re.DOTALL)


@final
class AQuA(Environment):
    """Question with lettered options in, rationale with the boxed letter out; reward 1 for the right letter, else 0."""

    name = "aqua"

    def __init__(
        self,
        path: str = "deepmind/aqua_rat",
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        revision: str | None = None,
        validation_fraction: float = 0.05,
        split_seed: int = 0,
        prompt: str = PROMPT,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: folder, file, or dataset of the hub.
            train_file: records in the folder `path`, if not to be found by name.
            val_file: likewise (found by the names dev, val, valid, validation).
            test_file: likewise.
            revision: of the hub's dataset.
            validation_fraction: share of the training problems set aside where there is no file for validation.
            split_seed: which ones.
            prompt: the user message; `{question}` stands for the question with its options.

        Raises:
            ValueError: if a setting is not usable.
        """
        if "{question}" not in prompt:
            raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
        self.path = path
        self.validation_fraction = checked_fraction("validation_fraction", validation_fraction)
        self.split_seed = split_seed
        self.prompt = prompt
        self._source = Source(
            task="AQuA",
            path=path,
            files={"train": train_file, "val": val_file, "test": test_file},
            hub={
                "train": [HubSplit("train", "raw")],
                "val": [HubSplit("validation", "raw")],
                "test": [HubSplit("test", "raw")],
            },
            revision=revision,
            folders=("raw",),
        )
        self._read: dict[Part, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the file.

        Raises:
            FileNotFoundError: if the data is neither local nor to be had from the hub.
            ValueError: if a record is broken; the message names file, line and column.
        """
        if split == "test" or self._source.has("val"):
            return self._items(split)
        return [e for e in self._items("train") if self._is_validation(e.meta["stem"]) == (split == "val")]

    def messages(self, example: Example) -> list[Message]:
        """One user message: the instruction, the question and its options."""
        return [{"role": "user", "content": self.prompt.replace("{question}", example.question)}]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the boxed letter is the right one, else 0."""
        return choice_reward(example.answer, len(example.meta["options"]), answer)

    def _is_validation(self, question: str) -> bool:
        return share(question, self.split_seed, "val") < self.validation_fraction

    def _items(self, part: Part) -> list[Example]:
        if part not in self._read:
            self._read[part] = [_example(part, record) for record in self._source.records(part)]
        return self._read[part]


def _example(part: Part, record: Record) -> Example:
    stem = record.text("question")
    options = _options(record)
    correct = record.text("correct").upper()
    if correct not in ascii_uppercase[: len(options)]:
        raise record.error("correct", f"must be a letter of the {len(options)} options, got {correct!r:.80}")
    return Example(
        id=f"{part}-{record.number}",
        question=asked(stem, options),
        # Some problems have no rationale.
        target=explained(record.text("rationale", empty=True), correct),
        answer=correct,
        meta={"stem": stem, "options": options},
    )


def _options(record: Record) -> tuple[str, ...]:
    """The options without their letters, which must be A, B, C ... in order."""
    given = record.value("options")
    if not isinstance(given, (list, tuple)) or not 2 <= len(given) <= len(ascii_uppercase):
        raise record.error("options", f"must be a list of lettered options, got {given!r:.80}")
    options = []
    for letter, option in zip(ascii_uppercase, given, strict=False):
        match = _OPTION.fullmatch(option.strip()) if isinstance(option, str) else None
        if match is None or match[1] != letter:
            raise record.error(
                "options", f"should have an option that begins with {letter}), got {option!r:.80}"
            )
        options.append(match[2].strip())
    return tuple(options)
