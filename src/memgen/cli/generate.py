"""`memgen generate`: streams an answer and marks where latents were inserted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from memgen.cli.errors import UsageError

EXTERNAL = ("retrieval", "bank")
"""Options that stand for settings of what the weaver reads besides the stream."""


def main(argv: Sequence[str]) -> int:
    """Answers one prompt, or each line of standard input.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        UsageError: if the prompt is missing.
        ValueError: if the checkpoint does not fit, or the prompt is empty or too long.
    """
    options = _parser().parse_args(argv)
    prompts = [options.prompt] if options.prompt is not None else [line.rstrip("\n") for line in sys.stdin]
    if not prompts:
        raise UsageError("there is no prompt: give --prompt TEXT, or one prompt per line on standard input")

    from memgen.api.agent import Agent, Insertion

    agent = Agent.from_pretrained(
        options.checkpoint,
        device=options.device,
        chat_template=options.chat_template,
        template_arguments=options.template_arguments,
        **{name: getattr(options, name) for name in EXTERNAL if hasattr(options, name)},
    )
    for line in prompts:
        pieces = agent.stream(
            line.replace("\\n", "\n"),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            raw=options.raw,
        )
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                answer = end.value
                break
            print(options.mark if isinstance(piece, Insertion) else piece, end="", flush=True)
        print(flush=True)
        ending = "" if answer.finished else f"; truncated at --max-new-tokens {options.max_new_tokens}"
        print(
            f"[{len(answer.tokens)} tokens, {len(answer.insertions)} insertions, {answer.work.reasoner:.0f} reasoner and "
            f"{answer.work.weaver:.0f} weaver positions{ending}]",
            file=sys.stderr,
        )
    return 0


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
        "--prompt", metavar="TEXT", help="the prompt; \\n is a line break. Default: lines of stdin"
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
