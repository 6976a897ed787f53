"""A small random Qwen2 and a byte-level tokenizer made from a data set's own text.

For trying a configuration on real data in seconds: shapes, special tokens and chat template are those of a real model,
the weights are random.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from memgen.chat import CHATML
from memgen.lab.saving import save_backbone

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

SUFFIXES = (".jsonl", ".json", ".txt")
MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class TinyRecipe:
    """Settings that decide the model and its tokenizer."""

    text_sha256: str
    """Checksum of the text that the tokenizer is made from."""
    vocab_size: int = 2048
    """At most so many tokens, special ones included; a short text has fewer."""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 192
    init_std: float = 0.1
    """Wide enough that logits, and with them a loss on a frozen random model, can move."""
    max_position_embeddings: int = 4096
    seed: int = 0

    @classmethod
    def for_text(cls, text: str) -> TinyRecipe:
        """The recipe whose tokenizer is made from this text."""
        return cls(text_sha256=hashlib.sha256(text.encode()).hexdigest())


def read_text(source: Path) -> str:
    """The text of a data file or directory, truncated at one million characters.

    Args:
        source: a `.txt` file, a `.jsonl` or `.json` file (every string value in it), or a directory with such files, of
            which `train.jsonl` is read first and the others in alphabetical order.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if a file is broken (its line is named) or there is no text.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"tiny:{source}: there is no such file or directory; give a .jsonl, .json or .txt file"
        )
    files = [source]
    if source.is_dir():
        files = sorted(
            path for path in source.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")
        )
        files.sort(key=lambda path: path.name != "train.jsonl")
    pieces: list[str] = []
    room = MAX_CHARACTERS
    for piece in (piece for path in files for piece in _strings(path)):
        pieces.append(piece[:room])
        room -= len(pieces[-1])
        if room <= 0:
            break
    text = "\n".join(pieces)
    if not text.strip():
        raise ValueError(f"tiny:{source} has no text; give a directory or file with {', '.join(SUFFIXES)}")
    return text


def _strings(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8-sig")
    elif path.suffix == ".json":
        yield from _string_values(_parse(path.read_text(encoding="utf-8-sig"), f"{path}"))
    else:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield from _string_values(_parse(line, f"{path}, line {number}"))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _string_values(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        # Half a surrogate pair, which JSON can hold, is no character.
        yield value.encode("utf-8", "replace").decode("utf-8")
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _string_values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _string_values(inner)


def tiny_tokenizer(text: str, vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Qwen2's byte-level BPE tokenizer (digits apart) with merges learnt from the text, and ChatML's tokens and template.

    It has to be Qwen2's own: for a Qwen2 model `AutoTokenizer` takes that class whatever the tokenizer was saved as, and
    with it Qwen2's way of splitting a text.
    """
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        text.splitlines(keepends=True),
        vocab_size=vocab_size,
        new_special_tokens=[TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.eos_token = TURN_END
    tokenizer.pad_token = PAD
    tokenizer.chat_template = CHATML
    tokenizer.model_max_length = max_length
    return tokenizer


def save_tiny(recipe: TinyRecipe, text: str, directory: Path) -> None:
    """Makes the tokenizer and the random model and saves both. The caller's random state is left as it was."""
    tokenizer = tiny_tokenizer(text, recipe.vocab_size, recipe.max_position_embeddings)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        intermediate_size=recipe.intermediate_size,
        initializer_range=recipe.init_std,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen2ForCausalLM(config).to(torch.float32)
    save_backbone(model, tokenizer, directory)
