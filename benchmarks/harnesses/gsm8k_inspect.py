"""GSM8K for inspect-ai (docs/harnesses.md), graded as in gsm8k.py beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer
from inspect_ai.solver import TaskState, generate

sys.path.insert(0, str(Path(__file__).parent))
from gsm8k import correct, prompt


@scorer(metrics=[accuracy()])
def same_number() -> Scorer:
    """1 for the right number, else 0."""

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        return Score(value=float(correct(answer, target.text)), answer=answer)

    return score


@task
def memgen_gsm8k(path: str = "test.jsonl") -> Task:
    """The items of a file of GSM8K."""

    def sample(item: dict[str, Any]) -> Sample:
        return Sample(input=prompt(item), target=item["answer"])

    return Task(
        dataset=json_dataset(str(Path(path).resolve()), sample), solver=generate(), scorer=same_number()
    )
