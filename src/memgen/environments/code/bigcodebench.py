"""BigCodeBench (arXiv 2406.15877): Python functions that call libraries, tested by unittest.

Asked as in the benchmark's "instruct" form (a description and the first lines) or its "complete" form (the first lines
with a docstring, to be continued). As in the benchmark's own harness, an answer in the instruct form is run behind the
task's first lines, so a forgotten import does not count as a wrong answer (`calibrated`). The paper's split (912 for
training, 228 for testing) is not published; it is made here by a seed and the task. A task is left out, and counted in
the log, if it needs a library that is neither in the standard library nor among `packages`.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Sequence
from typing import Literal, final

from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.environments.code.answers import extract_code, make_executor, parsed, score
from memgen.environments.code.execution import Isolation, Program, RunLimits
from memgen.environments.records import HubSplit, Part, Record, Source, checked_fraction, share

log = logging.getLogger(__name__)

PROMPT = "{question}\n"
PROGRAMS = ("sh", "bash", "cat", "cp", "echo", "gzip", "ls", "mv", "rm", "sleep", "split", "tar")
"""Commands that standard-library tasks run."""


@final
class BigCodeBench(Environment):
    """Description in, Python out; reward 1 if all of the item's tests pass in the sandbox, else 0."""

    name = "bigcodebench"

    def __init__(
        self,
        path: str = "bigcode/bigcodebench",
        hub_split: str = "v0.1.4",
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        revision: str | None = None,
        validation_fraction: float = 0.0,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        form: Literal["instruct", "complete"] = "instruct",
        prompt: str = PROMPT,
        calibrated: bool = True,
        isolation: Isolation = "bubblewrap",
        limits: RunLimits | None = None,
        packages: Sequence[str] = (),
        programs: Sequence[str] = PROGRAMS,
        reward_workers: int = 4,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: file, folder, or dataset of the hub.
            hub_split: the version, which is a split on the hub.
            train_file: records in the folder `path`, if not to be found by name. A file that is not named after a
                split, and the hub's dataset, are split by the fractions below.
            val_file: likewise.
            test_file: likewise.
            revision: of the hub's dataset.
            validation_fraction: share of all tasks for validation, where there is no file for it.
            test_fraction: share of all tasks for testing, likewise; 1 makes all of them test items.
            split_seed: which ones.
            form: which of the benchmark's two prompts.
            prompt: the user message; `{question}` stands for it.
            calibrated: whether the task's first lines stand before an answer in the instruct form.
            isolation: "bubblewrap", or "limits" where that cannot be had: limits only, no sandbox.
            limits: of each run; default: 20 s CPU, 60 s in all.
            packages: installed packages that the code may import, by the names it imports them by.
            programs: commands of the host that the code may run.
            reward_workers: runs at a time.

        Raises:
            RuntimeError: if bubblewrap is wanted and not installed.
            ValueError: if a setting is not usable.
        """
        if "{question}" not in prompt:
            raise ValueError(f"prompt must contain {{question}}, got {prompt!r}")
        if form not in ("instruct", "complete"):
            raise ValueError(f"form must be instruct or complete, got {form!r}")
        self.path = path
        self.validation_fraction = checked_fraction("validation_fraction", validation_fraction)
        self.test_fraction = checked_fraction("test_fraction", test_fraction)
        if validation_fraction + test_fraction > 1:
            raise ValueError(
                "validation_fraction and test_fraction must be at most 1 together, got "
                f"{validation_fraction} and {test_fraction}"
            )
        self.split_seed = split_seed
        self.form = form
        self.prompt = prompt
        self.calibrated = calibrated
        self._libraries = {*sys.stdlib_module_names, *packages}
        self._source = Source(
            task="BigCodeBench",
            path=path,
            files={"train": train_file, "val": val_file, "test": test_file},
            hub={"train": [HubSplit(hub_split)]},
            revision=revision,
            folders=("data",),
        )
        self._executor = make_executor(
            isolation,
            limits or RunLimits(cpu_s=20, wall_s=60.0),
            reward_workers,
            packages,
            programs if isolation == "bubblewrap" else (),
        )
        self._read: dict[Part, list[Example]] = {}

    def examples(self, split: Split) -> list[Example]:
        """The items of a split in the order of the file.

        Raises:
            FileNotFoundError: if the data is neither local nor to be had from the hub.
            ValueError: if a record is broken; the message names file, line and column.
        """
        own = {part: self._source.splits(part) for part in ("val", "test")}
        if split != "train" and own[split]:
            return self._items(split)
        kept = []
        for example in self._items("train"):
            place = share(example.meta["task_id"], self.split_seed, "split")
            test = 0.0 if own["test"] else self.test_fraction
            val = 0.0 if own["val"] else self.validation_fraction
            side = "test" if place < test else "val" if place < test + val else "train"
            if side == split:
                kept.append(example)
        return kept

    def messages(self, example: Example) -> list[Message]:
        """One user message: the benchmark's own prompt."""
        return [{"role": "user", "content": self.prompt.replace("{question}", example.question)}]

    def reward(self, example: Example, answer: str) -> Reward:
        """1 if the answer's code passes all tests, else 0."""
        return self.rewards([example], [answer])[0]

    def rewards(self, examples: Sequence[Example], answers: Sequence[str]) -> list[Reward]:
        """Runs many, `reward_workers` at a time."""
        return score(self._executor, [self._program(e, a) for e, a in zip(examples, answers, strict=True)])

    def _program(self, example: Example, answer: str) -> Program | None:
        code = extract_code(answer, defines=example.answer)
        if self.form == "complete" and f"def {example.answer}" not in code:
            code = example.meta["complete_prompt"] + code  # A continuation.
        elif self.form == "instruct" and self.calibrated and parsed(code) is not None:
            code = f"{example.meta['code_prompt'].rstrip()}\n    pass\n\n{code}"
        tree = parsed(code)
        if tree is None or not tree.body or not answer.strip():
            return None
        return Program(solution=code, tests=example.meta["test"], style="unittest")

    def _items(self, part: Part) -> list[Example]:
        if part not in self._read:
            records = self._source.records(part, whole=part == "train")
            kept = [record for record in records if _libraries(record) <= self._libraries]
            if len(kept) < len(records):
                log.info(
                    "BigCodeBench: %d of %d tasks need libraries that the sandbox does not have; name them in packages",
                    len(records) - len(kept),
                    len(records),
                )
            self._read[part] = [self._example(part, record) for record in kept]
        return self._read[part]

    def _example(self, part: Part, record: Record) -> Example:
        texts = {key: record.text(key) for key in ("task_id", "test", "entry_point")}
        for column in ("code_prompt", "complete_prompt", "canonical_solution"):
            record.text(column)
        # Not stripped: the solution goes on inside the function that these begin.
        code_prompt, body = record.value("code_prompt"), record.value("canonical_solution")
        instruct = self.form == "instruct"
        return Example(
            id=f"{part}-{record.number}",
            question=record.text("instruct_prompt" if instruct else "complete_prompt"),
            target=f"```python\n{code_prompt if instruct else record.value('complete_prompt')}{body}\n```",
            answer=texts["entry_point"],
            meta={
                "task_id": texts["task_id"],
                "test": texts["test"],
                "code_prompt": code_prompt,
                "complete_prompt": record.value("complete_prompt"),
            },
        )


def _libraries(record: Record) -> set[str]:
    """The libraries a task needs, by the name of their top package."""
    given = record.value("libs")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError) as error:
            raise record.error("libs", f"is no Python list: {given!r:.80}") from error
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise record.error("libs", f"must be a list of library names, got {given!r:.80}")
    return {name.partition(".")[0] for name in given}
