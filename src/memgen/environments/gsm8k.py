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
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, final

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.maths import MathsVerifier

PROMPT = (
    "Solve the math problem with proper reasoning, and make sure to put the FINAL ANSWER inside \\boxed{}."
    "Question: {question}\n"
)
"""The released code's user message."""

TargetStyle = Literal["boxed", "released", "hashes"]

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FINAL = "####"


@final
class GSM8K(Environment):
    """Question in, worked solution with a boxed number out; reward 1 for the right number, else 0."""

    name = "gsm8k"

    def __init__(
        self,
        path: str = "openai/gsm8k",
        train_file: str = "train.jsonl",
        test_file: str = "test.jsonl",
        validation_fraction: float = 0.05,
        prompt: str = PROMPT,
        target_style: TargetStyle = "boxed",
        reward_timeout_s: float = 5.0,
        reward_workers: int = 1,
    ) -> None:
        r"""Reads nothing yet.

        Args:
            path: directory with the two files, or a dataset of the Hugging Face hub (`owner/name`).
            train_file: question/answer JSON lines in the directory `path`; an absolute path may stand elsewhere.
            test_file: likewise.
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
        self.train_file = train_file
        self.test_file = test_file
        self.validation_fraction = validation_fraction
        self.prompt = prompt
        self.target_style: TargetStyle = target_style
        self._verifier = MathsVerifier(timeout_s=reward_timeout_s, workers=reward_workers)
        self._read: dict[str, list[Example]] = {}

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
        correct = float(self._verifier.correct(example.answer, answer))
        return Reward(total=correct, parts={"correct": correct})

    def _is_validation(self, question: str) -> bool:
        digest = hashlib.sha256(question.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.validation_fraction * 2**64

    def _items(self, part: Literal["train", "test"]) -> list[Example]:
        if part not in self._read:
            self._read[part] = [
                self._example(f"{part}-{number}", record, where)
                for number, where, record in self._records(part)
            ]
        return self._read[part]

    def _records(self, part: Literal["train", "test"]) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        """Number, place and content of each record of a file."""
        directory = Path(self.path).expanduser()
        if directory.is_dir():
            return _read_lines(directory / (self.train_file if part == "train" else self.test_file))
        if directory.is_file():
            raise FileNotFoundError(
                f"{self.path} is a file; path must be a directory with {self.train_file} and {self.test_file} "
                "(set train_file and test_file if they have other names)"
            )
        if _HUB_NAME.fullmatch(self.path):
            return _read_hub(self.path, part)
        raise FileNotFoundError(
            f"GSM8K: there is no directory {self.path}; set data.path to a directory with {self.train_file} and "
            f"{self.test_file}, or to a dataset of the hub such as openai/gsm8k"
        )

    def _example(self, identifier: str, record: Mapping[str, Any], where: str) -> Example:
        if not isinstance(record, Mapping):
            message = f"{where}: expected an object with question and answer, got {record!r:.80}"
            raise ValueError(message)  # noqa: TRY004 - the data is broken, not the call
        for key in ("question", "answer"):
            value = record.get(key)
            if not isinstance(value, str) or not value.strip():
                state = "is missing" if key not in record else f"is empty or no text: {value!r:.80}"
                raise ValueError(f'{where}: "{key}" {state}')
        solution, marker, answer = record["answer"].rpartition(_FINAL)
        if not marker or not answer.strip():
            raise ValueError(f'{where}: "answer" does not end in "{_FINAL} <number>"')
        return Example(
            id=identifier,
            question=record["question"].strip(),
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


def _read_lines(file: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    if not file.is_file():
        raise FileNotFoundError(f"GSM8K: there is no file {file}")
    # Not splitlines(): it would also split at separators that may stand inside a JSON string.
    lines = file.read_bytes().split(b"\n")
    if lines[-1].strip() == b"":
        lines.pop()
    if not lines:
        raise ValueError(f"{file} has no lines; expected one JSON object with question and answer per line")
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # Covers broken UTF-8 too.
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        yield number, where, record


def _read_hub(name: str, part: Literal["train", "test"]) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(
            f"GSM8K: {name} is no local directory, and the package `datasets`, which reads the hub, is not installed"
        ) from error
    try:
        rows = datasets.load_dataset(name, "main", split=part)
    except Exception as error:
        # The hub's client raises errors of several HTTP libraries; all of them mean that the data is not here.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"GSM8K: {name} is no local directory and could not be read from the hub ({reason}); set data.path to a "
            "directory with train.jsonl and test.jsonl"
        ) from error
    for number, record in enumerate(rows, start=1):
        yield number, f"{name} {part}, row {number}", record
