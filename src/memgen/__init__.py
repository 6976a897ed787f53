"""MemGen: generative latent memory for language models (arXiv:2509.24704). Start reading in `memgen.types`.

`memgen.load`, `memgen.Agent` and `memgen.Answer` are the Python API (docs/python_api.md). Importing this package imports nothing
else; torch and transformers come with the first agent, Lightning, MLflow and DeepSpeed not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from memgen.api.agent import Agent, Answer

__all__ = ["Agent", "Answer", "load"]
__version__ = "0.1.0"


def load(name: str | Path, **options: Any) -> Agent:
    """The agent of a checkpoint; short for `Agent.from_pretrained`.

    Args:
        name: a checkpoint's folder or a run's, `hf://ORG/NAME`, `models:/NAME/VERSION` of MLflow, or an asset such as
            `lab:weaver_sft`.
        options: those of `Agent.from_pretrained`.
    """
    from memgen.api.agent import Agent

    return Agent.from_pretrained(name, **options)


def __getattr__(name: str) -> Any:
    if name in ("Agent", "Answer"):
        from memgen.api import agent

        return getattr(agent, name)
    raise AttributeError(f"module 'memgen' has no attribute {name!r}")
