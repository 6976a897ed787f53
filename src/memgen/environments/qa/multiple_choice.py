r"""Questions with lettered options: how they are asked, and which letter an answer chose.

Only the last `\boxed{...}` that is complete and not empty counts: one letter (`C`, `(C)`, `C)`, `C.`, `**C**`, `\text{C}`,
`Option C`), or a letter with its option's text (`C. 21`, `C) 21`); in capitals or not. A box with two letters, with the
option's text alone, or with a letter that is no option is a wrong answer; a letter outside a box is none, since the prompt
asks for the box. Prompt and target are the released code's for GPQA.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from typing_extensions import override

from memgen.environments.base import Example, Reward
from memgen.environments.qa.maths import boxed_answer
from memgen.environments.qa.notation import unwrapped
from memgen.environments.questions import QuestionEnvironment

PROMPT = (
    "Solve the problem with proper reasoning, and make sure to put the FINAL CHOICE inside \\boxed{}."
    "Question: {question}\n"
)
"""The released code's user message for GPQA."""

_LETTER = re.compile(r"(?:(?:option|choice|answer)\b[\s:]*(?:is\s*)?)?\(?([A-Za-z])\)?[.:]?", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])\s*[.):])[.:]?\s*(.+)", re.DOTALL)
_SECOND_LETTER = re.compile(r"(?:(?:[,;/&]|\band|\bor)\s*|^)\(?[A-Z](?:[.):]|$)", re.IGNORECASE)
_LONGEST = 4096


class ChoiceEnvironment(QuestionEnvironment, ABC):
    """A benchmark whose items come from `choice_example`; reward 1 for the right letter, else 0."""

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the boxed letter is the right one, else 0."""
        return choice_reward(example.answer, len(example.meta["options"]), answer)

    @override
    def final_answer(self, example: Example, answer: str) -> str | None:
        """The letter in the box."""
        return chosen_letter(answer)


def choice_example(
    identifier: str, stem: str, options: Sequence[str], correct: str, explanation: str, **meta: Any
) -> Example:
    """An item with lettered options.

    Args:
        identifier: its id.
        stem: the question without its options.
        options: the options without their letters.
        correct: the right letter.
        explanation: what SFT learns to say before the letter; may be empty.
        **meta: anything else to keep with the item.
    """
    return Example(
        id=identifier,
        question=asked(stem, options),
        target=explained(explanation, correct),
        answer=correct,
        meta={"stem": stem, "options": tuple(options), **meta},
    )


def chosen_letter(answer: str) -> str | None:
    """The letter an answer chose, in capitals; None if it marks none, or something that is not one letter."""
    content = boxed_answer(answer)
    if content is None or len(content) > _LONGEST:
        return None
    content = _plain(content)
    if letter := _LETTER.fullmatch(content):
        return letter[1].upper()
    with_text = _LETTER_AND_TEXT.fullmatch(content)
    if with_text is None or _SECOND_LETTER.search(with_text[3].strip()):
        return None
    return (with_text[1] or with_text[2]).upper()


def _plain(content: str) -> str:
    """Without Markdown, dollar signs and text commands around the content or around its letter."""
    content = unwrapped(content)
    if inner := re.fullmatch(r"\((.*)\)", content, re.DOTALL):  # `(\text{C})`
        return f"({unwrapped(inner[1])})"
    # `\text{C. } 21` and `**C.** 21`
    content = re.sub(r"^\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1 ", content)
    return re.sub(r"^\*\*([^*]*)\*\*", r"\1 ", content).strip()


def choice_reward(correct: str, options: int, answer: str) -> Reward:
    """1 for the right letter, else 0.

    Args:
        correct: the right letter.
        options: how many there are.
        answer: the completion.
    """
    letter = chosen_letter(answer)
    right = float(letter == correct)
    return Reward(
        total=right,
        parts={
            "correct": right,
            "has_answer": float(letter is not None and letter in ascii_uppercase[:options]),
        },
    )


def asked(question: str, options: Sequence[str]) -> str:
    """The question followed by its options, lettered."""
    lines = [f"{letter}. {option}\n" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return f"{question}\n\nPlease choose one of the following options:\n{''.join(lines)}"


def explained(explanation: str, letter: str) -> str:
    """The completion to learn: an explanation and the boxed letter."""
    return f"{explanation}\n\nTherefore, the final answer is \\boxed{{{letter}}}".strip()
