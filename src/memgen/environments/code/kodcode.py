"""KodCode (arXiv 2503.02951), the Light-RL-10K set: one Python function per problem, with pytest tests.

The prompt is the released code's. Its random 70/10/20 split is made here by the hash of a seed and the question; a folder
with files named after the splits is taken as it is split. Tests run without pytest (see `harness`), in a sandbox.
The solution's names that a test uses without importing them are there, as in KodCode's own harness. An item is left out, and
counted in the log, if its test text holds no test, if nothing says which function it calls, or if it needs a library that is
neither in the standard library nor among `packages`.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from typing_extensions import override

from memgen.environments.base import Example, Message
from memgen.environments.code.answers import (
    extract_code,
    imported_modules,
    make_executor,
    parsed,
    with_name,
)
from memgen.environments.code.environment import CodeEnvironment
from memgen.environments.code.execution import Isolation, Program, RunLimits
from memgen.environments.questions import Questions
from memgen.environments.sources import HubSplit, Record, Source

PROMPT = (
    "Write an efficient and correct Python function to solve the following problem.Question: {question}\n"
)
"""The released code's user message."""

_TEST = re.compile(r"^\s*(?:async\s+)?def\s+test|^\s*class\s+\w*Test", re.MULTILINE)


@final
class KodCode(CodeEnvironment):
    """Problem in, Python out; reward 1 if all of the item's tests pass in the sandbox, else 0."""

    name = "kodcode"

    def __init__(
        self,
        path: str = "KodCode/KodCode-Light-RL-10K",
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        revision: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        prompt: str = PROMPT,
        target_style: Literal["raw", "fenced"] = "raw",
        isolation: Isolation = "bubblewrap",
        limits: RunLimits | None = None,
        packages: Sequence[str] = (),
        programs: Sequence[str] = (),
        reward_workers: int = 4,
    ) -> None:
        """Reads nothing yet.

        Args:
            path: file, folder, or dataset of the hub.
            train_file: records in the folder `path`, if not to be found by name. A file that is not named after a
                split, and the hub's dataset, are split by the fractions below.
            val_file: likewise.
            test_file: likewise.
            revision: of the hub's dataset.
            validation_fraction: share of all items for validation, where there is no file for it.
            test_fraction: share of all items for testing, likewise; 1 makes all of them test items.
            split_seed: which ones.
            prompt: the user message; `{question}` stands for the problem and `{signature}`, if it is there, for the
                wanted function's first line.
            target_style: the SFT target, the solution as it is or in a ```` ```python ```` block.
            isolation: "bubblewrap", or "limits" where it cannot be installed: limits only, no sandbox.
            limits: of each run; default: 5 s CPU, 20 s in all.
            packages: installed packages that the code may import.
            programs: commands of the host that the code may run.
            reward_workers: runs at a time.

        Raises:
            RuntimeError: if bubblewrap is wanted and not installed.
            ValueError: if a setting is not usable.
        """
        if target_style not in ("raw", "fenced"):
            raise ValueError(f"target_style must be raw or fenced, got {target_style!r}")
        self.target_style = target_style
        self._libraries = {*sys.stdlib_module_names, *packages, "pytest", "solution"}
        source = Source(
            task="KodCode",
            path=path,
            files={"train": train_file, "val": val_file, "test": test_file},
            hub={"train": [HubSplit("train")]},
            revision=revision,
            folders=("data",),
            lone_file="to_split",
        )
        super().__init__(
            Questions(source, self._example, validation_fraction, test_fraction, split_seed, prompt=prompt),
            make_executor(
                isolation, limits or RunLimits(cpu_s=5, wall_s=20.0), reward_workers, packages, programs
            ),
        )

    @override
    def messages(self, example: Example) -> list[Message]:
        """One user message: the instruction and the problem."""
        text = self.questions.prompt.replace("{signature}", example.meta["signature"])
        return [{"role": "user", "content": text.replace("{question}", example.question)}]

    @override
    def program(self, example: Example, answer: str) -> Program | None:
        """The tests, and the answer's code; if its function has another name, the wanted name becomes an alias."""
        name = example.meta["function"]
        code = extract_code(answer, defines=name)
        tree = parsed(code)
        if tree is None or not tree.body:
            return None
        return Program(
            solution=with_name(code, name, example.meta["parameters"]),
            tests=example.meta["test"],
            style="pytest",
        )

    def _example(self, record: Record, identifier: str) -> Example | str:
        test = record.text("test")
        solution = record.text("solution")
        question = record.text("question")
        info = _wanted(record) or _imported(test)
        if not _TEST.search(test):
            return f"{record.where} holds no test"
        if info is None:
            return f"{record.where} does not say which function its tests call"
        missing = ", ".join(sorted(imported_modules(f"{solution}\n", test) - self._libraries))
        if missing:
            return f"{record.where} needs libraries that the sandbox does not have ({missing}); name them in packages"
        target = solution if self.target_style == "raw" else f"```python\n{solution}\n```"
        return Example(
            id=identifier,
            question=question,
            target=target,
            answer=solution,
            meta={
                "test": test,
                "function": info["function_name"],
                "signature": info.get("function_declaration") or "",
                "parameters": _count(info.get("parameter_list")),
            },
        )


def _wanted(record: Record) -> Mapping[str, Any] | None:
    """The function that the tests call: the first of the column, which CSV files hold as JSON; None if it is empty."""
    given = record.fields.get("test_info")
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except ValueError:
            try:
                given = ast.literal_eval(given)
            except (ValueError, SyntaxError) as error:
                raise record.error(
                    "test_info", f"is neither JSON nor a Python list: {given!r:.80}"
                ) from error
    first = given[0] if isinstance(given, Sequence) and not isinstance(given, str) and given else given
    if not first or (isinstance(first, Mapping) and first.get("function_name") is None):
        return None
    if not isinstance(first, Mapping) or not isinstance(first["function_name"], str):
        raise record.error("test_info", f"must be a list of objects with function_name, got {given!r:.80}")
    return first


def _imported(test: str) -> Mapping[str, Any] | None:
    """The first name that the tests import from the solution."""
    for node in ast.walk(parsed(test) or ast.Module(body=[], type_ignores=[])):
        if isinstance(node, ast.ImportFrom) and node.module == "solution" and node.names[0].name != "*":
            return {"function_name": node.names[0].name}
    return None


def _count(parameters: Any) -> int | None:
    """How many parameters a list such as "(a, b=1)" has; None if it cannot be read."""
    if not isinstance(parameters, str):
        return None
    tree = parsed(
        f"def f{parameters}: pass" if parameters.strip().startswith("(") else f"def f({parameters}): pass"
    )
    if tree is None or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    return len(tree.body[0].args.posonlyargs + tree.body[0].args.args)
