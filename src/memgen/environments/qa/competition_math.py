r"""MATH (arXiv 2103.03874): competition problems whose solutions end in a boxed expression.

Evaluation is on MATH-500, the 500 test problems of PRM800K, as in the paper; its 1.6 K training problems are not
published, so training takes all that the source has. No problem of the test split is trained on: one that is found
among the training problems (by its text) is left out, so that the 5,000 problems of the original test split may serve
for training, as in PRM800K. Files may be JSON lines of any of the usual mirrors or the original folders of one file per
problem. The prompt is the released code's for mathematics. Answers are compared by math-verify, as for GSM8K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.qa.gsm8k import PROMPT
from memgen.environments.qa.maths import MathsVerifier, boxed_answer
from memgen.environments.records import HubSplit, Part, Record, Source, checked_fraction, normalised, share

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
"""The original's folders, which are configurations on the hub."""


@final
class MATH(Environment):
    """Problem in, worked solution with a boxed answer out; reward 1 for the right answer, else 0."""

    name = "math"

    def __init__(
        self,
        path: str = "EleutherAI/hendrycks_math",
        train_file: str | None = None,
        test_file: str | None = None,
        test_name: str = "HuggingFaceH4/MATH-500",
        revision: str | None = None,
        subjects: Sequence[str] = SUBJECTS,
        validation_fraction: float = 0.05,
        split_seed: int = 0,
        prompt: str = PROMPT,
        reward_timeout_s: float = 5.0,
        reward_workers: int = 1,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: folder, file, or dataset of the hub with the training problems.
            train_file: records in the folder `path`, if not to be found by name.
            test_file: likewise; of several test files, one with 500 in its name goes before.
            test_name: the hub's dataset of the test problems, where `path` is one of the hub.
            revision: of the hub's dataset `path`.
            subjects: configurations of the hub's dataset `path`; empty if it has none.
            validation_fraction: share of the training problems set aside for validation.
            split_seed: which ones.
            prompt: the user message; `{question}` stands for the problem.
            reward_timeout_s: seconds the comparison of one answer may take; beyond, the answer is wrong.
            reward_workers: processes that compare answers.

        Raises:
            ValueError: if a setting is not usable.
        """
        if "{question}" not in prompt:
            raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
        self.path = path
        self.validation_fraction = checked_fraction("validation_fraction", validation_fraction)
        self.split_seed = split_seed
        self.prompt = prompt
        files: dict[Part, str | None] = {"train": train_file, "test": test_file}
        self._source = Source(
            task="MATH",
            path=path,
            files=files,
            hub={"train": [HubSplit("train", subject) for subject in subjects or (None,)]},
            revision=revision,
            folders=("data",),
            prefer={"test": r"500(?!\d)"},
        )
        # On the hub the test problems are a dataset of their own, with revisions of its own.
        local = self._source.is_local or test_file is not None
        self._test_source = (
            self._source if local else Source(task="MATH", path=test_name, hub={"test": [HubSplit("test")]})
        )
        self._verifier = MathsVerifier(timeout_s=reward_timeout_s, workers=reward_workers)
        self._read: dict[Part, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the files.

        Raises:
            FileNotFoundError: if the data is neither local nor to be had from the hub.
            ValueError: if a record is broken, or lacks a problem or a solution with a final answer.
        """
        if split == "test" or (split == "val" and self._source.has("val")):
            return self._items(split)
        tested = {normalised(example.question) for example in self._tested()}
        return [
            example
            for example in self._items("train")
            if normalised(example.question) not in tested
            and (self._source.has("val") or self._is_validation(example.question) == (split == "val"))
        ]

    def messages(self, example: Example) -> list[Message]:
        """One user message: the instruction and the problem."""
        return [{"role": "user", "content": self.prompt.replace("{question}", example.question)}]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the answer marked as final equals the reference, else 0."""
        return self._verifier.reward(example.answer, answer)

    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Compares in `reward_workers` processes at once."""
        return self._verifier.rewards([example.answer for example in examples], answers)

    def _is_validation(self, question: str) -> bool:
        return share(question, self.split_seed, "val") < self.validation_fraction

    def _tested(self) -> list[Example]:
        # A lone training file has no test problems beside it to keep apart.
        return self._items("test") if self._test_source.has("test") else []

    def _items(self, part: Part) -> list[Example]:
        if part not in self._read:
            source = self._test_source if part == "test" else self._source
            self._read[part] = [_example(part, record) for record in source.records(part)]
        return self._read[part]


def _example(part: Part, record: Record) -> Example:
    solution = record.text("solution")
    answer = record.text("answer") if "answer" in record.fields else boxed_answer(solution)
    if answer is None:
        raise record.error("solution", 'has no \\boxed{} answer, and there is no column "answer"')
    meta = {
        key: record.fields[key] for key in ("subject", "type", "level", "unique_id") if key in record.fields
    }
    return Example(
        id=f"{part}-{record.number}",
        question=record.text("problem"),
        target=solution,
        answer=answer,
        meta=meta,
    )
