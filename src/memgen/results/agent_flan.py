"""Agent-FLAN (arXiv 2403.12881): collected trajectories rewritten as training data for SFT.

    CHAT       a turn in the environment's form becomes plain words: one question and answer for each skill in it
    BALANCE    each skill keeps its share of them: reasoning (the thought), retrieval (which tool or action), understanding
               (with which argument), and format (the trajectory as it was)
    NEGATIVE   tools that are not there are not used: the agent says so. Where ordinary conversations are given, they are also
               held in front of the trajectories' tools, which they need none of
    MIX        ordinary conversations as they are

Differs from the paper, whose code is not published: (1) no language model rewrites anything, so questions and refusals are
fixed sentences; (2) an answer and what it is asked is a row of its own, behind the turns before it in plain words; (3) the
default shares are read off the names of its published data (`toolbench_tflan_60p_r10r5u7`, `agent_instruct_react`), the ShareGPT
mixture is whatever file is given.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memgen.environments.base import Example, Message
from memgen.environments.trajectories import Trajectories
from memgen.environments.worlds.thought_action import parse_action
from memgen.seeds import seed_of

SKILLS = {
    "reasoning": "In plain words: what do you think?",
    "retrieval": "In plain words: what do you do?",
    "understanding": "With what?",
}
"""Skills of a turn in their order, and what asks for each."""
MISSING = "Use the tool {tool}: {argument}"
REFUSAL = "I have no tool {tool} here, so I cannot use it."

_TAGS = re.compile(
    r"(?:<think>(?P<thought>.*?)</think>)?\s*<(?P<tool>\w+)>(?P<argument>.*?)</(?P=tool)>\s*", re.DOTALL
)
_THOUGHT = re.compile(
    r"[\s*_`#>]*thought[\s*_`]*:(.*?)(?=^[\s*_`#>]*action[\s*_`]*:|\baction[*_`]*\s?:|\Z)", re.I | re.S | re.M
)
_INPUT = re.compile(r"^[\s*_`#>]*action[ _]input[\s*_`]*:(.*)", re.IGNORECASE | re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class FlanSettings:
    """How much of each kind is kept: shares of what the trajectories give."""

    format: float = 1.0
    """Trajectories as they were, in the form that the environment reads."""
    reasoning: float = 1.0
    """Thoughts."""
    retrieval: float = 0.5
    """Tools and actions."""
    understanding: float = 0.7
    """Arguments."""
    negatives: float = 0.1
    """Turns with a tool that are also asked for where it is not there; and ordinary conversations that are also held in front
    of the tools."""
    seed: int = 0
    """Decides which are kept."""

    def __post_init__(self) -> None:
        for name in ("format", *SKILLS, "negatives"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"the share of {name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class Decomposed:
    """A turn without its form; what it lacks is None.

    Attributes:
        reasoning: the thought.
        retrieval: the tool, or the whole action where it has no argument apart.
        understanding: the tool's argument.
    """

    reasoning: str | None
    retrieval: str
    understanding: str | None


def decompose(turn: str) -> Decomposed | None:
    """The skills in a turn.

    Args:
        turn: `<think>..</think> <tool>..</tool>`, `THOUGHT: .. ACTION: .. [ACTION INPUT: ..]`, or a JSON object with `action`
            (or `name`), and optionally `thought` and `arguments` (or `action_input`).

    Returns:
        None for a turn in plain words.
    """
    if (found := _TAGS.fullmatch(turn.strip())) is not None:
        return _parts(found["thought"], found["tool"], found["argument"])
    if (call := _call(turn)) is not None:
        tool = call.get("action", call.get("name"))
        argument = call.get("arguments", call.get("action_input"))
        if isinstance(argument, Mapping):
            argument = "\n".join(f"{key}: {_text(value)}" for key, value in argument.items())
        return _parts(_text(call.get("thought")), _text(tool), _text(argument))
    given = _INPUT.search(turn)
    action = parse_action(turn if given is None else turn[: given.start()])
    thought = _THOUGHT.match(turn)
    return _parts(None if thought is None else thought[1], action, None if given is None else given[1])


def _call(turn: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(turn)
    except ValueError:
        return None
    return found if isinstance(found, Mapping) else None


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parts(thought: str | None, tool: str | None, argument: str | None) -> Decomposed | None:
    texts = [None if text is None or not text.strip() else text.strip() for text in (thought, tool, argument)]
    return None if texts[1] is None else Decomposed(texts[0], texts[1], texts[2])


def rewrite(
    recorded: Trajectories, settings: FlanSettings, general: Trajectories | None = None
) -> list[dict[str, Any]]:
    """The training data, as lines of a file that `data.trajectories` reads; each says its `skill`.

    Args:
        recorded: collected trajectories.
        settings: how much of each kind is kept.
        general: ordinary conversations, in the same form: all of them are mixed in.

    Raises:
        ValueError: if nothing is kept.
    """
    examples = recorded.examples("train")
    ordinary = [] if general is None else list(general.examples("train"))
    kinds: dict[str, list[dict[str, Any]]] = {name: [] for name in ("format", *SKILLS, "negatives")}
    for example in examples:
        prompt = len(recorded.messages(example))
        kinds["format"].append(_line(example, "format", recorded.conversation(example), prompt))
        for skill, messages in _asked(recorded, example):
            kinds[skill].append(_line(example, skill, messages, len(messages) - 1))
        kinds["negatives"] += _missing(recorded, example)
    kinds["negatives"] += _unneeded(recorded, examples, ordinary)
    lines = [line for name, found in kinds.items() for line in _kept(name, found, settings)]
    lines += [_line(e, "general", e.meta["messages"], e.meta["prompt"]) for e in ordinary]
    if not lines:
        raise ValueError(f"nothing of {recorded.path} is kept; raise a share")
    return lines


def _asked(recorded: Trajectories, example: Example) -> Iterator[tuple[str, list[Message]]]:
    """Each skill of each turn: the conversation up to it in plain words, and it as the last message."""
    prompt = recorded.messages(example)
    context = list(prompt)
    for message in recorded.conversation(example)[len(prompt) :]:
        parts = decompose(message["content"]) if message["role"] == "assistant" else None
        if parts is None:
            context.append(message)
            continue
        for skill, question in SKILLS.items():
            answer = getattr(parts, skill)
            if answer is not None:
                context = [*_asking(context, question), {"role": "assistant", "content": answer}]
                yield skill, context


def _asking(context: list[Message], question: str) -> list[Message]:
    """The conversation with a question behind the last observation, or in a message of its own."""
    if not context or context[-1]["role"] != "user":
        return [*context, {"role": "user", "content": question}]
    return [*context[:-1], {"role": "user", "content": f"{context[-1]['content']}\n\n{question}"}]


def _missing(recorded: Trajectories, example: Example) -> Iterator[dict[str, Any]]:
    """The tools of a trajectory, asked for where there are none."""
    for message in recorded.conversation(example)[len(recorded.messages(example)) :]:
        parts = decompose(message["content"]) if message["role"] == "assistant" else None
        if parts is not None and parts.understanding is not None:
            asked = MISSING.format(tool=parts.retrieval, argument=parts.understanding)
            refused = REFUSAL.format(tool=parts.retrieval)
            messages: list[Message] = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": refused},
            ]
            yield _line(example, "negatives", messages, 1)


def _unneeded(
    recorded: Trajectories, tools: Sequence[Example], ordinary: Sequence[Example]
) -> Iterator[dict[str, Any]]:
    """Ordinary conversations in front of the tools that a trajectory's system message offers."""
    offers = [m for example in tools for m in recorded.messages(example)[:1] if m["role"] == "system"]
    free = [example for example in ordinary if example.meta["messages"][0]["role"] != "system"]
    for place, example in enumerate(free if offers else []):
        messages = [offers[place % len(offers)], *example.meta["messages"]]
        yield _line(example, "negatives", messages, 1 + example.meta["prompt"])


def _line(example: Example, skill: str, messages: Sequence[Message], prompt: int) -> dict[str, Any]:
    """A line of the file; what the assistant says behind the prompt is learnt."""
    marked = [
        {**message, "agent": True} if place >= prompt and message["role"] == "assistant" else dict(message)
        for place, message in enumerate(messages)
    ]
    kept = {
        "id": example.meta["item"],
        **{key: example.meta[key] for key in ("environment", "sample", "reward")},
    }
    return {**kept, "skill": skill, "messages": marked}


def _kept(name: str, lines: Sequence[dict[str, Any]], settings: FlanSettings) -> list[dict[str, Any]]:
    """A kind's share of its lines, in their order."""
    count = round(getattr(settings, name) * len(lines))
    chosen = random.Random(seed_of("agent-flan", settings.seed, name)).sample(range(len(lines)), count)
    return [lines[place] for place in sorted(chosen)]
