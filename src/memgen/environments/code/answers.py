"""From an answer to code that runs, and from runs to rewards.

The code of an answer is the last ```` ```python ```` block, complete or truncated (```` ```py ````, ```` ```python3 ````
and blocks without a language count too), that defines the wanted function; if none defines it, the last block; without
any block, the whole answer. So usage examples after a solution do no harm. The released code joins all blocks instead,
keeps only imports and definitions (constants get lost), and renames the first `def` in the text to the wanted name,
which may be a helper, and breaks recursion; here the code runs unchanged, and if the wanted name is not defined, the
function that was probably meant gets it as an alias (`with_name`).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence

from memgen.environments.base import Reward
from memgen.environments.code.execution import (
    Execution,
    Executor,
    Isolation,
    LimitedProcess,
    Program,
    RunLimits,
)
from memgen.environments.code.sandbox import Bubblewrap

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+.-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S
)
_PYTHON = ("", "py", "python", "python3")


def extract_code(answer: str, defines: str | None = None) -> str:
    """The code of an answer; the module's docstring says which block it is.

    Args:
        answer: a completion.
        defines: name of the wanted function, if known.
    """
    blocks = [m["code"] for m in _FENCE.finditer(answer) if m["language"].lower() in _PYTHON]
    if not blocks:
        return answer
    if defines is not None:
        wanted = re.compile(
            rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(defines)}\b|^{re.escape(defines)}[ \t]*=", re.M
        )
        blocks = [block for block in blocks if wanted.search(block)] or blocks
    return blocks[-1]


def parsed(code: str) -> ast.Module | None:
    """The syntax tree of code, or None if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # The warnings concern the answer's text.
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def with_name(code: str, name: str, parameters: int | None = None) -> str:
    """Code that defines `name`, if it has a function that can be meant by it.

    If the name is not defined, the function meant is the first top-level function with that many parameters (if there is
    one) that no other top-level function calls: not a helper.

    Args:
        code: an answer's code.
        name: what the tests import.
        parameters: number of its parameters, if known.
    """
    tree = parsed(code)
    if tree is None or name in _defined(tree):
        return code
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    called = {
        child.id
        for function in functions
        for child in ast.walk(function)
        if isinstance(child, ast.Name) and child.id != function.name
    }
    candidates = [function for function in functions if function.name not in called] or functions
    fitting = [
        f
        for f in candidates
        if parameters is not None and len(f.args.posonlyargs + f.args.args) == parameters
    ]
    chosen = next(iter(fitting or candidates), None)
    return code if chosen is None else f"{code}\n\n{name} = {chosen.name}\n"


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.Module(body=_top_level(tree.body), type_ignores=[])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def _top_level(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Statements with the bodies of functions and classes emptied."""
    kept: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.FunctionDef):
            node = ast.FunctionDef(node.name, node.args, [ast.Pass()], [], node.returns)
        elif isinstance(node, ast.AsyncFunctionDef):
            node = ast.AsyncFunctionDef(node.name, node.args, [ast.Pass()], [], node.returns)
        elif isinstance(node, ast.ClassDef):
            node = ast.ClassDef(node.name, [], [], [ast.Pass()], [])
        kept.append(node)
    return kept


def make_executor(
    isolation: Isolation,
    limits: RunLimits,
    workers: int,
    packages: Sequence[str] = (),
    programs: Sequence[str] = (),
) -> Executor:
    """The executor of answers' code.

    Args:
        isolation: "bubblewrap", or "limits" for machines without it: resource limits only, no sandbox.
        limits: resource limits of each run.
        workers: number of parallel runs.
        packages: installed packages that the code may import; with "limits", none.
        programs: commands of the host that the code may run; with "limits", all.

    Raises:
        RuntimeError: if bubblewrap is asked for and not installed.
        ValueError: if a setting is not usable.
    """
    match isolation:
        case "bubblewrap":
            return Bubblewrap(limits, workers, packages, programs)
        case "limits":
            if packages:
                raise ValueError(f"packages need isolation: bubblewrap, got {list(packages)} with limits")
            return LimitedProcess(limits, workers)
        case other:
            raise ValueError(f"isolation must be bubblewrap or limits, got {other!r}")


def score(executor: Executor, programs: Sequence[Program | None]) -> list[Reward]:
    """Runs programs and scores them: 1 if every test passed, else 0. None: an answer without code."""
    runs = iter(executor.run_all([program for program in programs if program is not None]))
    return [_reward(None if program is None else next(runs)) for program in programs]


def _reward(execution: Execution | None) -> Reward:
    if execution is None:
        names = ("correct", "has_answer", "tests_passed", "timed_out", "flooded")
        return Reward(total=0.0, parts=dict.fromkeys(names, 0.0))
    correct = float(execution.passed)
    parts = {
        "correct": correct,
        "has_answer": 1.0,
        "tests_passed": execution.share_passed if execution.error is None else 0.0,
        "timed_out": float(execution.timed_out),
        "flooded": float(execution.flooded),
    }
    return Reward(total=correct, parts=parts)
