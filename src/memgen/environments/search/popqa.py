"""PopQA (arXiv 2212.10511): questions about entities, most of them rarely asked for. A test split only.

The paper evaluates on it the agent that was trained on TriviaQA. Items of the data that carry `paragraphs` (title and
text, as in HippoRAG's subset of 1,000 questions) are their own passages: without another search backend, an index of
all items' paragraphs is searched.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

from memgen.environments.base import Example, Split
from memgen.environments.records import HubSplit, Record, Source, read_file
from memgen.environments.search.retrieval import PassageIndex, Searcher
from memgen.environments.search.search_qa import (
    SYSTEM_PROMPT,
    Metric,
    OnFailure,
    SearchQA,
    answer_target,
    texts,
)


@final
class PopQA(SearchQA):
    """Question in, searches as the agent likes, a short answer out."""

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
            search: finds passages; None: an index of the paragraphs in the file of `path`.
            metric: what a reward's total is, see `SearchQA`.
            on_failure: what a failed search does, see `SearchQA`.
            max_turns: turns of the agent, the answer's included.
            max_observation_chars: characters of an observation, the tags included; about four make a token.
            system_prompt: the system message; empty for none.

        Raises:
            ValueError: if a setting is not usable.
        """
        super().__init__(search, metric, on_failure, max_turns, max_observation_chars, system_prompt)
        self.path = path
        self.test_file = test_file
        self._read: list[Example] | None = None
        self._own_passages: Searcher | None = None

    def examples(self, split: Split) -> list[Example]:
        """The items of the test split in the order of the data.

        Raises:
            FileNotFoundError: if the data is not to be had, or for another split.
            ValueError: if a record is broken.
        """
        if split != "test":
            raise FileNotFoundError(
                f"PopQA has no {split} split, only a test split; train on TriviaQA (conf/data/triviaqa.yaml), as the "
                "paper does"
            )
        if self._read is None:
            self._read = [_example(record) for record in self._source().records("test")]
        return list(self._read)

    def searcher(self) -> Searcher:
        """What finds passages: the configured backend, else an index of the data's own paragraphs.

        Raises:
            ValueError: if the data has no paragraphs.
        """
        if self.search is not None:
            return self.search
        if self._own_passages is None:
            file = self._own_file() or Path(self.path).expanduser()
            if not _has_paragraphs(file):
                raise ValueError(
                    f"{self.path} holds no paragraphs, so there is nothing to search: set "
                    "data.environment.search to a memgen.environments.search.retrieval.PassageIndex or SearchServer"
                )
            self._own_passages = PassageIndex(str(file))
        return self._own_passages

    def _source(self) -> Source:
        file = self._own_file()
        named = self.test_file if file is None else str(file.resolve())
        return Source("PopQA", self.path, files={"test": named}, hub={"test": [HubSplit("test")]})

    def _own_file(self) -> Path | None:
        """The one data file: the configured one, else the path itself, else `popqa.*` in the folder."""
        folder = Path(self.path).expanduser()
        if self.test_file is not None:
            return folder / self.test_file
        if folder.is_file():
            return folder
        files = sorted(folder.glob("*.*")) if folder.is_dir() else []
        own = [file for file in files if file.name.lower().startswith("popqa.") and file.is_file()]
        return own[0] if len(own) == 1 else None


def _has_paragraphs(file: Path) -> bool:
    if file.suffix.lower() != ".json":
        return False
    return all(isinstance(record.fields.get("paragraphs"), list) for record in read_file(file))


def _example(record: Record) -> Example:
    question = record.text("question")
    aliases = texts(record.value("possible_answers"))
    if not aliases:
        raise record.error("possible_answers", f"holds no text: {record.value('possible_answers')!r:.80}")
    return Example(
        id=f"test-{record.number}",
        question=question,
        target=answer_target(aliases[0]),
        answer=aliases[0],
        meta={"aliases": aliases, "released_aliases": aliases},
    )
