"""Learns a chain of tasks in several ways, and tests all tasks before it and after each of its tasks.

Every training and every test is done once and kept in a folder of its own, so a run that was killed goes on with the one
that it was in: a training in the middle of its run, a test at the next item.

What passes from a task to the next: MemGen's weaver starts from the weaver of the task before, and the trigger, if it is
trained, from the trigger of the task before, beside the new weaver. LoRA-SFT starts from the adapter of the task before.
Nothing else is kept, but the replayed items. Whether the paper retrains its trigger for each task, or replays
anything, is not reported (arXiv 2509.24704, Table 4).
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, final

from memgen.continual.measures import Scores
from memgen.continual.settings import LORA, STAGE_OF, ContinualSettings
from memgen.files import new_folder, write_whole
from memgen.results.ledger import differences
from memgen.results.score_files import SUMMARY, read_records
from memgen.results.summary import item_score
from memgen.training.checkpoint import WEAVER_FILE

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
REASONER = "reasoner"
"""Name of the row before the chain."""


@dataclass(frozen=True)
class Stage:
    """A stage on a task.

    Attributes:
        config: its configuration file, whole.
        settings: what the file says.
    """

    config: Path
    settings: Mapping[str, Any]


class Commands(Protocol):
    """The commands that train and test."""

    def fit(self, config: Path, overrides: Mapping[str, object], run: Path) -> None:
        """`memgen fit` in a run's folder, where it goes on if it has begun."""

    def test(self, config: Path, overrides: Mapping[str, object], records: Path) -> None:
        """`memgen test`, recorded in a folder, where it goes on if it has begun."""


@final
class Chain:
    """Learns and tests; each training and each test once.

    Args:
        settings: what is learnt, and how.
        stages: each stage that the methods need, by its name and the task's.
        folder: of everything that is kept; exists.
        commands: train and test.
        progress: called with a line before each training and each row of tests.
    """

    def __init__(
        self,
        settings: ContinualSettings,
        stages: Mapping[tuple[str, str], Stage],
        folder: Path,
        commands: Commands,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings = settings
        self.stages = stages
        self.folder = folder
        self.commands = commands
        self.progress = progress

    def run(self) -> dict[str, Scores]:
        """What every method scores, by its name.

        Raises:
            ValueError: if no item of a task could be scored, or a test was begun with other settings.
            RuntimeError: if a training or a test fails.
        """
        chain = self.settings.chain
        before = self._row(REASONER, REASONER, {"model.memgen.trigger.kind": "never"}, "weaver_sft")
        rows: dict[str, list[dict[str, dict[int, float]]]] = {}
        for method in self.settings.methods:
            rows[method] = [before]
            for place, task in enumerate(chain):
                overrides, stage = self._learnt(method, place)
                rows[method].append(self._row(method, f"{place + 1}-{task}", overrides, stage))
        return {method: self._scores(found) for method, found in rows.items()}

    # Training

    def _learnt(self, method: str, place: int) -> tuple[dict[str, object], str]:
        """How the agent after a task of the chain is tested: values, and the stage that they are for."""
        match method:
            case "memgen":
                found = self._weaver(place)
            case "memgen_trigger":
                found = self._trigger(place)
            case _:
                found = self._lora(method, place)
        return {"model.init_from": found}, STAGE_OF[method]

    def _weaver(self, place: int) -> Path:
        """The weaver after a task of the chain."""
        start = None if place == 0 else self._weaver(place - 1)
        return self._fit("weaver_sft", place, start)

    def _trigger(self, place: int) -> Path:
        """The trigger after a task of the chain, with its weaver."""
        weaver = self._weaver(place)
        if place == 0:
            return self._fit("trigger_rl", place, weaver)
        start = self.folder / "trigger_start" / self._name(place)
        if not start.is_dir():
            with new_folder(start) as folder:
                shutil.copytree(self._trigger(place - 1), folder, dirs_exist_ok=True)
                shutil.copyfile(weaver / WEAVER_FILE, folder / WEAVER_FILE)
        return self._fit("trigger_rl", place, start)

    def _lora(self, method: str, place: int) -> Path:
        """The reasoner's adapter after a task of the chain."""
        start = None if place == 0 else self._lora(method, place - 1)
        replay: dict[str, object] = {}
        if method == "lora_replay" and place > 0:
            earlier = [self._stage(LORA, i).settings["data"]["environment"] for i in range(place)]
            replay = {"data.replay": json.dumps({"environments": earlier, **asdict(self.settings.replay)})}
        return self._fit(LORA, place, start, method, replay)

    def _fit(
        self,
        stage: str,
        place: int,
        start: Path | None,
        method: str | None = None,
        values: Mapping[str, object] | None = None,
    ) -> Path:
        """Trains a stage on a task of the chain; its checkpoint.

        Args:
            stage: of `self.stages`.
            place: of the task in the chain.
            start: the checkpoint that it starts from.
            method: whose it is; None: several methods share it.
            values: on top of its configuration.
        """
        run = self.folder / (method or stage) / self._name(place)
        done = run.with_name(f"{run.name}.json")
        if not done.is_file():
            self.progress(f"{method or stage} on {self.settings.chain[place]}")
            begin = time.perf_counter()
            overrides = {**(values or {}), **({} if start is None else {"model.init_from": start})}
            self.commands.fit(self._stage(stage, place).config, overrides, run)
            write_whole(done, json.dumps({"seconds": round(time.perf_counter() - begin, 1)}) + "\n")
        return run / "best" if (run / "best").is_dir() else run / "last"

    def _stage(self, stage: str, place: int) -> Stage:
        return self.stages[stage, self.settings.chain[place]]

    def _name(self, place: int) -> str:
        return f"{place + 1}-{self.settings.chain[place]}"

    # Tests

    def _row(
        self, method: str, name: str, overrides: Mapping[str, object], stage: str
    ) -> dict[str, dict[int, float]]:
        """Rewards of one agent on all tasks, by item."""
        self.progress(f"test: {method if method == name else f'{method} after {name}'}")
        found = {}
        for task in self.settings.tasks:
            records = self.folder / "tests" / method / name / task
            if not (records / SUMMARY).is_file():
                self.commands.test(self.stages[stage, task].config, overrides, records)
            items: dict[int, list[Mapping[str, Any]]] = {}
            for row in read_records(records).rows:
                if row["fault"] is None:
                    items.setdefault(int(row["index"]), []).append(row)
            found[task] = {index: item_score(rows) for index, rows in items.items()}
        return found

    def _scores(self, rows: Sequence[Mapping[str, Mapping[int, float]]]) -> Scores:
        """The rewards of the items that no row lacks (the environment may have failed an episode)."""
        kept = {}
        for task in self.settings.tasks:
            common = set.intersection(*(set(row[task]) for row in rows))
            if not common:
                raise ValueError(
                    f"no test item of {task} has a valid answer in every row; see the tests' records"
                )
            kept[task] = sorted(common)
        rewards = tuple({task: [row[task][i] for i in kept[task]] for task in kept} for row in rows)
        return Scores(self.settings.chain, tuple(self.settings.tasks), rewards)


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes what a folder's runs are made with, or compares it with what they were made with before.

    Args:
        folder: of everything that is kept.
        settings: as JSON values.

    Raises:
        ValueError: if they differ.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        write_whole(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    wrong = differences(json.loads(path.read_text(encoding="utf-8")), settings)
    if wrong:
        shown = "; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"{folder} was begun with other settings: {shown}; set them as they were, or choose --out DIR"
        )
