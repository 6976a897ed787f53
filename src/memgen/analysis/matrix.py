"""The ablation matrix in numbers: a line for each condition, and paired tests between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memgen.analysis.ablation import CONDITIONS, Ablation, Condition
from memgen.analysis.effects import REWARD, Effect, Outcome, effects, outcomes
from memgen.environments.base import Environment, Example, InteractiveEnvironment
from memgen.results.best_of_n import affordable, oracle, positions, positions_of_first, vote
from memgen.results.ledger import read_lines
from memgen.results.score_files import ANSWERS, JOURNAL, read_records
from memgen.results.statistics import Interval, mean_interval
from memgen.results.summary import Row, item_score

COSTS = ("latents", "insertions", "positions", "tokens", "seconds", "cpu_seconds")
"""Means per answered item."""

Scored = dict[int, dict[str, Any]]
"""What an item scored under a condition, by its index: `reward`, `fault`, `failure`, `task`, `finished`, `samples` and the
`COSTS`."""


@dataclass(frozen=True)
class Line:
    """One condition's results.

    Attributes:
        name: of the condition; of best-of-n with its selector.
        items: number of items with a valid answer.
        faulted: number of items that the environment failed; they are left out.
        reward: mean reward.
        finished: share of answers that were not cut off.
        samples: mean number of answers that an item was given to choose from.
        costs: means per item: latents inserted, insertions, positions read by reasoner, weaver and trigger, tokens
            written, wall seconds and CPU seconds of this process (decoding and environment; loading is left out).
    """

    name: str
    items: int
    faulted: int
    reward: Interval
    finished: float
    samples: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Matrix:
    """Everything that an ablation found.

    Attributes:
        title: what was compared.
        environment: its name.
        of: what was played: the checkpoint, or the sweep.
        items: number of test items.
        temperature: of the answers, unless a note says otherwise.
        seed: of the answers.
        first: name of the condition that all others are compared with.
        memory: name of the condition with memory that is compared with all others, `trained` if it was played, else
            `always`; None if neither was.
        lines: of all conditions.
        tests: number of different tests in the next two, over which Holm's correction of both is made.
        against_first: each condition's reward against that of the first.
        of_memory: the reward with memory against that of each other condition.
        by_task: both on each task, where there are several; corrected over all of them.
        notes: what has to be known to read the table.
    """

    title: str
    environment: str
    of: str
    items: int
    temperature: float
    seed: int
    first: str
    memory: str | None
    lines: tuple[Line, ...]
    tests: int
    against_first: tuple[Effect, ...]
    of_memory: tuple[Effect, ...]
    by_task: tuple[Effect, ...]
    notes: tuple[str, ...]


def matrix(ablation: Ablation) -> Matrix:
    """The numbers of an ablation that was played to its end.

    Raises:
        ValueError: if a condition is not complete, or has no valid answer.
    """
    examples = [item.example for item in ablation.items]
    rows = {c.name: _rows(ablation.folder, c, len(examples)) for c in ablation.conditions}
    memory = _memory(ablation.conditions)
    budget = None if memory is None else {index: positions(own[0]) for index, own in rows[memory].items()}
    notes = _notes(ablation)
    scored: dict[str, Scored] = {}
    for condition in ablation.conditions:
        own = rows[condition.name]
        if condition.samples == 1:
            name = condition.name
            scored[name] = {index: _scored(answers, answers[0]) for index, answers in own.items()}
            continue
        counted = {
            index: answers[: len(answers) if budget is None else affordable(answers, budget[index])]
            for index, answers in own.items()
        }
        notes.append(_equal_positions(condition, memory, counted))
        chosen = {"oracle": {index: oracle(_valid(answers)) for index, answers in counted.items()}}
        votes = _votes(ablation, condition, examples, counted)
        if votes is None:
            notes.append(
                f"{condition.name} has no majority vote: {ablation.data.environment.name} has no exact answers "
                "(Environment.final_answer)"
            )
        else:
            chosen["vote"] = votes
        for selector, best in chosen.items():
            scored[f"{condition.name} {selector}"] = {
                index: _scored(counted[index], best[index], of=own[index]) for index in own
            }
    name = ablation.data.environment.name
    for found in scored.values():
        for index, record in found.items():
            record["task"] = str(examples[index].meta.get("task", name))
    return compared(
        scored,
        title="Ablation",
        environment=name,
        of=ablation.init_from,
        temperature=ablation.generation.temperature,
        seed=ablation.generation.seed,
        memory=memory,
        notes=notes,
    )


def compared(
    scored: Mapping[str, Scored],
    *,
    title: str,
    environment: str,
    of: str,
    temperature: float,
    seed: int,
    memory: str | None,
    notes: Sequence[str],
    costs: Sequence[str] = COSTS,
) -> Matrix:
    """Compares conditions, each by the name of its line; the parameters are the fields of `Matrix`, and names of costs.

    Raises:
        ValueError: if a condition has no valid answer.
    """
    lines = tuple(_line(condition, found, costs) for condition, found in scored.items())
    first = next(iter(scored))
    others = [condition for condition in scored if condition != first]
    pairs = [(other, first) for other in others]
    if memory is not None:
        pairs += [(memory, other) for other in scored if other not in (memory, first)]
    overall = effects(pairs, scored, [Outcome(REWARD)])
    tasks = [outcome for outcome in outcomes(list(scored.values())) if outcome.task is not None]
    return Matrix(
        title=title,
        environment=environment,
        of=of,
        items=len(scored[first]),
        temperature=temperature,
        seed=seed,
        first=first,
        memory=memory,
        lines=lines,
        tests=len(overall),
        against_first=tuple(effect for effect in overall if effect.against == first),
        of_memory=tuple(effect for effect in overall if effect.condition == memory),
        by_task=tuple(effects(pairs, scored, tasks)),
        notes=tuple(notes),
    )


def scored_test(rows: Sequence[Row], task: str) -> Scored:
    """What the items of a recorded test scored; of several answers to an item the mean reward and all costs.

    Args:
        rows: the scores of its answers.
        task: name of the task.
    """
    by_item: dict[int, list[Row]] = {}
    for row in rows:
        by_item.setdefault(int(row["index"]), []).append(row)
    found = {}
    for index, answers in sorted(by_item.items()):
        valid = _valid(answers)
        found[index] = {**_scored(answers, valid[0]), "reward": item_score(valid), "task": task}
    return found


def _memory(conditions: Sequence[Condition]) -> str | None:
    names = [condition.name for condition in conditions]
    return next((name for name in ("trained", "always") if name in names), None)


def _rows(folder: Path, condition: Condition, items: int) -> dict[int, list[Row]]:
    """The scores of a condition's answers, by item."""
    place = folder / CONDITIONS / condition.folder_name
    found: dict[int, list[Row]] = {}
    for row in read_records(place).rows:
        found.setdefault(int(row["index"]), []).append(row)
    if len(found) < items:
        raise ValueError(
            f"{place} has {len(found)} of {items} items; run the command again, which goes on where it stopped"
        )
    return dict(sorted(found.items()))


def _valid(rows: Sequence[Row]) -> Sequence[Row]:
    return [row for row in rows if row["fault"] is None] or rows


def _votes(
    ablation: Ablation,
    condition: Condition,
    examples: Sequence[Example],
    counted: Mapping[int, Sequence[Row]],
) -> dict[int, Row] | None:
    """The answer that wins each item's vote; None if the task has no exact answers."""
    environment: Environment = ablation.data.environment
    if isinstance(environment, InteractiveEnvironment):
        return None
    folder = ablation.folder / CONDITIONS / condition.folder_name
    finals = {
        (int(line["index"]), int(line["sample"])): environment.final_answer(
            examples[int(line["index"])], str(line["answer"])
        )
        for line in read_lines(folder / JOURNAL, ANSWERS)
    }
    if all(final is None for final in finals.values()):
        return None
    return {
        index: vote(valid, [finals[index, int(row["sample"])] for row in valid])
        for index, answers in counted.items()
        for valid in [_valid(answers)]
    }


def _scored(counted: Sequence[Row], chosen: Row, of: Sequence[Row] = ()) -> dict[str, Any]:
    """What an item scored: the reward of the chosen answer, the costs of all that count.

    Args:
        counted: the answers that count.
        chosen: one of them.
        of: all answers that were sampled, if these were several.
    """
    read = positions_of_first(of, len(counted)) if of else sum(positions(row) for row in counted)
    return {
        "reward": float(chosen["reward"]),
        "fault": chosen["fault"],
        "failure": None,
        "finished": float(chosen["finished"]),
        "samples": float(len(counted)),
        "positions": read,
        **{name: sum(float(row[name]) for row in counted) for name in COSTS if name != "positions"},
    }


def _line(name: str, scored: Scored, costs: Sequence[str]) -> Line:
    valid = [record for record in scored.values() if record["fault"] is None]
    if not valid:
        raise ValueError(f"no item has a valid answer under {name}: all had an environment error")

    def mean(key: str) -> float:
        return float(sum(record[key] for record in valid) / len(valid))

    return Line(
        name=name,
        items=len(valid),
        faulted=len(scored) - len(valid),
        reward=mean_interval([record["reward"] for record in valid]),
        finished=mean("finished"),
        samples=mean("samples"),
        costs={cost: mean(cost) for cost in costs},
    )


def _equal_positions(condition: Condition, memory: str | None, counted: Mapping[int, Sequence[Row]]) -> str:
    mean = sum(map(len, counted.values())) / len(counted)
    if memory is None:
        return (
            f"{condition.name}: all {condition.samples} answers count; without trained or always there are no positions to "
            "make theirs equal to"
        )
    return (
        f"{condition.name}: of {condition.samples} answers of the reasoner alone, as many count as have together at most the "
        f"positions of {memory} on the same item, the first always: {mean:.2f} on average. The oracle selects by the "
        "environment's reward, which no selector can do better than; the vote takes the most frequent final answer"
    )


def _notes(ablation: Ablation) -> list[str]:
    kinds = {condition.kind for condition in ablation.conditions}
    chosen, temperature = ablation.settings.bon_temperature, ablation.generation.temperature
    notes = []
    if "bon" in kinds and chosen is not None and chosen != temperature:
        notes.append(
            f"best-of-n samples at temperature {chosen:g} (--bon-temperature), all others at {temperature:g}"
        )
    if "cot" in kinds:
        notes.append(
            f"cot is the reasoner alone with {ablation.settings.cot_text!r} at the end of the prompt"
        )
    if "entropy" in kinds:
        notes.append(
            "entropy:T invokes where the entropy of the next token is above T nats, at temperature 1 and without parameters"
        )
    if "pause" in kinds:
        notes.append(
            "pause is always with constant vectors in place of latents: pause untrained ones of a token's norm, pause:DIR learned ones"
        )
    if "swapped" in kinds:
        notes.append(
            "swapped is always with the latents of the next item of the same task; the seconds of making those are left out"
        )
    if "random" in kinds:
        notes.append("random:P invokes with probability P at each boundary, by the item's seed")
    return notes
