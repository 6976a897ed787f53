"""Separates a command's own options from the configuration files and overrides of all Trainer commands."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def take_options(
    argv: Sequence[str], valued: Collection[str], flags: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Splits a command line in two, each in its order.

    Args:
        argv: the arguments after the command.
        valued: options that take a value, as they are typed (`--out`).
        flags: options that take none.

    Returns:
        The command's own options with their values, and everything else.
    """
    own: list[str] = []
    rest: list[str] = []
    remaining = list(argv)
    while remaining:
        token = remaining.pop(0)
        name, equals, _ = token.partition("=")
        if name in flags:
            own.append(token)
        elif name in valued:
            own.append(token)
            # A missing value is reported by the command's parser.
            if not equals and remaining and not remaining[0].startswith("--"):
                own.append(remaining.pop(0))
        else:
            rest.append(token)
            # The value of another option may look like one of ours.
            if token.startswith("--") and not equals and remaining and not remaining[0].startswith("--"):
                rest.append(remaining.pop(0))
    return own, rest
