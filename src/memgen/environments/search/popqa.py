"""PopQA (arXiv 2212.10511): questions about entities, most of them rarely asked about. A test split only.

The paper evaluates on it the agent that was trained on TriviaQA. Items of the data that carry `paragraphs` (title and
text, as in HippoRAG's subset of 1,000 questions) are their own passages: without another search backend, an index of
all items' paragraphs is searched.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

from typing_extensions import override

from memgen.environments.base import Example, Split
from memgen.environments.questions import Questions
from memgen.environments.search.retrieval import PassageIndex, Searcher
from memgen.environments.search.search_qa import (
    SYSTEM_PROMPT,
    Metric,
    OnFailure,
    SearchQA,
    answer_target,
    texts,
)
from memgen.environments.sources import HubSplit, Record, Source, read_file


@final
class PopQA(SearchQA):
    """A question, any number of searches, a short answer."""

    name = "popqa"

    def __init__(
        self,
        path: str = "akariasai/PopQA",
        test_file: str | None = None,
        search: Searcher | None = None,
        metric: Metric = "exact_match",
        on_failure: OnFailure = "stop",
        max_turns: int = 5,
        max_observation_chars: int = 2048,
        system_prompt: str = SYSTEM_PROMPT,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: a file (`.tsv`, `.json`, `.jsonl`, `.csv` or `.parquet`), a folder with one named `popqa` or
                `test`, or a dataset of the Hugging Face hub (`owner/name`).
            test_file: the file in the folder `path`, if its name does not say so.
            search: the search backend; None: an index of the paragraphs in the file of `path`.
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
            task="PopQA",
            path=path,
            files={"test": test_file},
            hub={"test": [HubSplit("test")]},
            prefer={"test": r"(?i)^popqa\."},
            names={"test": "popqa|test"},
            lone_file="test",
        )
        self._questions = Questions(source, _example)
        self._own_passages: Searcher | None = None

    @override
    def examples(self, split: Split) -> list[Example]:
        """The items of the test split in the order of the data.

        Raises:
            FileNotFoundError: if the data cannot be found, or for another split.
            ValueError: if a record is broken.
        """
        if split != "test":
            raise FileNotFoundError(
                f"PopQA has no {split} split, only a test split; train on TriviaQA (conf/data/triviaqa.yaml), as the "
                "paper does"
            )
        return self._questions.examples(split)

    @override
    def searcher(self) -> Searcher:
        """The search backend: the configured one, else an index of the data's own paragraphs.

        Raises:
            ValueError: if the data has no paragraphs.
        """
        if self.search is not None:
            return self.search
        if self._own_passages is None:
            source = self._questions.source
            files = source.local_files("test")
            if len(files) != 1 or not _has_paragraphs(files[0]):
                raise ValueError(
                    f"{source.path} holds no paragraphs, so there is nothing to search: set "
                    "data.environment.search to a memgen.environments.search.retrieval.PassageIndex or SearchServer"
                )
            self._own_passages = PassageIndex(str(files[0]))
        return self._own_passages


def _has_paragraphs(file: Path) -> bool:
    return file.suffix.lower() == ".json" and all(
        isinstance(record.fields.get("paragraphs"), list) for record in read_file(file)
    )


def _example(record: Record, identifier: str) -> Example:
    question = record.text("question")
    aliases = texts(record.value("possible_answers"))
    if not aliases:
        raise record.error("possible_answers", f"holds no text: {record.value('possible_answers')!r:.80}")
    return Example(
        id=identifier,
        question=question,
        target=answer_target(aliases[0]),
        answer=aliases[0],
        meta={"aliases": aliases, "released_aliases": aliases},
    )
