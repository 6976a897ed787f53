"""The command `memgen`. Imports nothing but the standard library until a command is chosen, so that help is instant."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import memgen
from memgen.cli.errors import UsageError, file_system_error, nearest, refuses_input
from memgen.cli.output import VERBOSE, escape_what_cannot_be_shown, outlive_readers
from memgen.running.interrupt import LISTENER

VERBOSE_OPTION = "--verbose"
"""Of every command."""
INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as a shell reports it."""


@dataclass(frozen=True)
class Command:
    """A command and its module.

    Attributes:
        summary: one line for the help.
        module: has `main(argv) -> int`; imported when the command runs.
        trainer: True if the command is a method of the Trainer; its name then begins argv.
    """

    summary: str
    module: str
    trainer: bool = False


COMMANDS = {
    "fit": Command("train a stage", "memgen.cli.run", trainer=True),
    "validate": Command("score on the validation split", "memgen.cli.run", trainer=True),
    "test": Command("score on the test split", "memgen.cli.run", trainer=True),
    "predict": Command("write a prediction for every item", "memgen.cli.run", trainer=True),
    "ablate": Command("what memory is worth, against every control", "memgen.cli.ablate"),
    "analyze": Command("what the latent memory is and does", "memgen.cli.analyze"),
    "oracle": Command("what a trigger can gain", "memgen.cli.oracle"),
    "continual": Command(
        "learn tasks one after another, and see what is left of each", "memgen.cli.continual"
    ),
    "study": Command("memories beside each other, and what each costs", "memgen.cli.study"),
    "collect": Command("turn the agent's own experience into training data", "memgen.cli.collect"),
    "agent-flan": Command("rewrite collected trajectories as Agent-FLAN does", "memgen.cli.agent_flan"),
    "compare": Command("compare two tests item by item", "memgen.cli.compare"),
    "bank": Command("look into a latent bank, or prune it", "memgen.cli.bank"),
    "generate": Command("answer a prompt and mark where memory was woven in", "memgen.cli.generate"),
    "serve": Command("answer over HTTP as an OpenAI-compatible server", "memgen.cli.serve"),
    "convert": Command("import or export a checkpoint of the released code", "memgen.cli.convert"),
    "bench": Command("what memory costs, against plain work", "memgen.cli.bench"),
    "demo": Command("the whole pipeline on the embedded default", "memgen.cli.demo"),
    "init": Command("copy the configuration files, to change them", "memgen.cli.init"),
    "submit": Command("train on a SLURM cluster", "memgen.cli.submit"),
    "status": Command("how submitted runs are doing", "memgen.cli.status"),
    "deliver": Command("send what a run could not deliver to MLflow", "memgen.cli.deliver"),
    "ui": Command("open the record of runs in MLflow", "memgen.cli.ui"),
    "serve-search": Command("offer a passage file to agents as a search server", "memgen.cli.serve_search"),
}

HELP = """\
usage: memgen <command> [options]

Generative latent memory for language models.

commands:
{commands}

The first four take configuration files, merged in their order, and values that override them:

  memgen fit --config conf/weaver_sft.yaml [--config overlay.yaml ...] [--trainer.max_steps 100 ...]
  memgen test --config conf/weaver_sft.yaml --checkpoint DIR

  --print_config   print the complete resolved configuration and stop
  --checkpoint DIR start from what was trained before
  --records DIR    keep the records of the items in this folder (test)
  --gold           score the data's reference answers, without a model (test)
  --run DIR        keep the run in this folder, and go on from its last checkpoint if it has one (fit)

`memgen <command> --help` lists a command's options; --verbose shows what libraries report. MEMGEN_TRACEBACK=1 shows a traceback with every error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after `memgen`; default: those of the process.

    Returns:
        The exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C, or what the command returns.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    escape_what_cannot_be_shown()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  {name:<14}{command.summary}" for name, command in COMMANDS.items())
        print(HELP.format(commands=listing), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"memgen {memgen.__version__}")
        return 0
    if name not in COMMANDS:
        guess = nearest(name, COMMANDS)
        hint = f"did you mean '{guess}'?" if guess else f"choose one of: {', '.join(COMMANDS)}"
        print(f"memgen: unknown command '{name}'; {hint}", file=sys.stderr)
        return 2
    return _guarded(name, rest)


def _guarded(name: str, rest: list[str]) -> int:
    """Runs a command; refused input becomes a message and an exit status."""
    command = COMMANDS[name]
    if VERBOSE_OPTION in rest:
        rest = [argument for argument in rest if argument != VERBOSE_OPTION]
        os.environ[VERBOSE] = "1"
    if not os.environ.get(VERBOSE):
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if command.trainer:
        outlive_readers()
    if name == "fit":
        # Before slow imports: a signal during them would end the process.
        LISTENER.listen()
    try:
        if command.trainer:
            importlib.import_module("memgen.cli.config").require_files(rest)
        run = cast("Callable[[list[str]], int]", importlib.import_module(command.module).main)
        return run([name, *rest] if command.trainer else rest)
    except KeyboardInterrupt:
        print(f"memgen {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has exited. Redirect stdout so that the interpreter's last flush cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, ValueError, OSError, RuntimeError) as error:
        wanted = os.environ.get("MEMGEN_TRACEBACK", "0") not in ("", "0")
        ours = isinstance(error, UsageError) or refuses_input(error)
        message = str(error) if ours else file_system_error(error)
        if wanted or message is None:
            raise
        print(f"memgen {name}: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
