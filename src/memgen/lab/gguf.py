"""GGUF files as language models: each is converted once into a folder that `from_pretrained` reads.

transformers reads the weights (quantised ones are dequantised) and the vocabulary. Differs from its reader: the
normalizer and pre-tokenizer are set by the file's `tokenizer.ggml.pre`, because transformers leaves out some (smollm's digits, for
instance) without a word, and then the same text has other token ids; a kind that is not known here is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging as transformers_logging

from memgen.lab.cache import build_once, memgen_home
from memgen.lab.saving import save_backbone
from memgen.model.backbone import first_line, require_all_tensors

logger = logging.getLogger(__name__)

GGUF_VERSION = 1
"""Raised whenever code changes what a file is converted to."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What is taken as the tokenizer if the first of them lies beside a GGUF file."""

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Splitting:
    """What a byte-level tokenizer does with a text before its merges."""

    pre_tokenizer: PreTokenizer
    normalizer: Normalizer | None = None


def _byte_level(use_regex: bool) -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


SPLITTINGS = {
    "gpt-2": Splitting(_byte_level(use_regex=True)),
    "smollm": Splitting(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)])
    ),
    "qwen2": Splitting(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
                _byte_level(use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
}
"""By `tokenizer.ggml.pre`, as the models' own tokenizer.json have it."""


def build_from_gguf(source: Path) -> Path:
    """The directory of a GGUF file's model and tokenizer, converted first if it is not cached.

    A `tokenizer.json` in the file's folder (with `tokenizer_config.json` and `chat_template.jinja`, if they are there) is
    taken as the tokenizer; else it is made from the file.

    Args:
        source: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no GGUF file, or has something that would be lost.
        RuntimeError: if the package gguf is missing.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; name a GGUF file on this machine, or a folder")
    beside = [path for name in TOKENIZER_FILES if (path := source.absolute().parent / name).is_file()]
    if not beside or beside[0].name != TOKENIZER_FILES[0]:
        beside = []
    settings = {
        "version": GGUF_VERSION,
        "sha256": sha256_of(source),
        "tokenizer": {path.name: sha256_of(path) for path in beside},
    }

    def build(directory: Path) -> None:
        logger.warning("Converting %s, once.", source)
        convert_gguf(source, directory, beside)

    path = build_once(memgen_home(), "gguf", settings, build)
    logger.info("%s is %s", source, path)
    return path


def convert_gguf(source: Path, directory: Path, tokenizer_files: list[Path] | None = None) -> None:
    """Writes a GGUF file's model and tokenizer into an existing directory.

    Weights keep their type if the file has floating-point ones; quantised ones become bfloat16.

    Args:
        source: the file.
        directory: an existing, empty directory.
        tokenizer_files: taken as the tokenizer in place of the file's own.

    Raises:
        ValueError: if it is no GGUF file, or has something that would be lost.
        RuntimeError: if the package gguf is missing.
        OSError: if the disk is full or not writable.
    """
    require_gguf(source.name)
    fields, dtype = _header(source)
    splitting = None if tokenizer_files else _splitting(fields, source)
    try:
        with _quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=dtype, output_loading_info=True
            )
    except (KeyError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{source.name} cannot be converted: {first_line(error)}; name the model's own folder or hub name instead"
        ) from error
    require_all_tensors(source.name, found)
    # It is no quantised model any more.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = None if splitting is None else _tokenizer(source, splitting)
    if tokenizer is not None:
        tokenizer.model_max_length = int(model.config.max_position_embeddings)
    for path in tokenizer_files or []:
        shutil.copyfile(path, directory / path.name)
    save_backbone(model, tokenizer, directory)


def require_gguf(name: str) -> None:
    """Refuses to go on without the package that reads GGUF files.

    Args:
        name: what needs it.

    Raises:
        RuntimeError: with the command that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(
            f"{name} needs the package gguf to be read; install it by: pip install 'memgen[gguf]'"
        )


def _tokenizer(source: Path, splitting: Splitting) -> PreTrainedTokenizerBase:
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    core = tokenizer.backend_tokenizer
    core.normalizer, core.pre_tokenizer = splitting.normalizer, splitting.pre_tokenizer
    return tokenizer


def _header(source: Path) -> tuple[dict[str, Any], torch.dtype]:
    """The short values of a GGUF file, and the type of most of its weights.

    Raises:
        ValueError: if it is no GGUF file, or scales its rotary positions, which transformers' reader leaves out.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{source} is no GGUF file, or not a whole one: {error}") from error
    fields = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    architecture = fields.get("general.architecture")
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ValueError(
            f"{source.name} scales its rotary positions, which would be lost; name the model's own folder or hub name instead"
        )
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return fields, _FLOATS.get(max(sizes, key=sizes.__getitem__, default=""), torch.bfloat16)


def _splitting(fields: dict[str, Any], source: Path) -> Splitting:
    kind, model = fields.get("tokenizer.ggml.pre"), fields.get("tokenizer.ggml.model")
    if model != "gpt2" or kind not in SPLITTINGS:
        raise ValueError(
            f"{source.name} has a tokenizer of kind {model}/{kind}; a GGUF file does not say how such a one splits a text, and "
            f"memgen knows it of {', '.join(f'gpt2/{known}' for known in SPLITTINGS)} only: put the model's own tokenizer.json "
            f"and tokenizer_config.json into {source.absolute().parent}"
        )
    return SPLITTINGS[kind]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' advice (how to keep weights quantised, for instance) and its bars, but for that of converting."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    stat = path.stat()
    return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    # A model is named by several parts of a run; size and time of change tell whether the file is still the same.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
