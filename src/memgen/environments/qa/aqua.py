"""AQuA-RAT (arXiv 1705.04146): algebraic word problems with five options and a rationale.

The paper uses it in continual learning and publishes neither prompt nor sizes; it is asked as the released code asks
GPQA. Official splits: train, dev (here: val), test; a source without a dev file has a seeded share of its training
problems set aside. A single file that is not named after training serves for evaluation, as val and as test.
"""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import final

from memgen.environments.base import Example
from memgen.environments.qa.multiple_choice import PROMPT, ChoiceEnvironment, choice_example
from memgen.environments.questions import Questions, seeded_key
from memgen.environments.sources import HubSplit, Record, Source

_OPTION = re.compile(r"\(?([A-Z])\s*[).:]\s*(.*)", re.DOTALL)


@final
class AQuA(ChoiceEnvironment):
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
        source = Source(
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
        super().__init__(
            Questions(
                source,
                _example,
                validation_fraction,
                split_key=lambda item: seeded_key(item.meta["stem"], split_seed, "val"),
                prompt=prompt,
            )
        )


def _example(record: Record, identifier: str) -> Example:
    stem = record.text("question")
    options = _options(record)
    correct = record.text("correct").upper()
    if correct not in ascii_uppercase[: len(options)]:
        raise record.error("correct", f"must be a letter of the {len(options)} options, got {correct!r:.80}")
    # Some problems have no rationale.
    return choice_example(identifier, stem, options, correct, record.text("rationale", empty=True))


def _options(record: Record) -> list[str]:
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
    return options
