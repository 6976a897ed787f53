"""The items of a split as tokens, without those that are too long."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from transformers import PreTrainedTokenizerBase

from memgen.chat import ChatTemplate, ConversationTokens, conversation_ids, prompt_ids
from memgen.data.batches import Item
from memgen.environments.base import Environment, Example, InteractiveEnvironment, Message, Split
from memgen.environments.trajectories import Trajectories

log = logging.getLogger(__name__)


MAX_LENGTH = 1024
"""Default of `data.max_length`."""


@dataclass(frozen=True)
class ItemSettings:
    """Which items of the splits are used. The keys of `data` have these names."""

    trajectories: str | None = None
    """A file of `memgen collect`: its conversations replace the training split's reference completions."""
    max_length: int = MAX_LENGTH
    """Tokens a conversation may have, latents not counted; longer ones are dropped and counted."""
    max_prompt_length: int | None = None
    """Tokens a prompt may have; None: `max_length`."""
    train_examples: int | None = None
    """The first so many items of the split, counted before any is dropped; None: all."""
    val_examples: int | None = None
    """As `train_examples`."""
    test_examples: int | None = None
    """As `train_examples`."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_prompt_length", "train_examples", "val_examples", "test_examples")
        require_at_least(2, self, "max_length")

    @property
    def prompt_limit(self) -> int:
        """Tokens a prompt may have."""
        return self.max_length if self.max_prompt_length is None else self.max_prompt_length

    def limit(self, split: Split) -> int | None:
        """Items of a split; None: all."""
        return {"train": self.train_examples, "val": self.val_examples, "test": self.test_examples}[split]


def require_at_least(least: int, record: object, *names: str) -> None:
    """Refuses numbers of the section `data` that are too small; None is no number.

    Raises:
        ValueError: naming key and value.
    """
    for name in names:
        value = getattr(record, name)
        if value is not None and value < least:
            raise ValueError(f"data.{name} must be at least {least}, got {value}")


@final
@dataclass(frozen=True)
class SplitReader:
    """Tokenises the splits of an environment."""

    environment: Environment
    """The task."""
    path: str | None
    """Where its data is, for messages."""
    tokenizer: PreTrainedTokenizerBase
    """The reasoner's."""
    template: ChatTemplate
    """Chat template, as `memgen.chat` takes it."""
    settings: ItemSettings
    """Which items are used."""
    with_answers: bool
    """Whether reference completions are needed for a loss (in training and validation)."""
    report: bool
    """Whether this process logs what it read."""

    def read(self, split: Split) -> tuple[list[Item], int]:
        """The items of a split that are short enough, and how many are not.

        Raises:
            ValueError: if an item is broken or empty, or none is short enough; a validation split may be empty.
        """
        source = self._source(split)
        name, place = source.name, "" if self.path is None else f" from {self.path}"
        examples = source.examples(split)[: self.settings.limit(split)]
        self._report_duplicates(name, split, examples)
        if not examples:
            if split != "val":
                raise ValueError(f"{name} has no {split} items{place}")
            log.warning("%s has no validation items%s: nothing is validated", name, place)
            return [], 0
        items, excess = [], []
        learned = split != "test" and self.with_answers
        conversations = source.conversations(examples) if learned else itertools.repeat(None)
        for example in examples:
            try:
                item, over = self._tokenize(source, example, next(conversations))
            except ValueError as error:
                raise ValueError(f"{name}, {split} item {example.id}: {error}") from error
            if over > 0:
                excess.append(over)
            else:
                items.append(item)
        limits = (
            f"data.max_length {self.settings.max_length}, data.max_prompt_length {self.settings.prompt_limit}"
        )
        if not items:
            raise ValueError(
                f"all {len(excess)} {split} items of {name}{place} are longer than {limits} tokens; "
                f"the shortest by {min(excess)}: raise the limits"
            )
        if self.report:
            level = logging.WARNING if excess else logging.INFO
            message = "%s, %s: %d items%s, %d dropped as longer than %s tokens"
            log.log(level, message, name, split, len(items), place, len(excess), limits)
        return items, len(excess)

    def _report_duplicates(self, name: str, split: Split, examples: Sequence[Example]) -> None:
        counts = Counter(example.id for example in examples)
        repeated = [identifier for identifier, count in counts.items() if count > 1]
        if repeated and self.report:
            log.warning(
                "%s, %s: %d ids belong to several items, %r to %d; what is recorded by id cannot tell these apart",
                name, split, len(repeated), repeated[0], counts[repeated[0]],
            )  # fmt: skip

    def _source(self, split: Split) -> Environment:
        """The environment whose items a split has: collected trajectories are one too."""
        trajectories = self.settings.trajectories
        if split != "train" or trajectories is None or not self.with_answers:
            return self.environment
        source = Trajectories(trajectories)
        others = source.collected_on() - {self.environment.name}
        if others and self.report:
            named = ", ".join(sorted(others))
            log.warning("%s was collected on %s, not on %s", trajectories, named, self.environment.name)
        return source

    def _tokenize(
        self, environment: Environment, example: Example, messages: list[Message] | None
    ) -> tuple[Item, int]:
        """An item's tokens, and by how many it is longer than a limit (not positive if it fits)."""
        prompt: list[int] = []
        conversation = None
        if messages is not None:
            conversation = conversation_ids(self.tokenizer, messages, self.template)
            # Assistant messages that the prompt shows as examples are no targets.
            shown = sum(message["role"] == "assistant" for message in environment.messages(example))
            # What follows the last turn is no target and no context of one.
            conversation = dataclasses.replace(
                conversation,
                ids=conversation.ids[: conversation.turns[-1].end],
                turns=conversation.turns[shown:],
            )
        # The prompt of an interactive task may need its first observation; the rollout checks its length.
        if not isinstance(environment, InteractiveEnvironment):
            prompt = prompt_ids(self.tokenizer, environment.messages(example), self.template)
        item = Item(example=example, conversation=conversation, prompt_tokens=len(prompt))
        return item, self._excess(len(prompt), conversation)

    def _excess(self, prompt: int, conversation: ConversationTokens | None) -> int:
        excess = [prompt - self.settings.prompt_limit]
        if conversation is not None:
            first = conversation.turns[0].prompt_end
            excess += [len(conversation.ids) - self.settings.max_length, first - self.settings.prompt_limit]
        return max(excess)
