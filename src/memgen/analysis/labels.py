"""Failure types that people decide: an export of failed trajectories, a page to label them, and what labels agree on.

The paper's annotators gave each failed trajectory exactly one of eight types and left out failures outside of them (arXiv
2509.24704, App. G; their number and agreement are not reported). Here two annotators label the same trajectories, which do
not say under which condition they were played, and their agreement is Cohen's kappa.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from memgen.analysis.failures import INVALID_ACTION, WRONG_FORMAT
from memgen.files import write_whole
from memgen.parsing import parse

EXPORT, PAGE = "failures.jsonl", "label.html"

PLANNING, COMPOSITION, PARSING, RESPONSE, FORMATTING, DEMAND, THINK_ACT, BELIEF = (
    "planning failure",
    "compositional reasoning",
    "tool parsing error",
    "tool response error",
    "answer formatting failure",
    "demand misunderstanding",
    "think-act inconsistency",
    "false belief",
)
NONE = "none of these"
MEANINGS = {
    PLANNING: "the steps are wrong, missing or in a wrong order",
    COMPOSITION: "the steps are right, but what they found is put together wrongly",
    PARSING: "a tool call or an action that could not be parsed or carried out",
    RESPONSE: "what a tool or the environment answered is read or used wrongly",
    FORMATTING: "the answer is there, but not in the form that was asked for",
    DEMAND: "something else was answered than was asked",
    THINK_ACT: "the action is not what the agent had just decided",
    BELIEF: "something untrue is taken for a fact",
    NONE: "a failure of another kind, which no table counts",
}
"""The paper's eight types in its order, each with our reading of it: the paper names them and gives no definitions."""
UNLABELLED = "not labelled"
"""In the place of a type, of a failure that people have not labelled, or not alike."""
AS_PEOPLE_SAY = {INVALID_ACTION: PARSING, WRONG_FORMAT: FORMATTING}
"""The types of rules (`memgen.analysis.failures`) that are one of the paper's. The others say where an episode ended."""
OTHER = "other"
_FORMAT = "memgen labels 1"

Answers = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Failure:
    """A failed trajectory, as people are to read it.

    Attributes:
        id: of the item and of what was written; trajectories that are equal are one failure, whatever their condition.
        item: id of the item.
        task: the item's task.
        reward: what it earned.
        messages: the whole conversation: `role` and `content` of each message.
        reference: the item's reference answer.
        rule: the type that rules give it.
    """

    id: str
    item: str
    task: str
    reward: float
    messages: tuple[Mapping[str, str], ...]
    reference: str
    rule: str


@dataclass(frozen=True)
class Labels:
    """One annotator's labels: the file that the page saves.

    Attributes:
        format: of the file.
        export: of which failures (`export_id`).
        annotator: a name.
        labels: a type of `MEANINGS` for each failure that was labelled, by its id.
    """

    format: str
    export: str
    annotator: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Agreement:
    """How alike two sides label the failures that both have labelled.

    Attributes:
        first: an annotator, or the rules.
        second: another.
        failures: number of failures that both labelled.
        share: share of them with the same label.
        kappa: Cohen's kappa; None where chance alone would agree on everything, or there is no failure.
    """

    first: str
    second: str
    failures: int
    share: float
    kappa: float | None


def failure_id(answer: Mapping[str, Any]) -> str:
    """Names a failure by the item and what the agent wrote."""
    text = json.dumps([answer["index"], answer["id"], answer["text"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def collect_failures(
    answers: Mapping[str, Answers], conditions: Collection[str], reference: Callable[[int], str], seed: int
) -> list[Failure]:
    """The different failed trajectories of some conditions, in a random order, so that none tells its condition.

    Args:
        answers: of all conditions.
        conditions: whose failures are wanted.
        reference: the reference answer of an item, by its index.
        seed: of the order.
    """
    found: dict[str, Failure] = {}
    for condition in conditions:
        for index, answer in sorted(answers[condition].items()):
            if answer["failure"] is None:
                continue
            messages = answer.get("messages") or [{"role": "assistant", "content": answer["text"]}]
            found[failure_id(answer)] = Failure(
                id=failure_id(answer),
                item=str(answer["id"]),
                task=answer["task"],
                reward=answer["reward"],
                messages=tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages),
                reference=reference(index),
                rule=answer["failure"],
            )
    ordered = [found[name] for name in sorted(found)]
    Random(seed).shuffle(ordered)
    return ordered


def export_id(failures: Sequence[Failure]) -> str:
    """Names an export by its failures, whatever their order."""
    return hashlib.sha256(" ".join(sorted(failure.id for failure in failures)).encode()).hexdigest()[:16]


def label_page(failures: Sequence[Failure], title: str) -> str:
    """The page to label failures with: one file that fetches nothing.

    The rules' types are not in it, so that they suggest nothing.
    """
    data = {
        "title": title,
        "format": _FORMAT,
        "export": export_id(failures),
        "types": [{"name": name, "meaning": meaning} for name, meaning in MEANINGS.items()],
        "failures": [
            {key: value for key, value in asdict(failure).items() if key != "rule"} for failure in failures
        ],
    }
    # No text can end the element that holds it, or begin a comment in it.
    text = re.sub(
        "[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(data, ensure_ascii=False)
    )
    template = files("memgen.analysis").joinpath("label.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text)


def write_failures(failures: Sequence[Failure], title: str, folder: Path) -> None:
    """Writes `failures.jsonl` and `label.html`, each whole or not at all."""
    lines = (json.dumps(asdict(failure), ensure_ascii=False) for failure in failures)
    write_whole(folder / EXPORT, "".join(f"{line}\n" for line in lines))
    write_whole(folder / PAGE, label_page(failures, title))


def read_labels(path: Path) -> Labels:
    """Reads a file that the page saved.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (--labels)")
    try:
        found = parse(Labels, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of labels: {error}; save one in {PAGE}") from error
    if found.format != _FORMAT:
        raise ValueError(f"{path} is no file of labels: format is {found.format!r}; save one in {PAGE}")
    unknown = sorted(set(found.labels.values()) - set(MEANINGS))
    if unknown:
        raise ValueError(f"{path} has the type {unknown[0]!r}; there are {', '.join(MEANINGS)}")
    return found


@dataclass(frozen=True)
class Labelling:
    """What people said about the failures of an analysis.

    Attributes:
        annotators: their names.
        failures: number of different failures.
        agreed: number that got a label: one annotator's, or of two the same.
        agreements: of two annotators, and of each with the rules, in the types that both know.
        types: the label of each failure that got one, by its id.
    """

    annotators: tuple[str, ...]
    failures: int
    agreed: int
    agreements: tuple[Agreement, ...]
    types: Mapping[str, str]


def combine(failures: Sequence[Failure], given: Sequence[Labels]) -> Labelling:
    """Combines the labels of one annotator or two.

    Of two, a failure gets a label only where they agree. With the rules, an annotator is compared in the types that rules
    decide and the paper has (`AS_PEOPLE_SAY`); all else is one type, "other".

    Args:
        failures: of the analysis.
        given: one annotator's labels, or two.

    Raises:
        ValueError: if there are more than two, two of one annotator, or labels of other failures.
    """
    if not 1 <= len(given) <= 2:
        raise ValueError(f"labels are of one annotator or two, got {len(given)} files (--labels)")
    names = [labels.annotator for labels in given]
    if len(set(names)) < len(names):
        raise ValueError(
            f"both files of labels are of annotator {names[0]!r}; give two annotators' (--labels)"
        )
    export = export_id(failures)
    for labels in given:
        if labels.export != export:
            raise ValueError(
                f"the labels of {labels.annotator!r} are of other failures than this analysis has: label those of its {PAGE}"
            )
    agreements = []
    if len(given) == 2:
        first, second = (labels.labels for labels in given)
        both = sorted(first.keys() & second.keys())
        agreements.append(_agreement(names[0], names[1], [first[i] for i in both], [second[i] for i in both]))
    shared = set(AS_PEOPLE_SAY.values())
    rules = {failure.id: AS_PEOPLE_SAY.get(failure.rule, OTHER) for failure in failures}
    for labels in given:
        own = {name: label if label in shared else OTHER for name, label in labels.labels.items()}
        known = sorted(own)
        agreements.append(
            _agreement(labels.annotator, "rules", [own[i] for i in known], [rules[i] for i in known])
        )
    types = {
        name: label
        for name, label in given[0].labels.items()
        if all(other.labels.get(name) == label for other in given[1:])
    }
    return Labelling(tuple(names), len(failures), len(types), tuple(agreements), types)


def relabelled(
    answers: Mapping[str, Answers], types: Mapping[str, str], conditions: Collection[str]
) -> dict[str, dict[int, dict[str, Any]]]:
    """The answers with people's types of failure in the place of the rules'.

    Args:
        answers: of all conditions.
        types: the label of each failure that got one.
        conditions: those whose failures were labelled. Of others no failure has a type, and no success counts against
            one.

    Returns:
        The answers. An item whose `failure` is `UNLABELLED` counts for the reward alone.
    """

    def type_of(condition: str, answer: Mapping[str, Any]) -> str | None:
        if condition not in conditions:
            return UNLABELLED
        return None if answer["failure"] is None else types.get(failure_id(answer), UNLABELLED)

    return {
        condition: {
            index: {**answer, "failure": type_of(condition, answer)} for index, answer in found.items()
        }
        for condition, found in answers.items()
    }


def _agreement(first: str, second: str, ours: Sequence[str], theirs: Sequence[str]) -> Agreement:
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return Agreement(first, second, len(ours), same / max(1, len(ours)), cohens_kappa(ours, theirs))


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa (Cohen 1960): (p_o - p_e) / (1 - p_e), p_e of the two sides' own frequencies.

    Args:
        first: one side's labels.
        second: the other's, of the same failures in the same order.

    Returns:
        At most 1; None if p_e is 1, or there is no label.
    """
    if not first:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    ours, theirs = Counter(first), Counter(second)
    chance = sum(count * theirs[label] for label, count in ours.items()) / len(first) ** 2
    return None if chance == 1.0 else (observed - chance) / (1.0 - chance)
