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

from typing_extensions import override

from memgen.environments.base import Example, Split
from memgen.environments.qa.maths import PROMPT, MathsEnvironment, boxed_answer
from memgen.environments.questions import Questions, normalised, without
from memgen.environments.sources import HubSplit, Record, Source

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
class MATH(MathsEnvironment):
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
            test_file: likewise; of several test files, one with 500 in its name takes precedence.
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
        source = Source(
            task="MATH",
            path=path,
            files={"train": train_file, "test": test_file},
            hub={
                "train": [HubSplit("train", subject) for subject in subjects or (None,)],
                "test": [HubSplit("test", name=test_name)],
            },
            revision=revision,
            folders=("data",),
            prefer={"test": r"500(?!\d)"},
        )
        questions = Questions(source, _example, validation_fraction, split_seed=split_seed, prompt=prompt)
        super().__init__(questions, reward_timeout_s, reward_workers)

    @override
    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the files; no tested problem among those set aside or trained on.

        Raises:
            FileNotFoundError: if the data is neither local nor on the hub.
            ValueError: if a record is broken, or lacks a problem or a solution with a final answer.
        """
        source = self.questions.source
        if split == "test" or (split == "val" and source.has("val")):
            return self.questions.examples(split)
        # A lone training file has no test problems beside it.
        tested = self.questions.items("test") if source.has("test") else []
        return without(self.questions.examples(split), tested, lambda item: [normalised(item.question)])


def _example(record: Record, identifier: str) -> Example:
    solution = record.text("solution")
    answer = record.text("answer") if "answer" in record.fields else boxed_answer(solution)
    if answer is None:
        raise record.error("solution", 'has no \\boxed{} answer, and there is no column "answer"')
    meta = {
        key: record.fields[key] for key in ("subject", "type", "level", "unique_id") if key in record.fields
    }
    return Example(
        id=identifier,
        question=record.text("problem"),
        target=solution,
        answer=answer,
        meta=meta,
    )
