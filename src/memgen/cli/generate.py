"""`memgen generate`: streams an answer and marks where latents were inserted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memgen.cli.errors import UsageError
from memgen.cli.output import keep_model_loading_quiet

if TYPE_CHECKING:
    from memgen.api.agent import Agent, Answer, Insertion, Question
    from memgen.environments.base import Message

EXTERNAL = ("retrieval", "bank")
"""Options that stand for settings of what the weaver reads besides the stream."""


def main(argv: Sequence[str]) -> int:
    """Answers one prompt, each line of standard input, or a person at a terminal.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if the prompt is missing, or options contradict each other.
        ValueError: if the checkpoint does not fit, or the prompt is empty, too long or has unknown words.
    """
    options = _parser().parse_args(argv)
    earlier = _earlier(options)
    told = options.prompt is not None or bool(options.messages)
    interactive = options.interactive or (not told and not options.raw and sys.stdin.isatty())
    questions: list[Question] = []
    if not interactive:
        questions = _questions(options, earlier)

    from memgen.api.agent import Agent
    from memgen.training.threads import choose_threads

    keep_model_loading_quiet()
    agent = Agent.from_pretrained(
        options.checkpoint,
        device=options.device,
        chat_template=options.chat_template,
        template_arguments=options.template_arguments,
        **{name: getattr(options, name) for name in EXTERNAL if hasattr(options, name)},
    )
    choose_threads(agent.model)
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    if interactive:
        from memgen.cli.conversation import converse

        converse(agent, earlier, options.prompt, settings, options.mark)
        return 0
    for question in questions:
        report_byte_tokens(agent, question if isinstance(question, str) else _text(question))
        print_answer(agent.stream(question, raw=options.raw, **settings), options.mark)
    return 0


def unescaped(line: str) -> str:
    r"""A prompt as it was typed: `\\n` is a line break."""
    return line.replace("\\n", "\n")


def report_byte_tokens(agent: Agent, text: str) -> None:
    """Says which characters of a prompt the tokenizer knows as bytes alone. Unknown words are an error (`memgen.chat`)."""
    from memgen.chat import byte_tokens

    parts = byte_tokens(agent.tokenizer, text)
    if parts:
        named = ", ".join(repr(c) for c in list(dict.fromkeys(parts))[:5])
        count = len(agent.tokenizer(text, add_special_tokens=False)["input_ids"])
        print(
            f"[{len(parts)} of {count} tokens of this text are bytes of characters that the "
            f"tokenizer does not know: {named}; the reasoner may not understand them]",
            file=sys.stderr,
        )


def print_answer(
    pieces: Generator[str | Insertion, None, Answer], mark: str, stopped: Callable[[], bool] = lambda: False
) -> str:
    """Prints an answer while it is written, and below it what it took (standard error).

    Args:
        pieces: those of `Agent.stream`.
        mark: written where latents were inserted.
        stopped: asked after every piece; True ends the answer.

    Returns:
        The text that was written.
    """
    text, took = "", "interrupted"
    while not stopped():
        try:
            piece = next(pieces)
        except StopIteration as end:
            took = _took(end.value)
            break
        text += piece if isinstance(piece, str) else ""
        print(piece if isinstance(piece, str) else mark, end="", flush=True)
    pieces.close()
    print(flush=True)
    print(f"[{took}]", file=sys.stderr)
    return text


def _took(answer: Answer) -> str:
    ending = "" if answer.finished else f"; truncated at --max-new-tokens {len(answer.tokens)}"
    return (
        f"{len(answer.tokens)} tokens, {len(answer.insertions)} insertions, {answer.work.reasoner:.0f} reasoner and "
        f"{answer.work.weaver:.0f} weaver positions{ending}"
    )


def _earlier(options: argparse.Namespace) -> list[Message]:
    """The messages before the prompt.

    Raises:
        UsageError: if they cannot be read, or contradict other options.
    """
    for name in ("system", "messages", "interactive"):
        if options.raw and getattr(options, name):
            raise UsageError(
                f"--raw takes the prompt as it is, without messages; leave out --raw or --{name}"
            )
    if options.interactive and options.messages == "-":
        raise UsageError("--interactive reads standard input, so --messages must be a file")
    messages: list[Message] = []
    if options.messages:
        try:
            text = sys.stdin.read() if options.messages == "-" else Path(options.messages).read_text("utf-8")
            messages = json.loads(text)
        except (OSError, ValueError) as error:
            raise UsageError(f"--messages {options.messages} cannot be read: {error}") from error
        if not isinstance(messages, list) or not messages:
            raise UsageError(
                f"--messages {options.messages} must hold a JSON list such as "
                '[{"role": "user", "content": "What does a fig cost?"}]'
            )
    if options.system is None:
        return messages
    if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
        raise UsageError(f"--system and a system message in {options.messages}: give one of them")
    return [{"role": "system", "content": unescaped(options.system)}, *messages]


def _questions(options: argparse.Namespace, earlier: list[Message]) -> list[Question]:
    """What is answered: the prompt, the messages as they are, or each line of standard input.

    Raises:
        UsageError: if there is nothing.
    """
    if options.prompt is None and options.messages:
        return [earlier]
    prompts = [options.prompt] if options.prompt is not None else [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise UsageError("there is no prompt: give --prompt TEXT, or one prompt per line on standard input")
    texts = [unescaped(prompt) for prompt in prompts]
    if not earlier:
        return [*texts]
    return [[*earlier, {"role": "user", "content": text}] for text in texts]


def _text(messages: Sequence[Message]) -> str:
    """All that messages say; what is no message is left to the agent to refuse."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    return "\n".join(content for content in contents if isinstance(content, str))


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _mapping_or_null(text: str) -> dict[str, Any] | None:
    return None if text.strip() == "null" else _mapping(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen generate", description="Answer a prompt and mark where latents were inserted."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a checkpoint's folder (memgen.json) or a run's, models:/NAME/VERSION of MLflow, or hf://ORG/NAME of the hub",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the prompt; \\n is a line break. Default: lines of stdin, or a conversation if that is a terminal",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system prompt, before everything else")
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help='earlier messages, before the prompt if there is one: a JSON list of {"role": ..., "content": ...}; -: stdin',
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="a conversation: Ctrl-C ends an answer, an empty line the conversation, Ctrl-D the session",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="limit of the answer (256)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1: off)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (0)")
    parser.add_argument(
        "--mark", default="⟦memory⟧", metavar="TEXT", help="written where latents were inserted"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is text as it is, without chat template; control tokens that it spells count",
    )
    parser.add_argument(
        "--chat-template",
        choices=["checkpoint", "tokenizer", "chatml"],
        default="checkpoint",
        help="the checkpoint's own (default), the tokenizer's, or ChatML",
    )
    parser.add_argument(
        "--template-arguments",
        type=_mapping,
        metavar="JSON",
        help="values for the chat template, such as '{\"enable_thinking\": false}' (default: the checkpoint's)",
    )
    parser.add_argument(
        "--retrieval",
        type=_mapping_or_null,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help='passages that the weaver reads, such as \'{"memory": "trajectories.sqlite"}\'; null: none (default: as in the '
        "checkpoint)",
    )
    parser.add_argument(
        "--bank",
        type=_mapping_or_null,
        default=argparse.SUPPRESS,
        metavar="JSON",
        help='the latent bank that the weaver reads, such as \'{"path": "bank.sqlite", "write": false}\'; null: none '
        "(default: as in the checkpoint)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    return parser
