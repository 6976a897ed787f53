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

import hashlib
import re
from collections.abc import Sequence
from typing import Literal, final

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.qa.maths import MathsVerifier
from memgen.environments.records import HubSplit, Part, Record, Source

PROMPT = (
    "Solve the math problem with proper reasoning, and make sure to put the FINAL ANSWER inside \\boxed{}."
    "Question: {question}\n"
)
"""The released code's user message."""

TargetStyle = Literal["boxed", "released", "hashes"]

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_FINAL = "####"


@final
class GSM8K(Environment):
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
            train_file: question/answer records in the folder `path` (an absolute path may stand elsewhere), if not to
                be found by name.
            test_file: likewise.
            revision: of the hub's dataset.
            validation_fraction: share of the training questions set aside for validation, in [0, 1).
            prompt: the user message; `{question}` stands for the question.
            target_style: what SFT learns. "boxed": the solution without calculator annotations and `\boxed{X}` on
                the last line; "released": annotations kept and `\boxed{X}` directly behind the solution, as in the
                released code; "hashes": without annotations and `#### X` on the last line.
            reward_timeout_s: seconds the comparison of one answer may take; beyond, the answer is wrong.
            reward_workers: processes that compare answers.

        Raises:
            ValueError: if `validation_fraction`, `prompt`, `target_style` or a reward setting is not usable.
        """
        if not 0.0 <= validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        if "{question}" not in prompt:
            raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
        if target_style not in ("boxed", "released", "hashes"):
            raise ValueError(f"target_style must be boxed, released or hashes, got {target_style!r}")
        self.path = path
        self._source = Source(
            task="GSM8K",
            path=path,
            files={"train": train_file, "test": test_file},
            hub={"train": [HubSplit("train", "main")], "test": [HubSplit("test", "main")]},
            revision=revision,
            folders=("main",),
        )
        self.validation_fraction = validation_fraction
        self.prompt = prompt
        self.target_style: TargetStyle = target_style
        self._verifier = MathsVerifier(timeout_s=reward_timeout_s, workers=reward_workers)
        self._read: dict[Part, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the file.

        Raises:
            FileNotFoundError: if the data is neither a directory nor to be had from the hub.
            ValueError: if a line is not JSON, or lacks a question or a solution with a final answer.
        """
        match split:
            case "train" | "val":
                return [
                    e for e in self._items("train") if self._is_validation(e.question) == (split == "val")
                ]
            case "test":
                return list(self._items("test"))

    def messages(self, example: Example) -> list[Message]:
        """One user message: the instruction and the question."""
        return [{"role": "user", "content": self.prompt.replace("{question}", example.question)}]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the answer marked as final equals the reference, else 0."""
        return self._verifier.reward(example.answer, answer)

    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Compares in `reward_workers` processes at once."""
        return self._verifier.rewards([example.answer for example in examples], answers)

    def _is_validation(self, question: str) -> bool:
        digest = hashlib.sha256(question.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.validation_fraction * 2**64

    def _items(self, part: Part) -> list[Example]:
        if part not in self._read:
            self._read[part] = [self._example(part, record) for record in self._source.records(part)]
        return self._read[part]

    def _example(self, part: Part, record: Record) -> Example:
        question = record.text("question")
        solution, marker, answer = record.text("answer").rpartition(_FINAL)
        if not marker or not answer.strip():
            raise record.error("answer", f'does not end in "{_FINAL} <number>"')
        return Example(
            id=f"{part}-{record.number}",
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
