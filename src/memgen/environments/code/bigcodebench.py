"""BigCodeBench (arXiv 2406.15877): Python functions that call libraries, tested by unittest.

The prompt is the benchmark's "instruct" form (a description and the first lines) or its "complete" form (the first lines
with a docstring, to be continued). As in the benchmark's own harness, an answer in the instruct form is run after the
task's first lines, so a forgotten import does not count as a wrong answer (`calibrated`). The paper's split (912 for
training, 228 for testing) is not published; it is made here by the hash of a seed and the task's id. A task is left out,
and counted in the log, if it or its tests need a library that is neither in the standard library nor among `packages`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from typing import Literal, final

from typing_extensions import override

from memgen.environments.base import Example
from memgen.environments.code.answers import extract_code, imported_modules, make_executor, parsed
from memgen.environments.code.environment import CodeEnvironment
from memgen.environments.code.execution import Isolation, Program, RunLimits
from memgen.environments.questions import Questions, seeded_key
from memgen.environments.sources import HubSplit, Record, Source

PROMPT = "{question}\n"
PROGRAMS = ("sh", "bash", "cat", "cp", "echo", "gzip", "ls", "mv", "rm", "sleep", "split", "tar")
"""Commands that tasks of the standard library run."""


@final
class BigCodeBench(CodeEnvironment):
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
            calibrated: whether the task's first lines are put before an answer in the instruct form.
            isolation: "bubblewrap", or "limits" where it cannot be installed: limits only, no sandbox.
            limits: of each run; default: 20 s CPU, 60 s in all.
            packages: installed packages that the code may import, by their import names.
            programs: commands of the host that the code may run.
            reward_workers: runs at a time.

        Raises:
            RuntimeError: if bubblewrap is wanted and not installed.
            ValueError: if a setting is not usable.
        """
        if form not in ("instruct", "complete"):
            raise ValueError(f"form must be instruct or complete, got {form!r}")
        self.form = form
        self.calibrated = calibrated
        self._libraries = {*sys.stdlib_module_names, *packages}
        source = Source(
            task="BigCodeBench",
            path=path,
            files={"train": train_file, "val": val_file, "test": test_file},
            hub={"train": [HubSplit(hub_split)]},
            revision=revision,
            folders=("data",),
            lone_file="to_split",
        )
        questions = Questions(
            source,
            self._example,
            validation_fraction,
            test_fraction,
            split_key=lambda item: seeded_key(item.meta["task_id"], split_seed, "split"),
            prompt=prompt,
        )
        super().__init__(
            questions,
            make_executor(
                isolation,
                limits or RunLimits(cpu_s=20, wall_s=60.0),
                reward_workers,
                packages,
                programs if isolation == "bubblewrap" else (),
            ),
        )

    @override
    def program(self, example: Example, answer: str) -> Program | None:
        """The tests, and the answer's code after the task's first lines where the form needs them."""
        code = extract_code(answer, defines=example.answer)
        if self.form == "complete" and f"def {example.answer}" not in code:
            code = example.meta["complete_prompt"] + code  # A continuation.
        elif self.form == "instruct" and self.calibrated and parsed(code) is not None:
            code = f"{example.meta['code_prompt'].rstrip()}\n    pass\n\n{code}"
        tree = parsed(code)
        if tree is None or not tree.body or not answer.strip():
            return None
        return Program(solution=code, tests=example.meta["test"], style="unittest")

    def _example(self, record: Record, identifier: str) -> Example | str:
        missing = _libraries(record) - self._libraries
        if not missing:  # What the list of libraries does not name: the tests' own.
            test = record.text("test")
            solution = f"{record.value('code_prompt')}{record.value('canonical_solution')}"
            missing = imported_modules(solution, test) - self._libraries
        if missing:
            names = ", ".join(sorted(missing))
            return f"{record.where} needs libraries that the sandbox does not have ({names}); name them in packages"
        texts = {key: record.text(key) for key in ("task_id", "test", "entry_point")}
        for column in ("code_prompt", "complete_prompt", "canonical_solution"):
            record.text(column)
        # Not stripped: the solution goes on inside the function that these begin.
        code_prompt, body = record.value("code_prompt"), record.value("canonical_solution")
        instruct = self.form == "instruct"
        return Example(
            id=identifier,
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
    """The libraries a task needs, by their top-level package names."""
    given = record.value("libs")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError) as error:
            raise record.error("libs", f"is not a Python list: {given!r:.80}") from error
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise record.error("libs", f"must be a list of library names, got {given!r:.80}")
    return {name.partition(".")[0] for name in given}
