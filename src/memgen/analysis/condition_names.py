"""The conditions of an ablation by name. Imports nothing heavy, so that `memgen ablate --help` is instant."""

from __future__ import annotations

from typing import Literal, get_args

COT_TEXT = "Let's think step by step."
"""Kojima et al. 2022, arXiv 2205.11916. The paper has "a think step by step style instruction" and does not give it."""
Kind = Literal[
    "vanilla", "never", "always", "prompt_only", "delimiters", "random", "trained", "entropy", "pause", "swapped", "bon",
    "cot",
]  # fmt: skip
VALUED: dict[str, str] = {"random": "P", "entropy": "T", "bon": "N"}
"""Kinds that take a value, and what it is called."""
OPTIONAL: dict[str, str] = {"pause": "DIR"}
"""Kinds that may take one."""
NAMES = tuple(
    f"{kind}:{VALUED[kind]}" if kind in VALUED else f"{kind}[:{OPTIONAL[kind]}]" if kind in OPTIONAL else kind
    for kind in get_args(Kind)
)
"""Every condition, as it is written."""
DEFAULT = ("vanilla", "never", "always", "prompt_only", "delimiters", "random:0.5", "swapped")
"""Conditions that every checkpoint can be played under; `trained` is added where it holds a trained trigger."""
