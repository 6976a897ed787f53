"""Questions answered with the help of a search engine, over several turns: the task of TriviaQA and PopQA.

The agent writes `<think> ... </think>` and then either `<search> query </search>`, to which the environment answers
`<information>` with passages, or `<answer> ... </answer>`, which ends the episode (the protocol of Search-R1, arXiv
2503.09516; prompt and corrective message are the released code's, to the letter). Differs from the released code:
(1) passages come inside `<information>`, as its prompt promises, where it inserts them bare (and trains on
`<observation>`); (2) a failed search stops the run or ends the episode with an environment error, where it tells the
agent that no page was found and scores what follows as wrong; (3) an action ends at the first closing tag, where a
later `</search>` takes precedence over an earlier `</answer>`; (4) the reported number is an exact match unless
configured otherwise, and its substring match is reported beside it.
"""

from __future__ import annotations

import json
import logging
import re
import string
import unicodedata
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from memgen.environments.base import (
    Episode,
    Example,
    InteractiveEnvironment,
    Message,
    Observation,
    Reward,
    Step,
)
from memgen.environments.search.retrieval import Passage, Searcher, SearchError

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search "
    "as many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>."
)
"""The released code's system message."""
INVALID_ACTION = (
    "My previous action is invalid. If I want to search, I should put the query between <search> and </search>. If I "
    "want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again."
)
"""The observation after an action without a complete tag."""
NOTHING_FOUND = "No passage was found."
LEAST_OBSERVATION_CHARS = 200

Metric = Literal["exact_match", "alias_match", "released_match", "released_grpo"]
OnFailure = Literal["stop", "mark"]

_METRICS = ("exact_match", "alias_match", "released_match", "released_grpo")
_CLOSING = re.compile(r"</(search|answer)>")
_TAGS = re.compile(r"</?(?:think|search|information|answer)>")
_OPEN, _CLOSE = "<information>", "</information>"
_PUNCTUATION = frozenset(string.punctuation + "\u2018\u2019\u00b4`")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


# ------------------------------------------------------------------------------------------------------ the protocol


@dataclass(frozen=True)
class Action:
    """The action of one turn of the agent."""

    kind: Literal["search", "answer"] | None
    """None if the turn is not valid: no complete tag, or nothing inside."""
    content: str
    """The query or the answer."""


def parse_action(text: str) -> Action:
    """The action of a turn: it ends at the first `</search>` or `</answer>`; the rest is ignored."""
    closing = _CLOSING.search(text)
    if closing is None:
        return Action(None, "")
    kind: Literal["search", "answer"] = "search" if closing[1] == "search" else "answer"
    # The last opening tag: a tag named while thinking ("I could use <search>") opens nothing.
    _, opening, content = text[: closing.start()].rpartition(f"<{kind}>")
    content = " ".join(content.split())
    return Action(kind, content) if opening and content else Action(None, "")


def information(passages: Sequence[Passage], max_chars: int) -> str:
    """The observation after a search: the passages, best first, in at most `max_chars` characters, tags included.

    Each is `Doc 1(Title: "...") text`, as in Search-R1. If they are too long together, the last ones are truncated.
    """
    documents = [
        f'Doc {number}(Title: "{passage.title}") {passage.text.strip()}'
        for number, passage in enumerate(passages, start=1)
    ]
    return framed("\n".join(documents) or NOTHING_FOUND, max_chars)


def framed(text: str, max_chars: int) -> str:
    """A text in the tags of an observation, truncated to at most `max_chars` characters, both tags included.

    The protocol's own tags are removed from the text: a page that contains `</information>` must not end it.
    """
    room = max_chars - len(_OPEN) - len(_CLOSE)
    inner = _TAGS.sub("", text)
    if len(inner) > room:
        short = inner[: room - 4]
        inner = f"{short.rpartition(' ')[0] or short} ..."
    return f"{_OPEN}{inner}{_CLOSE}"


# ------------------------------------------------------------------------------------------------------- the scoring


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: as SQuAD's evaluation (arXiv 1606.05250) does.

    Differs from SQuAD's: it also removes the quotation marks that TriviaQA's evaluation (arXiv 1705.03551) removes;
    composed and decomposed accents are the same; and a text of which nothing would remain ("A", "!!!") is only
    lower-cased, so that it equals itself alone.
    """
    lowered = unicodedata.normalize("NFC", text).lower()
    bare = "".join(character for character in lowered if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split()) or " ".join(bare.split()) or " ".join(lowered.split())


def exact_match(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the answer equals one of the aliases, both normalised (EM)."""
    return bool(answer.strip()) and normalize_answer(answer) in {
        normalize_answer(alias) for alias in aliases if alias.strip()
    }


def alias_match(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the answer contains an alias as a sequence of whole words, both normalised (DPR, arXiv 2004.04906).

    PopQA's own accuracy (arXiv 2212.10511) and the released code compare characters: there "Napoli" contains the
    alias "pol" of "politician".
    """
    said = f" {normalize_answer(answer)} "
    return any(f" {normalize_answer(alias)} " in said for alias in aliases if alias.strip())


def released_match(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the answer contains an alias as characters, both only lower-cased: the released code's metric."""
    return any(alias.lower() in answer.lower() for alias in aliases if alias.strip())


def texts(value: object) -> list[str]:
    """The non-empty texts of a value that is a list, a list as a JSON string, or a single text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]  # An answer that happens to begin with a bracket.
    if isinstance(value, str):
        value = [value]
    if value is None or isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        return []
    return [text for text in value if isinstance(text, str) and text.strip()]


def answer_target(answer: str) -> str:
    """The completion that SFT learns: a thought and the answer."""
    return f"<think> I have what I need. </think>\n<answer> {answer} </answer>"


# --------------------------------------------------------------------------------------------------- the environment


class SearchQA(InteractiveEnvironment, ABC):
    """A question, any number of searches, a short answer. `examples` is the benchmark's own.

    An example's `meta` has `aliases` (the texts that count as right), `released_aliases` (those that the released code
    compares with), and `conversation` where the data has a trajectory.
    """

    stop_texts = ("</search>", "</answer>")

    def __init__(
        self,
        search: Searcher | None,
        metric: Metric,
        on_failure: OnFailure,
        max_turns: int,
        max_observation_chars: int,
        system_prompt: str,
    ) -> None:
        """Searches nothing yet.

        Args:
            search: the search backend; None: the benchmark's own passages, if it has any.
            metric: the reward's total, that is, the reported and the trained score. "exact_match": 1 if the answer
                is an alias; "alias_match": 1 if it contains one as whole words; "released_match": 1 if it contains
                one as characters, as the released code evaluates; "released_grpo": as its GRPO trains, 1 for
                released_match, 0.5 for another answer, 0 for none. The first three are reported beside it as components.
            on_failure: when a search fails, "stop" raises a `SearchError`; "mark" ends the episodes that searched
                with an environment error: they are neither trained on nor scored.
            max_turns: turns of the agent, the answer's included.
            max_observation_chars: characters of an observation, the tags included; about four make a token.
            system_prompt: the system message; empty for none.

        Raises:
            ValueError: if a setting is not usable.
        """
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric!r}")
        if on_failure not in ("stop", "mark"):
            raise ValueError(f"on_failure must be stop or mark, got {on_failure!r}")
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        if max_observation_chars < LEAST_OBSERVATION_CHARS:
            raise ValueError(
                f"max_observation_chars must be at least {LEAST_OBSERVATION_CHARS}, got {max_observation_chars}"
            )
        self.search = search
        self.metric: Metric = metric
        self.on_failure: OnFailure = on_failure
        self.max_turns = max_turns
        self.max_observation_chars = max_observation_chars
        self.system_prompt = system_prompt

    def searcher(self) -> Searcher:
        """The search backend.

        Raises:
            ValueError: if there is nothing to search.
        """
        if self.search is None:
            raise ValueError(
                f"{self.name} has nothing to search: set data.environment.search to a "
                "memgen.environments.search.retrieval.PassageIndex or SearchServer"
            )
        return self.search

    def messages(self, example: Example) -> list[Message]:
        """The system message and the bare question."""
        system: list[Message] = (
            [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        )
        return [*system, {"role": "user", "content": example.question}]

    def conversation(self, example: Example) -> list[Message]:
        """The example's own trajectory; else a reference of two turns: the question is searched, then answered.

        Raises:
            SearchError: if the search fails, whatever `on_failure` says: there is no episode to mark.
        """
        if "conversation" in example.meta:
            return [*self.messages(example), *example.meta["conversation"]]
        (found,) = self.searcher().search([example.question])
        return [
            *self.messages(example),
            {
                "role": "assistant",
                "content": f"<think> I should look this up. </think>\n<search> {example.question} </search>",
            },
            {"role": "user", "content": information(found, self.max_observation_chars)},
            {"role": "assistant", "content": example.target},
        ]

    def episode(self) -> Episode:
        """A new episode, which searches through this environment."""
        return SearchEpisode(self)

    def step_all(self, episodes: Sequence[Episode], actions: Sequence[str]) -> list[Step]:
        """Takes one step in each of many episodes; their queries are sent in one search."""
        playing: list[SearchEpisode] = []
        for episode in episodes:
            assert isinstance(episode, SearchEpisode), "episodes are this environment's own"
            playing.append(episode)
        steps = [episode.act(parse_action(text)) for episode, text in zip(playing, actions, strict=True)]
        searching = [episode for episode, step in zip(playing, steps, strict=True) if step is None]
        queries = list(dict.fromkeys(episode.query for episode in searching))
        if not queries:
            return [step for step in steps if step is not None]
        try:
            found = dict(zip(queries, self.searcher().search(queries), strict=True))
        except SearchError as error:
            if self.on_failure == "stop":
                raise
            logger.warning("%d episodes end with an environment error: %s", len(searching), error)
            return [
                episode.fail(str(error)) if step is None else step
                for episode, step in zip(playing, steps, strict=True)
            ]
        return [
            episode.inform(found[episode.query]) if step is None else step
            for episode, step in zip(playing, steps, strict=True)
        ]

    def reward(self, example: Example, answer: str) -> Reward:
        """The score of an episode in which `answer` is the only action; nothing is searched."""
        action = parse_action(answer)
        return self.score(example, action.content if action.kind == "answer" else None)

    def score(self, example: Example, answer: str | None) -> Reward:
        """The score of an answer without its tags; None: no answer was given."""
        aliases: Sequence[str] = example.meta["aliases"]
        said = answer if answer is not None else ""
        exact, alias = float(exact_match(said, aliases)), float(alias_match(said, aliases))
        released = float(released_match(said, example.meta["released_aliases"]))
        answered = float(answer is not None)
        match self.metric:
            case "exact_match":
                total = exact
            case "alias_match":
                total = alias
            case "released_match":
                total = released
            case "released_grpo":
                total = released if released else 0.5 * answered
        parts = {"exact_match": exact, "alias_match": alias, "released_match": released, "answered": answered}
        return Reward(total=total, parts=parts)


@final
class SearchEpisode(Episode):
    """One question. A step is `act`, followed by `inform` or `fail` if the action is a search."""

    def __init__(self, environment: SearchQA) -> None:
        self._environment = environment
        self._example: Example | None = None
        self._restart()

    def _restart(self) -> None:
        self.query = ""
        self._answer: str | None = None
        self._error: str | None = None
        self._counts = {"turns": 0, "searches": 0, "invalid_actions": 0}

    def reset(self, example: Example) -> Observation:
        """Starts a new run; the first observation is empty, as the prompt has the question."""
        self._restart()
        self._example = example
        return Observation("")

    def step(self, action: str) -> Step:
        """Takes an action; a search is sent alone. `SearchQA.step_all` sends those of many episodes together."""
        return self._environment.step_all([self], [action])[0]

    def act(self, action: Action) -> Step | None:
        """Takes a turn; None if it searches for `query`: call `inform` with the result, or `fail`.

        Raises:
            RuntimeError: if the episode has not begun or is over.
        """
        if self._example is None or self._answer is not None or self._error is not None:
            state = "has not begun" if self._example is None else "is over"
            raise RuntimeError(f"this episode {state}; reset it first")
        self._counts["turns"] += 1
        match action.kind:
            case "search":
                self._counts["searches"] += 1
                self.query = action.content
                return None
            case "answer":
                self._answer = action.content
                return Step(observation="", done=True, parts={"answered": 1.0})
            case None:
                self._counts["invalid_actions"] += 1
                return Step(observation=INVALID_ACTION, done=False, parts={"invalid_actions": 1.0})

    def inform(self, passages: Sequence[Passage]) -> Step:
        """The observation with the passages that the search found."""
        text = information(passages, self._environment.max_observation_chars)
        return Step(observation=text, done=False, parts={"searches": 1.0})

    def fail(self, reason: str) -> Step:
        """Ends the episode with an environment error, because its search has failed."""
        self._error = reason
        return Step(observation="", done=True, parts={"searches": 1.0}, fault=reason)

    def reward(self) -> Reward:
        """The score so far, with counts of turns, searches and invalid actions.

        Raises:
            SearchError: if the episode ended with an environment error: it has no score.
        """
        if self._example is None:
            raise RuntimeError("this episode has not begun; reset it first")
        if self._error is not None:
            raise SearchError(f"an episode that ended with an environment error has no score: {self._error}")
        reward = self._environment.score(self._example, self._answer)
        counts = {name: float(count) for name, count in self._counts.items()}
        return Reward(total=reward.total, parts={**reward.parts, **counts})
