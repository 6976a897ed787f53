"""From an answer to code that runs, and from runs to rewards.

The code of an answer is a fenced block (```` ``` ````, longer, or `~~~`; also in a list, indented, with its closing fence
glued to the last line, or truncated) whose language is Python or not named: the last one that defines the wanted function; if
none does, the last one with a top-level definition; if none has, the last one; without any block, the whole answer. So usage
examples after a solution do no harm. The released code joins all blocks instead, keeps only imports and definitions
(constants get lost), and renames the first `def` in the text to the wanted name, which may be a helper, and breaks
recursion; here the code runs unchanged, and if the wanted name is not defined, the function that was probably meant gets it
as an alias (`with_name`).
"""

from __future__ import annotations

import ast
import re
import textwrap
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

_LONGEST_ANSWER = 1 << 19
"""Characters of an answer; a longer one has no code, so that reading it cannot take long."""

_OPENING = re.compile(
    r"(?P<before>[ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)(?P<rest>[^\n]*)"
)
_PYTHON = re.compile(r"(?:i?py(?:thon)?[\d.]*)?", re.IGNORECASE)
_QUOTES = re.compile(r"""#[^\n]*|\\.|"{3}|'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""")
_IMPORT = re.compile(r"^[ \t]*(?:import|from)[ \t]", re.MULTILINE)
_DEFINITION = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(?!test|Test|main\b)\w", re.MULTILINE)


def extract_code(answer: str, defines: str | None = None) -> str:
    """The code of an answer; the module's docstring says which block it is.

    Args:
        answer: a completion; of more than half a million characters it has no code.
        defines: name of the wanted function, if known.
    """
    if len(answer) > _LONGEST_ANSWER:
        return ""
    answer = answer.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    blocks = _blocks(answer)
    if not blocks:
        return answer
    wanted = [_DEFINITION]
    if defines is not None:
        name = re.escape(defines)
        wanted.insert(0, re.compile(rf"^(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|^{name}[ \t]*[:=]", re.M))
    for pattern in wanted:
        if defining := [block for block in blocks if pattern.search(block)]:
            return defining[-1]
    return blocks[-1]


def _blocks(answer: str) -> list[str]:
    """The fenced blocks in Python, or in no language that is named.

    A fence inside a string in triple quotes is a part of the code, unless that string never ends.
    """
    lines = answer.split("\n")
    found = _scan(lines, strings=True)
    return _scan(lines, strings=False) or [] if found is None else found


def _scan(lines: Sequence[str], strings: bool) -> list[str] | None:
    """The blocks; None if a string in triple quotes that holds a fence never ends."""
    blocks: list[str] = []
    block: list[str] = []
    opening: re.Match[str] | None = None
    quote, hidden_fence = "", False
    for line in lines:
        found = _OPENING.fullmatch(line)
        if opening is None:
            if found is not None and not _is_inline(found, blocks):
                opening, block, quote, hidden_fence = found, [], "", False
            continue
        before = _before_fence(line, opening["fence"])
        if before is not None and strings and _quote_after(before, quote):
            hidden_fence = True
        elif before is not None and not before.lstrip().startswith("#"):
            _keep(blocks, opening, [*block, before] if before.strip() else block)
            opening = None
            continue
        elif found is not None and not quote and found["fence"] == opening["fence"] and found["language"]:
            _keep(blocks, opening, block)  # The last block was not closed.
            opening, block = found, []
            continue
        block.append(line)
        quote = _quote_after(line, quote) if strings else ""
    if opening is not None:
        if quote and hidden_fence:
            return None
        _keep(blocks, opening, block)
    return blocks


def _before_fence(line: str, fence: str) -> str | None:
    """What stands before the closing fence at the end of a line, or None if there is none."""
    line = line.rstrip()
    before = line.rstrip(fence[0])
    return before if len(line) - len(before) >= len(fence) else None


def _is_inline(found: re.Match[str], blocks: list[str]) -> bool:
    """Whether a line opens and closes its block, which is kept if there is code in it."""
    if "`" not in found["rest"] and "`" not in found["language"]:
        return False
    code = f"{found['language']}{found['rest']}".rstrip().rstrip("`")
    blocks.append(re.sub(r"^(?:python3?|py)\s+", "", code) + "\n")
    return True


def _keep(blocks: list[str], opening: re.Match[str], lines: Sequence[str]) -> None:
    if opening["language"].lower() in ("markdown", "md"):
        blocks += _blocks("\n".join(lines))
    if not _PYTHON.fullmatch(opening["language"].strip("{}.,:")):
        return
    indent = len(opening["before"])
    if indent:
        lines = [line[min(indent, len(line) - len(line.lstrip())) :] for line in lines]
    text = "\n".join(lines)
    first = next((line for line in lines if line.strip()), "")
    blocks.append((textwrap.dedent(text) if first[:1].isspace() else text) + ("\n" if lines else ""))


def _quote_after(line: str, quote: str) -> str:
    """The triple quotes of the string that is open behind a line, given what is open before it; empty: none."""
    position = 0
    while True:
        if quote:
            end = line.find(quote, position)
            if end < 0:
                return quote
            position, quote = end + 3, ""
        token = _QUOTES.search(line, position)
        if token is None:
            return ""
        position = token.end()
        if token[0] in ('"' * 3, "'" * 3):
            quote = token[0]


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


def imported_modules(*texts: str) -> set[str]:
    """Top-level names of the modules that code needs: imports in a `try` can fail."""
    found: set[str] = set()
    texts = tuple(text for text in texts if _IMPORT.search(text))
    pending: list[ast.AST] = [tree for text in texts if (tree := parsed(text)) is not None]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif not isinstance(node, ast.Try):
            pending += ast.iter_child_nodes(node)
    return found


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
