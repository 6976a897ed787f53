r"""GSM8K for lm-eval (with gsm8k.yaml) and inspect-ai, asked and graded as `memgen test` does: docs/harnesses.md.

Runs in the harness's own environment, so it imports nothing of memgen. Differs from `memgen.environments.qa.gsm8k`: GSM8K's
answers are numbers, and are compared as such here, where `memgen test` compares with math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

PROMPT = (
    "Solve the math problem with proper reasoning, and make sure to put the FINAL ANSWER inside \\boxed{}."
    "Question: {question}\n"
)
"""The user message, as of `memgen.environments.qa.maths`."""

_BOXED = re.compile(r"\\boxed\s*\{([^{}]+)\}")
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S.*)$", re.MULTILINE)
_AROUND = re.compile(r"\\?[$€£%]|[,\s]|\.$")


def prompt(item: Mapping[str, Any]) -> str:
    """The user message of an item."""
    return PROMPT.replace("{question}", item["question"])


def correct(answer: str, reference: str) -> bool:
    r"""Whether a completion's last `\boxed{...}`, or without one its last `#### ...`, is the number that ends a solution."""
    found = _BOXED.findall(answer) or _HASHES.findall(answer)
    value = _number(found[-1]) if found else None
    return value is not None and value == _number(reference.rpartition("####")[2])


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(_AROUND.sub("", text.strip()))
    except InvalidOperation:
        return None


def process_results(item: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What lm-eval calls with an item and its completions."""
    return {"correct": float(correct(results[0], item["answer"]))}
