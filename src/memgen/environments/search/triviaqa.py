r"""TriviaQA (arXiv 1705.03551): trivia questions, each with the aliases of its answer.

Questions come from `trivia_qa`, whose test split has no answers: its validation split is the test split here, as in
the paper. Supervised trajectories come from AgentBank's TriviaQA part, whose `Thought: / Action: search[..] / Final
Answer:` is rewritten to the tags of the prompt. Differs from the released code: (1) its GRPO data tests on the split
without answers; (2) an observation keeps all of its lines, a query its closing brackets, and both roles have the tags
of an episode; (3) an instruction before the question and the agent's reply to it are left out, since the system
message replaces them; (4) a trajectory that does not end in an answer is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from typing_extensions import override

from memgen.environments.base import Example, Message, Split
from memgen.environments.questions import Questions, seeded_key
from memgen.environments.search.retrieval import Searcher
from memgen.environments.search.search_qa import (
    SYSTEM_PROMPT,
    Metric,
    OnFailure,
    SearchQA,
    answer_target,
    framed,
    normalize_answer,
    texts,
)
from memgen.environments.sources import HubSplit, Record, Source

_CANONICAL = {"trivia_qa": "mandarjoshi/trivia_qa"}
"""Former names on the hub, without an owner."""

_THOUGHT = re.compile(r"Thought:\s*(.*?)(?=\n\s*Action:|\n\s*Final Answer:|\Z)", re.DOTALL)
_SEARCH = re.compile(r"^\s*Action:\s*search\[(.*)\]\s*$", re.MULTILINE | re.IGNORECASE)
_FINAL = re.compile(r"^\s*Final Answer:\s*(.*)\Z", re.MULTILINE | re.DOTALL)
_OBSERVATION = re.compile(r"^\s*Observation:\s*", re.MULTILINE)
_QUESTION = re.compile(r"^\s*Question:\s*", re.MULTILINE)


@final
class TriviaQA(SearchQA):
    """A question, any number of searches, a short answer."""

    name = "triviaqa"

    def __init__(
        self,
        path: str = "mandarjoshi/trivia_qa",
        train_file: str | None = None,
        test_file: str | None = None,
        subset: str = "rc.wikipedia.nocontext",
        trajectories: str | None = None,
        validation_fraction: float = 0.1,
        search: Searcher | None = None,
        metric: Metric = "exact_match",
        on_failure: OnFailure = "stop",
        max_turns: int = 5,
        max_observation_chars: int = 2048,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: the questions: a folder with files (`.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv`) named after
                their splits, `train` and `validation` (or `dev`, or `test` where there is neither), or a dataset of
                the Hugging Face hub. A single file is the test split, unless it is named `train`.
            train_file: the training questions' file in the folder `path`, if its name does not say so.
            test_file: the test questions' file, likewise.
            subset: which part of the hub's dataset: rc.wikipedia.nocontext or rc.nocontext, for instance.
            trajectories: conversations to train on instead of the training questions: a file, a folder with a
                `train` file, or a dataset of the hub with a part `triviaqa`
                (`Solaris99/AgentBank`). Their final answers are their only aliases.
            validation_fraction: share of the training items set aside for validation, in [0, 1].
            search: the search backend.
            metric: the reward's total, see `SearchQA`.
            on_failure: what happens when a search fails, see `SearchQA`.
            max_turns: turns of the agent, the answer's included.
            max_observation_chars: characters of an observation, the tags included; about four make a token.
            system_prompt: the system message; empty for none.

        Raises:
            ValueError: if a setting is not usable.
        """
        super().__init__(search, metric, on_failure, max_turns, max_observation_chars, system_prompt)
        source = Source(
            task="TriviaQA",
            path=_CANONICAL.get(path, path),
            files={"train": train_file, "test": test_file},
            hub={"train": [HubSplit("train", subset)], "test": [HubSplit("validation", subset)]},
            splits=("train", "test"),
            prefer={"test": r"(?i)(?<![a-z])(?:val|valid|validation|dev)(?![a-z])"},
            names={"test": "val|valid|validation|dev|test"},
        )

        def key(item: Example) -> str:
            return seeded_key(normalize_answer(item.question), 0, "validation")

        self._questions = Questions(source, _example, validation_fraction, split_key=key)
        self._training = self._questions
        if trajectories is not None:
            file = Path(trajectories).expanduser()
            conversations = Source(
                task="TriviaQA's trajectories",
                path=trajectories,
                files={"train": str(file.resolve())} if file.is_file() else {},
                hub={"train": [HubSplit("train", "triviaqa")]},
                splits=("train",),
            )
            self._training = Questions(conversations, self._trajectory, validation_fraction, split_key=key)

    @override
    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the data.

        Raises:
            FileNotFoundError: if the data cannot be found.
            ValueError: if a record is broken.
        """
        return (self._questions if split == "test" else self._training).examples(split)

    def _trajectory(self, record: Record, identifier: str) -> Example | str:
        return _trajectory(record, identifier, self.max_observation_chars)


def _example(record: Record, identifier: str) -> Example:
    question = record.text("question")
    answer = record.fields.get("answer")
    fields: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}

    def named(key: str) -> list[str]:
        return texts(fields.get(key, record.fields.get(f"answer.{key}")))

    value, aliases, normalized = named("value"), named("aliases"), named("normalized_aliases")
    accepted = list(dict.fromkeys([*value, *aliases, *normalized]))
    if not accepted or accepted == ["<unk>"]:
        raise record.error(
            "answer",
            f"has no aliases (trivia_qa's test split has none; use its validation split): {answer!r:.80}",
        )
    return Example(
        id=identifier,
        question=question,
        target=answer_target(accepted[0]),
        answer=accepted[0],
        meta={"aliases": accepted, "released_aliases": normalized or accepted},
    )


def _trajectory(record: Record, identifier: str, max_chars: int) -> Example | str:
    """An item with its conversation, or why the record cannot be used."""
    where, turns = record.where, record.value("conversations")
    if not isinstance(turns, Sequence) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise record.error("conversations", f"holds no texts: {turns!r:.80}")
    roles = [turn.get("from") for turn in turns]
    values: list[str] = [turn["value"] for turn in turns]
    acting = [
        number
        for number, (role, value) in enumerate(zip(roles, values, strict=True))
        if role == "gpt" and (_SEARCH.search(value) or _FINAL.search(value))
    ]
    if not acting or acting[0] == 0:
        return f"{where} has no action after a question"
    first = acting[0]
    if roles[first - 1 :] != ["human", "gpt"] * ((len(roles) - first + 1) // 2):
        return f"{where} does not alternate between human and gpt"
    # After an instruction the question comes last, marked "Question:"; without an instruction the mark may be missing.
    question = _QUESTION.split(values[first - 1])[-1].strip()
    conversation: list[Message] = []
    for role, value in zip(roles[first:], values[first:], strict=True):
        if role == "human":
            observed = _OBSERVATION.sub("", value, count=1).strip()
            conversation.append({"role": "user", "content": framed(observed, max_chars)})
        else:
            turn = _tagged(value)
            if turn is None:
                return f"{where} has a turn without a search or an answer: {value!r:.80}"
            conversation.append({"role": "assistant", "content": turn})
    final = _FINAL.search(values[-1])
    answer = " ".join(final[1].split()) if final else ""
    if not question or not answer or any(_FINAL.search(value) for value in values[first:-1]):
        return f"{where} does not end in its one answer"
    return Example(
        id=identifier,
        question=question,
        target=conversation[-1]["content"],
        answer=answer,
        meta={"aliases": [answer], "released_aliases": [answer], "conversation": conversation},
    )


def _tagged(turn: str) -> str | None:
    """A turn of the agent, rewritten to tags; None if it neither searches nor answers."""
    thought, query, answer = _THOUGHT.search(turn), _SEARCH.search(turn), _FINAL.search(turn)
    parts = []
    if thought and thought[1].strip():
        parts.append(f"<think> {thought[1].strip()} </think>")
    if answer and answer[1].strip():
        parts.append(f"<answer> {' '.join(answer[1].split())} </answer>")
    elif query and query[1].strip():
        parts.append(f"<search> {query[1].strip()} </search>")
    else:
        return None
    return "\n".join(parts)
