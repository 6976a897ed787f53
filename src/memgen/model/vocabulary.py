"""Tokenizers as far as a model depends on them: which text each token id stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = (
    "Tom has 3.14 apples, and 1,000 nuts.\n\n  How many (in all)? It's 1003!",
    "def f(x):\n\treturn x ** 2  # naïve\n",
    "ÉTÉ 東京 \N{GREEK SMALL LETTER PI}≈3 🙂\r\n",
)
"""Texts whose token ids tell tokenizers with one vocabulary and other rules apart."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies what the token ids of a tokenizer mean (SHA-256, hex).

    Its vocabulary, and the ids of a few texts, which depend on its rules. Added tokens and the chat template are not in it:
    adding one changes the meaning of no other id.
    """
    added = tokenizer.get_added_vocab()
    vocabulary = sorted(item for item in tokenizer.get_vocab().items() if item[0] not in added)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in _SAMPLE]
    return hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()


def translation(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, reader: str = "trigger"
) -> Callable[[Sequence[int]], list[int]] | None:
    """Turns one tokenizer's token ids into another's, by way of their text; None if the two are the same.

    Special tokens go by their text as well: where the target does not know one, it reads the characters.

    Args:
        source: whose token ids are given.
        target: whose token ids are wanted.
        reader: which component has the target (`model.memgen.trigger` or `.weaver`), for messages.
    """
    if tokenizer_fingerprint(source) == tokenizer_fingerprint(target) and (
        source.get_added_vocab() == target.get_added_vocab()
    ):
        return None

    def translate(ids: Sequence[int]) -> list[int]:
        text = source.decode(list(ids), clean_up_tokenization_spaces=False)
        found: list[int] = target.encode(text, add_special_tokens=False)
        if not found:
            raise ValueError(
                f"the {reader}'s tokenizer has no token for {text!r}; share the reasoner's base "
                f"(model.memgen.{reader}.backbone: null)"
            )
        return found

    return translate
