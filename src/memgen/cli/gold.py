"""`memgen test --gold`: whether a data set's reference answers earn their reward, before money is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memgen.cli.errors import UsageError
from memgen.environments.base import Environment, Example, InteractiveEnvironment, Split

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_AT_A_TIME = 64
_NAMED = 5


def test_gold(data: LightningDataModule) -> int:
    """Scores the reference answers of all splits, and names items whose reference is not right. Loads no model.

    Args:
        data: what the command line of `memgen test` configures.

    Returns:
        0 if there are items and every reference answer has a reward of 1, else 1.

    Raises:
        UsageError: if that is not `EnvironmentData`.
    """
    from memgen.data import EnvironmentData

    if not isinstance(data, EnvironmentData):
        raise UsageError("--gold needs memgen.data.EnvironmentData")
    wrong, found = 0, False
    for split in _SPLITS:
        try:
            examples = data.environment.examples(split)
        except FileNotFoundError as error:
            print(f"{split}: {error}")
            continue
        found = True
        failing = failing_references(data.environment, examples)
        wrong += len(failing)
        named = ", ".join(example.id for example in failing[:_NAMED])
        more = ", ..." if len(failing) > _NAMED else ""
        print(
            f"{split}: {len(examples) - len(failing)} of {len(examples)} reference answers are right"
            + (f"; not {named}{more}" if failing else "")
        )
    return int(wrong > 0 or not found)


def failing_references(environment: Environment, examples: Sequence[Example]) -> list[Example]:
    """The items whose reference answer, or reference conversation, earns a reward below 1."""
    failing = []
    for start in range(0, len(examples), _AT_A_TIME):
        some = examples[start : start + _AT_A_TIME]
        if isinstance(environment, InteractiveEnvironment):
            totals = [_played(environment, example) for example in some]
        else:
            references = [environment.conversation(item)[-1]["content"] for item in some]
            totals = [reward.total for reward in environment.rewards(some, references)]
        failing += [example for example, total in zip(some, totals, strict=True) if not total >= 1.0]
    return failing


def _played(environment: InteractiveEnvironment, example: Example) -> float:
    """The reward of the reference conversation's turns."""
    conversation = environment.conversation(example)[len(environment.messages(example)) :]
    episode = environment.episode()
    try:
        episode.reset(example)
        for message in conversation:
            if message["role"] == "assistant" and episode.step(message["content"]).done:
                break
        return episode.reward().total
    finally:
        episode.close()
