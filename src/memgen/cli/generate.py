"""`memgen generate`: streams an answer and marks where latents were inserted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memgen.cli.errors import UsageError


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

    from memgen.chat import CHATML, ChatTemplate, end_of_turn_id, load_tokenizer, prompt_ids, text_ids
    from memgen.cli.names import resolve_name
    from memgen.generation.decode import generate
    from memgen.generation.sampling import GenerationSettings
    from memgen.lab.assets import resolve_asset
    from memgen.training.checkpoint import open_checkpoint, read_text_settings
    from memgen.types import WorkCount

    settings = GenerationSettings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    directory = Path(resolve_name(options.checkpoint))
    model, config = open_checkpoint(directory, load_tokenizer, resolve_asset)
    tokenizer = load_tokenizer(resolve_asset(config.backbone.name), config.backbone.revision)
    if options.device is not None:
        model.to(options.device)
    text = read_text_settings(directory)
    arguments = options.template_arguments
    if arguments is None:
        arguments = {} if text is None else text.template_arguments
    # A checkpoint that does not say: the tokenizer's own.
    template = ChatTemplate(CHATML if options.chat_template == "chatml" else None, arguments)
    if options.chat_template == "checkpoint" and text is not None:
        template = ChatTemplate(text.chat_template, arguments)
    elif not options.raw:
        model.reasoner.end_at(end_of_turn_id(tokenizer, template))
    for line in prompts:
        prompt = line.replace("\\n", "\n")
        if options.raw:
            ids = text_ids(tokenizer, prompt, controls=True)
        else:
            ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}], template)
        printer = _Printer(tokenizer, options.mark)
        generation = generate(model, [ids], settings, observe=printer)
        printer.close()
        work: WorkCount = generation.work
        insertions = generation.plan.counts[0]
        finished = generation.turns[0].finished
        ending = "" if finished else f"; truncated at --max-new-tokens {options.max_new_tokens}"
        print(
            f"[{generation.lengths[0]} tokens, {insertions} insertions, "
            f"{work.reasoner_positions} reasoner and {work.weaver_positions} weaver positions{ending}]",
            file=sys.stderr,
        )
    return 0


class _Printer:
    """Writes text as soon as its characters are complete: a token may hold half a character."""

    def __init__(self, tokenizer: object, mark: str) -> None:
        self._decode = tokenizer.decode  # type: ignore[attr-defined]
        self._mark = mark
        self._ids: list[int] = []
        self._written = ""

    def __call__(self, row: int, token: int | None) -> None:
        if token is None:
            self._flush(final=True)
            self._write(self._mark)
            return
        self._ids.append(token)
        self._flush(final=False)

    def close(self) -> None:
        """Ends the line."""
        self._flush(final=True)
        self._write("\n")

    def _flush(self, *, final: bool) -> None:
        text = self._decode(self._ids, skip_special_tokens=True)
        if text.endswith("�") and not final:
            return
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen generate", description="Answer a prompt and mark where latents were inserted."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="checkpoint directory (memgen.json), or models:/NAME/VERSION of MLflow",
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
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    return parser
