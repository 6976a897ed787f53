r"""GSM8K (arXiv 2110.14168): grade-school word problems with one number as the answer.

The prompt is the released code's, to the letter: the instruction ends in a full stop directly before "Question:"
(its authors report that a line break in place of the full stop costs a 1.5B model accuracy). Differs from the
released code: (1) the reward is math-verify on the answer marked as final, not string comparison; (2) the target
leaves out GSM8K's calculator annotations `<<48/2=24>>` and puts the boxed answer on a line of its own
(`target_style="released"` gives the released target); (3) the validation split is chosen by a hash of the
question, so that it depends neither on a seed nor on the order of the file, and a repeated question cannot be in
both splits.
"""

from __future__ import annotations

import re
from typing import Literal, final

from memgen.environments.base import Example
from memgen.environments.qa.maths import PROMPT, MathsEnvironment
from memgen.environments.questions import Questions
from memgen.environments.sources import HubSplit, Record, Source

TargetStyle = Literal["boxed", "released", "hashes"]

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_FINAL = "####"


@final
class GSM8K(MathsEnvironment):
    """Question in, worked solution with a boxed number out; reward 1 for the right number, else 0."""

    name = "gsm8k"

    def __init__(
        self,
        path: str = "openai/gsm8k",
        train_file: str | None = None,
        test_file: str | None = None,
        revision: str | None = None,
        validation_fraction: float = 0.05,
        prompt: str = PROMPT,
        target_style: TargetStyle = "boxed",
        reward_timeout_s: float = 5.0,
        reward_workers: int = 1,
    ) -> None:
        r"""Reads nothing yet.

        Args:
            path: folder with a training and a test file, one such file, or a dataset of the Hugging Face hub
                (`owner/name`).
            train_file: question/answer records in the folder `path` (an absolute path may be elsewhere), if not to
                be found by name.
            test_file: likewise.
            revision: of the hub's dataset.
            validation_fraction: share of the training questions set aside for validation.
            prompt: the user message; `{question}` stands for the question.
            target_style: what SFT learns. "boxed": the solution without calculator annotations and `\boxed{X}` on
                the last line; "released": annotations kept and `\boxed{X}` directly behind the solution, as in the
                released code; "hashes": without annotations and `#### X` on the last line.
            reward_timeout_s: seconds the comparison of one answer may take; beyond, the answer is wrong.
            reward_workers: processes that compare answers.

        Raises:
            ValueError: if `validation_fraction`, `prompt`, `target_style` or a reward setting is not usable.
        """
        if target_style not in ("boxed", "released", "hashes"):
            raise ValueError(f"target_style must be boxed, released or hashes, got {target_style!r}")
        self.target_style: TargetStyle = target_style
        source = Source(
            task="GSM8K",
            path=path,
            files={"train": train_file, "test": test_file},
            hub={"train": [HubSplit("train", "main")], "test": [HubSplit("test", "main")]},
            revision=revision,
            splits=("train", "test"),
            folders=("main",),
        )
        # The bare question, as in the first releases, so that splits stay what they were.
        questions = Questions(
            source, self._example, validation_fraction, split_key=lambda item: item.question, prompt=prompt
        )
        super().__init__(questions, reward_timeout_s, reward_workers)

    def _example(self, record: Record, identifier: str) -> Example:
        question = record.text("question")
        solution, marker, answer = record.text("answer").rpartition(_FINAL)
        if not marker or not answer.strip():
            raise record.error("answer", f'does not end in "{_FINAL} <number>"')
        return Example(
            id=identifier,
            question=question,
            target=self._target(solution.strip(), answer.strip()),
            answer=answer.strip(),
        )

    def _target(self, solution: str, answer: str) -> str:
        boxed = f"\\boxed{{{answer}}}"
        match self.target_style:
            case "boxed":
                return f"{_ANNOTATION.sub('', solution)}\n{boxed}".strip()
            case "hashes":
                return f"{_ANNOTATION.sub('', solution)}\n{_FINAL} {answer}".strip()
            case "released":
                return f"{solution}{boxed}"
